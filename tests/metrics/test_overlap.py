import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from torchmetrics.functional.segmentation import dice_score

from organseg.metrics.overlap import OverlapCounts, dsc, overlap_counts

SHAPE = (3, 4, 5)
PREDS = arrays(np.uint8, SHAPE, elements=st.integers(0, 3))
LABEL = arrays(np.uint8, SHAPE, elements=st.sampled_from([0, 1, 2, 3, 255]))


def random_maps(shape, organs=3, seed=0):
    generator = np.random.default_rng(seed)
    return generator.integers(0, organs + 1, (2, *shape), np.uint8)


def test_counts_and_dice_of_a_row_worked_by_hand():
    preds = np.array([[[1, 1, 1, 2, 0, 0, 3]]], np.uint8)
    label = np.array([[[1, 1, 2, 2, 2, 0, 0]]], np.uint8)
    counts = overlap_counts(preds, label, 4)
    assert counts.intersection.tolist() == [2, 1, 0, 0]
    assert counts.preds.tolist() == [3, 1, 1, 0]
    assert counts.label.tolist() == [2, 3, 0, 0]
    # 2*2/(3+2), 2*1/(1+3), one empty: 0, both empty: 1
    assert dsc(counts).tolist() == [0.8, 0.5, 0.0, 1.0]


def test_missed_organ_scores_zero():
    label = np.array([[[1]]], np.uint8)
    assert dsc(overlap_counts(np.zeros_like(label), label, 1)).tolist() == [0.0]


def test_ignore_voxels_count_in_neither_map():
    preds = np.array([[[1, 1, 1, 2]]], np.uint8)
    label = np.array([[[1, 255, 255, 255]]], np.uint8)
    counts = overlap_counts(preds, label, 2)
    assert counts.preds.tolist() == [1, 0]
    assert dsc(counts).tolist() == [1.0, 1.0]


@settings(deadline=None, max_examples=50)
@given(PREDS, LABEL)
def test_counts_are_those_of_plain_masks(preds, label):
    counts = overlap_counts(preds, label, 3)
    known = label != 255
    for k in range(3):
        ours, truth = (preds == k + 1) & known, label == k + 1
        expected = (ours & truth).sum(), ours.sum(), truth.sum()
        assert (counts.intersection[k], counts.preds[k], counts.label[k]) == expected


def test_maps_larger_than_a_chunk_and_not_contiguous():
    preds, label = random_maps((13, 300, 700))  # 2.6 chunks
    counts = overlap_counts(preds[:, ::-1], label[:, ::-1], 3)
    assert counts.intersection.tolist() == [int(((preds == k) & (label == k)).sum()) for k in (1, 2, 3)]
    assert counts.preds.tolist() == [int((preds == k).sum()) for k in (1, 2, 3)]


def test_dice_of_stacked_slices_is_that_of_the_volume():
    preds, label = random_maps((5, 9, 7))
    total = OverlapCounts(*np.zeros((3, 3), np.int64))
    for ours, truth in zip(preds, label, strict=True):
        total = total + overlap_counts(ours, truth, 3)
    assert dsc(total).tolist() == dsc(overlap_counts(preds, label, 3)).tolist()


def test_dice_agrees_with_torchmetrics():
    preds, label = random_maps((6, 7, 8), organs=4)
    ours, truth = (
        torch.nn.functional.one_hot(torch.from_numpy(m).long(), 5).movedim(-1, 0)[None] for m in (preds, label)
    )
    theirs = dice_score(ours, truth, 5, include_background=False, average="none", input_format="one-hot")
    np.testing.assert_allclose(dsc(overlap_counts(preds, label, 4)), theirs[0].numpy(), rtol=1e-6)


@pytest.mark.parametrize(
    ("preds", "label", "message"),
    [
        (np.zeros((2, 2, 2), np.int64), np.zeros((2, 2, 2), np.uint8), "uint8 label maps, got int64 and uint8"),
        (np.zeros((2, 2, 2), np.uint8), np.zeros((2, 2, 1), np.uint8), r"one shape, got \(2, 2, 2\) and \(2, 2, 1\)"),
        (np.full((1, 1, 1), 4, np.uint8), np.zeros((1, 1, 1), np.uint8), r"`preds` must hold 0..3, found \[4\]"),
        (np.full((1, 1, 1), 255, np.uint8), np.zeros((1, 1, 1), np.uint8), r"`preds` must hold 0..3, found \[255\]"),
        (np.zeros((1, 1, 1), np.uint8), np.full((1, 1, 1), 9, np.uint8), r"`label` must hold 0..3 or 255, found \[9\]"),
    ],
)
def test_maps_that_do_not_fit_are_refused(preds, label, message):
    with pytest.raises(ValueError, match=message):
        overlap_counts(preds, label, 3)
