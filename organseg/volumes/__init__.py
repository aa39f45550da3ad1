"""One scan in memory and on disk: orientation, NIfTI in and out, resampling (DESIGN.md section 1)."""

from organseg.volumes.geometry import AffineSource, compare_geometry
from organseg.volumes.header import MAX_AXIS, MAX_VOXELS
from organseg.volumes.intensity import Normalisation, fit_normalisation, own_normalisation
from organseg.volumes.nifti import read_image, read_label, write_image, write_label, write_map
from organseg.volumes.orientation import canonical_affine, canonical_shape, spacing_of, to_canonical, to_file
from organseg.volumes.preprocessing import Preprocessing
from organseg.volumes.resample import linear_weights, resample_image, resample_label, resampled_affine
from organseg.volumes.volume import Volume
from organseg.volumes.working_grid import WorkingGrid, affine_on, spacing_on

__all__ = [
    "MAX_AXIS",
    "MAX_VOXELS",
    "AffineSource",
    "Normalisation",
    "Preprocessing",
    "Volume",
    "WorkingGrid",
    "affine_on",
    "canonical_affine",
    "canonical_shape",
    "compare_geometry",
    "fit_normalisation",
    "linear_weights",
    "own_normalisation",
    "read_image",
    "read_label",
    "resample_image",
    "resample_label",
    "resampled_affine",
    "spacing_of",
    "spacing_on",
    "to_canonical",
    "to_file",
    "write_image",
    "write_label",
    "write_map",
]
