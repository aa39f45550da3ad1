"""METHOD.md 3.5: 5, 14, 32, 68, 140, and what attention changes."""

import pytest
import torch
from torch import nn

from organseg.networks import NNUNet, UNet, UTransformer
from organseg.networks.receptive_field import effective_receptive_field, field_size, theoretical_receptive_field


def side(field) -> int:
    rows, columns = field.any(1).sum().item(), field.any(0).sum().item()
    assert rows == columns
    return rows


@pytest.mark.parametrize(("level", "expected"), [*enumerate([5, 14, 32, 68, 140])])
def test_theoretical_field_of_the_thesis(level, expected):
    network = UNet(width=2, depth=5)
    assert side(theoretical_receptive_field(network, f"encoder.{level}", (160, 160))) == expected


def test_norms_and_pooling_do_not_hide_it():
    network = NNUNet(width=2, depth=3)
    # conv3 conv3 | conv3 stride 2, conv3 | conv3 stride 2, conv3: 5, then 7 and 11, then 15 and 23.
    assert side(theoretical_receptive_field(network, "encoder.2", (64, 64))) == 23
    network = UTransformer(width=8, depth=4, heads=2, mhca=False)
    assert theoretical_receptive_field(network, "backbone.bottom", (96, 96)).all()


def test_the_network_is_left_as_it_was():
    network = UNet(width=2, depth=3).train()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    theoretical_receptive_field(network, "encoder.2", (32, 32))
    effective_receptive_field(network, network.encoder[2], (32, 32), samples=2)
    assert network.training and all(torch.equal(before[name], value) for name, value in network.state_dict().items())
    assert not network.encoder[2]._forward_hooks


class Blur(nn.Module):
    """One convolution of known weights."""

    def __init__(self, weight):
        super().__init__()
        self.conv = nn.Conv2d(1, 1, weight.shape[-1], padding=weight.shape[-1] // 2, bias=False)
        self.conv.weight.data[0, 0] = weight

    def features(self, image):
        return self.conv(image)


def test_effective_field_of_a_convolution_is_its_kernel():
    kernel = torch.tensor([[0.0, 1, 0], [2, -8, 2], [0, 1, 0.3]])
    network = Blur(kernel)
    field = effective_receptive_field(network, network.conv, (7, 7), samples=3)
    assert torch.allclose(field[2:5, 2:5], kernel.abs()) and field.sum() == pytest.approx(kernel.abs().sum().item())
    # Above (1 - 0.9545) of 8 = 0.364: five pixels.
    assert field_size(field) == pytest.approx(5**0.5)


def test_attention_widens_the_effective_field():
    torch.manual_seed(0)
    plain, attentive = (UTransformer(width=8, depth=4, heads=2, mhsa=mhsa, mhca=False) for mhsa in (False, True))
    sizes = [
        field_size(effective_receptive_field(network, network.backbone.bottom, (96, 96), samples=2))
        for network in (plain, attentive)
    ]
    assert 1.3 * sizes[0] < sizes[1]


def test_volumes():
    network = UNet(width=2, depth=2, dims=3)
    field = effective_receptive_field(network, network.encoder[1], (12, 12, 12), samples=1)
    assert field.shape == (12, 12, 12) and 1 < field_size(field) < 12
