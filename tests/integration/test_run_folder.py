"""What `fit` does with a run folder that is there already, and what a user is told when something is wrong."""

import json
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import nibabel
import numpy as np
import pytest
import warm
from toy import TOY, organseg

from organseg import cli
from organseg.checkpoints import load_checkpoint
from organseg.cli.prediction import Job, Writer
from organseg.cli.tested import is_tested
from organseg.methods.base import SegmentationModule
from organseg.runtime.checkpoint_io import save_checkpoint

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


def test_one_folder_of_predictions_has_one_meaning(
    finished: tuple[Path, list[object]], toy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    scans, out = toy / "phantoms" / "img", tmp_path / "out"
    words = ["predict", "--ckpt_path", str(finished[0] / "checkpoints" / "last.ckpt"), "--out", str(out),
             "--accelerator", "cpu", "--input"]  # fmt: skip
    assert cli.run([*words, str(scans / "phantom_000.nii.gz")]) == 0
    (out / "labels.json").write_text('{"1": "left_kidney"}')  # as a network of other organs would have it
    assert cli.run([*words, str(scans / "phantom_001.nii.gz")]) == 2
    assert "label maps of other organs" in capsys.readouterr().err
    assert not (out / "phantom_001.nii.gz").exists()
    (out / "labels.json").unlink()
    assert cli.run([*words, str(scans / "phantom_001.nii.gz"), "--devices", "2"]) == 2
    assert "--shard" in capsys.readouterr().err


def test_a_prediction_that_was_killed_before_it_was_noted_is_made_again(
    finished: tuple[Path, list[object]], toy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["predict", "--ckpt_path", str(finished[0] / "checkpoints" / "last.ckpt"), "--out", str(tmp_path),
             "--accelerator", "cpu", "--input", str(toy / "phantoms" / "img" / "phantom_000.nii.gz")]  # fmt: skip

    def killed(*_: object) -> str:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:  # between the map and its line in the journal
        patched.setattr("organseg.cli.prediction.Writer._note", _note_once_then(killed))
        assert cli.run(words) == 130
    output = tmp_path / "phantom_000.nii.gz"
    assert output.exists()
    assert cli.run(words) == 0
    output.write_bytes(b"somebody's work")
    assert cli.run(words) == 2


def _note_once_then(end: Callable[..., str]) -> Callable[..., None]:
    note = Writer._note

    def noted(self: Writer, job: Job, output: str) -> None:
        note(self, job, output) if output == "begun" else end()

    return noted


def test_probabilities_are_those_that_decided(
    finished: tuple[Path, list[object]], toy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    segment = SegmentationModule.segment
    monkeypatch.setattr(SegmentationModule, "segment", lambda *given: seen.append(1) or segment(*given))
    checkpoint = load_checkpoint(finished[0] / "checkpoints" / "last.ckpt")
    checkpoint["state_dict"]["network.head.bias"][:2] += 4.6  # as likely as not: a few steps have found no organ yet
    save_checkpoint(checkpoint, tmp_path / "likely.ckpt")
    words = ["predict", "--ckpt_path", str(tmp_path / "likely.ckpt"), "--out", str(tmp_path), "--accelerator", "cpu",
             "--probabilities", "--input"]  # fmt: skip
    scans = [str(toy / "phantoms" / "img" / f"phantom_00{n}.nii.gz") for n in (0, 1)]
    assert cli.run([*words, *scans]) == 0
    assert len(seen) == 2, "one pass a case"
    for n in (0, 1):
        label = nibabel.load(tmp_path / f"phantom_00{n}.nii.gz").get_fdata()
        names = json.loads((tmp_path / "labels.json").read_text())
        probs = [nibabel.load(tmp_path / f"phantom_00{n}.{organ}.nii.gz").get_fdata() for organ in names.values()]
        highest = np.stack(probs).max(axis=0)
        assert highest[label > 0].min() > 0.49 and highest[label == 0].max() < 0.51


def test_predict_takes_the_affine_that_it_is_told(
    finished: tuple[Path, list[object]], toy: Path, tmp_path: Path
) -> None:
    scan = tmp_path / "scan.nii.gz"
    image = nibabel.load(toy / "phantoms" / "img" / "phantom_000.nii.gz")
    qform = image.affine.copy()
    qform[2, 3] += 40
    image.set_sform(image.affine, code=1)
    image.set_qform(qform, code=1)
    nibabel.save(image, scan)
    words = ["predict", "--ckpt_path", finished[0] / "checkpoints" / "last.ckpt", "--input", scan, "--out"]
    assert cli.run([*map(str, words), str(tmp_path / "none")]) == 3
    for source, affine in (("qform", qform), ("sform", image.get_sform())):
        assert cli.run([*map(str, words), str(tmp_path / source), "--affine", source]) == 0
        assert np.allclose(nibabel.load(tmp_path / source / "scan.nii.gz").affine, affine)
    image.header["sform_code"] = image.header["qform_code"] = 0
    nibabel.save(nibabel.Nifti1Image(np.asarray(image.dataobj), None, image.header), scan)
    assert cli.run([*map(str, words), str(tmp_path / "none")]) == 3
    assert cli.run([*map(str, words), str(tmp_path / "assumed"), "--assume_affine"]) == 0


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


def test_a_network_of_one_s_own_predicts_when_it_is_trusted(
    finished: tuple[Path, list[object]], toy: Path, tmp_path: Path
) -> None:
    command = finished[1]
    module = tmp_path / "mine.py"
    readme = (Path(__file__).parents[2] / "README.md").read_text()
    (text,) = re.findall(r"^```python\n(.*?)^```", readme, flags=re.DOTALL | re.MULTILINE)
    imported = tmp_path / "imported"
    module.write_text(f"from pathlib import Path\n\nPath({str(imported)!r}).touch()\n{text}")
    own = ("--model.init_args.network", "mine.Mine", "--trainer.max_steps=1", "--out", tmp_path / "run")
    environment = warm.environment_of({"PYTHONPATH": f"{tmp_path}"})
    scan = toy / "phantoms" / "img" / "phantom_000.nii.gz"
    predict = ["predict", "--ckpt_path", tmp_path / "run" / "checkpoints" / "last.ckpt", "--input", scan, "--out",
               tmp_path / "out"]  # fmt: skip
    lacking = tmp_path / "lacking.py"
    lacking.write_text("from torch import nn\n\nclass Net(nn.Conv2d):\n    pass\n")
    strange = (
        "--model.init_args.network=lacking.Net",
        "--model.init_args.network.kernel_size=1",
        "--trust-import=lacking",
    )
    done = subprocess.run(
        [sys.executable, "-m", "organseg", *map(str, [*command, "--out", tmp_path / "none", *strange])],
        env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 2 and "Net has no `head`" in done.stderr, done.stderr
    for words, code in (
        ([*command, *own], 2),
        ([*command, *own, "--trust-import=mine"], 0),
        (predict, 4),
        ([*predict, "--trust-import", "mine"], 0),
    ):
        command = [sys.executable, "-m", "organseg", *map(str, words)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert done.returncode == code, done.stderr
        assert imported.exists() == (code == 0), "what nobody trusts is not even imported"
        imported.unlink(missing_ok=True)
        if code:
            assert "--trust-import MODULE allows it" in done.stderr and "Traceback" not in done.stderr


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
