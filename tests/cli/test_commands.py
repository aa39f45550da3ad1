"""Exit codes (errors.py) and outputs of the commands that are not Lightning's."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from synthetic import make_case, write_dataset, write_label_map

import organseg
from organseg.cli import run
from organseg.data.cache import CachedCase
from organseg.data.manifest import load_manifest
from organseg.errors import UsageError


def lines_of(capsys) -> tuple[list[str], list[str]]:
    captured = capsys.readouterr()
    return captured.out.splitlines(), captured.err.splitlines()


def usage(capsys, words: list[str]) -> str:
    """Error output of a command line that is wrong as such."""
    with pytest.raises(SystemExit) as caught:
        run(words)
    assert caught.value.code == 2
    return capsys.readouterr().err


LIGHT = """
import sys
from pathlib import Path
sys.argv = ["organseg", {word!r}]
from organseg.__main__ import main
try:
    main()
except SystemExit as stop:
    assert stop.code == 0, stop.code
heavy = {{"torch", "lightning", "h5py", "nibabel", "scipy", "albumentations", "jsonargparse"}} & set(sys.modules)
assert not heavy, heavy
"""


@pytest.mark.parametrize(("word", "expected"), [("--help", "prepare"), ("--version", organseg.__version__)])
def test_help_and_version_import_nothing_heavy(word, expected):
    done = subprocess.run([sys.executable, "-c", LIGHT.format(word=word)], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert expected in done.stdout


def test_the_module_is_the_command(tmp_path):
    words = [sys.executable, "-m", "organseg", "check", "gone.yaml"]
    done = subprocess.run(words, capture_output=True, text=True, check=False, cwd=tmp_path, env={"PATH": ""})
    assert done.returncode == 2
    assert done.stderr == "organseg: gone.yaml: no such file\n"
    assert done.stdout == ""


def test_no_command_shows_help(capsys):
    with pytest.raises(SystemExit) as caught:
        run([])
    assert caught.value.code == 0
    assert "COMMAND" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["chek"], "invalid choice: 'chek'"),
        (["check"], "DATASET.yaml"),
        (["prepare", "d.yaml"], "--out"),
        (["prepare", "d.yaml", "--out", "c", "--size", "1", "--spacing", "1", "1", "1"], "not allowed with"),
        (["prepare", "d.yaml", "--out", "c", "--size", "big"], "invalid int value"),
        (["prepare", "d.yaml", "--out", "c", "--sizes", "3"], "unrecognized arguments: --sizes"),
        (["import", "dicom", "r", "--out", "o"], "invalid choice: 'dicom'"),
    ],
)
def test_a_wrong_command_line_is_2(capsys, words, message):
    assert message in usage(capsys, words)


def test_check_lists_faults_and_who_annotates_what(tmp_path, capsys):
    entries = {"case1": {"annotated": ["liver"], "hide": ["spleen", "left_kidney", "right_kidney"]}}
    dataset = write_dataset(tmp_path, 4, entries=entries)
    label = make_case(2)[1]
    write_label_map(tmp_path / "case2_label.nii.gz", np.where(label == 7, 0, label).astype(np.uint8))
    assert run(["check", str(dataset), "--processes", "1"]) == 0
    out, err = lines_of(capsys)
    marks = {words[1]: words[3::2] for words in (line.split() for line in out) if len(words) > 3}
    assert marks["case0"] == ["+", "+", "+", "+"]  # liver, left kidney, right kidney, spleen
    assert marks["case1"] == ["+", ".", ".", "."]
    assert marks["case2"] == ["+", "+", "+", "0"]
    totals = next(line for line in out if "annotated in" in line).replace("annotated in", "").split("│")
    assert [cell.strip() for cell in totals if cell.strip()] == ["4", "3", "3", "3"]
    assert out[-1] == "tiny: 4 of 4 cases can be used"
    assert len(err) == 1
    assert err[0].startswith("warning: case2: case2_label.nii.gz: spleen: found no voxel")


def test_check_of_a_bad_case_is_3(tmp_path, capsys):
    dataset = write_dataset(tmp_path, 3)
    (tmp_path / "case1.nii.gz").write_bytes(b"\x1f\x8b nothing")
    assert run(["check", str(dataset), "--processes", "1"]) == 3
    out, err = lines_of(capsys)
    assert next(line for line in out if "case1" in line).split()[3::2] == ["!"] * 4
    assert out[-1] == "tiny: 2 of 3 cases can be used"
    assert len(err) == 1 and err[0].startswith("refused: case1: case1.nii.gz: gzip")


def test_faults_of_all_manifests_are_told_at_once(tmp_path, capsys):
    good = write_dataset(tmp_path / "good", 1)
    for name in ("one", "two"):
        (tmp_path / f"{name}.yaml").write_text(f"name: {name}\nmodality: CT\nlabels: {{1: livr}}\ncases: []\n")
    assert run(["check", str(tmp_path / "one.yaml"), str(good), str(tmp_path / "two.yaml")]) == 2
    out, err = lines_of(capsys)
    assert out == []
    assert sum("one.yaml" in line for line in err) == sum("two.yaml" in line for line in err) == 2


def test_two_data_sets_of_one_name(tmp_path, capsys):
    paths = [str(write_dataset(tmp_path / folder, 1)) for folder in "ab"]
    assert run(["check", *paths]) == 2
    assert "two data sets have the same name: tiny, tiny" in capsys.readouterr().err


def test_prepare_and_again(tmp_path, capsys):
    dataset, cache = write_dataset(tmp_path / "set", 2), tmp_path / "deep" / "cache"
    words = ["prepare", str(dataset), "--out", str(cache), "--size", "16", "--processes", "1"]
    assert run(words) == 0
    assert lines_of(capsys) == (["tiny: 2 cases prepared, 0 were current, 0 refused"], [])
    assert CachedCase(cache / "tiny" / "case0.h5").shape == (12, 16, 16)
    assert run(words) == 0
    assert lines_of(capsys)[0] == ["tiny: 0 cases prepared, 2 were current, 0 refused"]


def test_prepare_with_a_refused_case_is_3_and_the_rest_is_done(tmp_path, capsys):
    dataset, cache = write_dataset(tmp_path / "set", 3), tmp_path / "cache"
    (tmp_path / "set" / "case0_label.nii.gz").write_bytes(b"")
    assert run(["prepare", str(dataset), "--out", str(cache), "--processes", "1", "--spacing", "10", "18", "16"]) == 3
    out, err = lines_of(capsys)
    assert out == ["tiny: 2 cases prepared, 0 were current, 1 refused"]
    assert [line.split(":")[:3] for line in err] == [["refused", " case0", " case0_label.nii.gz"]]
    assert set(json.loads((cache / "tiny" / "index.json").read_text())["cases"]) == {"case1", "case2"}
    assert CachedCase(cache / "tiny" / "case1.h5").header.spacing == (10, 18, 16)


@pytest.mark.parametrize(
    "option",
    [["--size", "0"], ["--size", "-3"], ["--spacing", "1", "0", "1"], ["--spacing", "1", "nan", "1"],
     ["--spacing", "nan", "1", "1"], ["--spacing", "1", "1", "inf"]],
)  # fmt: skip
def test_sizes_and_spacings_above_0(tmp_path, capsys, option):
    dataset = write_dataset(tmp_path / "set", 1)
    assert run(["prepare", str(dataset), "--out", str(tmp_path / "cache"), *option]) == 2
    assert "--size and --spacing must be numbers above 0" in capsys.readouterr().err
    assert not (tmp_path / "cache").exists()


def test_a_cache_that_cannot_be_written_is_5(tmp_path, capsys):
    dataset = write_dataset(tmp_path / "set", 1)
    (tmp_path / "cache").write_text("a file")
    assert run(["prepare", str(dataset), "--out", str(tmp_path / "cache"), "--processes", "1"]) == 5
    (line,) = lines_of(capsys)[1]
    assert "cannot be made" in line and "--out" in line


def test_phantom(tmp_path, capsys):
    words = ["phantom", "--cases", "2", "--seed", "3", "--out", str(tmp_path / "p"), "--shape", "16", "24", "24"]
    assert run([*words, "--processes", "1"]) == 0
    out, err = lines_of(capsys)
    dataset = tmp_path / "p" / "dataset.yaml"
    assert out == [f"{dataset}: 2 cases", f"next: organseg prepare {dataset} --out cache"]
    assert err == []
    assert run(["check", str(dataset), "--processes", "1"]) == 0
    before = yaml.safe_load(dataset.read_text())
    assert run(words) == 2
    assert yaml.safe_load(dataset.read_text()) == before


@pytest.mark.parametrize("option", [["--cases", "0"], ["--shape", "15", "32", "32"]])
def test_phantoms_that_cannot_be_made(tmp_path, capsys, option):
    assert run(["phantom", "--out", str(tmp_path / "p"), *option]) == 2
    assert "--cases must be at least 1" in capsys.readouterr().err
    assert not (tmp_path / "p").exists()


def test_debug_shows_where(tmp_path):
    with pytest.raises(UsageError, match="no such file"):
        run(["--debug", "check", str(tmp_path / "gone.yaml")])


def test_a_closed_pipe_is_no_error(tmp_path):
    dataset = write_dataset(tmp_path / "set", 1)
    words = [sys.executable, "-m", "organseg", "check", str(dataset), "--processes", "1"]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.close()
    assert "Traceback" not in process.stderr.read().decode()
    assert process.wait() == 0


def test_ctrl_c_is_no_traceback(monkeypatch):
    def interrupted(_):
        raise KeyboardInterrupt

    monkeypatch.setattr("organseg.cli.commands.plan_command", interrupted)
    assert run(["plan", "cache"]) == 130


def test_channels_of_nnu_net(tmp_path, capsys):
    write_dataset(tmp_path / "raw", 1)
    root = tmp_path / "raw"
    for folder in ("imagesTr", "labelsTr"):
        (root / folder).mkdir()
    (root / "case0_label.nii.gz").rename(root / "labelsTr" / "case_0000.nii.gz")  # the case's own number
    (root / "case0.nii.gz").rename(root / "imagesTr" / "case_0000_0000.nii.gz")
    words = ["import", "folder", str(root), "--out", str(root / "d.yaml"), "--overwrite", "--labels", "2=liver"]
    assert run(words) == 0
    assert [(case.id, case.label is None) for case in load_manifest(root / "d.yaml").cases] == [("case_0000", False)]
    (root / "labelsTr" / "gone.nii.gz").write_bytes(b"")
    assert run(words) == 0
    assert "gone.nii.gz: no image of that name" in capsys.readouterr().err
    second = root / "imagesTr" / "case_0000_0001.nii.gz"
    second.write_bytes(b"")
    assert run(words) == 2  # else it would be a patient of its own
    assert f"{second.name}: cases have one channel here" in capsys.readouterr().err


def test_a_manifest_that_cannot_be_read(tmp_path, capsys, monkeypatch):
    path = write_dataset(tmp_path, 1)
    monkeypatch.setattr(Path, "read_text", lambda *_, **__: (_ for _ in ()).throw(PermissionError(13, "no permission")))
    assert run(["check", str(path)]) == 2
    assert f"{path}: cannot be read: no permission" in capsys.readouterr().err


@pytest.mark.parametrize("word", ["--trust-import", "--trust-import="])
def test_trust_needs_a_module(capsys, word):
    assert run(["predict", word]) == 2
    assert "name a module" in capsys.readouterr().err
