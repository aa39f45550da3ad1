"""What `fit` does with a run folder that is there already, and what a user is told when something is wrong."""

import json
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import warm
from toy import organseg

from organseg.checkpoints import load_checkpoint
from organseg.cli.tested import is_tested

CONFIG = Path(__file__).parents[2] / "configs" / "experiment" / "phantom_30_inerrant0.yaml"


def test_validation_logs_whole_case_dsc_of_each_organ_at_the_interval(finished: tuple[Path, list[object]]) -> None:
    lines = (finished[0] / "metrics.csv").read_text().splitlines()
    mean = [line for line in lines if line.split(",")[1] == "val/dsc"]
    assert [line.split(",")[0] for line in mean] == ["1", "3"]
    assert sum(",val/dsc/liver," in line for line in lines) == 2


@pytest.mark.slow
def test_validate_prints_what_training_logged_last(finished: tuple[Path, list[object]]) -> None:
    run, _ = finished
    done = organseg("validate", "--config", run / "config.yaml", "--ckpt_path", run / "checkpoints" / "last.ckpt")
    (line,) = [line for line in (run / "metrics.csv").read_text().splitlines() if line.startswith("3,val/dsc,")]
    shown = dict(words.rsplit(maxsplit=2)[:2] for words in done.stdout.splitlines() if words.startswith("val/dsc"))
    assert float(shown["val/dsc"]) == pytest.approx(100 * float(line.split(",")[2]), abs=0.06)
    assert "val/dsc/liver" in shown


def test_finished_run_says_so_and_stays_as_it_is(finished: tuple[Path, list[object]]) -> None:
    run, command = finished
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    done = organseg(*command, "--trainer.precision=bf16-mixed")  # it goes on in what it was begun in
    assert "finished" in done.stdout
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*")} == before


def test_another_setup_is_refused_with_every_difference(finished: tuple[Path, list[object]]) -> None:
    differences = {
        "--seed=1": "seed: run has 0, asked for 1",
        "--data.init_args.organs=[liver]": "data.organs: run has None, asked for ['liver']",
        "--model.init_args.network.init_args.width=5": "width: run has 4, asked for 5",
        "--trainer.max_steps=5": "trainer.max_steps: run has 4, asked for 5",
    }
    done = organseg(*finished[1], *differences, check=4)
    for difference in differences.values():
        assert difference in done.stderr
    assert "Traceback" not in done.stderr
    alone = organseg(*finished[1], "--trainer.max_steps=5", check=4)
    assert len(alone.stderr.splitlines()) == 2, "the error, and the one difference"


def test_float16_on_a_cpu_is_refused_by_all_commands(
    finished: tuple[Path, list[object]], toy: Path, tmp_path: Path
) -> None:
    run, command = finished
    last = run / "checkpoints" / "last.ckpt"
    test = ["test", "--config", run / "config.yaml", "--ckpt_path", last, "--out", tmp_path / "test"]
    predict = ["predict", "--ckpt_path", last, "--input", toy / "phantoms" / "img", "--out", tmp_path / "out"]
    for words in (
        [*command, "--trainer.precision=16-mixed"],
        [*test, "--trainer.precision=16-mixed"],
        [*predict, "--precision=16-mixed", "--accelerator=cpu"],
    ):
        assert "on a CPU, expected one that a CPU trains in" in organseg(*words, check=2).stderr


def test_overwrite_starts_anew(finished: tuple[Path, list[object]], tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished[0], run)
    (run / "notes.txt").write_text("mine")
    organseg(*finished[1], "--out", run, "--seed=1", "--overwrite", "--trainer.max_steps=2")
    assert (run / "notes.txt").read_text() == "mine"
    assert "seed: 1" in (run / "config.yaml").read_text()


def test_overwrite_does_not_touch_a_folder_that_is_no_run(finished: tuple[Path, list[object]], tmp_path: Path) -> None:
    (tmp_path / "test").mkdir()
    (tmp_path / "test" / "mine.txt").write_text("years of work")
    done = organseg(*finished[1], "--out", tmp_path, "--overwrite", check=2)
    assert "but no run" in done.stderr
    assert (tmp_path / "test" / "mine.txt").exists()


def test_damaged_checkpoint_is_refused_by_test_and_predict(
    finished: tuple[Path, list[object]], toy: Path, tmp_path: Path
) -> None:
    damaged = tmp_path / "last.ckpt"
    content = bytearray((finished[0] / "checkpoints" / "last.ckpt").read_bytes())
    content[len(content) // 2] ^= 1
    damaged.write_bytes(content)
    shutil.copy(finished[0] / "checkpoints" / "last.ckpt.sha256", tmp_path)
    scan = toy / "phantoms" / "img" / "phantom_000.nii.gz"
    for command in (
        ("test", "--config", finished[0] / "config.yaml", "--ckpt_path", damaged),
        ("predict", "--ckpt_path", damaged, "--input", scan, "--out", tmp_path / "out"),
    ):
        done = organseg(*command, check=4)
        assert "damaged" in done.stderr
        assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["fit", "--config", "no_such.yaml"], "no_such.yaml"),
        (["fit", "--config", CONFIG, "--trainer.max_stepz=3"], "max_stepz"),
        (["fit", "--config", CONFIG, "--data.init_args.cache=/nowhere"], "no prepared data set"),
        (["fit", "--config", CONFIG, "--model=os.system"], "os.system"),
        (["test", "--config", CONFIG, "--data.init_args.cache=CACHE"], "--ckpt_path"),
        (["predict", "--ckpt_path", "x.ckpt", "--input", "nowhere.nii", "--out", "o"], "x.ckpt"),
    ],
)
def test_wrong_usage_is_one_line_and_no_traceback(
    arguments: list[object], said: str, toy: Path, tmp_path: Path
) -> None:
    words = [str(word).replace("CACHE", str(toy / "cache")) for word in arguments]
    done = organseg(*words, check=None, cwd=tmp_path)
    assert done.returncode in (2, 4)
    assert said in done.stderr
    assert "Traceback" not in done.stderr


def test_a_checkpoint_is_not_tested_on_patients_that_it_was_trained_on(finished: tuple[Path, list[object]]) -> None:
    config, last = finished[0] / "config.yaml", finished[0] / "checkpoints" / "last.ckpt"
    done = organseg("test", "--config", config, "--ckpt_path", last, "--data.init_args.fold=1", check=4)
    assert "data.fold: trained with 0, asked for 1" in done.stderr


def test_changed_data_are_another_run(finished: tuple[Path, list[object]], toy: Path, tmp_path: Path) -> None:
    changed = tmp_path / "dataset.yaml"
    manifest = (toy / "phantoms" / "dataset.yaml").read_text()
    changed.write_text(f"root: {toy / 'phantoms'}\nhide: [stomach]\n{manifest}")
    organseg("prepare", changed, "--out", tmp_path / "cache", "--processes", 1)
    done = organseg(*finished[1], "--data.init_args.cache", tmp_path / "cache", check=4)
    assert "data content" in done.stderr


def test_data_that_changed_are_not_tested_with_an_older_network(
    finished: tuple[Path, list[object]], toy: Path, tmp_path: Path
) -> None:
    # The folds are drawn anew: patients whom the network knows would be tested, without a word.
    run, cache = finished[0], tmp_path / "cache"
    shutil.copytree(toy / "cache", cache)
    lines = (toy / "phantoms" / "dataset.yaml").read_text().splitlines()
    (tmp_path / "fewer.yaml").write_text("\n".join([f"root: {toy / 'phantoms'}", *lines[:-1]]))
    organseg("prepare", tmp_path / "fewer.yaml", "--out", cache, "--processes", 1)
    last = run / "checkpoints" / "last.ckpt"
    for command in ("test", "validate"):
        done = organseg(command, "--config", run / "config.yaml", "--ckpt_path", last, "--data.init_args.cache", cache,
                        "--out", tmp_path / "out", check=4)  # fmt: skip
        assert "trained on other data than the cache holds now" in done.stderr
        assert len(done.stderr.splitlines()) == 1
    done = organseg("test", "--config", run / "config.yaml", "--ckpt_path", last, "--data.init_args.val_share=0.5",
                    check=4)  # fmt: skip
    assert "data.val_share: trained with 0.3, asked for 0.5" in done.stderr


def test_results_are_written_where_the_run_is_now_and_are_its_own(
    finished: tuple[Path, list[object]], toy: Path, tmp_path: Path
) -> None:
    run = tmp_path / "moved"
    shutil.copytree(finished[0], run)
    config, last = run / "config.yaml", run / "checkpoints" / "last.ckpt"
    organseg("test", "--config", config, "--ckpt_path", last)
    assert (run / "test" / "summary.csv").exists() and not (finished[0] / "test").exists()
    # What anybody can say of the label maps alone is the same.
    theirs = tmp_path / "theirs"
    organseg("evaluate", toy / "phantoms" / "dataset.yaml", "--predictions", run / "test" / "predictions", "--out",
             theirs, "--processes", 1)  # fmt: skip
    for name in ("cases.csv", "summary.csv"):
        assert (theirs / name).read_bytes() == (run / "test" / name).read_bytes()
    phase = run / "03_round1_train" / "checkpoints"
    shutil.copytree(run / "checkpoints", phase)
    assert is_tested(last, run / "test") and not is_tested(last, theirs)
    organseg(
        "test", "--config", config, "--ckpt_path", last, "--out", tmp_path / "part", "--trainer.limit_test_batches=1"
    )
    assert (tmp_path / "part" / "test" / "summary.csv").exists() and not is_tested(last, tmp_path / "part" / "test")
    for other in (phase / "last.ckpt", run / "checkpoints" / "previous.ckpt"):
        shutil.copy(last, other)
        done = organseg("test", "--config", config, "--ckpt_path", other, "--out", run, check=2)
        assert "no result of" in done.stderr and "--out" in done.stderr
    organseg("evaluate", toy / "phantoms" / "dataset.yaml", "--predictions", run / "test" / "predictions", "--out",
             run / "test", check=2)  # fmt: skip


def test_a_training_begins_with_the_network_of_another(
    finished: tuple[Path, list[object]], toy: Path, tmp_path: Path
) -> None:
    run, command = finished
    checkpoint = run / "checkpoints" / "last.ckpt"
    fit = [*command, "--trainer.max_steps=1", "--model.init_args.optimizer.init_args.lr=1e-12", "--out"]
    weights = load_checkpoint(checkpoint)["state_dict"]["network.head.weight"]
    organs = ["--data.init_args.organs=[spleen,liver]"]
    done = organseg(*fit, tmp_path / "run", "--init", checkpoint, *organs)
    assert "begins with the network of" in done.stdout and "anew: nothing" in done.stdout
    named = load_checkpoint(checkpoint)["organseg"]["organs"]
    found = load_checkpoint(tmp_path / "run" / "checkpoints" / "last.ckpt")["state_dict"]["network.head.weight"]
    assert found.allclose(weights[[named.index(organ) for organ in ("spleen", "liver")]], atol=1e-5)
    assert "nothing to do" in organseg(*fit, tmp_path / "run", "--init", checkpoint, *organs).stdout
    refused = organseg(*fit, tmp_path / "run", *organs, check=4).stderr
    assert "init: run has" in refused and "asked for nothing" in refused
    inside = tmp_path / "run" / "checkpoints" / "last.ckpt"
    refused = organseg(*fit, tmp_path / "run", "--overwrite", "--init", inside, check=2).stderr
    assert "lies in the run's own folder" in refused and inside.exists()
    refused = organseg(*fit, tmp_path / "other", "--ckpt_path", checkpoint, check=2).stderr
    assert "unrecognized arguments: --ckpt_path" in refused and "--init CKPT begins with a network" in refused


def test_a_diverged_training_ends_with_7(finished: tuple[Path, list[object]], tmp_path: Path) -> None:
    words = ("--model.init_args.optimizer.init_args.lr=1e20", "--trainer.max_steps=40")
    done = organseg(*finished[1], *words, "--out", tmp_path / "run", check=7)
    assert "no finite gradient in 10 steps in a row" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("word", "said"),
    [("--trainer.accelerator=gpu", "No supported gpu backend"), ("--trainer.enable_checkpointing=false", "Checkpoint"),
     ("--model.init_args.optimizer.init_args.weight_decay=-1", "Invalid weight_decay")],
)  # fmt: skip
def test_what_lightning_and_torch_refuse_is_one_line_too(
    finished: tuple[Path, list[object]], tmp_path: Path, word: str, said: str
) -> None:
    done = organseg(*finished[1], word, "--out", tmp_path / "run", check=2)
    assert said in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize("lost", ["closed", "full", "nobody reads", "both full", "nobody reads both"])
def test_a_training_goes_on_without_its_standard_output(
    finished: tuple[Path, list[object]], tmp_path: Path, lost: str
) -> None:
    words = [str(word) for word in (*finished[1], "--out", tmp_path / "run")]
    shown = {
        "closed": ">&-", "full": "> /dev/full", "nobody reads": "| true; exit ${PIPESTATUS[0]}",
        "both full": "> /dev/full 2>&1", "nobody reads both": "2>&1 | true; exit ${PIPESTATUS[0]}",
    }[lost]  # fmt: skip
    script = f"{sys.executable} -m organseg {shlex.join(words)} {shown}"
    done = subprocess.run(["bash", "-c", script], env=warm.environment_of(), stderr=subprocess.PIPE, text=True)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr and done.stderr.count("an output is lost") == (
        lost in ("full", "nobody reads")
    )
    assert json.loads((tmp_path / "run" / "run.json").read_text())["finished"]
