"""Every line of the README's section "On a cluster": accepted by the tool that it is for, and by organseg's parser."""

import argparse
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from fake_slurm import Slurm, recorded, recorder
from understood import assert_understood

ROOT = Path(__file__).parents[2]
SECTION = (ROOT / "README.md").read_text().partition("\n## On a cluster\n")[2].partition("\n## ")[0]
BLOCKS = re.findall(r"^```\w*\n(.*?)^```", SECTION, flags=re.DOTALL | re.MULTILINE)
LINES = [line.partition("  #")[0].strip() for block in BLOCKS for line in block.splitlines()]
ELSEWHERE = ("kubectl",)
"""Tools whose lines other tests run."""
SWEEPING = 'ORGANSEG="python tools/sweep.py" sbatch'


def lines_of(*tools: str) -> list[str]:
    return [line for line in LINES if line.startswith(tools)]


def test_each_line_is_for_a_tool_whose_lines_are_tested() -> None:
    known = ("docker", "sbatch", "sed", "wandb", SWEEPING, "python tools/sweep.py", *ELSEWHERE)
    assert len(LINES) > 15
    assert [line for line in LINES if not line.startswith(known)] == []


def accepted(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """The real parser takes the words of an organseg command."""
    if words[0] == "test":  # the config of a run that the README's fit has made
        named = words[words.index("--config") + 1]
        words = ["configs/experiment/own_100_inerrant0.yaml" if word == named else word for word in words]
    assert_understood(words, monkeypatch)


@pytest.mark.slow
@pytest.mark.parametrize("line", lines_of("sbatch"))
def test_sbatch(line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    slurm = Slurm(tmp_path / "cluster")
    (slurm.folder / "tools").symlink_to(ROOT / "tools")
    code = slurm.submit(*shlex.split(line)[1:], ORGANSEG=recorder(slurm.folder, *[0] * 64))
    assert code == 0, slurm.said
    seen = {tuple(words) for words in recorded(slurm.folder)}
    assert not any("%" in word for words in seen for word in words)
    monkeypatch.chdir(ROOT)
    accepted(list(min(seen)), monkeypatch)


def docker_parser() -> argparse.ArgumentParser:
    """The options that the README uses, as docker has them."""
    parser = argparse.ArgumentParser("docker", allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True)
    build = commands.add_parser("build", allow_abbrev=False)
    build.add_argument("-t", "--tag", required=True)
    build.add_argument("--build-arg", action="append", default=[])
    build.add_argument("context", type=Path)
    run = commands.add_parser("run", allow_abbrev=False)
    for flag in ("--rm", "--read-only"):
        run.add_argument(flag, action="store_true")
    for option in ("--user", "--gpus", "--shm-size", "--network"):
        run.add_argument(option)
    run.add_argument("-v", "--volume", action="append", default=[])
    run.add_argument("image")
    run.add_argument("words", nargs=argparse.REMAINDER)
    return parser


@pytest.mark.parametrize("line", lines_of("docker"))
def test_docker(line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    called = docker_parser().parse_args(shlex.split(line)[1:])
    dockerfile = (ROOT / "Dockerfile").read_text()
    if called.command == "build":
        assert (ROOT / called.context / "Dockerfile").exists()
        for name, _, value in (argument.partition("=") for argument in called.build_arg):
            assert re.search(rf"^ARG {name}\b", dockerfile, flags=re.MULTILINE) and value
    else:
        assert called.image == "organseg"
        writable = {volume.split(":")[1] for volume in called.volume}
        assert writable == {"/work", "/scratch"} or not called.read_only
        accepted(called.words, monkeypatch)


@pytest.mark.parametrize("line", lines_of("sed"))
def test_one_line_names_the_image_in_all_manifests(line: str, tmp_path: Path) -> None:
    shutil.copytree(ROOT / "tools" / "cluster", tmp_path / "tools" / "cluster")
    subprocess.run(["bash", "-c", line], check=True, cwd=tmp_path)
    texts = [path.read_text() for path in (tmp_path / "tools/cluster/kubernetes").glob("*.yaml")]
    images = [image for text in texts for image in re.findall(r"^ +image: (.*)$", text, flags=re.MULTILINE)]
    assert len(images) > 5 and set(images) == {"REGISTRY/organseg:0.1.0"}


@pytest.mark.parametrize("line", lines_of("wandb sweep"))
def test_wandb_sweep(line: str) -> None:
    assert (ROOT / line.split()[-1]).is_file()


@pytest.mark.parametrize("line", lines_of("python tools/sweep.py"))
def test_sweep(line: str) -> None:
    words = shlex.split(line)[2:]
    done = subprocess.run(
        [sys.executable, ROOT / "tools" / "sweep.py", words[0], "--help"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0 and all(word in done.stdout for word in words if word.startswith("--"))
    assert all((ROOT / word).is_file() for word in words if word.endswith(".yaml"))


@pytest.mark.parametrize("line", lines_of(SWEEPING))
def test_an_array_of_agents(line: str, tmp_path: Path) -> None:
    """Each job's agent is asked for one trial; a stand-in keeps its words."""
    slurm = Slurm(tmp_path / "cluster")
    (slurm.folder / "tools").symlink_to(ROOT / "tools")
    wandb = slurm.folder / "bin" / "wandb"
    wandb.symlink_to(recorder(slurm.folder, *[0] * 16))
    slurm.environment["PATH"] = f"{slurm.folder / 'bin'}:{Path(sys.executable).parent}:{slurm.environment['PATH']}"
    variable, *words = shlex.split(line)
    assert slurm.submit(*words[1:], ORGANSEG=variable.partition("=")[2]) == 0, slurm.log
    assert recorded(slurm.folder) == 16 * [["agent", "--count", "1", "ENTITY/PROJECT/ID"]]
