"""Positions that a training withholds, and what is not found: specks, and organs that the scan cuts."""

import pickle
from dataclasses import replace

import numpy as np
import pytest
import torch
from stippled import ORGANS, data_of, method, trainer

from organseg.batch import WholeCase
from organseg.data.module import collate
from organseg.errors import UsageError
from organseg.methods.organ_positions import SPECK, Positioning, PriorGrid, learned_prior
from organseg.methods.withholding import withheld
from organseg.priors import OrganPriors, Reference
from organseg.runtime.checkpoint_io import save_checkpoint

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


def test_what_is_withheld_depends_on_the_view_and_the_step_alone():
    cases, views = [f"a/{n}" for n in range(200)], torch.randn(200, 4, 4)
    first = withheld(0.1, 3, cases, views, 7)
    assert first.shape == (200, 7) and 0.07 < first.float().mean() < 0.13
    assert torch.equal(withheld(0.1, 3, cases[50:60], views[50:60], 7), first[50:60])
    for other in (withheld(0.1, 4, cases, views, 7), withheld(0.1, 3, cases, views + 1, 7)):
        assert not torch.equal(other, first)
    assert not withheld(0.0, 3, cases, views, 7).any()


def test_what_is_withheld_has_the_plain_activation_in_training_alone(fitted, tmp_path):
    module, data, _ = fitted
    again = method(None, withheld=0.5, use=["activation", "input"])
    again.known, again.centres = module.known, module.centres
    again.trainer = trainer(tmp_path)
    samples = data.samples()
    batch = collate([samples[step, 0] for step in range(8)])
    hidden = withheld(0.5, 0, batch["case"], batch["index_to_mm"], len(ORGANS))
    seen, without = again.train().prior_of(batch, (32, 32)), again.eval().prior_of(batch, (32, 32))
    assert hidden.any() and not hidden.all()
    assert (seen[hidden] == 0.5).all() and (without[hidden] != 0.5).any()
    assert torch.equal(seen[~hidden], without[~hidden])
    # One draw a step: what the network sees is what the activation has.
    again.train()
    torch.testing.assert_close(torch.sigmoid(again.inputs(batch)[:, 1:]), again.prior_of(batch, (32, 32)))


@pytest.mark.parametrize("share", [-0.1, 1.0])
def test_all_or_less_than_nothing_cannot_be_withheld(share):
    with pytest.raises(UsageError, match=f"withheld {share} below 1"):
        method(None, withheld=share)


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
