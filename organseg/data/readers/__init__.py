"""Readers: one file a data set's own layout, each making a manifest of it for `organseg import`."""

from collections.abc import Callable, Sequence
from pathlib import Path

from organseg.data.manifest import Manifest
from organseg.data.readers.btcv import read_btcv
from organseg.data.readers.folder import read_folder

READERS: dict[str, Callable[[Path, str, dict[int, str], Sequence[str]], Manifest]] = {
    "btcv": read_btcv,
    "folder": read_folder,
}
"""Name -> (root, name of the data set, labels given by the user, organs that are new) -> manifest."""
