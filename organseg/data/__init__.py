"""Data: data sets on disk, the cache, folds, partial labels, and the data modules that stream batches."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from organseg.data.patches import PatchDataModule
    from organseg.data.slices import SliceDataModule

__all__ = ["PatchDataModule", "SliceDataModule"]


def __getattr__(name: str) -> Any:
    # Lazily, so that `check` and `prepare` need not wait for Lightning.
    if name == "SliceDataModule":
        from organseg.data.slices import SliceDataModule

        return SliceDataModule
    if name == "PatchDataModule":
        from organseg.data.patches import PatchDataModule

        return PatchDataModule
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
