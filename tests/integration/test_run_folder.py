"""What `fit` does with a run folder that is there already, and what a user is told when something is wrong."""

import shutil
from pathlib import Path

import pytest
from toy import TOY, organseg

from organseg import cli

CONFIG = Path(__file__).parents[2] / "configs" / "experiment" / "phantom_30_inerrant0.yaml"


@pytest.fixture(scope="module")
def finished(toy: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[object]]:
    """A finished run with validation, and the command that made it."""
    run = tmp_path_factory.mktemp("finished") / "run"
    command = ["fit", "--config", CONFIG, "--data.init_args.cache", toy / "cache", "--out", run, *TOY,
               "--trainer.max_steps=4", "--trainer.val_check_interval=2", "--data.init_args.val_share=0.3",
               "--data.init_args.label_share=1.0"]  # fmt: skip
    organseg(*command, "--trainer.precision=32-true")
    return run, command


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
        [*test, "--trainer.precision=16-true"],
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


@pytest.mark.slow
def test_predict_skips_what_is_made_and_refuses_what_is_not_its_own(
    finished: tuple[Path, list[object]], toy: Path, tmp_path: Path
) -> None:
    last, scans = finished[0] / "checkpoints" / "last.ckpt", toy / "phantoms" / "img"
    command = ["predict", "--ckpt_path", last, "--input", scans / "phantom_001.nii.gz", "--out", tmp_path]
    organseg(*command)
    output = tmp_path / "phantom_001.nii.gz"
    before = output.stat().st_mtime_ns
    assert "made already" in organseg(*command).stdout
    assert output.stat().st_mtime_ns == before
    output.write_bytes(b"somebody's work")
    assert str(output) in organseg(*command, check=2).stderr
    assert output.read_bytes() == b"somebody's work"
    organseg(*command, "--overwrite")
    assert output.read_bytes() != b"somebody's work"


def test_shards_of_a_prediction_make_it_whole(
    finished: tuple[Path, list[object]], toy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    scans = tmp_path / "scans"
    scans.mkdir()
    for n in range(3):
        shutil.copy(toy / "phantoms" / "img" / "phantom_000.nii.gz", scans / f"scan{n}.nii.gz")
    words = ["predict", "--ckpt_path", str(finished[0] / "checkpoints" / "last.ckpt"), "--input", str(scans), "--out",
             str(tmp_path / "out"), "--accelerator", "cpu"]  # fmt: skip
    assert cli.run([*words, "--shard", "1/2"]) == 0
    assert [path.name for path in (tmp_path / "out").glob("*.nii.gz")] == ["scan1.nii.gz"]
    assert cli.run([*words, "--shard", "0/2"]) == 0 and cli.run([*words, "--shard", "1/2"]) == 0
    assert cli.run(words) == 0
    assert "all 3 outputs are made already" in capsys.readouterr().out
    assert cli.run([*words, "--shard", "2/2"]) == 2
    (tmp_path / "other").mkdir()
    shutil.copy(scans / "scan1.nii.gz", tmp_path / "other")  # both would become scan1, in different shards
    twice = [*words[:4], str(tmp_path / "other"), *words[4:6], str(tmp_path / "new"), "--shard", "0/2"]
    assert cli.run(twice) == 2 and "would both become" in capsys.readouterr().err


def test_predict_refuses_a_bad_input_and_does_the_others(
    finished: tuple[Path, list[object]], toy: Path, tmp_path: Path
) -> None:
    bad = tmp_path / "bad.nii.gz"
    bad.write_bytes((toy / "phantoms" / "img" / "phantom_000.nii.gz").read_bytes()[:2000])
    good = toy / "phantoms" / "img" / "phantom_001.nii.gz"
    last = finished[0] / "checkpoints" / "last.ckpt"
    done = organseg("predict", "--ckpt_path", last, "--input", bad, good, "--out", tmp_path / "out", check=3)
    assert "bad.nii.gz" in done.stderr
    assert (tmp_path / "out" / "phantom_001.nii.gz").exists()
    assert not (tmp_path / "out" / "bad.nii.gz").exists()


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
