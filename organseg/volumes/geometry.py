"""Which affine a NIfTI header means, and whether two grids are one (FAULTS.md section 3, rows on zooms and affines).

A header may hold two affines, the sform and the qform, and programs disagree on which to use when both are set; so they
must agree here, or the user says which. A wrong affine swaps left and right without any other sign.
"""

from typing import Any, Literal

import numpy as np
from nibabel.spatialimages import HeaderDataError

from organseg.errors import Fault
from organseg.volumes.findings import Findings
from organseg.volumes.volume import Volume

AffineSource = Literal["sform", "qform"]
RawHeader = Any  # nibabel.Nifti1Header or Nifti2Header, whose methods carry no types

_MAX_MM = 1.0
_MAX_DEGREES = 1.0
_MAX_SHEAR = 1e-3
_MAX_DIFFERENCE = 1e-3
_MAX_ORIGIN_MM = 1e5  # a file's float32 still tells voxels apart there
_SPACING_RANGE = (0.05, 20.0)
_EXPECTED_SPACING = f"{_SPACING_RANGE[0]} to {_SPACING_RANGE[1]:g} mm on each axis"


def choose_affine(
    header: RawHeader,
    shape: tuple[int, int, int],
    findings: Findings,
    source: AffineSource | None,
    assume: bool,
) -> np.ndarray | None:
    """The voxel -> world affine that a header means.

    Args:
        header: As read, unchecked.
        shape: [X, Y, Z] of the file, to measure how far two affines are apart.
        findings: Takes every fault of affines and zooms.
        source: Which to use where both are set but differ; without it that is refused.
        assume: Where neither is set, take the axes as left, anterior, superior, as Analyze, SPM and nibabel do (NIfTI
            itself names no orientation then), the origin in the middle; without it that is refused.

    Returns:
        4 x 4 float64, voxel (x, y, z) -> world RAS, mm; None where it was refused.
    """
    # Through Python's float, which takes a signalling NaN without a warning.
    zooms = np.array([float(value) for value in header["pixdim"][1:4]])
    if not _within(zooms):
        findings.refuse(
            "pixdim", f"voxel size {_numbers(zooms)} mm", _EXPECTED_SPACING, "correct the header's voxel size"
        )
    unit = int(header["xyzt_units"]) & 7
    if unit in (1, 3):
        name = "metre" if unit == 1 else "micrometre"
        findings.refuse("xyzt_units", f"lengths in {name}s", "millimetres", "rewrite the header in mm")
    affine = _set_affine(header, shape, findings, source)
    if affine is None and not findings.refused and assume:
        # BTCV's original labels are such files, and this is how they lie.
        affine = np.diag([-zooms[0], zooms[1], zooms[2], 1.0])
        affine[:3, 3] = affine[:3, :3] @ (1 - np.array(shape)) / 2
        findings.warn(
            "affine",
            "sform_code 0 and qform_code 0",
            "one of them above 0",
            "axes assumed to be left, anterior, superior: check left and right on a picture",
        )
    elif affine is None and int(header["sform_code"]) == 0 and int(header["qform_code"]) == 0 and not assume:
        findings.refuse(
            "affine",
            "sform_code 0 and qform_code 0",
            "one of them above 0",
            "convert it anew, or say assume_affine (dataset.yaml, predict) if its axes are left, anterior, superior",
        )
    return affine if affine is not None and _usable(affine, zooms, findings) else None


def _set_affine(
    header: RawHeader, shape: tuple[int, int, int], findings: Findings, source: AffineSource | None
) -> np.ndarray | None:
    codes = {"sform": int(header["sform_code"]), "qform": int(header["qform_code"])}
    for name, code in codes.items():
        if not 0 <= code <= 5:
            findings.refuse(f"{name}_code", str(code), "0 to 5", "correct the header")
    sform = np.eye(4)
    sform[:3] = [[float(value) for value in header[row]] for row in ("srow_x", "srow_y", "srow_z")]
    chosen = source if source is not None and codes[source] > 0 else ("sform" if codes["sform"] > 0 else "qform")
    if codes[chosen] <= 0:
        return None
    # The form that is not used may be broken, unless its disagreement is what has to be found.
    both = min(codes.values()) > 0 and source is None
    qform = _qform(header, findings) if chosen == "qform" or both else None
    if both and qform is not None and np.isfinite(sform).all():
        millimetres, degrees = difference(sform, qform, shape)
        if not (millimetres <= _MAX_MM and degrees <= _MAX_DEGREES):
            findings.refuse(
                "affine",
                f"sform and qform that differ by {millimetres:.3g} mm and {degrees:.3g} degrees",
                f"at most {_MAX_MM:g} mm and {_MAX_DEGREES:g} degree",
                "check which one lies right and say affine: sform or qform (dataset.yaml, predict)",
            )
    return qform if chosen == "qform" else sform


def _qform(header: RawHeader, findings: Findings) -> np.ndarray | None:
    header = header.copy()
    if header["pixdim"][0] == 0:  # the standard: 0 means 1, which nibabel refuses
        header["pixdim"][0] = 1
    try:
        with np.errstate(all="ignore"):
            return np.asarray(header.get_qform(coded=False), dtype=np.float64)
    except (HeaderDataError, ValueError) as error:
        findings.refuse(
            "qform", f"no rotation ({error})", "a unit quaternion, qfac 1 or -1", "say affine: sform if that is right"
        )
        return None


def difference(first: np.ndarray, second: np.ndarray, shape: tuple[int, int, int]) -> tuple[float, float]:
    """How far two affines of one array are apart.

    Args:
        first: 4 x 4.
        second: 4 x 4.
        shape: [X, Y, Z].

    Returns:
        The largest distance between the two positions of a corner voxel, mm; the largest angle between two axes,
        degrees. NaN where one is not finite, or an axis has no length.
    """
    corners = np.array([[*corner, 1] for corner in np.ndindex(2, 2, 2)]) * [*(np.array(shape) - 1), 1]
    with np.errstate(all="ignore"):
        millimetres = np.linalg.norm((corners @ (first - second).T)[:, :3], axis=1).max()
        axes = [matrix[:3, :3] / np.linalg.norm(matrix[:3, :3], axis=0) for matrix in (first, second)]
        # The chord keeps small angles exact, where the arc cosine of a value near 1 loses them.
        chords = np.linalg.norm(axes[0] - axes[1], axis=0)
    return float(millimetres), float(np.degrees(2 * np.arcsin(np.clip(chords / 2, 0, 1))).max())


def _usable(affine: np.ndarray, zooms: np.ndarray, findings: Findings) -> bool:
    remedy = "correct the header or convert the scan anew"
    if not np.isfinite(affine).all():
        findings.refuse("affine", "values that are not finite", "finite numbers", remedy)
        return False
    with np.errstate(all="ignore"):  # a length of 0 or beyond float64 fails the comparisons below
        spacing = np.linalg.norm(affine[:3, :3], axis=0)
        axes = affine[:3, :3] / spacing
        volume = abs(np.linalg.det(axes))
    if spacing.min() == 0 or volume < 1e-3:
        findings.refuse("affine", "a singular matrix", "three independent axes", remedy)
        return False
    if np.abs(affine[:3, 3]).max() > _MAX_ORIGIN_MM:
        findings.refuse(
            "affine", f"an origin at {_numbers(affine[:3, 3])} mm", f"at most {_MAX_ORIGIN_MM:g} mm", remedy
        )
        return False
    if not _within(spacing):
        findings.refuse("affine", f"voxel size {_numbers(spacing)} mm", _EXPECTED_SPACING, remedy)
        return False
    shear = np.abs(axes.T @ axes - np.eye(3)).max()
    if shear > _MAX_SHEAR:
        findings.refuse(
            "affine",
            f"sheared axes (cosine {shear:.3g} between two)",
            f"at most {_MAX_SHEAR:g}",
            "resample the scan to a rectangular grid (gantry tilt must be undone)",
        )
        return False
    if _within(zooms) and np.abs(spacing / zooms - 1).max() > 0.01:
        found = f"voxel size {_numbers(zooms)} mm, but {_numbers(spacing)} mm in the affine"
        findings.warn("pixdim", found, "the same", "the affine is used: check the size of an organ")
    return True


def compare_geometry(image: Volume, label: Volume, *, case: str, path: str = "label") -> list[Fault]:
    """Whether a label map lies on its image's grid.

    Both are compared in canonical order, so the two files may differ in the order of their axes.

    Args:
        image: The scan.
        label: Its label map.
        case: Case id for the faults.
        path: The label's file for the faults, relative to its root.

    Returns:
        The faults, all refusals; none where shapes are equal and affines differ by at most 1e-3.
    """
    remedy = "pair the right files, or resample the label to the image's grid"
    if image.shape != label.shape:
        return [Fault(case, path, "shape", f"{label.shape} (z, y, x)", f"the image's {image.shape}", remedy)]
    gaps = np.abs(image.index_to_mm - label.index_to_mm)
    # Where flips moved the origin to another corner, a tolerable gap in the axes adds up there: then the files' own
    # affines count, with their axes: one origin with flipped axes is another grid.
    if min(gaps.max(), np.abs(image.affine - label.affine).max()) <= _MAX_DIFFERENCE:
        return []
    axes_gap, origin_gap = gaps[:3, :3].max(), gaps[:3, 3].max()
    expected = f"the image's affine within {_MAX_DIFFERENCE:g}"
    gap = f"axes that differ by {axes_gap:.3g}, an origin by {origin_gap:.3g} mm"
    return [Fault(case, path, "affine", gap, expected, remedy)]


def _within(spacing: np.ndarray) -> bool:
    # A float32 0.05 is below a float64 0.05; NaN fails both comparisons.
    return bool(((spacing >= _SPACING_RANGE[0] - 1e-6) & (spacing <= _SPACING_RANGE[1] + 1e-5)).all())


def _numbers(values: np.ndarray) -> str:
    return " x ".join(f"{value:.4g}" for value in values)
