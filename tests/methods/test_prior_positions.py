"""STIPPLE in the method: where organs are taken to be, in training and in two passes (METHOD.md 2.3)."""

from dataclasses import replace
from pathlib import Path

import lightning as L
import numpy as np
import pytest
import torch
from stippled import GRID, ORGANS, ball_model, coarse_of, data_of, method, trainer
from synthetic import make_cache, make_case, write_dataset, write_label_map
from torch import nn

from organseg.batch import View
from organseg.data.module import collate
from organseg.errors import Interrupted, UsageError
from organseg.methods.built_priors import built_priors
from organseg.methods.ensemble import Ensemble, moved
from organseg.methods.organ_positions import Positioning, PriorGrid, learned_prior, true_centres
from organseg.priors import OrganPriors, Reference, positions
from organseg.processes import STOP
from organseg.volumes import Normalisation

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


def test_centres_are_those_of_the_batches(cache):
    data = data_of(cache, label_share=1.0)
    found = {case.key: true_centres(case, 4) for case in (data.training_cases()[n] for n in range(3))}
    for case in data.cohort.train[:3]:
        np.testing.assert_allclose(found[case.key], case.centres(), rtol=1e-6)


def cut(label: np.ndarray, channel: int) -> bool:
    """Whether the organ has a voxel at a border of the scan."""
    return int((label == channel + 1).sum()) != int((label[1:-1, 1:-1, 1:-1] == channel + 1).sum())


def test_priors_are_built_of_the_fold_s_annotated_training_cases_alone(cache):
    data = data_of(cache)
    positioning = Positioning(PriorGrid(GRID), "boxes", 1, 0.0)
    known, _ = built_priors(data, ORGANS, positioning, 5)
    for k, (prior, pool) in enumerate(zip(known.priors, known.references, strict=True)):
        showing = [case for case in data.cohort.train if case.known[k]]
        annotating = {case.key for case in showing if not cut(case.lookup[case.cached.arrays().label], k)}
        annotating = annotating or {case.key for case in showing}
        assert set(prior.cases) == {reference.case for reference in pool} == annotating
        assert prior.organ == ORGANS[k] and prior.probs.max() > 0.9
    assert not {case.key for case in data.cohort.test} & {case for prior in known.priors for case in prior.cases}


@pytest.mark.parametrize("position", ["matched", "aligned", "naive"])
def test_a_case_is_searched_on_the_prior_s_grid_and_found_in_mm(fitted, position, monkeypatch):
    module, data, folder = fitted
    module.trainer = trainer(folder)
    truth = np.array([[52.0, 120, 90], [44.0, 200, 200], [np.nan] * 3, [70.0, 130, 220]], np.float32)
    monkeypatch.setattr(module, "_coarse_probabilities", ball_model(truth, 30.0))
    monkeypatch.setattr(module, "position", position)
    spacing, centring = (5.0, 4.0, 4.0), "matched" if position == "matched" else "boxes"
    positioning = Positioning(PriorGrid(spacing), centring, 1, 30.0)
    mm = [np.arange(-7, 8) * step for step in spacing]
    ball = Reference("a/ball", sum(axis**2 for axis in np.ix_(*mm)) <= 30.0**2)
    priors = tuple(learned_prior(organ, [ball], positioning, "all") for organ in ORGANS)
    known = OrganPriors(priors, ((ball,),) * 4, centring)
    monkeypatch.setattr(module, "positioning", positioning)
    monkeypatch.setattr(module, "known", known)
    case = data.training_cases()[0]
    # Wanted on a finer grid than the network's: positions are mm from the first voxel of the network's all the same.
    fine = replace(case, key="other/scan", shape=(24, 64, 32), spacing=(5.0, 4.5, 8.0), truth=None)
    found = module._located(fine, np.ones(4, bool))
    assert np.isnan(found[2]).all()
    np.testing.assert_allclose(np.delete(found, 2, 0), np.delete(truth, 2, 0), atol=5.0)


def test_where_an_organ_is_found_decides_where_it_is_predicted(fitted, tmp_path, monkeypatch):
    data, module = fitted[1], method(None, position="naive")
    module.load_state_dict(fitted[0].state_dict())
    module.eval().trainer = trainer(tmp_path)
    for parameter in module.network.head.parameters():
        nn.init.zeros_(parameter)  # the network says nothing: an organ is where its prior is above 0.5
    case = replace(data.training_cases()[0], key="other/scan")
    centres = []
    for shift in (0.0, 27.0):
        there = np.full((4, 3), np.nan, np.float32)
        there[0] = np.array([60.0, 100.0 + shift, 120.0])
        monkeypatch.setattr(module, "_coarse_probabilities", ball_model(there, 30.0))
        module.forget_positions()
        found = np.argwhere(module.segment(case) == 1) * case.spacing
        centres.append(found.mean(0))
    np.testing.assert_allclose(centres[0], [60, 100, 120], atol=25.0)  # the core of the prior, not its box
    np.testing.assert_allclose(centres[1] - centres[0], [0, 27, 0], atol=5.0)


def test_a_stop_while_organs_are_found(cache, coarse, tmp_path, monkeypatch):
    monkeypatch.setattr(STOP, "asked", True)
    module = method(coarse)
    with pytest.raises(Interrupted, match="stopped by a signal while reading annotations"):
        trainer(tmp_path).fit(module, data_of(cache))
    assert not (tmp_path / "prior").exists()


def table_of(folder: Path) -> dict[tuple[str, str], list[str]]:
    """(case, organ) -> who says where it is, and where."""
    lines = (folder / "prior" / "centres.csv").read_text().splitlines()[1:]
    return {(case, organ): said for case, organ, *said in (line.split(",") for line in lines)}


def test_annotated_organs_are_where_they_are_annotated_and_others_where_the_coarse_model_finds_them(
    cache, coarse, tmp_path, monkeypatch
):
    module, data = method(coarse, position="naive"), data_of(cache)
    found = np.array([[52.0, 120, 90], [44.0, 200, 200], [np.nan] * 3, [70.0, 130, 220]], np.float32)
    monkeypatch.setattr(module, "_coarse_probabilities", ball_model(found, 30.0))
    trainer(tmp_path).fit(module, data)
    table = table_of(tmp_path)
    assert len(table) == len(data.cohort.train) * 4
    sources = set()
    for case in data.cohort.train:
        for k, organ in enumerate(ORGANS):
            centre, (source, *mm) = module.centres[case.key][k], table[case.key, organ]
            if case.known[k]:
                assert source == "annotation"
                np.testing.assert_allclose(centre, case.centres()[k], rtol=1e-6)
            else:
                assert source == ("not found" if np.isnan(found[k]).any() else "coarse model")
                np.testing.assert_allclose(centre, found[k], atol=5.0)
            assert mm == ["" if np.isnan(value) else f"{value:.1f}" for value in centre]
            sources.add(source)
    assert sources == {"annotation", "coarse model", "not found"}


def test_training_cases_too_have_lost_organs_where_the_others_say(cache, coarse, tmp_path, monkeypatch):
    module, data = method(coarse, position="naive", placed_by_others=True), data_of(cache)
    found = np.array([[52.0, 120, 90], [44.0, 200, 200], [np.nan] * 3, [70.0, 130, 220]], np.float32)
    monkeypatch.setattr(module, "_coarse_probabilities", ball_model(found, 30.0))
    trainer(tmp_path).fit(module, data)
    table, lost = table_of(tmp_path), 0
    assert np.isfinite(module.between).all()
    for case in data.cohort.train:
        centres, ours = module.centres[case.key], case.centres()
        for k, organ in enumerate(ORGANS):
            source = table[case.key, organ][0]
            if case.known[k]:
                assert source == "annotation"
                np.testing.assert_allclose(centres[k], ours[k], rtol=1e-6)
            elif k == 2:
                assert source == "other organs"
                said = np.delete(centres + module.between[k], k, axis=0)
                np.testing.assert_allclose(centres[k], np.median(said, axis=0), atol=1e-3)
                lost += 1
            else:
                assert source == "coarse model"
    assert lost
    known = [case.centres()[2] - case.centres()[0] for case in data.cohort.train if case.known[[0, 2]].all()]
    own = [case.centres()[2] - found[0] for case in data.cohort.train if case.known[2] and not case.known[0]]
    np.testing.assert_allclose(module.between[2, 0], np.median([*known, *own], axis=0), atol=5.0)
    other = method(coarse, position="naive", placed_by_others=True)
    other.load_state_dict(module.state_dict())
    np.testing.assert_array_equal(other.between, module.between)
    older = module.state_dict()
    older["_extra_state"] = {key: value for key, value in older["_extra_state"].items() if key != "between"}
    other.load_state_dict(older)
    assert other.between.shape == (4, 4, 3) and np.isfinite(other.between).all()


def test_at_true_positions_an_absent_organ_is_not_placed(fitted, monkeypatch):
    module, data, _ = fitted
    monkeypatch.setattr(module, "position", "true")
    monkeypatch.setattr(module, "placed_by_others", True)
    case = data.training_cases()[0]
    truth = np.where(case.truth == 1, 0, case.truth)
    every = replace(case, key="other/scan", truth=truth, annotated=np.ones(4, bool))
    assert np.isnan(module.centres_of(every)[0]).all()


@pytest.mark.parametrize("placed_by_others", [False, True])
@pytest.mark.parametrize(("centring", "position"), [("boxes", "naive"), ("matched", "matched")])
def test_an_absent_organ_is_nowhere(centring, position, placed_by_others, tmp_path, monkeypatch):
    dataset = write_dataset(tmp_path / "set", 6)
    for n in range(3):  # some of them are in the training part, whatever the fold
        label = make_case(n)[1]
        write_label_map(tmp_path / "set" / f"case{n}_label.nii.gz", np.where(label == 7, 0, label))
    data = data_of(make_cache(dataset, tmp_path / "cache"), label_share=1.0)
    placing = {"centring": centring, "position": position, "placed_by_others": placed_by_others}
    module = method(coarse_of(data, tmp_path / "coarse.ckpt"), **placing)
    monkeypatch.setattr(module, "_coarse_probabilities", ball_model(np.full((4, 3), 100.0, np.float32), 30.0))
    trainer(tmp_path).fit(module, data)
    table = table_of(tmp_path)
    lacking = {case.key for case in data.cohort.train} & {f"tiny/case{n}" for n in range(3)}
    assert lacking
    for (case, organ), said in table.items():
        absent = case in lacking and organ == "spleen"
        assert (said == ["absent", "", "", ""]) == absent and (said[0] == "annotation") != absent
        assert np.isnan(module.centres[case][ORGANS.index(organ)]).all() == absent
    samples = data_of(tmp_path / "cache", label_share=1.0).samples()
    batch = collate([samples[step, 0] for step in range(12)])
    neutral = (module.prior_of(batch, (32, 32))[:, 3] == 0.5).flatten(1).all(dim=1)
    assert neutral.tolist() == [case in lacking for case in batch["case"]] and neutral.any()


def test_a_truth_is_never_looked_at_to_find_a_test_case_s_organs(fitted):
    module, data, folder = fitted
    module.trainer = trainer(folder)
    case = data.training_cases()[0]
    first = module.segment(replace(case, key="other/scan"))
    module.forget_positions()
    second = module.segment(replace(case, key="other/scan", truth=np.zeros_like(case.truth)))
    assert (first == second).all()


def test_coordinates_are_decimetres_from_the_middle_of_what_was_found(fitted):
    view: View = {
        "image": torch.zeros(2, 1, 3, 3),
        "case": ["other/scan"] * 2,
        "index_to_mm": torch.diag(torch.tensor([10.0, 50, 100, 1])).repeat(2, 1, 1),
        "centre": torch.full((2, 4, 3), torch.nan),
    }
    view["index_to_mm"][:, 0, 3] = 30.0
    view["centre"][0, 0], view["centre"][0, 2] = torch.tensor([0.0, 0, 0]), torch.tensor([20.0, 100, 200])
    found = fitted[0]._coordinates(view, (3, 3))
    assert found.shape == (2, 3, 3, 3) and (found[1] == 0).all()
    torch.testing.assert_close(found[0, :, 2, 1], torch.tensor([0.2, 0.5, 0.0]))


def test_members_of_an_ensemble_look_for_the_organs_themselves(fitted, coarse, tmp_path, monkeypatch):
    """Two members whose coarse models find the organs at other places, and see other normalisations."""
    first, data, _ = fitted
    second = method(coarse)
    second.load_state_dict(first.state_dict())
    second.eval()
    second.preprocessing = replace(first.preprocessing, normalisation=Normalisation((-160.0, 300.0), 20.0, 50.0))
    ensemble = Ensemble([first, second])
    ensemble.trainer = trainer(tmp_path)
    ensemble.setup("predict")
    there = np.array([[52.0, 120, 90], [44.0, 200, 200], [70.0, 130, 220], [60.0, 60, 60]], np.float32)
    brightest = []
    for n, one in enumerate((first, second)):
        find = ball_model(there + 20 * n, 30.0)
        monkeypatch.setattr(
            one, "_coarse_probabilities", lambda view, find=find: (brightest.append(view["image"].max()), find(view))[1]
        )
    case = replace(data.training_cases()[0], key="other/scan")
    alone = []
    for one in (first, second):
        one.forget_positions()
        own = replace(case, normalise=one.preprocessing.normalisation, floor=one.preprocessing.normalisation.floor)
        one.segment(own, lambda _, probs: alone.append(probs))
        one.forget_positions()
    looked = len(brightest)
    together = []
    ensemble.segment(case, lambda _, probs: together.append(probs))
    # The same slabs, first of one member and then of the other.
    slabs = len(alone) // 2
    assert not torch.equal(torch.cat(alone[:slabs]), torch.cat(alone[slabs:]))
    expected = (torch.cat(alone[:slabs]) + torch.cat(alone[slabs:])) / 2
    torch.testing.assert_close(torch.cat(together), expected, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(torch.stack(brightest[looked:]), torch.stack(brightest[:looked]))


def test_the_true_position_needs_a_truth(fitted, monkeypatch):
    module, data, _ = fitted
    monkeypatch.setattr(module, "position", "true")
    case = data.training_cases()[0]
    found = module.centres_of(replace(case, key="other/scan"))
    np.testing.assert_array_equal(found, true_centres(case, 4))
    with pytest.raises(UsageError, match="for a test alone"):
        method(None, position="true").begin()
    with pytest.raises(UsageError, match="needs a truth"):
        module.centres_of(replace(case, key="other/scan", truth=None))


def test_positions_are_exact_under_autocast():
    to_mm = torch.diag(torch.tensor([3.0, 0.7324, 0.7324, 1])).repeat(1, 1, 1)
    to_mm[:, 0, 3] = 431.25
    with torch.autocast("cpu", torch.bfloat16):
        mm, there = positions(to_mm, (512, 512)), moved(to_mm, 3, -5)
    assert mm.dtype == there.dtype == torch.float32
    torch.testing.assert_close(mm[0, 0, 511, 300], torch.tensor([431.25, 511 * 0.7324, 300 * 0.7324]))
    torch.testing.assert_close(there[0, :3, 3], torch.tensor([431.25, -3 * 0.7324, 5 * 0.7324]))


def test_matched_centres_in_a_training(cache, coarse, tmp_path):
    module = method(coarse, centring="matched", position="matched")
    data = data_of(cache)
    trainer(tmp_path).fit(module, data)
    for one in data.cohort.train:
        assert np.isfinite(module.centres[one.key])[np.isfinite(one.centres())].all()


class SaveAt(L.Callback):
    """Saves a checkpoint in the middle, as a run does that is stopped there."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_batch_end(self, trainer: L.Trainer, *_: object) -> None:
        if trainer.global_step == 2:
            trainer.save_checkpoint(self.path)


def test_a_stopped_run_goes_on_with_the_positions_that_it_had_and_needs_no_coarse_model(cache, tmp_path):
    coarse, stopped = coarse_of(data_of(cache), tmp_path / "coarse.ckpt"), tmp_path / "stopped.ckpt"
    whole, first = method(coarse, placed_by_others=True), trainer(tmp_path, 4)
    first.callbacks.append(SaveAt(stopped))
    first.fit(whole, data_of(cache))
    coarse.unlink()
    resumed = method(coarse, placed_by_others=True)
    trainer(tmp_path, 4).fit(resumed, data_of(cache), ckpt_path=stopped, weights_only=True)
    for name, value in whole.state_dict().items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(value, resumed.state_dict()[name]), name
    assert resumed.centres.keys() == whole.centres.keys()
    np.testing.assert_array_equal(resumed.between, whole.between)
