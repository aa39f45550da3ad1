"""STIPPLE in the method: training, what checkpoints carry, where the prior enters, what must not be known."""

from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from stippled import ORGANS, ball_model, coarse_of, data_of, method, small, trainer

from organseg.curriculum import CrossFittedConfidence
from organseg.data import PatchDataModule
from organseg.data.module import collate
from organseg.errors import IntegrityError, UsageError
from organseg.losses import partial_label_loss
from organseg.methods import PartialLabelModule
from organseg.methods.built_priors import built_priors
from organseg.methods.coarse import coarse_weights
from organseg.networks import NNUNet, UNet, UTransformer
from organseg.priors import place, prior_logits
from organseg.runtime.checkpoint_io import save_checkpoint

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


def test_a_later_phase_finds_the_coarse_model_that_the_run_began_with(cache, tmp_path):
    coarse = coarse_of(data_of(cache), tmp_path / "coarse.ckpt")
    trainer(tmp_path / "run").fit(method(coarse), data_of(cache))
    trainer(tmp_path / "run").fit(method(coarse), data_of(cache))
    record = tmp_path / "run" / "prior" / "made_of.json"
    for damaged in ("", record.read_text()[:40]):
        whole = record.read_text()
        record.write_text(damaged)
        with pytest.raises(IntegrityError, match=r"made_of\.json: this run was begun with another"):
            trainer(tmp_path / "run").fit(method(coarse), data_of(cache))
        record.write_text(whole)
    coarse_of(data_of(cache), coarse, 10)
    with pytest.raises(IntegrityError, match=r"begun with another .*coarse\.ckpt"):
        trainer(tmp_path / "run").fit(method(coarse), data_of(cache))


def test_a_checkpoint_carries_all_that_prediction_needs(fitted, cache, tmp_path, monkeypatch):
    module, data, _ = fitted
    save_checkpoint({"state_dict": module.state_dict()}, tmp_path / "last.ckpt")
    state = torch.load(tmp_path / "last.ckpt", weights_only=True)["state_dict"]
    other = method(Path("is/not/there.ckpt"))
    other.load_state_dict(state)
    neutral = method(None)
    neutral.load_state_dict(state)
    neutral.known = replace(neutral.known, priors=(None,) * 4)
    case = replace(data.training_cases()[1], key="other/scan")
    there = np.array([[52.0, 120, 90], [44.0, 200, 200], [70.0, 130, 220], [60.0, 60, 60]], np.float32)
    kept = {module: [], other: [], neutral: []}
    for one, slabs in kept.items():
        one.eval().trainer = trainer(tmp_path)
        monkeypatch.setattr(one, "_coarse_probabilities", ball_model(there, 30.0))
        one.forget_positions()
        one.segment(case, lambda _, probs, slabs=slabs: slabs.append(probs))
        assert not np.isnan(one.centres_of(case)).any()
        one.forget_positions()
    assert torch.equal(torch.cat(kept[module]), torch.cat(kept[other]))
    assert not torch.equal(torch.cat(kept[module]), torch.cat(kept[neutral]))
    assert all((other.centres[key] == centre)[~np.isnan(centre)].all() for key, centre in module.centres.items())


def test_training_leaves_the_coarse_model_alone_and_starts_from_it(fitted, coarse, cache, tmp_path):
    weights = torch.load(coarse, weights_only=True)["state_dict"]
    module = fitted[0]
    for name, value in module.coarse.state_dict().items():
        assert torch.equal(value, weights[f"network.{name}"])
    assert not torch.equal(module.network.head.weight, weights["network.head.weight"])
    begun, scratch, judge = method(coarse), method(coarse, start="scratch"), method(coarse)
    for one, same in ((begun, True), (scratch, False), (judge, False)):
        one.trainer = trainer(tmp_path)
        one.trainer.datamodule = data_of(cache)
        one.preprocessing = one.trainer.datamodule.preprocessing
        one.begin(afresh=one is judge)
        assert torch.equal(one.network.head.weight, weights["network.head.weight"]) == same


@pytest.mark.parametrize("use", ["activation", "input", "bottleneck", "coordinates"])
def test_the_prior_is_in_the_loss_and_the_activation_where_it_is_used_there_alone(use, fitted):
    module = method(None, use=[use])
    module.known, module.centres = fitted[0].known, fitted[0].centres
    batch, logits = next(iter(fitted[1].train_dataloader())), torch.randn(4, 4, 32, 32)
    shifted = prior_logits(logits, module.prior_of(batch, (32, 32)))
    biased, other = (shifted, logits) if use == "activation" else (logits, shifted)
    loss, without = (partial_label_loss(each, batch["label"], batch["annotated"]) for each in (biased, other))
    assert torch.equal(module.loss(logits, batch), loss) and not torch.equal(loss, without)
    assert torch.equal(module.activate(logits, batch), torch.sigmoid(biased))


@pytest.mark.parametrize("use", [["input"], ["bottleneck"], ["coordinates"], ["activation", "input", "coordinates"]])
def test_other_places_of_the_prior(use, coarse, cache, tmp_path):
    module, data = method(coarse, use=use), data_of(cache)
    trainer(tmp_path).fit(module, data)
    assert all(parameter.isfinite().all() for parameter in module.network.parameters())
    batch = next(iter(data.train_dataloader()))
    module.eval().trainer = trainer(tmp_path)
    with torch.no_grad():
        probs = module.probabilities(batch)
        moved = module.probabilities({**batch, "centre": batch["centre"] + 40.0, "case": ["other/scan"] * 4})
    assert probs.shape == (4, 4, 32, 32) and probs.isfinite().all() and not torch.equal(probs, moved)


def test_without_any_use_it_is_the_coarse_model_trained_on(coarse, cache, tmp_path):
    """The same steps as PartialLabelModule makes from the coarse model's weights on, bit by bit."""
    module, plain = method(coarse, use=[]), PartialLabelModule(ORGANS, small)
    plain.load_state_dict(torch.load(coarse, weights_only=True)["state_dict"])
    for one in (module, plain):
        torch.manual_seed(1)
        trainer(tmp_path).fit(one, data_of(cache))
        one.eval().trainer = trainer(tmp_path)
    for name, value in plain.state_dict().items():
        assert torch.equal(module.state_dict()[name], value), name
    case = replace(data_of(cache).training_cases()[0], key="other/scan")
    assert np.array_equal(module.segment(case), plain.segment(case))
    assert "coarse" in (tmp_path / "prior" / "made_of.json").read_text()


def test_priors_of_another_run(fitted, coarse, cache, tmp_path):
    module = fitted[0]
    save_checkpoint({"state_dict": module.state_dict()}, tmp_path / "prior.ckpt")
    other = method(coarse, prior=tmp_path / "prior.ckpt")
    trainer(tmp_path).fit(other, data_of(cache))
    for ours, theirs in zip(other.known.priors, module.known.priors, strict=True):
        assert np.array_equal(ours.probs, theirs.probs)
    wrong = method(coarse, prior=tmp_path / "prior.ckpt", working_spacing=(5.0, 5.0, 5.0))
    with pytest.raises(UsageError, match="working_spacing"):
        trainer(tmp_path / "wrong").fit(wrong, data_of(cache))
    boxes = method(coarse, prior=tmp_path / "prior.ckpt", centring="matched", position="matched")
    with pytest.raises(UsageError, match="its centring is boxes, this run's is matched"):
        trainer(tmp_path / "wrong").fit(boxes, data_of(cache))
    # Of another fold, and of labels that are hidden here.
    for options in ({"fold": 1, "seed": 3}, {"label_share": 1.0}):
        theirs = data_of(cache, **options)
        known, _ = built_priors(theirs, ORGANS, module.positioning, 5)
        state = {"_extra_state": {**known.to_state(), "centres": {}}}
        save_checkpoint({"state_dict": state}, tmp_path / "leak.ckpt")
        with pytest.raises(UsageError, match="held out or hidden here: tiny/case"):
            trainer(tmp_path / "leak").fit(method(coarse, prior=tmp_path / "leak.ckpt"), data_of(cache))
    with pytest.raises(UsageError, match=r"nothing\.ckpt: no such checkpoint"):
        trainer(tmp_path / "none").fit(method(coarse, prior=tmp_path / "nothing.ckpt"), data_of(cache))
    with pytest.raises(UsageError, match="holds no priors"):
        trainer(tmp_path / "none").fit(method(coarse, prior=coarse), data_of(cache))


def test_organs_that_another_run_has_no_prior_of_are_said(fitted, coarse, cache, tmp_path, capfd):
    known = fitted[0].known
    state = replace(known, priors=(None, *known.priors[1:])).to_state()
    save_checkpoint({"state_dict": {"_extra_state": {**state, "centres": {}}}}, tmp_path / "prior.ckpt")
    trainer(tmp_path).fit(method(coarse, prior=tmp_path / "prior.ckpt"), data_of(cache))
    assert f"no prior of {ORGANS[0]}:" in capfd.readouterr().err
    rows = [line.split(",")[1:3] for line in (tmp_path / "prior" / "centres.csv").read_text().splitlines()[1:]]
    assert all((source == "no prior") == (organ == ORGANS[0]) for organ, source in rows)


def test_a_coarse_model_that_may_know_more_is_refused(cache, tmp_path):
    data = data_of(cache)
    for record, found in (
        ({"organs": ["liver"]}, "organs"),
        ({"identity": {"data content": data_of(cache, seed=1).content_hash}}, "data"),
        ({"preprocessing": data_of(cache, window_hu=(0.0, 1.0)).preprocessing.to_json()}, "preprocessing"),
    ):
        path = coarse_of(data, tmp_path / "coarse.ckpt", **record)
        with pytest.raises(UsageError, match=f"trained with other {found}"):
            trainer(tmp_path).fit(method(path), data)
    with pytest.raises(UsageError, match="no such checkpoint"):
        trainer(tmp_path).fit(method(tmp_path / "nothing.ckpt"), data)
    identity = {"data content": data.content_hash, "trainer.max_steps": 9}
    (tmp_path / "unfinished").mkdir()
    path = coarse_of(data, tmp_path / "unfinished" / "last.ckpt", 7, identity=identity)
    with pytest.raises(UsageError, match="stopped after 7 of 9 steps"):
        trainer(tmp_path).fit(method(path), data)
    identity["curriculum.round_steps"] = 5
    for steps in (9, 5, 7):  # the phases of a curriculum, of which each counts its own
        path = coarse_of(data, tmp_path / "unfinished" / "last.ckpt", steps, identity=identity)
        if steps != 7:
            assert coarse_weights(path, ORGANS, data.preprocessing, data.content_hash)
    with pytest.raises(UsageError, match="stopped after 7 of 9 or 5 steps"):
        trainer(tmp_path).fit(method(path), data)
    path = coarse_of(data, tmp_path / "coarse.ckpt", model={"class_path": "organseg.methods.PriorModule"})
    with pytest.raises(UsageError, match="without a prior"):
        trainer(tmp_path).fit(method(path), data)
    good = coarse_of(data, tmp_path / "coarse.ckpt")
    with pytest.raises(UsageError, match="another network"):
        trainer(tmp_path).fit(method(good, network=lambda i, o: UNet(i, o, width=8, depth=3)), data)


@pytest.mark.parametrize(
    ("options", "found"),
    [
        ({"bins": 0}, "bins 0"), ({"floor": 0.0}, "floor 0"), ({"references": 0}, "references 0"),
        ({"working_spacing": (3.0, float("nan"), 2.0)}, "working_spacing"), ({"max_shift_mm": -1.0}, "max_shift_mm"),
        ({"use": ["input", "bottleneck"]}, "one place"),
        ({"centring": "matched", "position": "naive"}, "position naive with centring matched"),
        ({"centring": "boxes", "position": "matched"}, "position matched with centring boxes"),
        ({"cross_fitted": True, "prior": Path("other.ckpt")}, "another run's"),
        ({"coarse_network": small}, "start: scratch"),
        ({"network": partial(UNet, depth=1)}, "depth >= 2"),
        ({"network": partial(UTransformer, width=4, depth=3, levels=2, heads=3)}, "equally by 3 heads"),
        ({"coarse_network": partial(UNet, depth=1), "start": "scratch"}, "depth >= 2"),
        ({"network": NNUNet, "use": ["bottleneck"]}, "maps enter at the bottleneck"),
    ],
)  # fmt: skip
def test_impossible_options_are_refused(options, found):
    with pytest.raises(UsageError, match=found):
        method(None, **options)


def test_patches_of_three_dimensions(cache, tmp_path):
    """A 3D network, windows smaller than the case, deep supervision's coarser labels: priors at all of them."""

    def network(in_channels: int, out_channels: int) -> NNUNet:
        return NNUNet(in_channels, out_channels, width=4, depth=3, dims=3)

    def data() -> PatchDataModule:
        return PatchDataModule(cache, label_share=0.4, val_share=0.0, batch_size=2, workers=0, organs=ORGANS,
                               patch_size=(8, 16, 16))  # fmt: skip

    kind = {"class_path": "organseg.methods.PartialLabelModule"}
    record = {
        "model": kind,
        "preprocessing": data().preprocessing.to_json(),
        "identity": {"data content": data().content_hash},
    }
    torch.manual_seed(5)
    state = PartialLabelModule(ORGANS, network).state_dict()
    save_checkpoint({"state_dict": state, "organseg": {"organs": list(ORGANS), **record}}, tmp_path / "coarse.ckpt")
    module = method(tmp_path / "coarse.ckpt", network=network)
    trainer(tmp_path).fit(module, data())
    module.eval().trainer = trainer(tmp_path)
    case = replace(data().training_cases()[0], key="other/scan")
    assert module.segment(case).shape == case.shape
    source = data()
    source.trainer = module.trainer
    batch = next(iter(source.train_dataloader()))
    found = module.prior_of(batch, batch["image"].shape[2:])
    assert found.shape == (2, 4, 8, 16, 16) and (found < 0.5).any()


def test_judges_have_the_method_s_priors(fitted, cache, tmp_path):
    """And its coarse model: nothing is looked for again, and no file is needed."""
    module = fitted[0]
    annotated = {key: np.ones(4, bool) for key in data_of(cache).case_keys("fit")}
    judges = CrossFittedConfidence(steps=1).learner(module, lambda: method(Path("gone.ckpt")), annotated)
    trainer(tmp_path, 1).fit(judges, data_of(cache))
    again = CrossFittedConfidence(steps=1).learner(method(None), lambda: method(None), {"a/b": np.ones(4, bool)})
    again.load_state_dict(judges.state_dict())
    for judge in (judges.first, judges.second, again.first, again.second):
        assert [prior.cases for prior in judge.known.priors] == [prior.cases for prior in module.known.priors]
        assert judge.centres.keys() == module.centres.keys()
        for name, value in module.coarse.state_dict().items():
            assert torch.equal(judge.coarse.state_dict()[name], value)
    assert not (tmp_path / "prior").exists()


@pytest.mark.parametrize("centring", ["boxes", "matched"])
def test_cross_fitted_priors_are_seen_in_training_and_those_of_all_elsewhere(cache, coarse, tmp_path, centring):
    """At 100% of the labels every training case is in one half of each organ, or cut."""
    data = data_of(cache, label_share=1.0)
    path = coarse_of(data, tmp_path / "coarse.ckpt")
    where = {"centring": centring, "position": {"boxes": "aligned", "matched": "matched"}[centring]}
    module, plain = method(path, cross_fitted=True, **where), method(path, **where)
    for each, name in ((module, "crossed"), (plain, "plain")):
        trainer(tmp_path / name).fit(each, data_of(cache, label_share=1.0))
    halves = module.halves
    for ours, theirs in zip(module.known.priors, plain.known.priors, strict=True):
        assert np.array_equal(ours.probs, theirs.probs)
    samples = data_of(cache, label_share=1.0).samples()
    batch = collate([samples[step, 0] for step in range(12)])
    seen, all_of_them = (each.prior_of(batch, (32, 32)) for each in (module, plain))
    for b, case in enumerate(batch["case"]):
        for k, number in enumerate(halves.seen[case]):
            prior = (module.known, halves.first, halves.second)[number].priors[k]
            if number:
                assert case not in prior.cases
            centre = torch.from_numpy(module.centres[case])[None]
            wanted = place([prior], batch["index_to_mm"][b : b + 1], centre[:, k : k + 1], (32, 32), module.floor)
            torch.testing.assert_close(seen[b, k], wanted[0, 0])
    assert not torch.equal(seen, all_of_them)
    if centring == "boxes":  # elsewhere nothing changes, and centres are those of the boxes
        for case, centre in plain.centres.items():
            np.testing.assert_array_equal(module.centres[case], centre)
    elsewhere = {**batch, "case": ["set/new"] * len(batch["case"]), "centre": plain._centres(batch)}
    torch.testing.assert_close(module.prior_of(elsewhere, (32, 32)), plain.prior_of(elsewhere, (32, 32)))
    # And a checkpoint carries them, to go on with.
    again = method(path, cross_fitted=True, **where)
    again.load_state_dict(module.state_dict())
    torch.testing.assert_close(again.prior_of(batch, (32, 32)), seen)
