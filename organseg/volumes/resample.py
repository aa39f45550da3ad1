"""Resampling to another number of voxels over the same field of view (METHOD.md section 0: slices of any size).

Separable: each axis is one matrix of linear interpolation weights, so a slice is two matrix products. The weights are
those of torch's `interpolate(mode="bilinear", align_corners=False, antialias=True)`. Only the slices that one result
slice needs are in memory as float32.
"""

from collections.abc import Callable, Iterator
from typing import TypeVar

import numpy as np
from scipy import ndimage

T = TypeVar("T")

_TIE = 1e-5  # sums of float32 weights differ by less; organ shares that matter differ by more


def linear_weights(n_in: int, n_out: int) -> np.ndarray:
    """Linear interpolation of n_in samples to n_out, as a matrix.

    Shrinking widens the triangle by the scale, so that every input voxel counts; growing is plain linear interpolation
    with clamped edges; equal sizes give the identity.

    Args:
        n_in: Samples of the input, at least 1.
        n_out: Samples of the output over the same extent, at least 1.

    Returns:
        float32 [n_out, n_in]; each row sums to 1.
    """
    scale = n_in / n_out
    centres = (np.arange(n_out) + 0.5) * scale
    distance = np.abs(np.arange(n_in) + 0.5 - centres[:, None]) / max(scale, 1.0)
    weights = np.clip(1 - distance, 0, None)
    weights /= weights.sum(axis=1, keepdims=True)
    return weights.astype(np.float32)


def resample_image(array: np.ndarray, shape: tuple[int, int, int]) -> np.ndarray:
    """Resample an image linearly, with antialiasing where it shrinks.

    Args:
        array: [Z, Y, X] int16 or float32, finite.
        shape: [Z', Y', X'] of the result.

    Returns:
        A new array of that shape and of the input's dtype (int16: rounded).
    """
    across_z, down, along = (linear_weights(*sizes) for sizes in zip(array.shape, shape, strict=True))
    result = np.empty(shape, array.dtype)
    in_plane = array.shape[1:] != tuple(shape[1:])

    def plane_of(index: int) -> np.ndarray:
        plane: np.ndarray = array[index].astype(np.float32)
        if in_plane:
            plane = down @ (plane @ along.T)
        return plane

    for index, taps, planes in _sweep(across_z, plane_of):
        plane = planes[0] if len(taps) == 1 else np.tensordot(across_z[index, taps], np.stack(planes), 1)
        result[index] = np.rint(plane) if result.dtype.kind in "iu" else plane
    return result


def resample_label(array: np.ndarray, shape: tuple[int, int, int]) -> np.ndarray:
    """Resample a label map: each voxel takes the value that covers most of it.

    Every value's mask is resampled like an image; the largest share wins, 0 included, ties go to the lower value. 255
    (ignore) is a value like any other.

    Args:
        array: [Z, Y, X] uint8.
        shape: [Z', Y', X'] of the result.

    Returns:
        A new uint8 array of that shape.
    """
    if array.shape == tuple(shape):
        return array.copy()
    across_z, down, along = (linear_weights(*sizes) for sizes in zip(array.shape, shape, strict=True))
    result = np.zeros(shape, np.uint8)
    for index, taps, planes in _sweep(across_z, lambda index: _mask_shares(array[index], down, along)):
        shares: dict[int, np.ndarray] = {}
        for weight, plane in zip(across_z[index, taps], planes, strict=True):
            for value, (rows, columns, block) in plane.items():
                share = shares.setdefault(value, np.zeros(shape[1:], np.float32))
                share[rows, columns] += weight * block
        if not shares:
            continue
        best = 1 - sum(shares.values())  # the background's share: the weights of a voxel sum to 1
        for value in sorted(shares):
            wins = shares[value] > best + _TIE
            result[index][wins] = value
            best = np.where(wins, shares[value], best)
    return result


def resampled_affine(
    index_to_mm: np.ndarray, shape: tuple[int, int, int], new_shape: tuple[int, int, int]
) -> np.ndarray:
    """Where the voxels of a resampled array lie: the field of view stays, so voxel *edges* coincide, not centres.

    Args:
        index_to_mm: 4 x 4, index (z, y, x) before -> mm.
        shape: [Z, Y, X] before.
        new_shape: [Z', Y', X'] after.

    Returns:
        4 x 4 float64, index (z, y, x) after -> mm.
    """
    scale = np.array(shape) / np.array(new_shape)
    to_old = np.diag([*scale, 1.0])
    to_old[:3, 3] = scale / 2 - 0.5
    return np.asarray(index_to_mm @ to_old, dtype=np.float64)


def _sweep(across_z: np.ndarray, plane_of: Callable[[int], T]) -> Iterator[tuple[int, np.ndarray, list[T]]]:
    """For each output slice: its index, the input slices it needs, and those slices resampled in plane.

    An input slice is resampled once and forgotten as soon as no later output slice needs it.
    """
    window: dict[int, T] = {}
    for index, row in enumerate(across_z):
        taps = np.flatnonzero(row)
        window = {tap: window[tap] if tap in window else plane_of(tap) for tap in taps.tolist()}
        yield index, taps, list(window.values())


def _mask_shares(plane: np.ndarray, down: np.ndarray, along: np.ndarray) -> dict[int, tuple[slice, slice, np.ndarray]]:
    """Per value above 0 of one slice: the output rows and columns it reaches, and its share of each voxel there."""
    shares = {}
    for value, box in enumerate(ndimage.find_objects(plane), start=1):
        if box is None:
            continue
        rows, columns = _reach(down[:, box[0]]), _reach(along[:, box[1]])
        mask = (plane[box] == value).astype(np.float32)
        shares[value] = rows, columns, down[rows, box[0]] @ (mask @ along[columns, box[1]].T)
    return shares


def _reach(weights: np.ndarray) -> slice:
    touched = np.flatnonzero(weights.any(axis=1))
    return slice(int(touched[0]), int(touched[-1]) + 1) if len(touched) else slice(0, 0)
