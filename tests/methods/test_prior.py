"""STIPPLE in the method: positions, two passes, what checkpoints carry, what must not be known (METHOD.md 2)."""

from dataclasses import replace
from functools import partial
from pathlib import Path

import lightning as L
import numpy as np
import pytest
import torch
from synthetic import make_cache, write_dataset
from torch import nn

from organseg.batch import View
from organseg.curriculum import CrossFittedConfidence
from organseg.data import PatchDataModule, SliceDataModule
from organseg.data.module import collate
from organseg.errors import IntegrityError, Interrupted, UsageError
from organseg.methods import PartialLabelModule, PriorModule
from organseg.methods.ensemble import Ensemble, moved
from organseg.methods.organ_positions import Positioning, PriorGrid, annotated_organs, learned_priors, true_centres
from organseg.networks import NNUNet, UNet, UTransformer
from organseg.priors import place, positions
from organseg.processes import STOP
from organseg.runtime.checkpoint_io import save_checkpoint
from organseg.volumes import Normalisation

ORGANS = ("liver", "left_kidney", "right_kidney", "spleen")
GRID = (10.0, 9.0, 8.0)
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


def small(in_channels: int, out_channels: int) -> UNet:
    return UNet(in_channels, out_channels, width=4, depth=3)


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("prior")
    return make_cache(write_dataset(folder / "set", 8), folder / "cache")


def data_of(cache: Path, **options) -> SliceDataModule:
    given = {"label_share": 0.4, "val_share": 0.0, "batch_size": 4, "workers": 0, "organs": ORGANS}
    return SliceDataModule(cache, **{**given, **options})


@pytest.fixture(scope="module")
def coarse(cache, tmp_path_factory) -> Path:
    return coarse_of(data_of(cache), tmp_path_factory.mktemp("coarse") / "last.ckpt")


def coarse_of(data: SliceDataModule, path: Path, steps: int = 9, **record) -> Path:
    torch.manual_seed(5)
    said = {
        "model": {"class_path": "organseg.methods.PartialLabelModule"},
        "organs": list(ORGANS),
        "preprocessing": data.preprocessing.to_json(),
        "identity": {"data content": data.content_hash},
    }
    module = PartialLabelModule(ORGANS, small)
    whole = {"state_dict": module.state_dict(), "organseg": {**said, **record}, "global_step": steps, "callbacks": {}}
    save_checkpoint(whole, path)
    return path


def method(coarse: Path | None, **options) -> PriorModule:
    torch.manual_seed(0)
    given = {"network": small, "working_spacing": GRID, "references": 2, "centring": "boxes", "position": "aligned",
             "smooth_mm": 0.0}  # fmt: skip
    return PriorModule(ORGANS, coarse, **{**given, **options})


def trainer(folder: Path, steps: int = 2) -> L.Trainer:
    return L.Trainer(max_steps=steps, accelerator="cpu", logger=False, enable_checkpointing=False,
                     enable_progress_bar=False, enable_model_summary=False, default_root_dir=folder,
                     use_distributed_sampler=False, num_sanity_val_steps=0)  # fmt: skip


@pytest.fixture(scope="module")
def fitted(cache, coarse, tmp_path_factory) -> tuple[PriorModule, SliceDataModule, Path]:
    folder = tmp_path_factory.mktemp("run")
    module, data = method(coarse), data_of(cache)
    trainer(folder).fit(module, data)
    return module.eval(), data, folder


def ball_model(centres: np.ndarray, radius_mm: float):
    """A coarse model that sees a ball around each centre (mm; NaN: nothing)."""

    def probabilities(view: View) -> torch.Tensor:
        size = view["image"].shape[2:]
        axes = [torch.arange(n, dtype=torch.float32) for n in (1, *size)]
        index = torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1)
        to_mm = view["index_to_mm"]
        mm = (index[None] @ to_mm[:, None, None, :3, :3].mT + to_mm[:, None, None, None, :3, 3])[:, 0]
        away = (mm[:, None] - torch.tensor(centres)[None, :, None, None]).norm(dim=-1)
        return torch.where(away <= radius_mm, 0.95, 0.02)

    return probabilities


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
    pools = annotated_organs(data.training_cases(), len(ORGANS), positioning.grid)
    known = learned_priors(pools, ORGANS, positioning, 5)
    for k, (prior, pool) in enumerate(zip(known.priors, known.references, strict=True)):
        showing = [case for case in data.cohort.train if case.known[k]]
        annotating = {case.key for case in showing if not cut(case.lookup[case.cached.arrays().label], k)}
        annotating = annotating or {case.key for case in showing}
        assert set(prior.cases) == {reference.case for reference in pool} == annotating
        assert prior.organ == ORGANS[k] and prior.probs.max() > 0.9
    assert not {case.key for case in data.cohort.test} & {case for prior in known.priors for case in prior.cases}


@pytest.mark.parametrize("position", ["aligned", "naive"])
def test_a_case_is_searched_on_the_prior_s_grid_and_found_in_mm(fitted, position, monkeypatch):
    module, data, folder = fitted
    module.trainer = trainer(folder)
    truth = np.array([[52.0, 120, 90], [44.0, 200, 200], [np.nan] * 3, [70.0, 130, 220]], np.float32)
    monkeypatch.setattr(module, "_coarse_probabilities", ball_model(truth, 30.0))
    monkeypatch.setattr(module, "position", position)
    monkeypatch.setattr(module, "positioning", Positioning(PriorGrid((5.0, 4.0, 4.0)), "boxes", 1, 0.0))
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
    with pytest.raises(Interrupted, match="finding organs"):
        trainer(tmp_path).fit(module, data_of(cache))
    assert not (tmp_path / "prior").exists()


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


def test_annotated_organs_are_where_they_are_annotated_and_others_where_the_coarse_model_finds_them(fitted):
    module, data, folder = fitted
    table = [line.split(",") for line in (folder / "prior" / "centres.csv").read_text().splitlines()[1:]]
    said = {(case, organ): source for case, organ, source, *_ in table}
    assert len(said) == len(data.cohort.train) * 4
    for case in data.cohort.train:
        centres = case.centres()
        for k, organ in enumerate(ORGANS):
            source = said[case.key, organ]
            assert (source in ("annotation", "absent")) == bool(case.known[k])
            if source == "annotation":
                np.testing.assert_allclose(module.centres[case.key][k], centres[k], rtol=1e-6)


def test_a_truth_is_never_looked_at_to_find_a_test_case_s_organs(fitted):
    module, data, folder = fitted
    module.trainer = trainer(folder)
    case = data.training_cases()[0]
    first = module.segment(replace(case, key="other/scan"))
    module.forget_positions()
    second = module.segment(replace(case, key="other/scan", truth=np.zeros_like(case.truth)))
    assert (first == second).all()


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
        pools = annotated_organs(theirs.training_cases(), len(ORGANS), module.positioning.grid)
        known = learned_priors(pools, ORGANS, module.positioning, 5)
        state = {"_extra_state": {**known.to_state(), "centres": {}}}
        save_checkpoint({"state_dict": state}, tmp_path / "leak.ckpt")
        with pytest.raises(UsageError, match="held out or hidden here: tiny/case"):
            trainer(tmp_path / "leak").fit(method(coarse, prior=tmp_path / "leak.ckpt"), data_of(cache))
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
    path = coarse_of(data, tmp_path / "coarse.ckpt", model={"class_path": "organseg.methods.PriorModule"})
    with pytest.raises(UsageError, match="without a prior"):
        trainer(tmp_path).fit(method(path), data)
    good = coarse_of(data, tmp_path / "coarse.ckpt")
    with pytest.raises(UsageError, match="another network"):
        trainer(tmp_path).fit(method(good, network=lambda i, o: UNet(i, o, width=8, depth=3)), data)


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


def test_judges_have_priors_of_their_own(cache, coarse, tmp_path):
    judges = CrossFittedConfidence(steps=1).learner(
        method(coarse), lambda: method(coarse), {key: np.ones(4, bool) for key in data_of(cache).case_keys("fit")}
    )
    trainer(tmp_path, 1).fit(judges, data_of(cache))
    again = CrossFittedConfidence(steps=1).learner(method(None), lambda: method(None), {"a/b": np.ones(4, bool)})
    again.load_state_dict(judges.state_dict())
    assert all(judge.known is not None and judge.centres for judge in (again.first, again.second))


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
    whole, first = method(coarse), trainer(tmp_path, 4)
    first.callbacks.append(SaveAt(stopped))
    first.fit(whole, data_of(cache))
    coarse.unlink()
    resumed = method(coarse)
    trainer(tmp_path, 4).fit(resumed, data_of(cache), ckpt_path=stopped, weights_only=True)
    for name, value in whole.state_dict().items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(value, resumed.state_dict()[name]), name
    assert resumed.centres.keys() == whole.centres.keys()


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
