"""The image: its Dockerfile keeps hadolint's rules and ours, its lock says what constraints.txt says, by hash."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from organseg import __version__

ROOT = Path(__file__).parent.parent
sys.path.append(str(ROOT / "tools"))

import image  # noqa: E402

INSTRUCTIONS = image.parse((ROOT / "Dockerfile").read_text())
LAST = INSTRUCTIONS[max(number for number, found in enumerate(INSTRUCTIONS) if found.name == "FROM") :]
"""Those of the stage that is the image."""


def pinned(path: Path) -> dict[str, str]:
    """Package -> version."""
    found = re.findall(r"^([A-Za-z0-9_.-]+)==([^\s;]+)", path.read_text(), flags=re.MULTILINE)
    return {re.sub(r"[-_.]+", "-", name).lower(): version for name, version in found}


def hadolint(text: str) -> subprocess.CompletedProcess[str]:
    words = [Path(sys.executable).with_name("hadolint"), "--no-color", "--failure-threshold", "style", "-"]
    return subprocess.run(words, input=text, capture_output=True, text=True)


def of(name: str) -> list[image.Instruction]:
    return [instruction for instruction in LAST if instruction.name == name]


def test_the_lock_has_the_versions_that_are_tested() -> None:
    lock, tested = pinned(ROOT / "requirements.lock"), pinned(ROOT / "constraints.txt")
    assert {name: version for name, version in lock.items() if name != "setuptools"}.items() <= tested.items()
    assert "torch" not in lock and lock["lightning"] == tested["lightning"]


def test_every_package_is_locked_by_its_hash() -> None:
    lines = [line for line in (ROOT / "requirements.lock").read_text().splitlines() if not line.startswith("#")]
    assert len(lines) > 40
    assert all(re.fullmatch(r"[a-z0-9_.-]+==\S+( --hash=sha256:[0-9a-f]{64})+", line) for line in lines)


def test_compiled_packages_are_locked_for_both_pythons() -> None:
    lines = (ROOT / "requirements.lock").read_text().splitlines()
    for name in ("numpy", "scipy", "h5py", "pyyaml"):
        assert sum(line.count("--hash") for line in lines if line.startswith(f"{name}==")) >= 2, name


def test_the_dockerfile_keeps_all_rules_of_hadolint() -> None:
    found = hadolint((ROOT / "Dockerfile").read_text())
    assert found.returncode == 0, found.stdout


def test_hadolint_would_find_what_breaks_them() -> None:
    text = (ROOT / "Dockerfile").read_text()
    found = hadolint(re.sub(r"^ENTRYPOINT .*$", "ENTRYPOINT organseg", text, flags=re.MULTILINE))
    assert found.returncode != 0 and "DL3025" in found.stdout
    assert "DL3059" in hadolint("FROM debian:12.5-slim\nRUN true\nRUN false\n").stdout  # the mildest level counts


def test_one_rule_is_set_aside_and_once() -> None:
    assert re.findall(r"hadolint .*ignore.*", (ROOT / "Dockerfile").read_text()) == ["hadolint ignore=DL3008"]


def test_tini_is_the_parent_of_organseg() -> None:
    (entry,) = of("ENTRYPOINT")
    assert entry.exec_form() == ["/usr/bin/tini", "-g", "--", "organseg"]
    assert of("CMD")[-1].exec_form() == ["--help"]


def test_the_image_runs_as_a_number_that_is_not_root() -> None:
    user = of("USER")[-1].text
    assert re.fullmatch(r"[1-9]\d*:0", user)
    assert LAST.index(of("USER")[-1]) > max(LAST.index(step) for step in of("RUN"))


def test_what_is_written_goes_to_the_volumes() -> None:
    environment = of("ENV")[0].pairs()
    for name in ("HOME", "TMPDIR", "MPLCONFIGDIR", "XDG_CACHE_HOME", "WANDB_DIR"):
        assert environment[name].split("/")[1] == "scratch", name
    assert environment["PYTHONDONTWRITEBYTECODE"] == "1"
    assert of("WORKDIR")[-1].text == "/work" and "-m 1777 /work /scratch" in of("RUN")[0].text


def test_labels_are_those_of_oci_and_of_the_package() -> None:
    labels = of("LABEL")[0].pairs()
    assert all(name.startswith("org.opencontainers.image.") for name in labels)
    assert {name.rpartition("image.")[2] for name in labels} >= {"title", "version", "revision", "licenses"}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert labels["org.opencontainers.image.licenses"] == project["license"]
    assert labels["org.opencontainers.image.description"] == project["description"]
    arguments = {key: value for step in of("ARG") for key, value in step.pairs().items()}
    assert image.expand(labels["org.opencontainers.image.version"], arguments) == __version__ == project["version"]


def test_no_secret_can_come_in_and_nothing_from_a_url() -> None:
    names = [name for step in INSTRUCTIONS if step.name in ("ARG", "ENV") for name in step.pairs()]
    assert "TORCH" in names
    assert not [name for name in names if re.search("key|token|secret|passw|cred|auth", name, re.IGNORECASE)]
    assert not [step for step in INSTRUCTIONS if step.name == "ADD" or "http" in step.text]


def test_everything_but_torch_comes_by_hash() -> None:
    (install,) = [step.text for step in INSTRUCTIONS if "requirements.lock" in step.text and step.name == "RUN"]
    lock, torch = install.split(" && ", 1)
    assert {"--require-hashes", "--no-deps", "--only-binary=:all:", "--ignore-installed"} <= set(lock.split())
    assert torch.count("pip install") == 1 and '"${TORCH}"' in torch
    others = [step.text for step in INSTRUCTIONS if "pip install" in step.text and step.text != install]
    assert others and all("--no-index" in text for text in others)


def test_the_base_is_pinned_by_its_digest_and_used_by_every_stage() -> None:
    base = next(step for step in INSTRUCTIONS if step.name == "ARG").pairs()["BASE_IMAGE"]
    torch = pinned(ROOT / "constraints.txt")["torch"]
    assert re.fullmatch(rf"pytorch/pytorch:{torch}-cuda[\d.]+-cudnn9-runtime@sha256:[0-9a-f]{{64}}", base)
    assert all(step.text.startswith("${BASE_IMAGE}") for step in INSTRUCTIONS if step.name == "FROM")


def test_the_context_is_what_the_image_copies() -> None:
    for step in INSTRUCTIONS:
        if step.name == "COPY" and "--from" not in step.text:
            for source in step.text.split()[:-1]:
                assert image.taken(ROOT, source), source
    assert [path.suffix for path in image.taken(ROOT, "organseg")].count(".py") > 100
    assert not any(image.taken(ROOT, name) for name in ("tests", "tools", "results", "Makefile", "Dockerfile"))


@pytest.fixture
def context(tmp_path: Path) -> Path:
    """A checkout in which things lie about."""
    (tmp_path / ".dockerignore").write_text((ROOT / ".dockerignore").read_text())
    for name in ("organseg/a.py", "organseg/cli/b.py", "organseg/cli/__pycache__/b.pyc", "organseg/.env",
                 ".git/config", "runs/last.ckpt", "organseg.egg-info/PKG-INFO", "README.md"):  # fmt: skip
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("")
    return tmp_path


def test_what_lies_about_is_not_copied(context: Path) -> None:
    assert [str(path) for path in image.taken(context, "organseg")] == ["organseg/a.py", "organseg/cli/b.py"]
    assert [str(path) for path in image.taken(context, "README.md")] == ["README.md"]
    everything = {str(path) for path in image.taken(context, ".")}
    assert everything == {"README.md", "organseg/a.py", "organseg/cli/b.py"}


@pytest.mark.parametrize(
    ("path", "patterns", "left_out"),
    [
        ("a/b/c.pyc", ["**/*.pyc"], True),
        ("c.pyc", ["**/*.pyc"], True),
        ("a/c.pyc", ["*.pyc"], False),  # one star stays in its folder
        ("a/b", ["a"], True),  # a folder goes with all that is in it
        ("ab", ["a"], False),
        ("a/b", ["*", "!a"], False),
        ("a/b", ["!a", "*"], True),  # the last one that matches decides
        ("a.py", ["a?py"], True),
        ("axpy", ["a.py"], False),  # a dot is a dot
    ],
)
def test_ignored_as_an_engine_would(path: str, patterns: list[str], left_out: bool) -> None:
    assert image.ignored(path, patterns) is left_out


def test_lines_are_joined_and_comments_dropped() -> None:
    found = image.parse('# no\nFROM a AS b\n\nRUN x \\\n    # why\n    && y\nENV A=1 B="${C} d"\n')
    assert [(step.line, step.name, step.text) for step in found] == [
        (2, "FROM", "a AS b"),
        (4, "RUN", "x && y"),
        (7, "ENV", 'A=1 B="${C} d"'),
    ]
    assert found[2].pairs() == {"A": "1", "B": "${C} d"}
    assert image.expand("$C/${C}d${E}", {"C": "c"}) == "c/cd"


@pytest.mark.parametrize(
    "text",
    ["ADD a b", "VOLUME /work", "HEALTHCHECK NONE", "COPY --chown=1 a b", "RUN --mount=type=secret x", 'RUN ["x"]',
     "ENTRYPOINT organseg", "ENV A 1"],
)  # fmt: skip
def test_what_it_would_do_otherwise_than_an_engine_is_refused(text: str, tmp_path: Path) -> None:
    (instruction,) = image.parse(text)
    with pytest.raises(SystemExit, match=r"Dockerfile:1: "):
        image.step(tmp_path, image.Stage(tmp_path), instruction, {})


def test_a_stage_follows_the_dockerfile(context: Path, tmp_path: Path) -> None:
    stage = image.Stage(tmp_path / "root", arguments={"V": "7"})
    text = "ENV PATH=/x:${PATH} V2=$V\nWORKDIR /build\nCOPY README.md ./\nCOPY organseg ./here\nUSER 5:0\n"
    for instruction in image.parse(text):
        image.step(context, stage, instruction, {})
    assert stage.environment == {"PATH": f"/x:{image.BASE_PATH}", "V2": "7"}
    assert (stage.workdir, stage.user) == ("/build", "5:0")
    files = {str(path.relative_to(stage.root)) for path in stage.root.rglob("*") if path.is_file()}
    assert files == {"build/README.md", "build/here/a.py", "build/here/cli/b.py"}


@pytest.mark.parametrize(
    ("path", "fine"),
    [
        ("opt/organseg/lib/python3.12/site-packages/organseg/cli/doctor.py", True),
        ("opt/organseg/lib/python3.12/site-packages/organseg/scan.nii.gz", False),
        ("opt/organseg/share/configs/data/own.yaml", True),
        ("opt/organseg/share/configs/data/own.h5", False),
        ("build/organseg/cli/doctor.py", False),
        ("etc/pip.conf", False),
        ("root/.cache/pip/x", False),
        ("tmp/x", False),
        ("work/scan.nii.gz", False),
        ("work", True),
    ],
)
def test_what_an_image_may_add_to_its_base(path: str, fine: bool) -> None:
    assert image.expected(path) is fine
