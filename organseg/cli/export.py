"""`organseg export`: the pseudo-labels of a relabelling round as NIfTI, for a viewer (METHOD.md 1.5).

They lie on the cache's working grid, voxel by voxel what training saw, in the voxel order of the source file and with
the affine of that grid, so that a viewer lays them over the source scan at the right place.
"""

import json
import sys
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from organseg.curriculum.journal import chain, digest_of
from organseg.data.cohort import Cohort, CohortCase, CohortOptions, load_cohort
from organseg.data.pseudo_labels import PSEUDO_LABELS, merge, path_of, read_pseudo_labels
from organseg.data.sealed import verify_sealed
from organseg.errors import IntegrityError, StorageError, UsageError
from organseg.files import publish_text
from organseg.runtime.run_folder import DATA, RunFolder
from organseg.strict_yaml import read_yaml
from organseg.volumes import affine_on, write_image, write_label


@dataclass(frozen=True)
class FinishedRound:
    """A relabelling that the journal names.

    Attributes:
        index: From 1.
        folder: Of its pseudo-labels.
        digests: Case key -> content hash of its file.
    """

    index: int
    folder: Path
    digests: dict[str, str]


def export(arguments: Namespace) -> int:
    """Write one round's pseudo-labels; 4 if some were damaged, the others are done."""
    run, out = Path(arguments.run), Path(arguments.out)
    record = RunFolder(run).record()
    if record is None:
        raise UsageError(f"{run}: no run here; name the folder that `organseg fit` wrote (its --out)")
    chosen = _choose(finished_rounds(run, record["identity"]), arguments.round, run)
    cohort = _cohort(run, record["identity"], arguments.cache)
    cases = [case for case in cohort.train if case.key in chosen.digests]
    parts = ("label", "round", "score", *(("merged",) if arguments.merged else ()))
    if not arguments.overwrite:
        _refuse_existing(out, [case.key for case in cases], parts)
    _make(out)
    publish_text(out / "labels.json", json.dumps({k + 1: organ for k, organ in enumerate(cohort.organs)}, indent=1))
    bad = 0
    for case in cases:
        try:
            _export_case(chosen, case, out, parts)
        except IntegrityError as error:
            print(f"organseg: {error}", file=sys.stderr)
            bad += 1
    print(f"{out}: round {chosen.index}, pseudo-labels of {len(cases) - bad} cases written, {bad} damaged")
    return IntegrityError.exit_code if bad else 0


def finished_rounds(run: Path, identity: dict[str, Any]) -> list[FinishedRound]:
    """The relabellings in the chain of a run's journal, in order.

    Args:
        run: The run folder.
        identity: Of the run; the chain begins with its digest.
    """
    found: list[FinishedRound] = []
    for entry in chain(run / "journal.jsonl", digest_of(identity)):
        if entry.phase.endswith("_relabel"):
            folder = f"pseudo_labels/round_{len(found) + 1}"
            files = entry.outputs.items()
            digests = {name.removeprefix(f"{folder}/").removesuffix(".h5"): digest for name, digest in files}
            found.append(FinishedRound(len(found) + 1, run / folder, digests))
    return found


def _choose(rounds: Sequence[FinishedRound], wanted: int | None, run: Path) -> FinishedRound:
    if not rounds:
        raise UsageError(f"{run}: no relabelling round is finished here; only a run with a `curriculum` has rounds")
    if wanted is not None and not 1 <= wanted <= len(rounds):
        raise UsageError(
            f"--round {wanted}: not finished in {run}; finished: {', '.join(str(r.index) for r in rounds)}"
        )
    return rounds[-1] if wanted is None else rounds[wanted - 1]


def _cohort(run: Path, identity: dict[str, Any], cache: str | None) -> Cohort:
    """The cases that the run saw.

    Raises:
        IntegrityError: If the cache holds other data by now: their grids and annotations would be wrong ones.
    """
    config = read_yaml(run / "config.yaml")
    try:
        given = {**config["data"]["init_args"], "seed": config["seed"]}
        given["cache"] = Path(cache or given["cache"])
        options = CohortOptions(
            **{name: given[name] for name in (f.name for f in fields(CohortOptions)) if name in given}
        )
    except (KeyError, TypeError) as error:
        raise IntegrityError(f"{run / 'config.yaml'}: no config of a run ({error!r}); restore it") from error
    cohort = load_cohort(options)
    if cohort.content_hash != identity.get(DATA):
        raise IntegrityError(
            f"{options.cache}: other cases, annotations or grids than those that {run} was trained on; restore that "
            "cache, or say with --cache where it is now"
        )
    return cohort


def _outputs(out: Path, key: str, parts: Sequence[str]) -> dict[str, Path]:
    return {part: out / f"{key}_{part}.nii.gz" for part in parts}


def _refuse_existing(out: Path, keys: Sequence[str], parts: Sequence[str]) -> None:
    wanted = [out / "labels.json", *(path for key in keys for path in _outputs(out, key, parts).values())]
    existing = [str(path) for path in wanted if path.exists()]
    if existing:
        raise UsageError(
            f"{', '.join(existing[:3])}{' ...' if len(existing) > 3 else ''}: exists; choose another --out, or replace "
            "with --overwrite"
        )


def _make(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StorageError(f"{folder}: cannot be made: {error.strerror}; choose another --out") from error


def _export_case(chosen: FinishedRound, case: CohortCase, out: Path, parts: Sequence[str]) -> None:
    """Write the maps of one case.

    Raises:
        IntegrityError: If its file is missing, damaged, or not the one that the journal names; nothing is written.
    """
    path = path_of(chosen.folder, case.key)
    if verify_sealed(path, PSEUDO_LABELS) != chosen.digests[case.key]:
        raise PSEUDO_LABELS.broken(path, "another content", "that of the run's journal")
    voxels = read_pseudo_labels(chosen.folder, case.key)
    header = case.cached.header
    affine = affine_on(case.cached.shape, header.source_shape, np.asarray(header.affine))
    _make((out / case.key).parent)
    for part, output in _outputs(out, case.key, parts).items():
        if part == "score":
            write_image(output, voxels.score, affine)
        elif part == "merged":
            write_label(output, merge(case.lookup[case.cached.arrays().label], voxels.label), affine)
        else:
            write_label(output, voxels.label if part == "label" else voxels.round, affine)
