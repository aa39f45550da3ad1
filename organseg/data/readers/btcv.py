"""BTCV, as its organisers lay it out: `RawData/Training/img/img0001.nii.gz` and `label/label0001.nii.gz`, 13 organs."""

from collections.abc import Sequence
from pathlib import Path

from organseg.data.manifest import CaseEntry, Manifest
from organseg.errors import UsageError

LABELS = {
    1: "spleen",
    2: "right_kidney",
    3: "left_kidney",
    4: "gallbladder",
    5: "oesophagus",
    6: "liver",
    7: "stomach",
    8: "aorta",
    9: "inferior_vena_cava",
    10: "portal_and_splenic_vein",
    11: "pancreas",
    12: "right_adrenal",
    13: "left_adrenal",
}


def read_btcv(root: Path, name: str, labels: dict[int, str], new_organs: Sequence[str] = ()) -> Manifest:
    """The manifest of BTCV below `root` (the download's folder, `RawData`, or `Training` itself).

    Raises:
        UsageError: If no case is found, or labels were given (BTCV has its own).
    """
    if labels or new_organs:
        raise UsageError("btcv has its own labels; leave out --labels and --new-organs, or use the reader `folder`")
    root = root.resolve()
    homes = [path for path in (root, root / "Training", root / "RawData" / "Training") if (path / "img").is_dir()]
    if not homes:
        raise UsageError(f"{root}: no `img` folder here, in Training or in RawData/Training; is this BTCV?")
    cases = []
    for image in sorted((homes[0] / "img").glob("img*.nii*")):
        number = image.name.removeprefix("img")
        label = homes[0] / "label" / f"label{number}"
        known = frozenset(LABELS.values()) if label.exists() else frozenset[str]()
        name_of_case = image.name.split(".nii")[0]
        cases.append(CaseEntry(name_of_case, image, label if known else None, known, frozenset()))
    if not cases:
        raise UsageError(f"{homes[0] / 'img'}: no img*.nii.gz here")
    return Manifest(name or "btcv", "CT", LABELS, root, tuple(cases))
