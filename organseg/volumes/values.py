"""Voxel values on their way from a file into the canonical array: slab by slab, judged as they pass (FAULTS.md 3).

Memory stays at the result plus one slab, whatever type the file stores.
"""

import numpy as np

from organseg.volumes.findings import Findings
from organseg.volumes.header import Header
from organseg.volumes.orientation import canonical_shape, to_file

_INT16 = np.iinfo(np.int16)
_MAX_BAD_SHARE = 1e-3
_MAX_ROUNDING = 1e-3


def _empty(header: Header, dtype: type[np.generic]) -> np.ndarray:
    shape = header.shape if header.affine is None else canonical_shape(header.shape, header.affine)
    return np.empty(shape, dtype)


def _scaled(slab: np.ndarray, header: Header) -> np.ndarray:
    values: np.ndarray = slab
    # An overflow becomes Inf, and a signalling NaN a quiet one: both are counted, and need no warning of numpy's.
    with np.errstate(over="ignore", invalid="ignore"):
        if not header.unscaled:
            values = slab * np.float64(header.slope) + header.inter
        elif slab.dtype.kind == "f":
            values = slab + slab.dtype.type(0)
    return values


def _in_file_order(array: np.ndarray, header: Header) -> np.ndarray:
    return array if header.affine is None else to_file(array, header.affine)


class ImageSink:
    """Takes an image's slabs.

    Attributes:
        array: [Z, Y, X] once all slabs came: int16 where every value is whole and fits, else float32. In the file's
            axis order where the header has no usable affine (the values are judged all the same).
    """

    def __init__(self, header: Header, modality: str, findings: Findings) -> None:
        self.array = _empty(header, np.int16)
        self._header = header
        self._is_ct = modality == "CT"
        # Air where air has a number; in MR it has none, and -1024 would pull the mean that normalises the case.
        self._fill = -1024 if self._is_ct else 0
        self._findings = findings
        self._low, self._high = np.inf, -np.inf
        self._bad = 0

    def put(self, start: int, slab: np.ndarray) -> None:
        """Take the stored values [X, Y, n] of the file's slices from `start`."""
        values = _scaled(slab, self._header)
        # float32 holds the result, so a value beyond it is as bad as Inf.
        good = True if values.dtype.kind in "iu" else np.abs(values) <= np.finfo(np.float32).max
        if not np.all(good):
            self._bad += int(values.size - np.count_nonzero(good))
            values = np.where(good, values, self._fill)
        low = float(values.min(where=good, initial=np.inf)) if values.dtype.kind == "f" else int(values.min())
        high = float(values.max(where=good, initial=-np.inf)) if values.dtype.kind == "f" else int(values.max())
        self._low, self._high = min(self._low, low), max(self._high, high)
        fits = _INT16.min <= low and high <= _INT16.max
        if self._is_ct and not fits:
            return  # refused in the end: no need to keep it
        whole = values.dtype.kind in "iu" or bool((np.rint(values) == values).all())
        if self.array.dtype == np.int16 and not (fits and whole):
            self.array = self.array.astype(np.float32)
        _in_file_order(self.array, self._header)[:, :, start : start + slab.shape[2]] = values

    def judge(self) -> None:
        """Note the faults of the whole image."""
        findings, size = self._findings, self.array.size
        if self._bad > _MAX_BAD_SHARE * size:
            found = f"{self._bad} of {size} voxels NaN or infinite"
            findings.refuse("voxels", found, f"at most {_MAX_BAD_SHARE:.1%}", "export the scan anew")
        elif self._bad:
            findings.warn("voxels", f"{self._bad} NaN or infinite", "finite values", f"replaced by {self._fill}")
        extent = f"{self._low:g} to {self._high:g}"
        if self._bad == size:
            return
        if self._is_ct and not (_INT16.min <= self._low and self._high <= _INT16.max):
            remedy = "check the slope and intercept; is it CT? (modality in dataset.yaml)"
            findings.refuse("voxels", f"values {extent}", f"HU from {_INT16.min} to {_INT16.max}", remedy)
        elif self._low == self._high:
            findings.refuse("voxels", f"the same value {self._low:g} everywhere", "an image", "export the scan anew")
        elif self._is_ct and self._low == 0 and 2000 <= self._high <= 4096:
            remedy = "values look like raw scanner numbers: if so, apply the rescale intercept (often -1024)"
            findings.warn("voxels", f"values {extent}", "HU, air near -1000", remedy)


class LabelSink:
    """Takes a label map's slabs.

    Attributes:
        array: [Z, Y, X] uint8 once all slabs came (in the file's axis order where the header has no usable affine).
    """

    def __init__(self, header: Header, findings: Findings) -> None:
        self.array = _empty(header, np.uint8)
        self._header = header
        self._findings = findings
        self._counts = dict.fromkeys(("NaN or infinite", "negative", "above 255", "not whole"), 0)
        self._example: dict[str, float] = {}
        self._rounded = 0

    def put(self, start: int, slab: np.ndarray) -> None:
        """Take the stored values [X, Y, n] of the file's slices from `start`."""
        values = _scaled(slab, self._header)
        if values.dtype.kind == "f":
            finite = np.isfinite(values)
            self._count("NaN or infinite", values, ~finite)
            values = np.where(finite, values, 0)
            whole = np.rint(values)
            off = np.abs(values - whole)
            self._count("not whole", values, off > _MAX_ROUNDING)
            self._rounded += int(np.count_nonzero((off > 0) & (off <= _MAX_ROUNDING)))
            values = whole
        if values.dtype != np.uint8 and not (values.min() >= 0 and values.max() <= 255):
            self._count("negative", values, values < 0)
            self._count("above 255", values, values > 255)
            return  # refused in the end: no need to keep it
        _in_file_order(self.array, self._header)[:, :, start : start + slab.shape[2]] = values

    def _count(self, fault: str, values: np.ndarray, where: np.ndarray) -> None:
        if count := int(np.count_nonzero(where)):
            self._counts[fault] += count
            self._example.setdefault(fault, float(values[where][0]))

    def judge(self) -> None:
        """Note the faults of the whole label map."""
        for fault, count in self._counts.items():
            if count:
                found = f"{count} voxels {fault}, e.g. {self._example[fault]:.6g}"
                remedy = "export the label map as integers, without interpolation"
                self._findings.refuse("label values", found, "whole numbers from 0 to 255", remedy)
        if self._rounded:
            found = f"{self._rounded} voxels up to {_MAX_ROUNDING:g} from a whole number"
            self._findings.warn("label values", found, "whole numbers", "rounded")
