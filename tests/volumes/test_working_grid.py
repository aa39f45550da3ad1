import numpy as np
import pytest

from organseg.volumes import WorkingGrid, resampled_affine, spacing_on

SCAN, SPACING = (40, 512, 400), (5.0, 0.75, 0.8)


@pytest.mark.parametrize(
    ("grid", "shape"),
    [
        (WorkingGrid(), (40, 512, 400)),
        (WorkingGrid(size=128), (40, 128, 128)),
        (WorkingGrid(spacing=(5.0, 1.5, 1.6)), (40, 256, 200)),
        (WorkingGrid(spacing=(2.0, 0.75, 1.0)), (100, 512, 320)),
        (WorkingGrid(spacing=(3.0, 2.0, 3.0)), (67, 192, 107)),  # 66.7, 192, 106.7
        (WorkingGrid(spacing=(1000.0, 1.5, 1000.0)), (1, 256, 1)),
    ],
)
def test_shapes_by_hand(grid, shape):
    assert grid.shape(SCAN, SPACING) == shape


@pytest.mark.parametrize("new_shape", [(40, 128, 128), (67, 192, 107), (1, 1, 1), (80, 1024, 800)])
def test_the_extent_stays(new_shape):
    spacing = spacing_on(new_shape, SCAN, SPACING)
    assert np.multiply(spacing, new_shape) == pytest.approx(np.multiply(SPACING, SCAN))
    # The same rule as the affine's.
    affine = resampled_affine(np.diag([*SPACING, 1]), SCAN, new_shape)
    assert np.diag(affine)[:3] == pytest.approx(spacing)


def test_a_grid_is_reached_within_half_a_voxel():
    wanted = (3.0, 2.0, 3.0)
    shape = WorkingGrid(spacing=wanted).shape(SCAN, SPACING)
    found = spacing_on(shape, SCAN, SPACING)
    assert all(abs(f - w) * n <= w / 2 + 1e-9 for f, w, n in zip(found, wanted, shape, strict=True))
