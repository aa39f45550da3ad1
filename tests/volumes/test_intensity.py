"""METHOD.md 0: clip, subtract the mean, divide by the standard deviation."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from organseg.volumes import Normalisation, fit_normalisation, own_normalisation

WINDOW = (-160.0, 300.0)


def test_by_hand():
    normalise = Normalisation(WINDOW, mean=70.0, std=46.0)
    image = np.array([[-2000, -160, 70], [116, 300, 3000]], np.int16)
    # (-160 - 70) / 46 = -5; (116 - 70) / 46 = 1; (300 - 70) / 46 = 5
    assert normalise(image).tolist() == pytest.approx(np.array([[-5, -5, 0], [1, 5, 5]]))
    assert normalise(image).dtype == np.float32
    assert normalise.floor == -5
    assert image[0, 0] == -2000  # untouched


@pytest.mark.parametrize("dtype", [np.int16, np.float32, np.float64, ">i2"])
def test_any_type_and_shape(dtype):
    normalise = Normalisation(WINDOW, 10.0, 20.0)
    image = np.arange(-200, 400, 10).reshape(3, 4, 5).astype(dtype)
    assert normalise(image) == pytest.approx((np.clip(image.astype(float), *WINDOW) - 10) / 20, abs=1e-5)
    assert normalise(image).dtype == np.float32 and normalise(image).dtype.isnative


@given(st.lists(arrays.arrays(np.int16, st.tuples(*[st.integers(1, 4)] * 3)), min_size=1, max_size=4))
@settings(max_examples=60, deadline=None)
def test_statistics_are_over_all_voxels_of_all_images(images):
    found = fit_normalisation(iter(images), WINDOW)
    voxels = np.clip(np.concatenate([image.ravel() for image in images]), *WINDOW).astype(np.float64)
    assert found.window == WINDOW
    assert found.mean == pytest.approx(voxels.mean(), abs=1e-6)
    expected = voxels.std()
    assert found.std == pytest.approx(expected if expected > 1e-5 else 1.0, abs=1e-4)


def test_normalised_training_voxels_have_mean_0_and_deviation_1():
    rng = np.random.default_rng(0)
    images = [rng.normal(mean, 200, (4, 20, 20)).astype(np.int16) for mean in (-300, 0, 100)]
    normalise = fit_normalisation(images, WINDOW)
    values = np.concatenate([normalise(image).ravel() for image in images])
    assert values.mean() == pytest.approx(0, abs=1e-4) and values.std() == pytest.approx(1, abs=1e-4)


def test_large_volumes_lose_no_precision():
    image = np.full((64, 128, 128), 299, np.int16)
    image[::2] = 300
    found = fit_normalisation([image] * 3, WINDOW)
    assert (found.mean, found.std) == pytest.approx((299.5, 0.5), abs=1e-5)


def test_a_constant_image_is_not_divided_by_zero():
    constant = np.full((2, 3, 3), 50, np.int16)
    assert fit_normalisation([constant], WINDOW) == Normalisation(WINDOW, 50.0, 1.0)
    assert (fit_normalisation([constant], WINDOW)(constant) == 0).all()
    assert np.isfinite(own_normalisation(constant)(constant)).all()


def test_mr_is_normalised_by_its_own_percentiles():
    rng = np.random.default_rng(1)
    image = rng.gamma(2, 100, (20, 30, 30)).astype(np.float32)
    image[0, 0, 0] = 1e6  # one wild voxel must not set the scale
    found = own_normalisation(image)
    assert found.window == pytest.approx(np.percentile(image, (0.5, 99.5)), rel=1e-3)
    clipped = np.clip(image, *found.window)
    assert (found.mean, found.std) == pytest.approx((clipped.mean(), clipped.std()), rel=1e-4)
    louder = own_normalisation(image * 7)  # no absolute scale
    assert louder(image * 7) == pytest.approx(found(image), abs=1e-3)
