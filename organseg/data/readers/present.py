"""Which organs each label map shows, for data sets in which a case annotates some of them and nobody says which."""

from dataclasses import replace
from functools import partial

import numpy as np

from organseg.data.cache import value_counts
from organseg.data.manifest import CaseEntry, Manifest
from organseg.errors import Fault, InputError
from organseg.processes import in_processes
from organseg.volumes import read_label


def with_present_organs(manifest: Manifest, processes: int) -> Manifest:
    """Each case annotates the organs that its label map has voxels of.

    Args:
        manifest: Of the data set.
        processes: That read label maps.

    Raises:
        InputError: With the faults of every label map that cannot be read.
    """
    labelled = [case for case in manifest.cases if case.label]
    found = list(in_processes(partial(_present, manifest), labelled, processes))
    faults = [fault for _, some in found for fault in some]
    if faults:
        raise InputError(faults)
    present = {case.id: organs for case, (organs, _) in zip(labelled, found, strict=True)}
    cases = tuple(replace(case, annotated=present.get(case.id, case.annotated)) for case in manifest.cases)
    return replace(manifest, cases=cases)


def _present(manifest: Manifest, case: CaseEntry) -> tuple[frozenset[str], tuple[Fault, ...]]:
    """The organs of a case's label map, or why it cannot be read; where it lies does not matter here."""
    assert case.label is not None
    try:
        # Faults of its place are for `check`.
        volume, _ = read_label(case.label, case=case.id, root=manifest.root, affine_source="sform", assume_affine=True)
    except InputError as error:
        return frozenset(), error.faults
    values = np.flatnonzero(value_counts(volume.array)).tolist()
    return frozenset(manifest.labels.get(value, "") for value in values) & frozenset(manifest.organs), ()
