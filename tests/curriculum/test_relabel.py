"""Which voxels become candidates, what a case's file says of them, and what relabelling holds, refuses and prints."""

import tracemalloc
from collections.abc import Callable
from pathlib import Path

import lightning as L
import numpy as np
import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from organseg.batch import View, WholeCase
from organseg.curriculum import Selection
from organseg.curriculum.relabel import Candidates, Relabelling, Round, Turns, select
from organseg.data.pseudo_labels import PseudoLabels, read_pseudo_labels
from organseg.errors import IntegrityError, Interrupted
from organseg.methods import PartialLabelModule
from organseg.networks import UNet
from organseg.processes import STOP

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


def task(gamma=0.5, index=1, selection=THESIS, mean_ml=(np.nan,) * 3, folder=None, before=None):
    return Round(index, gamma, folder, "made by", before, selection, mean_ml, {"set/case"})


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


def whole(length=8, organs=3, key="set/case", annotated=False) -> WholeCase:
    """Noise of 64 x 64 voxels a slice."""
    image = np.random.default_rng(0).random((length, 64, 64), dtype=np.float32)
    return WholeCase(key, 0, image, lambda part: part, image.shape, SPACING, np.eye(4),
                     np.zeros(image.shape, np.uint8), np.full(organs, annotated))  # fmt: skip


def one_in_a_hundred(organs: int, then: Callable[[], None] = lambda: None) -> Callable[[View], torch.Tensor]:
    """One voxel in a hundred is a candidate of the first organ."""

    def scorer(view: View) -> torch.Tensor:
        then()
        probs = torch.zeros(len(view["image"]), organs, 64, 64)
        probs[:, 0] = view["image"][:, 0] - 0.49
        return torch.cat([probs, probs], dim=1)

    return scorer


def relabelling(scorer, what: Round, organs=3) -> Relabelling:
    names = [f"organ{k}" for k in range(organs)]
    module = PartialLabelModule(names, lambda i, o: UNet(i, o, width=2, depth=2))
    return Relabelling(module, None, scorer, what)


def peak_of(length: int, organs: int, folder: Path) -> int:
    """Bytes of arrays and tensors together, at most, beside the case itself."""
    case = whole(length, organs)
    work = relabelling(one_in_a_hundred(organs), task(mean_ml=(np.nan,) * organs, folder=folder), organs)
    tracemalloc.start()
    try:
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
            work.predict_step(case, 0)
        arrays = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    held = np.cumsum([event.nbytes() for event in seen.profiler.kineto_results.events() if event.name() == "[memory]"])
    assert read_pseudo_labels(folder, case.key).candidate.any()
    return arrays + int(held.max())


def test_memory_does_not_grow_with_organs_times_volume(tmp_path):
    voxels = 64 * 64 * 64
    each = {
        organs: (peak_of(128, organs, tmp_path / f"{organs}") - peak_of(64, organs, tmp_path / f"{organs} half"))
        / voxels
        for organs in (2, 20)
    }
    assert 11 < each[2] < 60  # bytes a voxel; five volumes have 11
    assert each[20] < each[2] + 4  # one byte of each organ would be 18 more


def test_of_an_earlier_round_only_its_label_is_held_while_the_network_runs(tmp_path):
    case, held = whole(64), []
    relabelling(one_in_a_hundred(3), task(0.5, folder=tmp_path / "1")).predict_step(case, 0)
    scorer = one_in_a_hundred(3, lambda: held.append(tracemalloc.get_traced_memory()[0]))
    work = relabelling(scorer, task(1.0, 2, folder=tmp_path / "2", before=tmp_path / "1"))
    tracemalloc.start()
    try:
        work.predict_step(case, 0)
    finally:
        tracemalloc.stop()
    assert len(held) == 4 and max(held) < 3 * case.image.size  # the label, and what the sweep decides, a byte each
    rounds = read_pseudo_labels(tmp_path / "2", case.key).round
    assert (rounds == 1).any() and (rounds == 2).any()


def test_only_training_cases_that_lack_an_organ_are_relabelled(tmp_path):
    work = relabelling(one_in_a_hundred(3), task(folder=tmp_path))
    for case in (whole(key="set/tested"), whole(annotated=True)):
        with pytest.raises(IntegrityError, match=rf"{case.key}: found among the cases to relabel"):
            work.predict_step(case, 0)
    assert not any(tmp_path.iterdir())


def test_a_case_is_left_when_a_signal_came_and_the_turn_s_end_stops(tmp_path, monkeypatch):
    monkeypatch.setattr(STOP, "asked", False)
    looked = []

    def first_views() -> None:
        looked.append(None)
        monkeypatch.setattr(STOP, "asked", True)

    work = relabelling(one_in_a_hundred(3, first_views), task(folder=tmp_path))
    work.predict_step(whole(64), 0)
    assert len(looked) == 1 and not any(tmp_path.iterdir())
    with pytest.raises(Interrupted, match="while relabelling"):
        Turns(3).on_predict_batch_end(trainer(), work, None, None, 0)


def trainer() -> L.Trainer:
    return L.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False)


def test_without_a_terminal_a_line_now_and_then_says_how_far_it_is(capsys):
    often, seldom = Turns(3, print_every_s=0.0), Turns(3)
    for turn in range(3):
        for turns in (often, seldom):
            turns.on_predict_batch_end(trainer(), None, None, None, turn)
    printed = [line for line in capsys.readouterr().out.splitlines() if "relabelled" in line]
    assert printed == [f"relabelled {n} of 3 cases" for n in (1, 2, 3)]
