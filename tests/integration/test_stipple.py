"""STIPPLE through the real commands and tools, at toy size: coarse model, priors, rounds, two passes, two ranks."""

import csv
import re
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import nibabel
import numpy as np
import pytest
import torch
import warm
from toy import TOY, organseg

sys.path.append(str(warm.TOOLS))

import before_after
import cut
import priors
import stipple

from organseg.batch import WholeCase
from organseg.errors import UsageError
from organseg.priors import OrganPriors, Prior

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "configs" / "experiment"


def run_tool(name: str, *words: object) -> str:
    done = warm.run_tool(name, *words, timeout=600)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def runs(toy: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A coarse model, and STIPPLE without and with relabelling."""
    out = tmp_path_factory.mktemp("stipple") / "runs"
    words = ("relabelling", "--cache", toy / "cache", "--out", out, "--dataset", "phantom", "--shares", 30,
             "--round0-steps", 60, *TOY)  # fmt: skip
    run_tool(*words, "--methods", "stipple0", "--trainer.max_steps=8")
    run_tool(*words, "--methods", "stipple", "--trainer.max_steps=4", "--curriculum.round_steps=4")
    return out / "phantom" / "30" / "seed0"


@pytest.mark.slow
def test_relabelling_with_a_prior(runs: Path) -> None:
    run = runs / "stipple"
    assert sorted(path.name for path in run.glob("[0-9]*")) == [
        "00_round0_train", "02_round1_relabel", "03_round1_train",
    ]  # fmt: skip
    states = {
        phase: torch.load(run / phase / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
        for phase in ("00_round0_train", "03_round1_train")
    }
    before, after = states.values()
    coarse = torch.load(runs / "round0" / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    for name, weight in coarse.items():
        kept = name.replace("network.", "coarse.", 1)
        assert torch.equal(before[kept], weight) and torch.equal(after[kept], weight)
    assert not torch.equal(before["network.head.weight"], after["network.head.weight"])
    # A pseudo-labelled case keeps the centre that it was relabelled with.
    (one, two) = (state["_extra_state"]["centres"] for state in states.values())
    assert one.keys() == two.keys() and all(torch.equal(one[key].nan_to_num(), two[key].nan_to_num()) for key in one)
    with (run / "prior" / "centres.csv").open() as file:
        sources = {row["from"] for row in csv.DictReader(file)}
    assert "annotation" in sources and sources & {"coarse model", "not found"}


@pytest.mark.slow
def test_a_round_from_scratch_does_not_begin_with_the_coarse_weights(runs: Path, toy: Path, tmp_path: Path) -> None:
    coarse = runs / "round0" / "checkpoints" / "last.ckpt"
    organseg("fit", "--config", CONFIGS / "phantom_30_stipple.yaml", "--data.init_args.cache", toy / "cache", *TOY,
             "--out", tmp_path / "run", "--model.init_args.coarse", coarse, "--trainer.max_steps=4",
             "--model.init_args.optimizer.init_args.lr=1e-9", "--curriculum.start=scratch",
             "--curriculum.round_steps=1")  # fmt: skip
    given, first, last = (
        torch.load(path, weights_only=True)["state_dict"]["network.head.weight"]
        for path in (coarse, *sorted((tmp_path / "run").glob("*_train/checkpoints/last.ckpt")))
    )
    assert torch.allclose(first, given, atol=1e-6) and not torch.allclose(last, given, atol=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize(("experiment", "words", "phases"), [
    ("phantom_30_inerrant_stipple", ["--curriculum.score.init_args.steps=2"], 4),
    ("phantom_30_stipple", ["--curriculum.score=organseg.curriculum.LearnedConfidence",
                            "--curriculum.score.init_args.steps=2", "--curriculum.selection.threshold=0.5"], 4),
    ("phantom_30_stipple0", ["--config", CONFIGS.parent / "prior" / "utransformer.yaml",
                             "--model.init_args.coarse_network.init_args.width=4"], 0),
])  # fmt: skip
def test_with_other_scores_and_networks(
    experiment: str, words: list[object], phases: int, runs: Path, toy: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    rounds = ["--curriculum.round_steps=2"] if phases else []
    organseg("fit", "--config", CONFIGS / f"{experiment}.yaml", *words, "--data.init_args.cache", toy / "cache", *TOY,
             "--model.init_args.coarse", runs / "round0" / "checkpoints" / "last.ckpt", "--trainer.max_steps=2",
             *rounds, "--out", run)  # fmt: skip
    organseg("test", "--config", run / "config.yaml", "--ckpt_path", run / "checkpoints" / "last.ckpt")
    assert len(list(run.glob("[0-9]*"))) == phases and (run / "prior" / "centres.csv").exists()
    with (run / "test" / "cases.csv").open() as file:
        assert len({row["organ"] for row in csv.DictReader(file)}) == 7


@pytest.mark.slow
def test_the_coarse_model_may_be_found_later_or_elsewhere(runs: Path, toy: Path, tmp_path: Path) -> None:
    coarse = runs / "round0" / "checkpoints" / "last.ckpt"
    words = ("fit", "--config", CONFIGS / "phantom_30_stipple0.yaml", "--data.init_args.cache", toy / "cache", *TOY,
             "--trainer.max_steps=1", "--out", tmp_path / "run", "--model.init_args.coarse")  # fmt: skip
    assert "no such checkpoint" in organseg(*words, tmp_path / "typo.ckpt", check=2).stderr
    organseg(*words, coarse)
    shutil.copytree(runs / "stipple", tmp_path / "moved")
    shutil.copy(coarse, tmp_path / "last.ckpt")
    again = ("fit", "--config", tmp_path / "moved" / "config.yaml", "--out", tmp_path / "moved",
             "--model.init_args.coarse", tmp_path / "last.ckpt")  # fmt: skip
    assert "this run is finished" in organseg(*again).stdout
    shutil.copy(runs / "stipple0" / "checkpoints" / "last.ckpt", tmp_path / "last.ckpt")
    assert f"asked for {tmp_path / 'last.ckpt'}" in organseg(*again, check=4).stderr


@pytest.mark.slow
def test_round_0_of_another_run_comes_with_its_priors(runs: Path, toy: Path, tmp_path: Path) -> None:
    done = organseg("fit", "--config", runs / "stipple" / "config.yaml", "--out", tmp_path / "run",
                    "--curriculum.round0", runs / "stipple", "--curriculum.gamma_max=0.5")  # fmt: skip
    assert "round 0: training" not in done.stdout
    for name in ("centres.csv", "made_of.json"):
        assert (tmp_path / "run" / "prior" / name).read_bytes() == (runs / "stipple" / "prior" / name).read_bytes()


@pytest.mark.slow
def test_prediction_needs_the_checkpoint_alone(runs: Path, toy: Path, tmp_path: Path) -> None:
    last = tmp_path / "moved.ckpt"
    last.write_bytes((runs / "stipple" / "checkpoints" / "last.ckpt").read_bytes())
    scan = toy / "phantoms" / "img" / "phantom_000.nii.gz"
    organseg("predict", "--ckpt_path", last, last, "--tta", "--input", scan, "--out", tmp_path / "out", cwd=tmp_path)
    assert nibabel.load(tmp_path / "out" / scan.name).shape == nibabel.load(scan).shape


@pytest.mark.slow
def test_other_positions_are_not_tested_into_the_run_s_own_results(runs: Path) -> None:
    run = runs / "stipple0"
    before = (run / "test" / "summary.csv").read_bytes()
    for option in ("position", "placed_by_others"):
        done = organseg("test", "--config", run / "config.yaml", "--ckpt_path", run / "checkpoints" / "last.ckpt",
                        f"--model.init_args.{option}=true", check=2)  # fmt: skip
        assert re.search(rf"{option}: [Tt]rue is no result of", done.stderr) and "add --out" in done.stderr
    assert (run / "test" / "summary.csv").read_bytes() == before


@pytest.mark.slow
def test_pictures_of_the_priors(runs: Path, toy: Path) -> None:
    case = sorted((toy / "cache" / "phantom").glob("*.h5"))[0].stem
    for run, words in (("stipple0", ()), ("stipple", ("--case", f"phantom/{case}"))):
        said = organseg("report", runs / run, "prior", *words).stdout.strip()
        assert Path(said).stat().st_size > 10_000


@pytest.mark.slow
def test_the_tables_of_its_parts(runs: Path, toy: Path) -> None:
    words = ("--cache", toy / "cache", "--out", runs.parents[2], "--dataset", "phantom")
    done = warm.run_tool("stipple", *words, "--variants", "boxes", "--trainer.max_steps=2", *TOY, timeout=600)
    assert done.returncode == 4 and "trainer.max_steps: 8 there, 2 here" in done.stderr
    shutil.rmtree(runs / "stipple0_boxes")
    shown = run_tool("stipple", *words, "--variants", "boxes", "bins=all", "--trainer.max_steps=8", *TOY)
    trained = ("round0", "stipple0", "stipple", "bins_all", "boxes")
    for variant in (*trained, "boxes_naive", "boxes_true", "stipple0_true", "stipple0_by_others"):
        assert f"{variant} |" in shown
    assert "| organ | naive | aligned | matched |" in shown
    shown = run_tool("priors", runs / "stipple0", "--tables", runs)
    with (runs / "priors.csv").open() as file:
        lines = list(csv.DictReader(file))
    ways = {(line["centring"], line["smooth_mm"], line["position"]) for line in lines}
    assert {way[::2] for way in ways} == {
        (way, position) for way, all_ in priors.POSITIONS.items() for position in all_
    }
    assert len(ways) == 10 and all(f"| {' | '.join(way)} | 0.001 | " in shown for way in ways)
    shown = run_tool("cut", runs / "round0", runs / "stipple0", "--by-others", "--tables", runs)
    with (runs / "cut.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert all(f"| {run} |" in shown for run in ("round0", "stipple0", "stipple0_by_others"))
    assert {line["run"] for line in lines} == {"round0", "stipple0", "stipple0_by_others"} and all(
        bool(line["dsc"]) != bool(line["invented_ml"]) for line in lines
    )
    picture = runs / "picture.png"
    shown = run_tool(
        "before_after", runs / "round0", runs / "stipple0", "--organs", "liver", "spleen", "--out", picture
    )
    assert "liver: " in shown and "spleen: " in shown
    assert picture.exists() == ("no picture" not in shown)
    five, every = (
        torch.load(runs / name / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]["_extra_state"]["priors"]
        for name in ("stipple0", "stipple0_bins_all")
    )
    for few, many in zip(five, every, strict=True):
        assert len(few["probs"]) == 5 and len(many["probs"]) == round(many["box_mm"][0] / many["spacing"][0])


def test_what_is_trained_on_without_a_prior_differs_in_that_alone(tmp_path: Path) -> None:
    sys.path.insert(0, str(ROOT / "tools"))
    from relabelling import Run

    for without, method in (("plain0", "stipple0"), ("plain", "stipple")):
        for share in (30, 10):  # there is no phantom_10: its configs are those of 30 with another share
            words = [
                Run(Path("out"), "phantom", share, 1, name).fit_words(tmp_path, 1500, ["--curriculum.rounds=1"])
                for name in (without, method)
            ]
            for each, name in zip(words, (without, method), strict=True):
                each[each.index("--out") + 1] = each[each.index("--out") + 1].removesuffix(name)
                assert Path(each[1]).name == f"phantom_30_{method}.yaml"
                assert each.count("--data.init_args.label_share") == (share == 10)
            words[0].remove("--model.init_args.use=[]")
            assert words[0] == words[1]


@pytest.mark.slow
def test_two_ranks_find_the_same_organs(runs: Path, toy: Path, tmp_path: Path) -> None:
    words = ("fit", "--config", CONFIGS / "phantom_30_stipple0.yaml", "--data.init_args.cache", toy / "cache", *TOY,
             "--model.init_args.coarse", runs / "round0" / "checkpoints" / "last.ckpt",
             "--trainer.max_steps=2")  # fmt: skip
    organseg(*words, "--out", tmp_path / "two", "--trainer.devices=2", "--trainer.strategy=ddp")
    one = (runs / "stipple0" / "prior" / "centres.csv").read_text()
    assert (tmp_path / "two" / "prior" / "centres.csv").read_text() == one


def test_nats_of_a_prior_that_is_placed_right_and_wrong() -> None:
    probs = np.full((1, 2, 2), 0.8, dtype=np.float32)
    known = OrganPriors(
        (None, Prior("spleen", probs, (6.0, 4.0, 4.0), (3.0, 2.0, 2.0), 1, ("a/b",))), ((), ()), "boxes"
    )
    mask = np.zeros((6, 6, 6), dtype=bool)
    mask[2:4, 2:4, 2:4] = True
    where = np.array([7.5, 5.0, 5.0], dtype=np.float32)  # index 2.5 in voxels of 3 x 2 x 2 mm
    right = (8 * -np.log(0.8) + (216 - 8) * -np.log(0.9)) / 8
    assert priors.nats(known, 1, where, mask, (3.0, 2.0, 2.0), 0.1) == pytest.approx(right, rel=1e-5)
    wrong = (8 * -np.log(0.1) + 8 * -np.log(0.2) + (216 - 16) * -np.log(0.9)) / 8
    assert priors.nats(
        known, 1, where + np.array([0, 4, 0], dtype=np.float32), mask, (3.0, 2.0, 2.0), 0.1
    ) == pytest.approx(wrong, rel=1e-5)


def test_thirds_of_a_scan_and_what_is_near_them() -> None:
    truth = np.zeros((30, 2, 2), np.uint8)
    truth[22, 0, 0], truth[29, 0, 0], truth[4, 0, 0] = 1, 2, 3
    case = WholeCase("a/b", 0, np.arange(30, dtype=np.float32)[:, None, None] + truth, np.float32, truth.shape,
                     (5.0, 1.0, 1.0), np.eye(4), truth, np.ones(3, bool))  # fmt: skip
    parts = list(cut.parts_of(case))
    assert [part.key for part, _ in parts] == ["a/b/lower", "a/b/middle", "a/b/upper"]
    assert [near for _, near in parts] == [{0, 3}, {0, 1}, {0, 1, 2}]  # 15 mm are three slices
    for part, start in zip((part for part, _ in parts), (0, 10, 20), strict=True):
        assert part.shape == (10, 2, 2) and np.array_equal(part.truth, truth[start : start + 10])
        assert np.array_equal(part.image, case.image[start : start + 10])
    two = WholeCase("a/b", 0, case.image[:2], np.float32, (2, 2, 2), (5.0, 1.0, 1.0), np.eye(4), truth[:2],
                    np.ones(3, bool))  # fmt: skip
    assert [part.shape for part, _ in cut.parts_of(two)] == [(1, 2, 2), (1, 2, 2)]


def test_runs_of_patches_are_refused_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("data: {class_path: organseg.data.PatchDataModule, init_args: {}}\n")
    with pytest.raises(UsageError, match="trained on what PatchDataModule gives"):
        stipple.options_of(tmp_path)


def test_another_share_keeps_the_lines_of_the_first(tmp_path):
    table = tmp_path / "variants.csv"

    def line(share: str, dsc: str) -> dict[str, str]:
        return {**dict.fromkeys(stipple.KEYS, "x"), "label_share_percent": share, "mean": dsc}

    other_organs = {**line("5", "0.4"), "aorta": "0.5"}
    for lines in ([line("30", "0.1")], [line("10", "0.2")], [line("30", "0.3")], [other_organs]):
        stipple.put(table, lines)
    rows = [(row["label_share_percent"], row["mean"], row["aorta"]) for row in stipple.rows_of(table)]
    assert rows == [("10", "0.2", ""), ("30", "0.3", ""), ("5", "0.4", "0.5")]


def test_volumes_far_from_the_organ_by_hand() -> None:
    truth, preds = np.zeros((2, 1, 1, 40), np.uint8)
    truth[0, 0, 5:8] = 1
    preds[0, 0, [6, 15, 27, 28, 39]] = 1  # 8, 20, 21 and 32 voxels from the last one of the organ
    preds[0, 0, 30] = 2  # of an organ that is absent: all of it
    preds[0, 0, 31] = 3  # of one that is unknown: none
    volumes = stipple.far_ml(preds, truth, (10.0, 10.0, 1.0), np.array([True, True, False]))
    assert volumes == pytest.approx([0.2, 0.1])  # two voxels of 100 mm3; exactly 20 mm is not far
    assert stipple.far_ml(truth, truth, (10.0, 10.0, 1.0), np.array([True])) == [0.0]


def test_what_is_recovered_and_removed_by_hand() -> None:
    label, one, two = np.zeros((3, 2, 1, 6), np.uint8)
    label[0, 0, :3] = 2
    one[0, 0, [0, 4, 5]] = 2  # one right, two false
    two[0, 0, [0, 1, 5]] = 2  # two right, one false
    two[1, 0, 0] = 2  # and one invented in the other slice
    cases = [SimpleNamespace(label=label, preds=preds) for preds in (one, two)]
    recovered, removed = before_after.changes(*cases, 1)
    assert recovered.tolist() == [1, 0] and removed.tolist() == [1, -1]
