"""What `predict` makes, skips and refuses."""

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import nibabel
import numpy as np
import pytest
import warm
from toy import organseg

from organseg import cli
from organseg.checkpoints import load_checkpoint
from organseg.cli.prediction import Job, Writer
from organseg.methods.base import SegmentationModule
from organseg.runtime.checkpoint_io import save_checkpoint


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
