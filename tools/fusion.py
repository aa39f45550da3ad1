"""The data sets of the fusion experiment (METHOD.md 1.7), made from one that labels everything, such as BTCV.

`few.yaml` keeps all labels of a few training patients, `pancreas.yaml` only the pancreas of the others, and
`heldout.yaml` has the test patients of fold 0, those on which the other experiments are scored. Usage:

    python tools/fusion.py btcv.yaml --out fusion
    organseg prepare fusion/few.yaml fusion/pancreas.yaml fusion/heldout.yaml --out cache --size 128
"""

import argparse
from dataclasses import replace
from pathlib import Path

import numpy as np

from organseg.data.folds import split
from organseg.data.manifest import CaseEntry, Manifest, load_manifest, write_manifest

KEPT = "pancreas"


def draw(manifest: Manifest, count: int, seed: int) -> dict[str, list[CaseEntry]]:
    """Who is in which data set.

    Args:
        manifest: The data set.
        count: Patients that keep all labels.
        seed: Draws them among the training patients who have all labels.

    Returns:
        Cases of `few`, `pancreas` (the labels still all there) and `heldout`.
    """
    patients = {case.id: manifest.patient_of(case) for case in manifest.cases}
    tested = set(split(patients, fold=0, folds=5, fold_seed=0, val_share=0).test)
    training = [case for case in manifest.cases if case.id not in tested]
    partly = {patients[case.id] for case in training if len(case.annotated) < len(manifest.organs)}
    full = sorted({patients[case.id] for case in training} - partly)
    others = len({patients[case.id] for case in training}) - count
    if not 0 < count <= len(full) or others < 1:
        raise SystemExit(f"--cases {count}: {len(full)} training patients have all labels, and one must be left over")
    few = {full[i] for i in np.random.default_rng([seed, 0]).permutation(len(full))[:count]}
    return {
        "few": [case for case in training if patients[case.id] in few],
        KEPT: [case for case in training if patients[case.id] not in few],
        "heldout": [case for case in manifest.cases if case.id in tested],
    }


def keep_one(case: CaseEntry, manifest: Manifest) -> CaseEntry:
    """The case with only the pancreas annotated, all other organs' voxels hidden."""
    return replace(case, annotated=case.annotated & {KEPT}, hidden=case.hidden | (set(manifest.organs) - {KEPT}))


def main() -> None:
    """Write the three files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset", type=Path, help="dataset.yaml of BTCV")
    parser.add_argument("--out", type=Path, required=True, help="folder of the three files")
    parser.add_argument("--cases", type=int, default=4, help="patients that keep all labels")
    parser.add_argument("--seed", type=int, default=0, help="draws them")
    arguments = parser.parse_args()
    manifest = load_manifest(arguments.dataset)
    if KEPT not in manifest.organs:
        raise SystemExit(f"{arguments.dataset}: does not label the {KEPT}")
    parts = draw(manifest, arguments.cases, arguments.seed)
    parts[KEPT] = [keep_one(case, manifest) for case in parts[KEPT]]
    arguments.out.mkdir(parents=True, exist_ok=True)
    for name, cases in parts.items():
        path = arguments.out / f"{name}.yaml"
        write_manifest(path, replace(manifest, name=f"{manifest.name}_{name}", cases=tuple(cases)))
        load_manifest(path)
        print(f"{path}: {len(cases)} cases: {', '.join(case.id for case in cases)}")


if __name__ == "__main__":
    main()
