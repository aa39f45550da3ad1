"""The test of a run: every case once, whichever rank saw it, into `test/cases.csv` and `test/summary.csv`."""

from collections.abc import Sequence
from dataclasses import astuple
from pathlib import Path

import lightning as L
import numpy as np
import torch
from numpy.typing import NDArray

from organseg.batch import WholeCase
from organseg.metrics import (
    OUTCOMES,
    CaseRow,
    OrganScore,
    conventions,
    diagonal_mm,
    evaluate_case,
    summarise,
    write_case_table,
    write_summary,
)
from organseg.volumes import write_label


class CaseEvaluation:
    """Scores of all test cases, gathered over ranks by summing a table to which each case adds its own rows.

    Args:
        keys: Of all cases, in the order of their numbers.
        organs: In channel order.
        trainer: Gives the run folder, the ranks and their sums.
    """

    def __init__(self, keys: Sequence[str], organs: Sequence[str], trainer: L.Trainer) -> None:
        self.keys = keys
        self.organs = organs
        self.trainer = trainer
        self.folder = Path(trainer.default_root_dir) / "test"
        columns = 2 + len(astuple(_ANY))
        self.table = torch.zeros(len(keys), len(organs), columns, dtype=torch.float64)
        self.seen = torch.zeros(len(keys), dtype=torch.int64)

    def add(self, case: WholeCase, preds: NDArray[np.uint8]) -> None:
        """Score one case and keep its label map, `test/predictions/<data set>/<id>.nii.gz`."""
        assert case.truth is not None
        scores = evaluate_case(preds, case.truth, case.annotated, case.spacing)
        diagonal = diagonal_mm(case.shape, case.spacing)
        for k, score in enumerate(scores):
            outcome, *numbers = astuple(score)
            self.table[case.number, k] = torch.tensor([OUTCOMES.index(outcome), *numbers, diagonal, 1.0])
        self.seen[case.number] += 1
        path = self.folder / "predictions" / f"{case.key}.nii.gz"
        path.parent.mkdir(parents=True, exist_ok=True)
        write_label(path, preds, case.affine)

    def rows(self) -> list[CaseRow]:
        """All rows, from all ranks.

        Raises:
            RuntimeError: If a case was not scored exactly once.
        """
        table = self.trainer.strategy.reduce(self.table.to(self.trainer.strategy.root_device), reduce_op="sum")
        seen = self.trainer.strategy.reduce(self.seen.to(self.trainer.strategy.root_device), reduce_op="sum")
        wrong = [key for key, count in zip(self.keys, seen.tolist(), strict=True) if count != 1]
        if wrong and self.trainer.limit_test_batches == 1.0:
            msg = f"cases {wrong} were not scored exactly once"
            raise RuntimeError(msg)
        rows = []
        for number, key in enumerate(self.keys):
            for k, organ in enumerate(self.organs):
                outcome, *numbers, diagonal, scored = table[number, k].tolist()
                if scored:
                    rows.append(CaseRow(key, organ, OrganScore(OUTCOMES[int(outcome)], *numbers), diagonal))
        return rows

    def finish(self) -> dict[str, float]:
        """Write the tables, show the summary; returns the mean DSC of each organ and of all."""
        rows = self.rows()
        lines = summarise(rows)
        if self.trainer.is_global_zero:
            write_case_table(self.folder / "cases.csv", rows)
            write_summary(self.folder / "summary.csv", lines)
            print(f"\n{'organ':<26}{'cases':>6}{'DSC %':>8}{'std':>7}{'NSD %':>8}{'HD95 mm':>9}{'ASD mm':>8}"
                  f"{'missed':>8}{'false':>7}{'absent':>8}")  # fmt: skip
            for line in lines:
                print(f"{line.organ:<26}{line.evaluated:>6}{100 * line.dsc.mean:>8.1f}{100 * line.dsc.std:>7.1f}"
                      f"{100 * line.nsd.mean:>8.1f}{line.hd95_mm.mean:>9.1f}{line.asd_mm.mean:>8.1f}{line.missed:>8}"
                      f"{line.false_positive:>7}{line.both_empty:>8}")  # fmt: skip
            print(f"\n{conventions()}\n{self.folder / 'summary.csv'}, {self.folder / 'cases.csv'}")
        return {f"test/dsc/{line.organ}": line.dsc.mean for line in lines}


_ANY = OrganScore("unknown", *[0.0] * 7)
