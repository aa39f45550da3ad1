"""Means over checkpoints and views."""

from functools import partial

import lightning as L
import numpy as np
import pytest
import torch
from shown import shown

from organseg.batch import WholeCase
from organseg.errors import UsageError
from organseg.methods import PartialLabelModule
from organseg.methods.ensemble import AUGMENTED, Ensemble, moved, shifted
from organseg.networks import UNet
from organseg.volumes import Normalisation, Preprocessing, WorkingGrid


def member(seed: int = 0, mean: float = 0.0, std: float = 1.0, organs=("liver", "spleen"), grid=None, window=None):
    torch.manual_seed(seed)
    network = partial(UNet, width=4, depth=2, dims=3 if window else 2)
    method = PartialLabelModule(organs, network, channels_last=False)
    torch.nn.init.normal_(method.network.head.bias)
    method.preprocessing = Preprocessing(grid or WorkingGrid(), Normalisation((-160.0, 300.0), mean, std), window)
    return method.eval()


def attached(ensemble: Ensemble) -> Ensemble:
    ensemble.trainer = L.Trainer(accelerator="cpu", devices=1, logger=False, enable_checkpointing=False,
                                 enable_progress_bar=False, max_steps=1)  # fmt: skip
    ensemble.setup("predict")
    return ensemble


pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


def test_the_mean_of_the_members():
    members, image = [member(seed) for seed in range(3)], torch.randn(2, 1, 8, 8)
    ensemble = attached(Ensemble(members))
    with torch.no_grad():
        expected = sum(one.network(image).sigmoid() for one in members) / 3
        assert torch.allclose(ensemble.probabilities(shown(image)), expected, atol=1e-6)


def test_each_member_sees_its_own_normalisation():
    members, hu = [member(0, 10, 80), member(1, -20, 120)], 100 * torch.randn(2, 1, 8, 8)
    ensemble = attached(Ensemble(members))
    with torch.no_grad():
        seen = [(hu - 10) / 80, (hu + 20) / 120]
        expected = sum(one.network(image).sigmoid() for one, image in zip(members, seen, strict=True)) / 2
        assert torch.allclose(ensemble.probabilities(shown(seen[0])), expected, atol=1e-5)


def test_views_are_moved_there_and_back():
    one, image = member(), torch.zeros(1, 1, 12, 16)
    image[..., 5:8, 6:10] = torch.randn(3, 4)  # far from every border
    one.network.features = lambda image: image.expand(-1, 4, -1, -1)  # every pixel by itself: all views say the same
    ensemble = attached(Ensemble([one], [(1.0, 0, 0), (1.0, 3, -5), (1.0, -2, 5)]))
    with torch.no_grad():
        assert torch.allclose(ensemble.probabilities(shown(image)), one.network(image).sigmoid(), atol=1e-6)
        gained = attached(Ensemble([one], [(0.5, 0, 0)])).probabilities(shown(image))
        assert torch.allclose(gained, one.network(0.5 * image).sigmoid(), atol=1e-6)
    assert len(AUGMENTED) == 5 and AUGMENTED[0] == (1.0, 0, 0)


def test_what_is_moved_says_where_it_lies():
    image = torch.arange(12.0).view(1, 1, 3, 4)
    there = moved(torch.diag(torch.tensor([1.0, 2, 3, 1]))[None], 1, -2)[0]
    # The pixel (2, 0) shows what was at (1, 2): 2 mm down, 6 mm across.
    assert shifted(image, 1, -2)[0, 0, 2, 0] == image[0, 0, 1, 2]
    assert (there @ torch.tensor([0.0, 2, 0, 1])).tolist() == [0, 2, 6, 1]


def test_views_repeat_the_edge_and_nothing_wraps_around():
    image = torch.arange(12.0).view(1, 1, 3, 4)
    assert shifted(image, 1, -2)[0, 0].tolist() == [[2, 3, 3, 3], [2, 3, 3, 3], [6, 7, 7, 7]]
    assert torch.equal(shifted(image, 0, 0), image)


def whole_case(size, window=None) -> WholeCase:
    image = np.random.default_rng(0).normal(size=size).astype(np.float32)
    return WholeCase(
        "a/b", 0, image, lambda values: values, size, (1.0, 1, 1), np.eye(4), None, np.ones(2, bool), window
    )


def test_a_whole_case():
    members = [member(seed) for seed in range(2)]
    ensemble = attached(Ensemble(members, AUGMENTED))
    case = whole_case((5, 8, 8))
    probs = []
    preds = ensemble.predict_step(case, 0)
    ensemble.segment(case, lambda _, slab: probs.append(slab))
    best, channel = torch.cat(probs).max(1)
    assert (torch.from_numpy(preds) == torch.where(best >= 0.5, channel + 1, 0)).all()
    assert ensemble.predict_step(None, 0) is None


def test_a_whole_case_in_windows_is_the_mean_of_what_each_member_and_view_says_of_it():
    window = (4, 12, 10)
    members, case = [member(seed, window=window) for seed in range(2)], whole_case((7, 16, 10), window)

    def said(members, changes) -> torch.Tensor:
        probs: list[torch.Tensor] = []
        attached(Ensemble(members, changes)).segment(case, lambda _, slab: probs.append(slab.clone()))
        return torch.cat(probs)

    each = torch.stack([said([one], [change]) for one in members for change in AUGMENTED])
    assert each.shape == (10, 7, 2, 16, 10) and each.std(0).max() > 0.01
    torch.testing.assert_close(said(members, AUGMENTED), each.mean(0))
    plain: list[torch.Tensor] = []
    members[0].segment(case, lambda _, slab: plain.append(slab.clone()))
    torch.testing.assert_close(each[0], torch.cat(plain))


def test_views_of_patches_move_their_rows_and_columns_there_and_back():
    one, image = member(window=(4, 12, 16)), torch.zeros(1, 1, 4, 12, 16)
    image[..., 5:8, 6:10] = torch.randn(4, 3, 4)  # far from every border in the plane, from none along z
    one.network.features = lambda image: image.expand(-1, 4, -1, -1, -1)
    ensemble = attached(Ensemble([one], [(1.0, 3, -5), (1.0, -2, 5)]))
    with torch.no_grad():
        assert torch.allclose(ensemble.probabilities(shown(image)), one.network(image).sigmoid(), atol=1e-6)


@pytest.mark.parametrize(
    "other", [{"organs": ("spleen", "liver")}, {"grid": WorkingGrid(size=64)}, {"window": (8, 8, 8)}]
)
def test_members_that_do_not_fit_are_refused(other):
    with pytest.raises(UsageError, match="checkpoint 2 does not fit the first"):
        Ensemble([member(), member(1, **other)])
