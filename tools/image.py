"""Build the image of the Dockerfile, and run it, where there is no container engine: root on a Linux is enough.

Each RUN is executed by `chroot` in a bare Debian that plays the part of python:3.11-slim, the entry point as an engine
would with `--read-only --cap-drop=ALL --security-opt=no-new-privileges --network=none --user=UID:GID`. It knows what
this Dockerfile says; anything else is refused, not passed over. Needs debootstrap, iproute2 and util-linux.

    python tools/image.py build --out DIR --build-arg TORCH=torch==2.13.0
    python tools/image.py run DIR -- --help

DIR/root is the image, DIR/image.json its configuration; DIR/volumes has what `run` may write, /work and /scratch.
"""

import argparse
import ast
import fnmatch
import json
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path, PurePosixPath

ROOT = Path(__file__).resolve().parents[1]
BASE_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
PACKAGES = "python3,python-is-python3,python3-pip,ca-certificates"
"""What python:3.11-slim has beside a bare Debian."""
EXPECTED = (
    "opt/organseg/bin/*", "opt/organseg/include/*", "opt/organseg/lib*", "opt/organseg/pyvenv.cfg",
    "opt/organseg/share/*.yaml", "opt/organseg/share/man/*", "usr/bin/tini*", "usr/share/*/tini*", "work", "scratch",
    "var/lib/dpkg/*", "var/lib/apt/*", "var/cache/debconf/*",
)  # fmt: skip
"""Files that the Dockerfile may add to its base."""
VOLUMES = ("work", "scratch")
DEVICES = ("null", "zero", "full", "random", "urandom")


@dataclass(frozen=True)
class Instruction:
    """One instruction, its continued lines joined."""

    line: int
    name: str
    text: str

    def refused(self, why: str = "not known here") -> SystemExit:
        """To be raised where an engine would do something else."""
        return SystemExit(f"Dockerfile:{self.line}: {self.name} {self.text[:80]}: {why}")

    def exec_form(self) -> list[str]:
        """The words of a JSON list."""
        try:
            return [str(word) for word in json.loads(self.text)]
        except json.JSONDecodeError as error:
            raise self.refused("must be a JSON list") from error

    def pairs(self) -> dict[str, str]:
        """Of KEY=VALUE words; of ARG, a key may stand alone."""
        words = [word.partition("=") for word in shlex.split(self.text)]
        if self.name != "ARG" and not all(equals for _, equals, _ in words):
            raise self.refused("must be KEY=VALUE")
        return {key: value for key, _, value in words}


@dataclass
class Stage:
    """A root folder that grows, and the configuration that goes with it."""

    root: Path
    arguments: dict[str, str] = field(default_factory=dict)
    environment: dict[str, str] = field(default_factory=lambda: {"PATH": BASE_PATH})
    labels: dict[str, str] = field(default_factory=dict)
    shell: list[str] = field(default_factory=lambda: ["/bin/sh", "-c"])
    workdir: str = "/"
    user: str = "0:0"
    entrypoint: list[str] = field(default_factory=list)
    command: list[str] = field(default_factory=list)

    def expand(self, text: str) -> str:
        """Replace `$NAME` and `${NAME}` by ENV or else ARG; a name of neither is empty."""
        return expand(text, {**self.arguments, **self.environment})

    def path(self, text: str) -> Path:
        """A path of the image, on this machine."""
        return self.root / (PurePosixPath(self.workdir) / self.expand(text)).relative_to("/")


def expand(text: str, variables: dict[str, str]) -> str:
    """Replace `$NAME` and `${NAME}`; an unknown name is empty."""
    return re.sub(r"\$(?:(\w+)|\{(\w+)\})", lambda match: variables.get(match[1] or match[2], ""), text)


def parse(text: str) -> list[Instruction]:
    """The instructions of a Dockerfile, in order."""
    found: list[Instruction] = []
    parts: list[str] = []
    start = 0
    for number, line in enumerate(map(str.strip, text.splitlines()), start=1):
        if not line or line.startswith("#"):
            continue
        start = start if parts else number
        parts.append(line.removesuffix("\\").strip())
        if not line.endswith("\\"):
            name, _, rest = " ".join(parts).partition(" ")
            found.append(Instruction(start, name.upper(), rest.strip()))
            parts = []
    return found


def ignored(path: str, patterns: Sequence[str]) -> bool:
    """Whether .dockerignore leaves out a path: the last pattern that matches it, or a folder above it, decides."""
    wild = {"**/": "(?:.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}
    verdict = False
    for pattern in patterns:
        parts = re.split(r"(\*\*/|\*\*|\*|\?)", pattern.removeprefix("!").strip("/"))
        if re.fullmatch("".join(wild.get(part, re.escape(part)) for part in parts) + "(?:/.*)?", path):
            verdict = not pattern.startswith("!")
    return verdict


def taken(context: Path, source: str) -> list[Path]:
    """The files that COPY takes from the context for a source, relative to the context."""
    lines = map(str.strip, (context / ".dockerignore").read_text().splitlines())
    patterns = [line for line in lines if line and not line.startswith("#")]
    top = context / source
    files = [top] if top.is_file() else sorted(path for path in top.rglob("*") if path.is_symlink() or path.is_file())
    found = [path.relative_to(context) for path in files]
    return [path for path in found if not ignored(path.as_posix(), patterns)]


def build(context: Path, out: Path, given: dict[str, str]) -> None:
    """Follow the Dockerfile of a context.

    Args:
        context: The folder that has the Dockerfile, .dockerignore and what COPY names.
        out: Where the image goes; a base that an earlier build made there serves again.
        given: Build arguments.
    """
    base = bare_debian(out / "base")
    stages: dict[str, Stage] = {}
    defaults: dict[str, str] = {}
    stage = None
    for instruction in parse((context / "Dockerfile").read_text()):
        print(f"{instruction.name} {instruction.text}", flush=True)
        if instruction.name == "ARG":
            known = {**defaults, **given} if stage else given
            arguments = {key: known.get(key, value) for key, value in instruction.pairs().items()}
            (stage.arguments if stage else defaults).update(arguments)
        elif instruction.name == "FROM":
            image, _, name = instruction.text.replace(" as ", " AS ").partition(" AS ")
            if image != "${BASE_IMAGE}":
                raise instruction.refused("no other image than the base can be played")
            stage = stages[name or "root"] = Stage(out / (name or "root"))
            if stage.root.exists():
                shutil.rmtree(stage.root)
            subprocess.run(["cp", "-a", f"{base}/.", stage.root], check=True)
        elif stage is None:
            raise instruction.refused("before FROM")
        else:
            step(context, stage, instruction, stages)
    assert stage is not None
    if surplus := [path for path in added(base, stage.root) if not expected(path)]:
        raise SystemExit("not to be in an image: " + " ".join(surplus[:20]))
    out.joinpath("image.json").write_text(json.dumps(asdict(stage), indent=1, default=str))


def step(context: Path, stage: Stage, instruction: Instruction, stages: dict[str, Stage]) -> None:
    """Follow one instruction inside a stage."""
    match instruction.name:
        case "ENV":
            stage.environment |= {key: stage.expand(value) for key, value in instruction.pairs().items()}
        case "LABEL":
            stage.labels |= {key: stage.expand(value) for key, value in instruction.pairs().items()}
        case "SHELL":
            stage.shell = instruction.exec_form()
        case "ENTRYPOINT":
            stage.entrypoint = instruction.exec_form()
        case "CMD":
            stage.command = instruction.exec_form()
        case "USER":
            stage.user = stage.expand(instruction.text)
        case "WORKDIR":
            stage.path(instruction.text).mkdir(parents=True, exist_ok=True)
            stage.workdir = str(PurePosixPath(stage.workdir) / stage.expand(instruction.text))
        case "COPY":
            copy(context, stage, instruction, stages)
        case "RUN":
            execute(stage, instruction)
        case _:
            raise instruction.refused()


def copy(context: Path, stage: Stage, instruction: Instruction, stages: dict[str, Stage]) -> None:
    """COPY from the context, file by file, or a folder --from another stage."""
    words = shlex.split(instruction.text)
    options = [word for word in words if word.startswith("--")]
    *sources, target = (word for word in words if not word.startswith("--"))
    if len(options) > 1 or not all(option.startswith("--from=") for option in options):
        raise instruction.refused("of the options only --from is known here")
    if options:
        folder, destination = stages[options[0].removeprefix("--from=")].path(sources[0]), stage.path(target)
        destination.mkdir(parents=True)
        subprocess.run(["cp", "-a", f"{folder}/.", destination], check=True)
        return
    for source in sources:
        files = taken(context, source)
        if not files:
            raise instruction.refused(f"{source} is missing or ignored")
        for path in files:
            inner = path.relative_to(source) if (context / source).is_dir() else path.name
            named = (context / source).is_file() and not target.endswith("/")
            destination = stage.path(target) if named else stage.path(target) / inner
            destination.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(context / path, destination, follow_symlinks=False)


def execute(stage: Stage, instruction: Instruction) -> None:
    """RUN in the shell, as root, with this machine's way to its package indexes lent for as long as it takes."""
    if stage.user != "0:0" or instruction.text.startswith(("--", "[", "<<")):
        raise instruction.refused("only the shell form, as root and without options, is known here")
    settings, paths = indexes()
    words = ["unshare", "--pid", "--fork", "--kill-child", f"--root={stage.root}", f"--wd={stage.workdir}"]
    environment = {"HOME": "/root", **stage.arguments, **stage.environment, **settings}
    with lent(stage.root, paths):
        done = subprocess.run([*words, "--mount-proc", *stage.shell, instruction.text], env=environment)
    if done.returncode:
        raise instruction.refused(f"exit {done.returncode}")


def indexes() -> tuple[dict[str, str], list[Path]]:
    """The settings of pip on this machine as variables, and the files that they and the resolver need."""
    listed = subprocess.run([sys.executable, "-m", "pip", "config", "list"], check=True, capture_output=True, text=True)
    settings = {}
    for line in reversed(listed.stdout.splitlines()):  # variables come first, and win
        key, _, value = line.partition("=")
        section, _, name = key.rpartition(".")
        if section in (":env:", "global"):
            settings["PIP_" + name.upper().replace("-", "_")] = str(ast.literal_eval(value))
    words = " ".join(settings.values()).split()
    files = [Path(word) for word in words if word.startswith("/")]
    archives = [Path(word.removeprefix("file://")).parent for word in words if word.startswith("file:///")]
    return settings, [path for path in (Path("/etc/resolv.conf"), *files, *archives) if path.exists()]


@contextmanager
def lent(root: Path, paths: Sequence[Path]) -> Iterator[None]:
    """Mount this machine's files at the same place in a root, and leave nothing of them there."""
    made: list[Path] = []
    mounted: list[Path] = []
    try:
        for path in paths:
            target = root / path.relative_to("/")
            missing = [folder for folder in (target, *target.parents) if not folder.exists()]
            for folder in reversed(missing):
                folder.touch() if folder == target and path.is_file() else folder.mkdir()
                made.append(folder)
            mount("--bind", "-o", "ro", path, target)
            mounted.append(target)
        yield
    finally:
        for target in reversed(mounted):
            subprocess.run(["umount", target], check=True)
        for path in reversed(made):
            path.rmdir() if path.is_dir() else path.unlink()


def mount(*words: str | Path) -> None:
    """Mount, in this process's own namespace."""
    subprocess.run(["mount", *words], check=True)


def bare_debian(root: Path) -> Path:
    """The base: made once, with nothing in it of this machine."""
    if not root.exists():
        partial = root.with_suffix(".partial")
        shutil.rmtree(partial, ignore_errors=True)
        root.parent.mkdir(parents=True, exist_ok=True)
        words = ["debootstrap", "--variant=minbase", f"--include={PACKAGES}", "bookworm", str(partial)]
        subprocess.run(words, check=True)
        for pattern in ("etc/resolv.conf", "etc/hostname", "var/cache/apt/archives/*.deb", "var/lib/apt/lists/*_*"):
            for path in partial.glob(pattern):
                path.unlink()
        (partial / "etc/hosts").touch()  # where `run`, as engines do, mounts another
        partial.rename(root)
    return root


def added(base: Path, root: Path) -> list[str]:
    """Files, links and empty folders of a root that are not in its base."""
    found = []
    for folder, folders, files in os.walk(root):
        inside = Path(folder).relative_to(root)
        names = files + [name for name in folders if (Path(folder) / name).is_symlink()]
        found += [str(inside / name) for name in names] + ([str(inside)] if not folders and not files else [])
    return sorted(path for path in found if not os.path.lexists(base / path))


def expected(path: str) -> bool:
    """Whether an image may have a file beside what its base has; of organseg itself, code alone."""
    ours = re.match(r"opt/organseg/lib/[^/]+/site-packages/organseg/", path)
    return any(fnmatch.fnmatch(path, pattern) for pattern in EXPECTED) and (not ours or path.endswith((".py", ".pyc")))


def run(out: Path, user: str, shm: str, arguments: list[str]) -> None:
    """Become the image's entry point; PID 1 of its namespace is the child of this process.

    Args:
        out: Folder of the image.
        user: UID:GID, which the image need not know.
        shm: Size of /dev/shm.
        arguments: For the entry point; without any, those of CMD.
    """
    stage = Stage(**json.loads((out / "image.json").read_text()))
    root = Path(stage.root)
    mount("--bind", root, root)
    mount("-o", "remount,bind,ro", root)
    for name in VOLUMES:
        volume = out / "volumes" / name
        volume.mkdir(parents=True, exist_ok=True)
        volume.chmod(0o1777)
        mount("--bind", volume, root / name)
    mount("-t", "sysfs", "-o", "ro", "sysfs", root / "sys")
    mount("-t", "tmpfs", "-o", "mode=755", "tmpfs", root / "dev")
    for name in DEVICES:
        (root / "dev" / name).touch()
        mount("--bind", f"/dev/{name}", root / "dev" / name)
    (root / "dev/shm").mkdir()
    mount("-t", "tmpfs", "-o", f"mode=1777,size={shm}", "tmpfs", root / "dev/shm")
    subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
    socket.sethostname("organseg")
    (out / "hosts").write_text("127.0.0.1 localhost organseg\n")
    mount("--bind", out / "hosts", root / "etc/hosts")
    uid, _, gid = user.partition(":")
    words = ["unshare", "--pid", "--fork", "--kill-child", f"--root={root}", f"--wd={stage.workdir}", "--mount-proc",
             "setpriv", f"--reuid={uid}", f"--regid={gid}", "--clear-groups", "--bounding-set=-all", "--inh-caps=-all",
             "--no-new-privs"]  # fmt: skip
    os.execve(
        shutil.which(words[0]) or words[0],
        [*words, *stage.entrypoint, *(arguments or stage.command)],
        stage.environment,
    )


def main() -> None:
    """Parse, and go where mounts are seen by nobody else and end with this process."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    builder = commands.add_parser("build", help="follow the Dockerfile")
    builder.add_argument("--out", type=Path, required=True)
    builder.add_argument("--context", type=Path, default=ROOT)
    builder.add_argument("--build-arg", action="append", default=[], metavar="KEY=VALUE")
    runner = commands.add_parser("run", help="run the entry point; arguments for it come after --")
    runner.add_argument("image", type=Path)
    runner.add_argument("--user", default="12345:0", help="UID:GID (default: %(default)s, which no base image knows)")
    runner.add_argument("--shm-size", default="64m", help="of /dev/shm (default: %(default)s, as Docker's)")
    cut = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    arguments = parser.parse_args(sys.argv[1:cut])
    if os.geteuid() != 0:
        parser.error("only root can change the root folder")
    if "ORGANSEG_IMAGE" not in os.environ:
        others = ["--net", "--uts", "--ipc"] if arguments.command == "run" else []
        words = ["unshare", "--mount", "--propagation=private", *others, sys.executable, __file__, *sys.argv[1:]]
        os.execvpe(words[0], words, {**os.environ, "ORGANSEG_IMAGE": "1"})
    if arguments.command == "run":
        run(arguments.image.resolve(), arguments.user, arguments.shm_size, sys.argv[cut + 1 :])
    else:
        given = dict(word.split("=", 1) for word in arguments.build_arg)
        build(arguments.context.resolve(), arguments.out.resolve(), given)


if __name__ == "__main__":
    main()
