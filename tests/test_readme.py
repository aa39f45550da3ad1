"""The README's commands, as printed, at toy size."""

import re
import shlex
import shutil
from pathlib import Path

import pytest
from toy import TOY, organseg
from understood import assert_understood

ROOT = Path(__file__).parent.parent
BLOCKS = re.findall(r"^```\w*\n(.*?)^```", (ROOT / "README.md").read_text(), flags=re.DOTALL | re.MULTILINE)
OWN_DATA = [block for block in BLOCKS if "MY_SCANS" in block or "runs/mine" in block]
COMMANDS = [line.removeprefix("organseg ") for block in OWN_DATA for line in block.splitlines() if "organseg " in line]
ELSEWHERE = (ROOT / "README.md").read_text().partition("\n## On a cluster\n")[2].partition("\n## ")[0]
OTHERS = [
    line.partition("  #")[0]
    .strip()
    .replace("$k", "0")
    .replace("$name", "btcv_30_naive")
    .replace("fold_?", "fold_0")
    .replace("$run", "fusion_inerrant")
    for block in BLOCKS
    if block not in OWN_DATA and block not in ELSEWHERE
    for line in re.split(r"\n| && ", block)
    if line.strip().startswith("organseg ")
]


@pytest.mark.parametrize("line", OTHERS)
def test_every_other_command_is_understood(line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    words = shlex.split(line)[1:]
    if words[0] == "test":  # the config of a run that a `fit` before it has made
        name = Path(words[2]).parent.name.replace("fold_0", "own_100_inerrant0")
        words[2] = f"configs/experiment/{name}.yaml"
    assert_understood(words, monkeypatch)


def test_commands_are_found() -> None:
    assert {shlex.split(line)[1] for line in OTHERS} >= {"fit", "test", "predict", "prepare", "evaluate", "report"}


@pytest.mark.slow
def test_own_data_from_import_to_report(tmp_path: Path) -> None:
    organseg("phantom", "--cases", 6, "--shape", 24, 32, 32, "--out", tmp_path / "phantoms", "--processes", 1)
    scans = tmp_path / "MY_SCANS"
    scans.mkdir()
    (tmp_path / "phantoms" / "img").rename(scans / "images")
    (tmp_path / "phantoms" / "label").rename(scans / "labels")
    (tmp_path / "NEW_SCANS").mkdir()
    shutil.copy(scans / "images" / "phantom_002.nii.gz", tmp_path / "NEW_SCANS")
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    labels = "1=liver 2=gallbladder 3=spleen 4=left_kidney 5=right_kidney 6=pancreas 7=stomach"
    names = [command.split()[0] for command in COMMANDS]
    assert names == ["import", "check", "prepare", "fit", "predict", "test", "report"]
    for command in COMMANDS:
        words = command.replace("1=liver 2=spleen 3=pancreas", labels).replace("--size 128", "--size 32").split()
        if words[0] == "fit":
            words += [*TOY, "--trainer.max_steps=2", "--trainer.val_check_interval=1"]
        organseg(*words, cwd=tmp_path, cold=True)
    assert (tmp_path / "predictions" / "phantom_002.nii.gz").exists()
    assert (tmp_path / "runs" / "mine" / "report" / "index.html").exists()


def test_make_targets_of_the_readme_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"`?make ([a-z-]+)", (ROOT / "README.md").read_text()):
        assert f"\n{target}:" in makefile, target
