"""Where an augmentation moved things to, and that it never mirrors them."""

import cv2
import numpy as np
import pytest

from organseg.data.augment import SliceAugmentation

FLOOR = -1.5
STILL = {"rotation_degrees": 0.0, "scale": (1.0, 1.0), "shift": 0.0, "gain": (1.0, 1.0), "offset": 0.0}


def transform(seed: int, image: np.ndarray, label: np.ndarray | None = None, **ranges):
    label = np.zeros(image.shape, np.uint8) if label is None else label
    apply = SliceAugmentation(**{**STILL, **ranges}).compose(FLOOR)
    return apply(image.astype(np.float32), label, np.random.default_rng(seed))


def centre_of_mass(image: np.ndarray) -> np.ndarray:
    """(x, y) in pixel indices."""
    rows, columns = np.indices(image.shape)
    return np.array([(columns * image).sum(), (rows * image).sum()]) / image.sum()


def blob(shape: tuple[int, int], x: float, y: float) -> np.ndarray:
    rows, columns = np.indices(shape)
    return np.exp(-((columns - x) ** 2 + (rows - y) ** 2) / (2 * 2.5**2))


@pytest.mark.parametrize("shape", [(64, 64), (48, 80), (65, 51)])
def test_the_matrix_says_where_things_went_to_a_tenth_of_a_pixel(shape):
    rng = np.random.default_rng(0)
    for seed in range(25):
        x, y = rng.uniform(0.35, 0.65, 2) * (shape[1] - 1, shape[0] - 1)
        label = (blob(shape, x, y) > 0.3).astype(np.uint8) * 3
        image, moved_label, matrix = transform(
            seed, blob(shape, x, y) + FLOOR, label, rotation_degrees=11.5, scale=(0.85, 1.18), shift=0.12
        )
        expected = (matrix @ (x, y, 1))[:2]
        assert centre_of_mass(image - FLOOR) == pytest.approx(expected, abs=0.1)
        assert centre_of_mass(moved_label == 3) == pytest.approx(expected, abs=0.35)
        assert set(np.unique(moved_label)) <= {0, 3}
        assert matrix[2].tolist() == [0, 0, 1]


def test_it_is_the_matrix_that_warps_the_image_pixel_by_pixel():
    rng = np.random.default_rng(1)
    picture = cv2.GaussianBlur(rng.normal(size=(40, 56)).astype(np.float32), (0, 0), 1.5)
    for seed in range(10):
        image, _, matrix = transform(seed, picture, rotation_degrees=11.5, scale=(0.85, 1.18), shift=0.12)
        expected = cv2.warpAffine(picture, matrix[:2], (56, 40), flags=cv2.INTER_LINEAR, borderValue=FLOOR)
        assert image == pytest.approx(expected, abs=2e-2)


def test_ranges_are_kept_and_nothing_is_ever_mirrored():
    ranges = SliceAugmentation()
    apply = ranges.compose(FLOOR)
    image, label = np.zeros((60, 80), np.float32), np.zeros((60, 80), np.uint8)
    scales, angles, shifts = [], [], []
    for seed in range(300):
        _, _, matrix = apply(image, label, np.random.default_rng(seed))
        linear = matrix[:2, :2]
        scale = np.sqrt(np.linalg.det(linear))  # not a number where it is mirrored
        assert linear / scale @ (linear / scale).T == pytest.approx(np.eye(2), abs=1e-4)
        scales.append(scale)
        angles.append(np.degrees(np.arctan2(linear[1, 0], linear[0, 0])))
        middle = np.array([39.5, 29.5])
        shifts.append(((matrix @ (*middle, 1))[:2] - middle) / (80, 60))
    assert 0.85 - 1e-3 <= min(scales) < 0.88 and 1.15 < max(scales) <= 1.18 + 1e-3
    assert -11.5 - 1e-2 <= min(angles) < -10 and 10 < max(angles) <= 11.5 + 1e-2
    assert np.abs(shifts).max() <= 0.12 + 1 / 60  # albumentations rounds to whole pixels
    for axis in (0, 1):
        assert np.min(shifts, axis=0)[axis] < -0.1 and np.max(shifts, axis=0)[axis] > 0.1


def test_intensities_are_scaled_and_shifted_without_clipping():
    image = np.linspace(-3, 4, 64 * 64).reshape(64, 64)
    gains, offsets = [], []
    for seed in range(60):
        changed, _, matrix = transform(seed, image, gain=(0.9, 1.1), offset=0.1)
        assert matrix == pytest.approx(np.eye(3), abs=1e-6)
        gain, offset = np.polyfit(image.ravel(), changed.ravel(), 1)
        assert changed == pytest.approx(image * gain + offset, abs=1e-4)
        gains.append(gain)
        offsets.append(offset)
    assert 0.9 - 1e-4 <= min(gains) < 0.93 and 1.07 < max(gains) <= 1.1 + 1e-4
    assert -0.1 - 1e-4 <= min(offsets) < -0.08 and 0.08 < max(offsets) <= 0.1 + 1e-4


def test_what_comes_in_from_outside_is_air_and_background():
    for seed in range(20):
        image, label, matrix = transform(seed, np.ones((50, 50)), np.full((50, 50), 2, np.uint8), scale=(0.5, 0.5))
        assert matrix[0, 0] == pytest.approx(0.5, abs=1e-3)
        assert image[0, 0] == pytest.approx(FLOOR)
        assert label[0, 0] == 0
        assert image[25, 25] == 1 and label[25, 25] == 2


def test_the_generator_decides_everything():
    picture = np.random.default_rng(3).normal(size=(32, 32)).astype(np.float32)
    apply = SliceAugmentation().compose(FLOOR)
    label = np.zeros((32, 32), np.uint8)
    first = [apply(picture, label, np.random.default_rng(seed)) for seed in range(5)]
    np.random.seed(0)  # the global generators must not matter
    again = [
        SliceAugmentation().compose(FLOOR)(picture, label, np.random.default_rng(seed)) for seed in (4, 3, 2, 1, 0)
    ]
    for one, other in zip(first, reversed(again), strict=True):
        assert all(np.array_equal(a, b) for a, b in zip(one, other, strict=True))
    assert len({image.tobytes() for image, _, _ in first}) == 5
    assert first[0][0].dtype == np.float32 and first[0][1].dtype == np.uint8
