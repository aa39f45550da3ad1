"""Organs that are not found, or in part: specks, what the scan cuts, and to whom they are left."""

import pickle
from dataclasses import replace

import numpy as np
import pytest
import torch
from stippled import ORGANS, ball_model, data_of, method, trainer

from organseg.batch import WholeCase
from organseg.data.module import collate
from organseg.errors import UsageError
from organseg.methods import PriorModule
from organseg.methods.organ_positions import SPECK, Positioning, PriorGrid, learned_prior
from organseg.priors import OrganPriors, Reference, relations
from organseg.runtime.checkpoint_io import save_checkpoint

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


def test_an_organ_that_is_not_found_is_left_to_the_coarse_model(fitted, tmp_path):
    module, data, _ = fitted
    one = method(None, use=["activation"])
    one.load_state_dict(module.state_dict())
    with torch.no_grad():
        for parameter in one.coarse.parameters():
            parameter.mul_(2)
    batch = collate([data.samples()[step, 0] for step in range(4)])
    batch["centre"] = torch.full_like(batch["centre"], torch.nan)
    lost = {case: k for k, case in enumerate(dict.fromkeys(batch["case"]))}
    one.centres = {case: np.full((len(ORGANS), 3), 30.0, np.float32) for case in lost}
    for case, k in lost.items():
        one.centres[case][k % len(ORGANS)] = np.nan
    one.trainer = trainer(tmp_path)
    one.eval()
    with torch.no_grad():
        ours, theirs = one.probabilities(batch), torch.sigmoid(one.coarse(batch["image"]))
        with_prior = one.activate(one.network(batch["image"]), batch)
    for row, case in enumerate(batch["case"]):
        for k in range(len(ORGANS)):
            expected = theirs if k == lost[case] % len(ORGANS) else with_prior
            torch.testing.assert_close(ours[row, k], expected[row, k])
    assert not torch.allclose(theirs, with_prior)


@pytest.mark.parametrize("without", ["use", "prior"])
def test_without_a_prior_every_organ_is_the_networks(without, fitted, tmp_path):
    module, data, _ = fitted
    one = method(None, use=[] if without == "use" else ["activation"])
    one.load_state_dict(module.state_dict())
    if without == "prior":
        one.known = replace(one.known, priors=(None,) * len(ORGANS))
    one.centres = {}
    one.trainer = trainer(tmp_path)
    one.eval()
    batch = collate([data.samples()[step, 0] for step in range(2)])
    batch["centre"] = torch.full_like(batch["centre"], torch.nan)
    with torch.no_grad():
        torch.testing.assert_close(one.probabilities(batch), torch.sigmoid(one.network(batch["image"])))


def whole(organ: np.ndarray) -> WholeCase:
    label = organ.astype(np.uint8)
    return WholeCase("a/0", 0, label.astype(np.float32), np.float32, label.shape, (1.0,) * 3, np.eye(4), label,
                     np.ones(1, bool))  # fmt: skip


def ellipsoid(shape, centre, radii) -> np.ndarray:
    grid = np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"), axis=-1)
    return (((grid - np.array(centre)) / np.array(radii)) ** 2).sum(axis=-1) <= 1


def known_of(positioning: Positioning, mask: np.ndarray) -> OrganPriors:
    reference = Reference("b/0", mask)
    return OrganPriors((learned_prior("liver", [reference], positioning, 5),), ((reference,),), positioning.centring)


@pytest.mark.parametrize("position", ["matched", "aligned", "naive"])
def test_a_speck_is_not_the_organ(position):
    positioning = Positioning(PriorGrid((1.0,) * 3), "matched" if position == "matched" else "boxes", 1, 3.0)
    known = known_of(positioning, ellipsoid((21, 21, 21), (10, 10, 10), (10, 10, 10)))
    case = replace(whole(np.zeros((40, 40, 40), bool)), truth=None)
    for radius, found in ((2, False), (3, True)):
        piece = ellipsoid(case.shape, (20, 20, 20), [radius] * 3)
        assert (piece.sum() >= SPECK * known.references[0][0].mask.sum()) == found
        centre = positioning.found(case, 0.9 * piece[None], np.ones(1, bool), known, position)
        assert np.isnan(centre).any() != found


@pytest.mark.parametrize("end", ["low", "high"])
def test_an_organ_that_the_scan_cuts_is_searched_for_as_a_whole(end):
    """40 slices long, 12 of them shown, 4 mm of search: its middle is 8 slices beyond the scan's end."""
    positioning = Positioning(PriorGrid((1.0,) * 3), "matched", 1, 4.0)
    known = known_of(positioning, ellipsoid((41, 17, 17), (20, 8, 8), (20, 8, 8)))
    middle = -8 if end == "low" else 37
    case = whole(ellipsoid((30, 40, 40), (middle, 20, 20), (20, 8, 8)))
    shown = case.truth[None] > 0
    assert shown.any(axis=(0, 2, 3)).sum() == 13
    annotated = positioning.annotated(case, known)
    found = positioning.found(replace(case, truth=None), 0.9 * shown, np.ones(1, bool), known, "matched")
    for centre in (annotated, found):
        np.testing.assert_allclose(centre[0], [middle, 20, 20], atol=2.0)


def test_an_organ_that_the_scan_cuts_at_both_ends_stays():
    positioning = Positioning(PriorGrid((1.0,) * 3), "matched", 1, 4.0)
    known = known_of(positioning, ellipsoid((41, 17, 17), (20, 8, 8), (20, 8, 8)))
    case = whole(ellipsoid((12, 40, 40), (5.5, 20, 20), (20, 8, 8)))
    np.testing.assert_allclose(positioning.annotated(case, known)[0], [5.5, 20, 20], atol=1.0)


def test_ranks_send_each_other_references():
    mask = np.random.default_rng(0).random((5, 7, 3)) < 0.5
    again = pickle.loads(pickle.dumps(Reference("a/b", mask)))
    assert again.case == "a/b" and again.mask.dtype == bool and np.array_equal(again.mask, mask)


@pytest.mark.parametrize("same", [0, 1])
def test_the_same_patient_or_image_under_another_name_is_held_out_too(same, fitted, coarse, cache, tmp_path):
    known, held = fitted[0].known, data_of(cache)
    test_case = held.case_keys("test")[0]
    identity = ["somebody", "an image"]
    identity[same] = held.identity_of(test_case)[same]
    other = known.priors[0].cases[0]
    priors = tuple(replace(prior, cases=("far/1",)) for prior in known.priors)
    references = tuple(() for _ in ORGANS)
    for said, refused in ((identity, True), (["somebody", "an image"], False)):
        state = OrganPriors(priors, references, "boxes", {"far/1": tuple(said)}).to_state()
        save_checkpoint({"state_dict": {"_extra_state": {**state, "centres": {}}}}, tmp_path / "prior.ckpt")
        module = method(coarse, prior=tmp_path / "prior.ckpt")
        if refused:
            with pytest.raises(UsageError, match=r"held out or hidden here: far/1 \(left_kidney\)"):
                trainer(tmp_path / "no").fit(module, data_of(cache))
        else:
            trainer(tmp_path / "yes").fit(module, data_of(cache))
    assert known.identities[other] == held.identity_of(other)
    assert OrganPriors.from_state(known.to_state()).identities == known.identities


def test_files_without_priors_are_named(fitted, coarse, cache, tmp_path):
    foreign = OrganPriors((replace(fitted[0].known.priors[0], organ="uterus"),), ((),), "boxes").to_state()
    for content, message in (
        ({"weights": {}}, "holds no priors"),
        ({"state_dict": {"_extra_state": {"centres": {}}}}, "holds no priors"),
        ({"state_dict": {"_extra_state": foreign}}, "has priors of uterus, this run's organs are liver"),
    ):
        save_checkpoint(content, tmp_path / "prior.ckpt")
        with pytest.raises(UsageError, match=message):
            trainer(tmp_path / "run").fit(method(coarse, prior=tmp_path / "prior.ckpt"), data_of(cache))


@pytest.fixture
def placing(fitted, tmp_path) -> tuple[PriorModule, WholeCase]:
    """A trained method that places lost organs by the others, and a case that it has not seen."""
    module, data, _ = fitted
    one = method(None, use=["activation"], placed_by_others=True)
    one.load_state_dict(module.state_dict())
    one.trainer = trainer(tmp_path)
    one.eval()
    return one, replace(data.training_cases()[0], key="other/scan")


def test_an_organ_that_is_not_found_is_placed_by_the_others(placing, monkeypatch):
    one, case = placing
    extent = np.multiply(case.shape, case.spacing)
    seen = (extent * np.array([[0.4, 0.4, 0.3], [0.5, 0.6, 0.7], [0.5, 0.6, 0.3], [0.6, 0.4, 0.7]])).astype(np.float32)
    one.between = relations([seen])
    lost = np.where(np.arange(4)[:, None] == 2, np.float32(np.nan), seen)
    monkeypatch.setattr(one, "_coarse_probabilities", ball_model(lost, 30))
    one.placed_by_others = False
    found = one.centres_of(case)
    assert np.isnan(found).any(axis=-1).tolist() == [False, False, True, False]
    one.placed_by_others = True
    placed = one.centres_of(case)
    np.testing.assert_array_equal(placed[[0, 1, 3]], found[[0, 1, 3]])
    said = found[[0, 1, 3]] + seen[2] - seen[[0, 1, 3]]
    np.testing.assert_allclose(placed[2], np.median(said, axis=0), atol=1e-3)

    kept = []
    one.segment(case, lambda _, probs: kept.append(probs))
    monkeypatch.setattr(one, "_coarse_probabilities", lambda _: pytest.fail("the second pass asks the coarse model"))
    again = []
    one.segment(case, lambda _, probs: again.append(probs))
    torch.testing.assert_close(torch.cat(again), torch.cat(kept))


def test_where_no_organ_is_found_all_are_left_to_the_coarse_model(placing, monkeypatch):
    one, case = placing
    monkeypatch.setattr(one, "_coarse_probabilities", ball_model(np.full((4, 3), np.nan, np.float32), 30))
    assert np.isnan(one.centres_of(case)).all()
    kept = []
    one.segment(case, lambda _, probs: kept.append(probs))
    torch.testing.assert_close(torch.cat(kept), torch.full_like(torch.cat(kept), 0.02), atol=1e-3, rtol=0)


@pytest.mark.parametrize("why", ["no prior", "no use of one"])
def test_what_needs_no_place_is_not_placed(why, placing):
    one, case = placing
    if why == "no prior":
        one.known = replace(one.known, priors=(None, *one.known.priors[1:]))
    else:
        one.use = {"coordinates"}
    one.between = np.zeros((4, 4, 3), np.float32)
    centres = np.full((4, 3), np.nan, np.float32)
    centres[3] = 7
    one._found[case.key] = centres
    placed = np.isfinite(one.centres_of(case)).all(axis=-1).tolist()
    assert placed == ([False, True, True, True] if why == "no prior" else [False, False, False, True])
