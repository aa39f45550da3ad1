"""One sealed file a case: what is written is read, what is damaged is refused, annotations never change."""

import numpy as np
import pytest

from organseg.data.pseudo_labels import (
    PseudoLabels,
    RoundHeader,
    RoundLabels,
    exists,
    merge,
    path_of,
    read_pseudo_labels,
    read_round_header,
    write_pseudo_labels,
)
from organseg.errors import IntegrityError

SHAPE = (3, 20, 16)
HEADER = RoundHeader("set/case0", ("liver", "spleen"), 2, 0.5, "made by", (10, 0), (5, 0))


def voxels(seed=0):
    rng = np.random.default_rng(seed)
    candidate = rng.integers(0, 3, SHAPE, dtype=np.uint8)
    label = np.where(rng.random(SHAPE) < 0.5, candidate, 0).astype(np.uint8)
    rounds = (label > 0).astype(np.uint8) * 2
    score = rng.random(SHAPE, dtype=np.float32)
    return PseudoLabels(label, rounds, candidate, score, 1 - score)


def test_what_is_written_is_read(tmp_path):
    write_pseudo_labels(tmp_path, HEADER, voxels())
    assert read_round_header(tmp_path, "set/case0") == HEADER
    found = read_pseudo_labels(tmp_path, "set/case0")
    for name, array in voxels().__dict__.items():
        assert (getattr(found, name) == array).all() and getattr(found, name).dtype == array.dtype


def test_made_by_decides_whether_a_file_is_there(tmp_path):
    assert not exists(tmp_path, "set/case0", "made by")
    write_pseudo_labels(tmp_path, HEADER, voxels())
    assert exists(tmp_path, "set/case0", "made by")
    assert not exists(tmp_path, "set/case0", "other weights")


def test_every_flip_is_found(tmp_path):
    write_pseudo_labels(tmp_path, HEADER, voxels())
    path = path_of(tmp_path, "set/case0")
    content = path.read_bytes()
    for place in np.random.default_rng(0).integers(0, len(content), 60):
        damaged = bytearray(content)
        damaged[place] ^= 4
        path.write_bytes(damaged)
        assert not exists(tmp_path, "set/case0", "made by")
        with pytest.raises(IntegrityError, match="set/case0"):
            read_pseudo_labels(tmp_path, "set/case0")
        with pytest.raises(IntegrityError, match="fit"):
            RoundLabels(tmp_path, ["set/case0"], ["set/case0"])


def test_merging_never_changes_an_annotation():
    label = np.array([0, 1, 2, 255, 0], np.uint8)
    pseudo = np.array([3, 3, 3, 3, 0], np.uint8)
    assert merge(label, pseudo).tolist() == [3, 1, 2, 255, 0]
    assert merge(label, pseudo).dtype == np.uint8


def test_round_labels_of_cases_with_and_without(tmp_path):
    write_pseudo_labels(tmp_path, HEADER, voxels())
    labels = RoundLabels(tmp_path, ["set/full", "set/case0"], {"set/case0"})
    assert labels.plane(0, 1) is None and labels.counts(0) is None
    assert (labels.plane(1, 1) == voxels().label[1]).all()
    by_hand = [[int((plane == k).sum()) for k in (1, 2)] for plane in voxels().label]
    assert labels.counts(1).tolist() == by_hand


def test_a_missing_file_is_an_error(tmp_path):
    with pytest.raises(IntegrityError, match="set/case1"):
        RoundLabels(tmp_path, ["set/case1"], {"set/case1"})
