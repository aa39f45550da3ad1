"""A plain folder: images in one subfolder, label maps in another, paired by their names; or all in one folder.

Known names of the two: `img` and `label`, `images` and `labels`, `imagesTr` and `labelsTr` (whose `dataset.json` then
says what the integers mean). In one folder, names begin with `image` or `img`, and with `label`. A case's id is the
image's name without its extension and without a prefix (`img`, `image`, `label`), so that `image_7.nii.gz` and
`label_7.nii.gz` belong together; where images have a channel suffix (`_0000`) and their label maps have none, as
nnU-Net's, also without that.
"""

import json
import re
import sys
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path

from organseg.anatomy import canonical
from organseg.data.manifest import BACKGROUND, CaseEntry, Manifest
from organseg.errors import UsageError

FOLDERS = (("img", "label"), ("images", "labels"), ("imagesTr", "labelsTr"))
DICOM = "DICOM is converted before, for example by dcm2niix -z y -f %i -o FOLDER/images DICOM_FOLDER"
_PREFIX = re.compile(r"^(image|img|label)s?[_-]?(?=.)")
_IN_ONE_FOLDER = (re.compile(r"^(image|img)s?[_-]?."), re.compile(r"^labels?[_-]?."))


def read_folder(root: Path, name: str, labels: dict[int, str], new_organs: Sequence[str] = ()) -> Manifest:
    """The manifest of a plain folder.

    Args:
        root: The folder.
        name: Of the data set; "" takes the folder's.
        labels: Integer -> organ, or background; {} where a `dataset.json` says it.
        new_organs: Organs among them that the anatomy does not know.

    Raises:
        UsageError: If the layout is another one, nothing says what the integers mean, cases have several channels, or
            two files are one case.
    """
    root = root.resolve()
    folders = next(((root / images, root / maps) for images, maps in FOLDERS if (root / images).is_dir()), None)
    files = [scans_in(folder) for folder in folders or (root, root)]
    if not folders:
        files = [[path for path in some if of.match(path.name)] for some, of in zip(files, _IN_ONE_FOLDER, strict=True)]
    if not folders and not all(files):
        expected = " or ".join(f"{images}/ and {maps}/" for images, maps in FOLDERS)
        expected += f", or files image_* and label_*; {DICOM}"
        raise UsageError(f"{root}: no folder of images here; expected {expected}")
    labels = labels or organs_of_json(root / "dataset.json")
    if not labels:
        raise UsageError("say what the integers mean: --labels 1=liver 2=spleen ...")
    known = _canonical(labels, new_organs)
    organs = frozenset(known.values()) - {BACKGROUND}
    images, maps = map(_by_id, files)
    if not images:
        raise UsageError(f"{folders[0] if folders else root}: no .nii or .nii.gz file here; {DICOM}")
    images = _first_channels(images, maps)
    lonely = [path for case, path in maps.items() if case not in images]
    if lonely:
        print(f"organseg: warning: {_some(lonely)}: no image of that name: left out", file=sys.stderr)
    cases = [
        CaseEntry(case, image, maps.get(case), organs if case in maps else frozenset(), frozenset())
        for case, image in images.items()
    ]
    return Manifest(name or root.name, "CT", known, root, tuple(cases), new_organs=tuple(new_organs))


def scans_in(folder: Path) -> list[Path]:
    """The NIfTI files of a folder, without what is hidden: macOS leaves `._name.nii.gz` beside files of archives."""
    return sorted(path for path in folder.glob("*.nii*") if not path.name.startswith("."))


def _canonical(labels: Mapping[int, str], new_organs: Sequence[str]) -> dict[int, str]:
    """The organs' own names, or everything that is wrong with those given."""
    known: dict[int, str] = {}
    faults: list[str] = []
    for value, name in labels.items():
        if not value and name == BACKGROUND:
            continue
        try:
            known[value] = BACKGROUND if name == BACKGROUND else canonical(name, new_organs)
        except UsageError as error:
            faults.append(f"{value}: {error}")
    if faults:
        raise UsageError("\n".join(faults) + (
            "\nsay with --labels what each integer is: parts of an organ have its name (1=pancreas 2=pancreas), what "
            "is no organ to learn is background (2=background), and --new-organs NAME declares an organ"
        ))  # fmt: skip
    return known


def _first_channels(images: dict[str, Path], maps: Collection[str]) -> dict[str, Path]:
    """Images without nnU-Net's channel suffix, where label maps do not have it too.

    Raises:
        UsageError: If there is more than one channel.
    """
    if any(case in maps for case in images):
        return images
    others = [
        path for case, path in images.items()
        if not case.endswith("_0000") and re.search(r"_0\d\d\d$", case) and f"{case[:-4]}0000" in images
    ]  # fmt: skip
    if others:
        raise UsageError(f"{_some(others)}: cases have one channel here, `_0000`; move the others elsewhere")
    return _unique((case.removesuffix("_0000"), path) for case, path in images.items())


def _some(paths: Sequence[Path]) -> str:
    return ", ".join(path.name for path in paths[:3]) + " ..." * (len(paths) > 3)


def _by_id(paths: Sequence[Path]) -> dict[str, Path]:
    stems = [(path.name.split(".nii")[0], path) for path in paths]
    return _unique((_PREFIX.sub("", stem) or stem, path) for stem, path in stems)


def _unique(named: Iterable[tuple[str, Path]]) -> dict[str, Path]:
    found: dict[str, Path] = {}
    for case, path in named:
        if case in found:
            raise UsageError(f"{path.parent}: {found[case].name} and {path.name} are both case {case}; rename one")
        found[case] = path
    return found


def organs_of_json(path: Path) -> dict[int, str]:
    """Integers and organs of a `dataset.json`, background left out; {} where there is no such file.

    Raises:
        UsageError: If it does not say what each integer is.
    """
    if not path.is_file():
        return {}
    try:
        raw = dict(json.loads(path.read_text())["labels"])
        # Two spellings are about: {"1": "liver"} and {"liver": 1}.
        pairs = [(int(key), str(value)) if str(key).isdigit() else (int(value), str(key)) for key, value in raw.items()]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UsageError(f"{path}: no readable `labels` ({error!r}); give --labels 1=liver 2=spleen ...") from error
    values = [value for value, _ in pairs]
    if min(values, default=-1) < 0 or len(set(values)) < len(values) or not any(values):
        found = ", ".join(f"{value} {organ}" for value, organ in pairs) or "nothing"
        raise UsageError(f"{path}: `labels`: found {found:.200}, expected one integer an organ, each once")
    return {value: organ for value, organ in pairs if value}
