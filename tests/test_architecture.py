"""DESIGN.md section 1, read off every import and call of the package; the checker is itself shown to see violations."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "organseg"
MAX_LINES = 400

RANK = {
    "errors": 0, "anatomy": 0, "batch": 0, "files": 0, "strict_yaml": 0, "processes": 0,
    "checkpoints": 1, "volumes": 1, "losses": 1, "priors": 1, "metrics": 1, "networks": 1,
    "data": 2, "inference": 2,
    "methods": 3, "runtime": 3,
    "curriculum": 4, "report": 4,
    "cli": 5,
    "__main__": 6,  # only starts cli
}  # fmt: skip
FOR_ALL = {"errors", "__init__"}  # `from organseg import __version__` is the package's own __init__

IMAGE_LIBRARIES = ("volumes",)
LIGHTNING = ("data.module", "data.slices", "data.patches", "methods", "runtime", "curriculum", "cli")
ONLY_IN = {
    "nibabel": IMAGE_LIBRARIES,
    "pydicom": IMAGE_LIBRARIES,
    "highdicom": IMAGE_LIBRARIES,
    "h5py": ("data.sealed",),
    "albumentations": ("data.augment",),
    "lightning": LIGHTNING,
    "pytorch_lightning": LIGHTNING,
    "lightning_fabric": LIGHTNING,
    "wandb": ("runtime.tracker",),
    **dict.fromkeys(("pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"), ()),
}
NOT_IN = {"torch": ("volumes", "errors", "anatomy", "files", "strict_yaml", "processes")}
CALLS_REFUSED = {
    "eval", "exec", "builtins.eval", "builtins.exec", "__import__", "importlib.import_module", "os.system", "os.popen",
    "yaml.unsafe_load", "yaml.full_load", "yaml.load_all", "yaml.unsafe_load_all", "yaml.full_load_all",
}  # fmt: skip


def imports(tree: ast.AST, module: str) -> Iterator[tuple[int, str]]:
    """Line and dotted name of everything imported, also inside functions; `from a import b` gives `a.b`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                package = ["organseg", *module.split(".")][: -node.level]
                base = ".".join([*package, base]).strip(".")
            yield from ((node.lineno, f"{base}.{alias.name}") for alias in node.names)


def full_names(tree: ast.AST) -> dict[str, str]:
    """Local name -> dotted name of what was imported under it."""
    names = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.asname: alias.name for alias in node.names if alias.asname}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
    return names


def dotted(node: ast.expr, names: dict[str, str]) -> str:
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value, names)}.{node.attr}"
    return names.get(node.id, node.id) if isinstance(node, ast.Name) else "?"


def belongs(module: str, places: tuple[str, ...]) -> bool:
    return any(module == place or module.startswith(f"{place}.") for place in places)


def room_of(module: str) -> str:
    return module.split(".")[0]


def import_faults(tree: ast.AST, module: str) -> Iterator[str]:
    room = room_of(module)
    for line, name in imports(tree, module):
        top, *rest = name.split(".")
        if top == "organseg":
            target = rest[0] if rest and rest[0] in RANK else "__init__"
            if target != room and target not in FOR_ALL and not (room in RANK and RANK[target] < RANK[room]):
                yield f"{module}:{line}: {room} may not import {target}"
        elif not belongs(module, ONLY_IN.get(top, (room,))) or belongs(module, NOT_IN.get(top, ())):
            yield f"{module}:{line}: {top} has no place in {module}"


def call_faults(tree: ast.AST, module: str) -> Iterator[str]:
    names = full_names(tree)
    safe_loaders = {
        node.name
        for node in ast.walk(tree)
        if isinstance(node, ast.ClassDef) and [dotted(base, names) for base in node.bases] == ["yaml.SafeLoader"]
    }
    for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
        name = dotted(call.func, names)
        given = {keyword.arg: keyword.value for keyword in call.keywords}

        def is_set(argument: str, value: object, given: dict[str | None, ast.expr] = given) -> bool:
            found = given.get(argument)
            return isinstance(found, ast.Constant) and found.value is value

        if name in CALLS_REFUSED or name.endswith(".extractall"):
            yield f"{module}:{call.lineno}: {name}() is refused"
        if "shell" in given and not is_set("shell", False):
            yield f"{module}:{call.lineno}: shell=True"
        if (name == "torch.load" or name.endswith(".load_from_checkpoint")) and not is_set("weights_only", True):
            yield f"{module}:{call.lineno}: {name}() without weights_only=True"
        if name == "numpy.load" and "allow_pickle" in given and not is_set("allow_pickle", False):
            yield f"{module}:{call.lineno}: numpy.load(allow_pickle=...)"
        if name == "yaml.load":
            loader = given.get("Loader")
            if module != "strict_yaml" or not (isinstance(loader, ast.Name) and loader.id in safe_loaders):
                yield f"{module}:{call.lineno}: yaml.load()"


def faults(text: str, module: str) -> list[str]:
    """What a module's text does against the rules; `module` is its dotted name below organseg."""
    tree = ast.parse(text)
    found = [*import_faults(tree, module), *call_faults(tree, module)]
    lines = len(text.splitlines())
    return found + ([f"{module}: {lines} lines"] if lines > MAX_LINES else [])


def module_name(path: Path) -> str:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)


MODULES = sorted(PACKAGE.rglob("*.py"))


def test_every_room_has_a_rank():
    rooms = {room_of(module_name(path)) for path in MODULES} - {"__init__"}
    assert len(rooms) > 12
    assert rooms <= set(RANK)


@pytest.mark.parametrize("path", MODULES, ids=module_name)
def test_module_keeps_the_rules(path):
    assert faults(path.read_text(), module_name(path)) == []


@pytest.mark.parametrize(
    ("module", "text", "fault"),
    [
        ("volumes.nifti", "from organseg.data.cache import CachedCase", "volumes may not import data"),
        ("volumes.nifti", "def f():\n    import organseg.data.cache", "volumes.nifti:2: volumes may not import data"),
        ("volumes.nifti", "from organseg import data", "volumes may not import data"),
        ("volumes.nifti", "from ..data import cache", "volumes may not import data"),
        ("volumes.nifti", "from .. import data", "volumes may not import data"),
        ("methods.base", "from organseg.runtime import pace", "methods may not import runtime"),  # the same rank
        ("anatomy", "from organseg.batch import IGNORE", "anatomy may not import batch"),
        ("errors", "from organseg.files import publish", "errors may not import files"),
        ("curriculum.callback", "if TYPE_CHECKING:\n    from organseg.cli import run", "curriculum may not import cli"),
        ("newroom.thing", "from organseg.volumes import Volume", "newroom may not import volumes"),
        ("data.check", "import nibabel as nib", "nibabel has no place in data.check"),
        ("report.html", "from pydicom.dataset import Dataset", "pydicom has no place"),
        ("data.cachet", "import h5py", "h5py has no place in data.cachet"),
        ("data.slices", "def f():\n    import albumentations", "albumentations has no place"),
        ("data.cohort", "import lightning as L", "lightning has no place"),
        ("networks.unet", "from lightning.pytorch import LightningModule", "lightning has no place"),
        ("volumes.nifti", "from torch import Tensor", "torch has no place"),
        ("runtime.metrics_log", "import wandb", "wandb has no place"),
        ("data.cache", "import pickle", "pickle has no place"),
        ("data.cache", "from pickle import loads", "pickle has no place"),
        ("cli", "eval('1')", "eval() is refused"),
        ("cli", "exec('1')", "exec() is refused"),
        ("cli", "from importlib import import_module as load\nload('x')", "importlib.import_module() is refused"),
        ("cli", "subprocess.run('ls', shell=True)", "shell=True"),
        ("cli", "subprocess.run('ls', shell=chosen)", "shell=True"),
        ("runtime.x", "torch.load(path)", "without weights_only=True"),
        ("runtime.x", "import torch as t\nt.load(path, weights_only=False)", "without weights_only=True"),
        ("runtime.x", "from torch import load as read\nread(path)", "without weights_only=True"),
        ("runtime.x", "Module.load_from_checkpoint(path)", "without weights_only=True"),
        ("data.x", "import numpy as np\nnp.load(path, allow_pickle=True)", "allow_pickle"),
        ("data.x", "archive.extractall(path)", "archive.extractall() is refused"),
        ("data.x", "opened(path).extractall()", "extractall() is refused"),
        ("data.x", "yaml.load(text, Loader=yaml.SafeLoader)", "yaml.load()"),
        ("data.x", "from yaml import unsafe_load\nunsafe_load(text)", "yaml.unsafe_load() is refused"),
        ("strict_yaml", "yaml.load(text, Loader=yaml.Loader)", "yaml.load()"),
        ("strict_yaml", "class A(yaml.Loader): ...\nyaml.load(text, Loader=A)", "yaml.load()"),
        ("data.x", "pass\n" * 401, "data.x: 401 lines"),
    ],
)  # fmt: skip
def test_checker_sees(module, text, fault):
    found = faults(text, module)
    assert len(found) == 1
    assert fault in found[0]


@pytest.mark.parametrize(
    ("module", "text"),
    [
        ("data.sealed", "import h5py\nfrom organseg.volumes import Volume\nfrom organseg.data.check import examine"),
        ("data.slices", "import lightning as L\nimport torch\nfrom .cache import CachedCase"),
        ("volumes.nifti", "import nibabel.orientations\nfrom organseg.errors import Fault"),
        ("anatomy", "from organseg.errors import UsageError"),
        ("cli", "from organseg import __version__\nfrom organseg.report import write_report"),
        ("runtime.x", "import torch\ntorch.load(path, weights_only=True)\nnp.load(path, allow_pickle=False)"),
        ("strict_yaml", "import yaml\nclass A(yaml.SafeLoader): ...\nyaml.load(text, Loader=A)"),
        ("networks.x", "network.eval()\njson.load(file)\nyaml.safe_load(text)"),
        ("data.x", "pass\n" * 400),
    ],
)
def test_checker_lets_pass(module, text):
    assert faults(text, module) == []
