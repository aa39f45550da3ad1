"""`tools/relabelling.py`: shared round 0, equal steps, tables of what is finished, and nothing twice."""

import csv
from pathlib import Path

import pytest
import warm
from toy import TOY


def run_tool(toy: Path, out: Path, *more: str) -> str:
    words = ("--cache", toy / "cache", "--out", out, "--dataset", "phantom", "--shares", "30")
    done = warm.run_tool("relabelling", *words, *more)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_methods_share_round_0_and_end_in_tables(toy: Path, tmp_path: Path) -> None:
    out = tmp_path / "runs"
    assert "| labels |" not in run_tool(toy, out, "--minutes", "0")
    small = (*TOY, "--curriculum.round_steps=5", "--curriculum.score.init_args.steps=5")
    plain = ("--methods", "inerrant0", "--trainer.max_steps=60", *TOY)  # as many as 50 and two rounds of 5
    run_tool(toy, out, *plain)
    folder = out / "phantom" / "30" / "seed0"
    tested = (folder / "inerrant0" / "test" / "summary.csv").stat().st_mtime_ns
    shown = run_tool(toy, out, "--methods", "inerrant", "--round0-steps", "50", "--trainer.max_steps=50", *small)
    assert "/round0/" in shown and "--curriculum.round0" in shown
    shown = run_tool(toy, out, "--methods", "inerrant", "inerrant0", "--round0-steps", "50")
    assert "$ organseg" not in shown  # all of it is finished
    assert (folder / "inerrant0" / "test" / "summary.csv").stat().st_mtime_ns == tested
    assert shown.count("| phantom | 30% | inerrant") == 4  # scores of two methods, and two rounds
    with (out / "results.csv").open() as file:
        found = {row["method"] for row in csv.DictReader(file)}
    assert found == {"round0", "inerrant", "inerrant0"}
    with (out / "rounds.csv").open() as file:
        rounds = list(csv.DictReader(file))
    assert {row["round"] for row in rounds} == {"1", "2"} and {row["method"] for row in rounds} == {"inerrant"}
    assert any(row["precision"] for row in rounds)
