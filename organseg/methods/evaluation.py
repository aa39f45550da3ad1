"""The test of a run: every case once, whichever rank saw it, into `test/cases.csv` and `test/summary.csv`.

One shard of several leaves the rows of its cases for the others, and whichever finds all rows writes the tables.
"""

import json
from collections.abc import Sequence
from dataclasses import astuple
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from numpy.typing import NDArray

from organseg.batch import WholeCase
from organseg.data.shards import CaseResults, forget_results
from organseg.errors import IntegrityError
from organseg.files import publish_text
from organseg.metrics import (
    OUTCOMES,
    CaseRow,
    OrganScore,
    diagonal_mm,
    evaluate_case,
    summarise,
    summary_text,
    write_case_table,
    write_summary,
)
from organseg.volumes import write_label


class CaseEvaluation:
    """Scores of all test cases, gathered over ranks by summing a table to which each case adds its own rows.

    Args:
        keys: Of all cases, in the order of their numbers.
        organs: In channel order.
        trainer: Gives the run folder, the ranks and their sums, and in a shard where results meet.
    """

    def __init__(self, keys: Sequence[str], organs: Sequence[str], trainer: L.Trainer) -> None:
        self.keys = keys
        self.organs = organs
        self.trainer = trainer
        self.folder = Path(trainer.default_root_dir) / "test"
        columns = 2 + len(astuple(_ANY))
        self.table = torch.zeros(len(keys), len(organs), columns, dtype=torch.float64)
        self.seen = torch.zeros(len(keys), dtype=torch.int64)
        data: Any = trainer.datamodule  # type: ignore[attr-defined]  # set by the trainer
        self.results: CaseResults | None = data.results
        if self.results is None and trainer.is_global_zero:
            forget_results(self.folder)

    def add(self, case: WholeCase, preds: NDArray[np.uint8]) -> None:
        """Score one case and keep its label map, `test/predictions/<data set>/<id>.nii.gz`."""
        assert case.truth is not None
        if self.results is not None and not self.seen.any():
            self._remove_tables()
        scores = evaluate_case(preds, case.truth, case.annotated, case.spacing)
        diagonal = diagonal_mm(case.shape, case.spacing)
        cells = [[OUTCOMES.index(score.outcome), *astuple(score)[1:], diagonal, 1.0] for score in scores]
        self.table[case.number] = torch.tensor(cells, dtype=torch.float64)
        self.seen[case.number] += 1
        path = self.folder / "predictions" / f"{case.key}.nii.gz"
        path.parent.mkdir(parents=True, exist_ok=True)
        write_label(path, preds, case.affine)
        if self.results is not None:
            self.results.write(case.key, self.table[case.number].tolist(), path)

    def _remove_tables(self) -> None:
        """Before the first label map is replaced: tables of other ones must not look like the result of all shards."""
        for name in ("cases.csv", "summary.csv"):
            (self.folder / name).unlink(missing_ok=True)

    @property
    def _all_wanted(self) -> bool:
        limit = self.trainer.limit_test_batches
        return isinstance(limit, float) and limit == 1  # the integer 1 is one batch

    def meet(self) -> str:
        """Take the rows of all shards instead of this one's; returns how far they are if some are still to come.

        Raises:
            IntegrityError: If cases of this shard have no result by now.
        """
        assert self.results is not None
        strategy = self.trainer.strategy
        strategy.barrier("all ranks have written their cases")
        found = self.results.read(self.keys) if self.trainer.is_global_zero else {}
        lost = [key for key in self.results.shard.of(self.keys) if key not in found]
        waiting = "" if len(found) == len(self.keys) else self.results.progress(self.keys, found)
        lost, waiting = strategy.broadcast((lost, waiting))
        if lost and self._all_wanted:
            raise IntegrityError(
                f"{self.folder}: {', '.join(lost[:3])}{' ...' if len(lost) > 3 else ''}: no result any more; another "
                "test is at work in this folder: wait for it, or choose another --out, and run this shard again"
            )
        for number, key in enumerate(self.keys):
            self.table[number] = torch.tensor(found[key], dtype=torch.float64) if key in found else 0.0
            self.seen[number] = key in found
        return waiting

    def rows(self) -> list[CaseRow]:
        """All rows, from all ranks.

        Raises:
            RuntimeError: If a case was not scored exactly once.
        """
        table, seen = self.table, self.seen
        if self.trainer.world_size > 1:  # alone it stays on the CPU: not every device knows float64
            strategy = self.trainer.strategy
            table = strategy.reduce(table.to(strategy.root_device), reduce_op="sum")
            seen = strategy.reduce(seen.to(strategy.root_device), reduce_op="sum")
        wrong = [key for key, count in zip(self.keys, seen.tolist(), strict=True) if count != 1]
        if wrong and self._all_wanted:
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
        """Write the tables, show the summary; returns the mean DSC of each organ and of all.

        A shard that is not the last one to end says how far all are, and returns nothing.
        """
        waiting = self.meet() if self.results is not None else ""
        if waiting:
            if self.trainer.is_global_zero:
                print(f"\n{self.folder}: {waiting}; the last shard to end writes summary.csv and cases.csv")
            return {}
        rows = self.rows()
        lines = summarise(rows)
        if self.trainer.is_global_zero:
            write_case_table(self.folder / "cases.csv", rows)
            write_summary(self.folder / "summary.csv", lines)
            integers = {k + 1: organ for k, organ in enumerate(self.organs)}
            (self.folder / "predictions").mkdir(parents=True, exist_ok=True)
            publish_text(self.folder / "predictions" / "labels.json", json.dumps(integers, indent=1))
            print(f"{summary_text(lines)}\n{self.folder / 'summary.csv'}, {self.folder / 'cases.csv'}")
        return {f"test/dsc/{line.organ}": line.dsc.mean for line in lines}


_ANY = OrganScore("unknown", *[0.0] * 7)
