"""`tools/relabelling.py`: shared round 0, equal steps, tables of what is finished, and nothing twice."""

import argparse
import csv
import inspect
import json
import sys
from pathlib import Path

import pytest
import warm
from toy import TOY

from organseg.errors import IntegrityError
from organseg.methods import PartialLabelModule, PriorModule
from organseg.metrics import CaseRow, OrganScore, summarise, write_case_table, write_summary

sys.path.append(str(warm.TOOLS))

import compared
import relabelling


def run_tool(toy: Path, out: Path, *more: object, check: int = 0) -> str:
    words = ("--cache", toy / "cache", "--out", out, "--dataset", "phantom", "--shares", "30")
    done = warm.run_tool("relabelling", *words, *more)
    assert done.returncode == check, done.stderr
    return done.stderr if check else done.stdout


@pytest.mark.slow
def test_methods_share_round_0_and_end_in_tables(toy: Path, tmp_path: Path) -> None:
    out = tmp_path / "runs"
    assert "| labels |" not in run_tool(toy, out, "--minutes", "0")
    small = (*TOY, "--curriculum.rounds=2", "--curriculum.start=initial", "--curriculum.round_steps=5")
    plain = ("--methods", "inerrant0", "--trainer.max_steps=60", *TOY)  # as many as 50 and two rounds of 5
    run_tool(toy, out, *plain)
    folder = out / "phantom" / "30" / "seed0"
    tested = (folder / "inerrant0" / "test" / "summary.csv").stat().st_mtime_ns
    shown = run_tool(toy, out, "--methods", "inerrant", "--round0-steps", "50", "--trainer.max_steps=50", *small)
    assert "/round0/" in shown and "--curriculum.round0" in shown
    options = ("--round0-steps", "50", "--trainer.max_steps=50", *small)
    shown = run_tool(toy, out, "--methods", "inerrant", *options)
    assert "$ organseg" not in shown  # all of it is finished
    refused = run_tool(toy, out, "--methods", "inerrant", "inerrant0", *options, check=4)
    assert "trainer.max_steps: run has 60, asked for 50" in refused  # inerrant0 as it is wanted now
    shown = run_tool(toy, out, "--methods", "inerrant", "inerrant0", "--minutes", "0")
    assert "At 30% of the labels:" in shown and "inerrant: " in shown
    assert (folder / "inerrant0" / "test" / "summary.csv").stat().st_mtime_ns == tested
    assert shown.count("| phantom | 30% | inerrant") == 6  # two scores of two methods, and two rounds
    assert "round0: " not in shown  # of fewer steps
    (folder / "inerrant0" / "run.json").write_text(
        (folder / "inerrant0" / "run.json").read_text().replace('"finished": true', '"finished": false')
    )  # a test half-way is no result
    assert "| inerrant0 |" not in run_tool(
        toy, tmp_path / "no tables", "--out", out, "--tables", tmp_path, "--minutes", "0"
    )
    with (out / "results.csv").open() as file:
        found = {row["method"] for row in csv.DictReader(file)}
    assert found == {"round0", "inerrant", "inerrant0"}
    with (out / "rounds.csv").open() as file:
        rounds = list(csv.DictReader(file))
    assert {row["round"] for row in rounds} == {"1", "2"} and {row["method"] for row in rounds} == {"inerrant"}
    assert any(row["precision"] for row in rounds)
    with (out / "cases.csv").open() as file:
        cases = [row for row in csv.DictReader(file) if row["method"] == "inerrant" and row["organ"] == "liver"]
    with (out / "results.csv").open() as file:
        (liver,) = [row for row in csv.DictReader(file) if row["method"] == "inerrant" and row["organ"] == "liver"]
    assert {row["outcome"] for row in cases} <= {"found", "missed", "both_empty", "false_positive"}
    assert sum(float(row["dsc"]) for row in cases) / len(cases) == pytest.approx(float(liver["dsc_mean"]), abs=1e-4)


def test_a_changed_method_is_the_other_with_what_is_changed(tmp_path: Path) -> None:
    more = ["--curriculum.score.init_args.steps=5", "--curriculum.rounds=3"]

    def words(method: str, share: int = 30) -> list[str]:
        return relabelling.Run(Path("out"), "btcv", share, 0, method).fit_words(tmp_path, 1500, more)

    whole = words("inerrant_judges")
    assert [word for word in words("judges_once") if word not in whole] == [
        "out/btcv/30/seed0/judges_once", *relabelling.ONCE
    ]  # fmt: skip
    assert more[0] in words("judges_once") and more[0] not in words("mcp_once")  # another score
    assert "--curriculum.score=mcp" in words("mcp_once")


@pytest.mark.parametrize("dataset", ["btcv", "phantom"])
@pytest.mark.parametrize("method", relabelling.METHODS)
def test_every_method_is_a_command_that_is_understood(method: str, dataset: str, tmp_path: Path) -> None:
    """As `fit` understands it, before data are read."""
    run = relabelling.Run(tmp_path, dataset, 30, 0, method)
    compared.refuse_another_setup(["fit", *run.fit_words(tmp_path, 1500, [])])


def test_the_priors_of_another_run_are_named(toy: Path, tmp_path: Path) -> None:
    words = ("--methods", relabelling.OTHER)
    assert "needs --prior CKPT" in run_tool(toy, tmp_path, *words, check=2)
    assert "found none.ckpt" in run_tool(toy, tmp_path, *words, "--prior", "none.ckpt", check=2)  # before any training
    assert "$ organseg" not in run_tool(toy, tmp_path, *words, "--minutes", "0")  # tables need none


def test_with_all_labels_there_is_nothing_to_find() -> None:
    asked = argparse.Namespace(
        seeds=[0], folds=[0], shares=[100, 30], methods=list(relabelling.METHODS), out=Path("out"), dataset="btcv"
    )
    planned = [(run.share, run.method) for run in relabelling.plan(asked)]
    assert [method for share, method in planned if share == 100] == [
        "round0",
        "inerrant0",
        "naive",
        "stipple0",
        "plain0",
        "stipple0_other",
    ]
    assert [method for share, method in planned if share == 30] == ["round0", *relabelling.METHODS]


def test_an_organ_that_a_case_lacks_is_in_one_of_two_means(tmp_path: Path) -> None:
    """Of two cases one has no spleen: predicting none is 1 in the first mean, and nothing in the second."""
    run = relabelling.Run(tmp_path, "btcv", 30, 0, "naive", fold=1)
    assert run.folder == tmp_path / "btcv" / "30" / "fold1_seed0" / "naive"
    test = run.folder / "test"
    test.mkdir(parents=True)
    (run.folder / "run.json").write_text(json.dumps({"identity": {"trainer.precision": "32-true"}}))
    scores = [OrganScore("found", 0.6, 1, 1, 1, 1, 9, 9), OrganScore("both_empty", 1.0, 0, 0, 0, 1, 0, 0)]
    rows = [CaseRow(case, "spleen", score, 100.0) for case, score in zip("ab", scores, strict=True)]
    write_case_table(test / "cases.csv", rows)
    write_summary(test / "summary.csv", summarise(rows))
    organ, mean = relabelling.scores_of(run)
    assert (organ["dsc_mean"], organ["dsc_present"], organ["absent_cases"]) == ("0.8000", "0.6000", "1")
    assert (mean["dsc_mean"], mean["dsc_present"]) == ("0.8000", "0.6000")
    assert (organ["fold"], organ["computed_in"], organ["false_positives"]) == ("1", "32-true", "0")


def finished(folder: Path, identity: dict[str, object]) -> None:
    """What a tested run leaves, as far as its setup is compared."""
    for name in ("test", "checkpoints"):
        (folder / name).mkdir(parents=True)
    (folder / "run.json").write_text(json.dumps({"finished": True, "identity": identity}))
    (folder / "checkpoints" / "last.ckpt.sha256").write_text("abc\n")
    (folder / "test" / "checkpoint.sha256").write_text("abc\n")
    (folder / "test" / "summary.csv").touch()


def test_methods_have_the_same_network(tmp_path: Path) -> None:
    runs = [relabelling.Run(tmp_path, "btcv", 30, 0, method) for method in ("inerrant0", "naive")]
    for run, width in zip(runs, (16, 32), strict=True):
        key = "model.init_args.network.init_args.width"
        identity = {key: width, "model.init_args.naive": run.method == "naive", "trainer.max_steps": 9}
        finished(run.folder, identity)
    with pytest.raises(IntegrityError, match=r"width: 16 there, 32 here$"):
        relabelling.refuse_unequal_runs(runs)


def test_seeds_of_other_setups_make_no_mean(tmp_path: Path) -> None:
    runs = [relabelling.Run(tmp_path, "btcv", 30, seed, "inerrant0") for seed in (0, 1)]
    for run, steps in zip(runs, (2700, 300), strict=True):
        identity = {"seed": run.seed, "data.seed": run.seed, "data content": str(run.seed), "trainer.max_steps": steps}
        finished(run.folder, identity)
    with pytest.raises(IntegrityError, match=r"trainer\.max_steps: 2700 there, 300 here"):
        relabelling.refuse_unequal_runs(runs)


@pytest.mark.parametrize(
    ("head", "method", "said"),
    [
        ("dataset,label_share_percent,fold,seed,method,computed_in", "inerrant_mcp", r"methods \['inerrant_mcp'\]"),
        ("dataset,label_share_percent,fold,seed,method,precision", "inerrant", r"columns \['computed_in'\]"),
    ],
)
def test_a_table_of_another_version_is_refused(tmp_path: Path, head: str, method: str, said: str) -> None:
    table = tmp_path / "results.csv"
    assert relabelling.known_lines(table) == []
    table.write_text(f"{head}\nbtcv,30,0,0,{method},32-true\n")
    with pytest.raises(IntegrityError, match=said):
        relabelling.known_lines(table)


def test_whatever_a_prior_has_of_its_own_may_differ_between_methods() -> None:
    own = inspect.signature(PriorModule).parameters.keys() - inspect.signature(PartialLabelModule).parameters.keys()
    assert {f"model.init_args.{option}" for option in own} <= set(compared._OF_A_METHOD)
