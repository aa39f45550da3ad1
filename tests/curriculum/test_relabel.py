"""Which voxels become candidates, and what a case's file says of them."""

import numpy as np
import pytest
import torch

from organseg.curriculum import Selection
from organseg.curriculum.relabel import Candidates, Round, select
from organseg.data.pseudo_labels import PseudoLabels

ORGANS = ("liver", "spleen", "pancreas")
SHAPE = (3, 4, 5)
SPACING = (5.0, 2.0, 2.0)
THESIS = Selection()


@pytest.fixture
def volumes():
    rng = np.random.default_rng(0)
    probs = torch.from_numpy(rng.random((SHAPE[0], 3, *SHAPE[1:]), dtype=np.float32))
    score = torch.from_numpy(rng.random((SHAPE[0], 3, *SHAPE[1:]), dtype=np.float32))
    label = np.where(rng.random(SHAPE) < 0.3, 2, 0).astype(np.uint8)  # the spleen is annotated
    label[0, 0, 0] = 255
    return probs, score, label


def collect(probs, score, label, unknown, slab, threshold=0.5):
    candidates = Candidates(label, np.array(unknown), SPACING, threshold)
    for start in range(0, len(probs), slab):
        candidates.add(start, torch.cat([probs, score], dim=1)[start : start + slab])
    return candidates


@pytest.mark.parametrize(("slab", "threshold"), [(1, 0.5), (2, 0.5), (3, 0.2)])
def test_candidates_are_what_the_method_says(volumes, slab, threshold):
    probs, score, label = volumes
    candidates = collect(probs, score, label, [True, False, True], slab, threshold)
    index, organ, ranked, probability = candidates.collected()
    expected = {}
    for z, y, x in np.ndindex(SHAPE):  # METHOD.md 1.5, word by word
        p = {k: float(probs[z, k, y, x]) for k in (0, 2)}
        best = max(p, key=lambda k: p[k])
        if label[z, y, x] == 0 and p[best] >= threshold:
            expected[np.ravel_multi_index((z, y, x), SHAPE)] = (best + 1, float(score[z, best, y, x]), p[best])
    assert index.tolist() == sorted(expected)
    found = zip(organ.tolist(), ranked.tolist(), probability.tolist(), strict=True)
    assert dict(zip(index.tolist(), found, strict=True)) == expected


def task(gamma=0.5, index=1, selection=THESIS, mean_ml=(np.nan,) * 3):
    return Round(index, gamma, None, "made by", None, selection, mean_ml)


def test_each_organ_gets_its_share_and_annotations_stay(volumes):
    probs, score, label = volumes
    candidates = collect(probs, score, label, [True, False, True], 2)
    voxels, header = select(candidates, None, task(), "set/case", ORGANS)
    assert not voxels.label[label > 0].any()
    assert set(np.unique(voxels.label)) == {0, 1, 3}
    for k in (0, 2):
        ours, added = voxels.candidate == k + 1, voxels.label == k + 1
        assert header.candidates[k] == ours.sum() and header.added[k] == added.sum() == -(-ours.sum() // 2)
        assert voxels.score[added].min() >= voxels.score[ours & ~added].max()
    assert (voxels.round == (voxels.label > 0)).all()
    assert header.candidates[1] == header.added[1] == 0


def test_accumulated_rounds_keep_what_was_added(volumes):
    probs, score, label = volumes
    first, _ = select(collect(probs, score, label, [True, False, True], 3), None, task(0.3), "set/case", ORGANS)
    merged = np.where(label == 0, first.label, label)
    second, header = select(
        collect(1 - probs, score, merged, [True, False, True], 3), first, task(1.0, 2), "set/case", ORGANS
    )
    earlier = first.round > 0
    assert earlier.any()
    assert (second.label[earlier] == first.label[earlier]).all() and (second.round[earlier] == 1).all()
    assert (second.score[earlier] == first.score[earlier]).all() and first.score[earlier].any()
    assert (second.probability[earlier] == first.probability[earlier]).all() and first.probability[earlier].any()
    assert not second.candidate[earlier].any()
    assert (second.round == 2).sum() == sum(header.added) > 0


def test_without_candidates(volumes):
    probs, score, label = volumes
    voxels, header = select(
        collect(probs * 0, score, label, [True, True, True], 2), None, task(1.0), "set/case", ORGANS
    )
    assert isinstance(voxels, PseudoLabels) and not voxels.label.any()
    assert header.candidates == header.added == (0, 0, 0)


def test_no_more_than_an_organ_can_be(volumes):
    probs, score, label = volumes
    # 20 mm3 a voxel: half of 0.2 mL are 5 voxels of the liver; the pancreas has no annotated volume, so no limit.
    limited = task(0.5, selection=Selection(max_volume=1.0), mean_ml=(0.2, 0.2, np.nan))
    _, header = select(collect(probs, score, label, [True, False, True], 2), None, limited, "set/case", ORGANS)
    assert header.candidates[0] > 10 and header.added[0] == 5
    assert header.added[2] == -(-header.candidates[2] // 2)
