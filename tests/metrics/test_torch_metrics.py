import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from organseg.metrics.overlap import OverlapCounts, dsc, overlap_counts
from organseg.metrics.torch_metrics import CaseDice

CASES, ORGANS = 5, 3


def case(index):
    generator = np.random.default_rng(index)
    preds, label = generator.integers(0, ORGANS + 1, (2, 3, 4, 5), np.uint8)
    annotated = torch.tensor([True, index % 2 == 0, False])
    return overlap_counts(preds, label, ORGANS), annotated


def metric_of(indices):
    metric = CaseDice(CASES, ORGANS)
    for index in indices:
        metric.update(index, *case(index))
    return metric


def test_mean_is_over_the_cases_that_annotate_the_organ():
    scores = np.stack([dsc(case(index)[0]) for index in range(CASES)])
    found = metric_of(range(CASES)).compute()
    assert found.dtype == torch.float64
    assert found[:2].tolist() == pytest.approx([scores[:, 0].mean(), scores[::2, 1].mean()])
    assert math.isnan(found[2])


def test_an_empty_organ_scores_one_or_zero():
    metric = CaseDice(2, 2)
    zero, some = np.zeros(2, np.int64), np.array([0, 7])
    metric.update(0, OverlapCounts(zero, zero, some), torch.tensor([True, True]))
    assert metric.compute().tolist() == [1.0, 0.0]


def test_a_case_counted_twice_is_refused():
    metric = metric_of([0, 1, 1])
    with pytest.raises(RuntimeError, match=r"cases \[1\] were counted more than once"):
        metric.compute()


def test_reset_forgets_all_cases():
    metric = metric_of(range(CASES))
    metric.reset()
    metric.update(0, *case(0))
    assert metric.compute()[0] == pytest.approx(dsc(case(0)[0])[0])


def test_two_processes_equal_one(tmp_path):
    ranks = [
        subprocess.Popen([sys.executable, __file__, str(rank), str(tmp_path)], stderr=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    for rank in ranks:
        _, errors = rank.communicate(timeout=120)
        assert rank.returncode == 0, errors
    expected = metric_of(range(CASES)).compute()
    for rank in range(2):
        torch.testing.assert_close(torch.load(tmp_path / f"dice{rank}.pt"), expected, rtol=0, atol=0, equal_nan=True)
        assert "cases [3] were counted more than once" in (tmp_path / f"refused{rank}.txt").read_text()


def run_rank(rank, folder):
    """Three cases on one rank, two on the other; then one that both have seen."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    torch.save(metric_of(range(rank, CASES, 2)).compute(), folder / f"dice{rank}.pt")
    try:
        metric_of([rank, 3]).compute()
    except RuntimeError as error:
        (folder / f"refused{rank}.txt").write_text(str(error))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    run_rank(int(sys.argv[1]), Path(sys.argv[2]))
