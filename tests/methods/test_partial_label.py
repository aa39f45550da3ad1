from functools import partial

import pytest
import torch
from torch import Tensor, nn

from organseg.batch import Batch
from organseg.errors import UsageError
from organseg.methods import PartialLabelModule
from organseg.methods.base import NetworkFactory
from organseg.networks import NNUNet, UNet, UTransformer


def small(in_channels: int, out_channels: int) -> nn.Module:
    return UNet(in_channels, out_channels, width=4, depth=2, norm="instance")


def batch(label: Tensor, annotated: list[list[bool]]) -> Batch:
    count = len(label)
    return {
        "image": torch.randn(count, 1, 8, 8),
        "label": label.to(torch.uint8),
        "annotated": torch.tensor(annotated),
        "case": ["a"] * count,
        "index_to_mm": torch.eye(4).repeat(count, 1, 1),
        "centre": torch.zeros(count, len(annotated[0]), 3),
    }


def test_outputs_are_one_an_organ() -> None:
    module = PartialLabelModule(["liver", "spleen", "pancreas"], small)
    assert module.network(torch.zeros(1, 1, 8, 8)).shape == (1, 3, 8, 8)


def test_decision_takes_the_best_organ_from_one_half_on() -> None:
    module = PartialLabelModule(["liver", "spleen"], small)
    probs = torch.tensor([[0.4, 0.49], [0.5, 0.3], [0.6, 0.9], [0.9, 0.9]]).T.reshape(1, 2, 1, 4)
    assert module.decide(probs).flatten().tolist() == [0, 1, 2, 1]


def test_an_organ_that_nobody_annotates_gets_no_gradient_unless_naive() -> None:
    given = batch(torch.zeros(2, 8, 8), [[True, False], [True, False]])
    for naive in (False, True):
        module = PartialLabelModule(["liver", "spleen"], small, naive=naive)
        module.loss(module.network(given["image"]), given).backward()
        head = module.network.head.weight.grad
        assert head[0].abs().sum() > 0
        assert (head[1].abs().sum() > 0) == naive


@pytest.mark.parametrize(
    ("network", "message"),
    [
        (partial(UTransformer, width=4, depth=3, levels=2, heads=3), "16 channels cannot be shared equally by 3 heads"),
        (partial(UNet, depth=1), "depth >= 2"),
        (partial(UNet, widht=4), "widht"),
    ],
)
def test_wrong_options_of_the_network_are_one_line_for_the_user(network: NetworkFactory, message: str) -> None:
    with pytest.raises(UsageError, match=rf"^model\.init_args: .*{message}"):
        PartialLabelModule(["liver"], network)


def test_training_starts_at_the_prior_at_every_level_of_deep_supervision() -> None:
    method = PartialLabelModule(["liver", "spleen"], lambda *channels: NNUNet(*channels, width=4, depth=4))
    heads = [method.network.head, *method.network.coarse_heads]
    assert len(heads) == 2
    assert all(torch.allclose(torch.sigmoid(head.bias), torch.tensor(0.01)) for head in heads)
