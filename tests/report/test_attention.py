"""Attention maps and receptive fields as data and as pictures (Figures 5.2 and 5.8)."""

import numpy as np
import pytest
import torch

from organseg.networks import HybridUNet, NNUNet, UNet, UTransformer
from organseg.report.attention import (
    AttentionMap,
    attention_maps,
    draw_attention,
    draw_receptive_field,
    padded_size,
)
from organseg.report.figures import png
from organseg.report.views import Slice


def network(dims: int = 2, **options) -> UTransformer:
    torch.manual_seed(0)
    return UTransformer(out_channels=2, width=4, depth=4, heads=2, dims=dims, **options).eval()


@pytest.mark.parametrize(("options", "sizes"), [
    ({}, [(4, 3), (4, 3), (8, 6), (16, 12)]),
    ({"mhca": False}, [(4, 3)]),
    ({"block": True, "levels": 1, "keys": 4}, [(4, 3), (2, 2)]),
])  # fmt: skip
def test_one_map_a_module_in_their_order(options, sizes):
    maps = attention_maps(network(**options), torch.randn(1, 1, 32, 24), (9, 20))
    assert [found.heads.shape for found in maps] == [(2, *size) for size in sizes]
    assert all(found.heads.sum(axis=(1, 2)) == pytest.approx(1, abs=1e-5) for found in maps)
    assert maps[0].title.startswith("self-attention\n4 x 3 keys, 2 heads")
    assert [found.title.split("\n")[0] for found in maps[1:]] == [
        f"cross-attention, skip {n}" for n in range(1, len(maps))
    ]


def test_the_token_is_that_of_the_voxel():
    model, image = network(mhca=False), torch.randn(1, 1, 32, 24)
    inputs = []
    model.backbone.bottom.register_forward_pre_hook(lambda _, given: inputs.append(given[0]))
    (found,) = attention_maps(model, image, (9, 20))
    with torch.no_grad():
        weights = model.backbone.bottom.weights(inputs[0])
    # Row 9 of 32 is row 1 of 4, column 20 of 24 is column 2 of 3: token 5.
    assert found.heads == pytest.approx(weights[0, :, 5].view(2, 4, 3).numpy(), abs=1e-6)


def test_the_token_of_a_padded_image():
    model, image = network(mhca=False), torch.randn(1, 1, 25, 25)  # computed as 32 x 32, 4 x 4 tokens of 8 pixels
    assert padded_size(model, (25, 25)) == [32, 32]
    (first,), (other,) = attention_maps(model, image, (23, 8)), attention_maps(model, image, (16, 15))
    assert np.array_equal(first.heads, other.heads)  # both are row 2, column 1
    hybrid = HybridUNet(patch=(16, 16), width=4, depth=3, dims=2, heads=2)
    assert padded_size(hybrid, (17, 30)) == [20, 32] and len(attention_maps(hybrid.eval(), image, (0, 0))) == 1


def test_the_token_of_an_image_that_is_padded_to_two_tokens():
    assert padded_size(NNUNet(width=4, depth=4), (8, 5)) == [8, 16]
    (found,) = attention_maps(network(mhca=False, backbone="nnunet"), torch.randn(1, 1, 8, 5), (7, 4))
    assert found.heads.shape == (2, 1, 2)


def test_no_hook_stays_and_a_network_without_attention_has_no_map():
    model = network()
    attention_maps(model, torch.randn(1, 1, 16, 16), (0, 15))
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert attention_maps(UNet(width=4, depth=3).eval(), torch.randn(1, 1, 16, 16), (0, 0)) == []


@pytest.mark.parametrize("dims", [2, 3])
def test_pictures(dims):
    size = (8, 16, 24)[-dims:]
    middle = tuple(n // 2 for n in size)
    maps = attention_maps(network(dims), torch.randn(1, 1, *size), middle)
    view = Slice("case $1\nvoxel", "A", np.random.default_rng(0).normal(size=(16, 24)), (1.0, 2.0))
    figure = draw_attention(view, (-1, 1), middle, size, maps)
    assert len(figure.axes) == 2 * (len(maps) + 1)
    assert png(figure).startswith(b"\x89PNG")
    field = torch.rand(*size)
    assert "effective size" in draw_receptive_field(field, field > 0.5, "a network").axes[1].get_title()


def test_the_sharpest_head_is_shown_below_the_mean():
    flat, sharp = np.full((2, 2), 0.25, np.float32), np.array([[0, 0], [0, 1]], np.float32)
    view = Slice("", "A", np.zeros((4, 4)), (1.0, 1.0))
    figure = draw_attention(view, (-1, 1), (0, 0), (4, 4), [AttentionMap("one", np.stack([flat, sharp]))])
    mean, sharpest = (np.asarray(axes.get_images()[-1].get_array()) for axes in (figure.axes[1], figure.axes[3]))
    assert np.allclose(mean, (flat + sharp) / 2) and np.allclose(sharpest, sharp)
    titles = [axes.get_title() for axes in (figure.axes[1], figure.axes[3])]
    assert "highest 62 %, a head sees 2.5" in titles[0] and "highest 100 %, a head sees 1.0" in titles[1]
