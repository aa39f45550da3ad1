"""Means over checkpoints and views."""

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


def member(seed: int = 0, mean: float = 0.0, std: float = 1.0, organs=("liver", "spleen"), grid=None):
    torch.manual_seed(seed)
    method = PartialLabelModule(organs, lambda *channels: UNet(*channels, width=4, depth=2), channels_last=False)
    torch.nn.init.normal_(method.network.head.bias)
    method.preprocessing = Preprocessing(grid or WorkingGrid(), Normalisation((-160.0, 300.0), mean, std))
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


def test_a_whole_case():
    members = [member(seed) for seed in range(2)]
    ensemble = attached(Ensemble(members, AUGMENTED))
    image = np.random.default_rng(0).normal(size=(5, 8, 8)).astype(np.float32)
    case = WholeCase(
        "a/b", 0, image, lambda values: values, image.shape, (1.0, 1, 1), np.eye(4), None, np.ones(2, bool)
    )
    probs = []
    preds = ensemble.predict_step(case, 0)
    ensemble.segment(case, lambda _, slab: probs.append(slab))
    best, channel = torch.cat(probs).max(1)
    assert (torch.from_numpy(preds) == torch.where(best >= 0.5, channel + 1, 0)).all()
    assert ensemble.predict_step(None, 0) is None


@pytest.mark.parametrize("other", [{"organs": ("spleen", "liver")}, {"grid": WorkingGrid(size=64)}])
def test_members_that_do_not_fit_are_refused(other):
    with pytest.raises(UsageError, match="checkpoint 2 does not fit the first"):
        Ensemble([member(), member(1, **other)])
