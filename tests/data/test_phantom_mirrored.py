"""The mirrored cohort: blobs that look alike, and a far mark that names them."""

import numpy as np
import pytest

from organseg.data.manifest import load_manifest
from organseg.data.phantom import write_cohort
from organseg.data.phantom_mirrored import make_mirrored_case

SHAPE = (16, 64, 64)


@pytest.fixture(scope="module")
def cases():
    return [make_mirrored_case(0, index, SHAPE) for index in range(40)]


def middle_mm(label, value, spacing):
    return np.argwhere(label == value).mean(axis=0) * spacing


def test_the_gallbladder_is_on_the_livers_side_and_half_are_mirrored(cases):
    sides = []
    for _, label, spacing in cases:
        liver, gallbladder, spleen = (middle_mm(label, value, spacing)[2] - 160 for value in (1, 2, 3))
        assert np.sign(liver) == np.sign(gallbladder) == -np.sign(spleen)
        sides.append(liver > 0)
    assert 8 < sum(sides) < 32


def test_the_blobs_look_alike_whichever_they_are(cases):
    def of_all(value):
        voxels = [image[label == value] for image, label, _ in cases]
        counts = [len(found) for found in voxels]
        return np.concatenate(voxels).mean(), np.concatenate(voxels).std(), np.mean(counts)

    assert of_all(2) == pytest.approx(of_all(3), rel=0.06)


def test_the_mark_is_far_and_in_every_slice(cases):
    for _, label, spacing in cases:
        assert (label == 1).any(axis=(1, 2)).all()
        mark = np.argwhere(label[0] == 1) * spacing[1:]
        for value in (2, 3):
            blob = np.argwhere((label == value).any(axis=0)) * spacing[1:]
            distance = np.linalg.norm(mark[:, None] - blob[None], axis=2)
            assert distance.min() > 100 and distance.mean() > 150


def test_a_case_is_a_function_of_seed_and_index():
    one, again, other = (make_mirrored_case(*key, SHAPE)[0] for key in ((0, 3), (0, 3), (1, 3)))
    assert np.array_equal(one, again) and not np.array_equal(one, other)


def test_a_cohort_on_disk(tmp_path):
    path = write_cohort(tmp_path / "set", cases=2, seed=0, shape=SHAPE, mirrored=True)
    manifest = load_manifest(path)
    assert manifest.name == "mirrored" and manifest.organs == ("liver", "gallbladder", "spleen")
    assert len(manifest.cases) == 2
