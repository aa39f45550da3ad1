"""METHOD.md 3.4: what is put where, and what that lets a network see."""

from typing import Any

import pytest
import torch
from torch import nn

from organseg.losses import deep_supervision, partial_label_loss
from organseg.networks import (
    AttentionUNet,
    MultiHeadCrossAttention,
    MultiHeadSelfAttention,
    TransformerBlock,
    UNet,
    UTransformer,
)
from organseg.networks.attention_unet import AdditiveGate
from organseg.networks.unet import PlainSkip

SMALL = {"out_channels": 3, "width": 8, "depth": 4, "heads": 4}
BACKBONES = ("unet", "attention_unet", "nnunet")


def small(**options) -> UTransformer:
    torch.manual_seed(0)
    return UTransformer(**{**SMALL, **options}).eval()


def count(module) -> int:
    return sum(p.numel() for p in module.parameters())


def test_parameters_of_the_thesis():
    with torch.device("meta"):
        unet = count(UNet())
        assert count(UTransformer(mhca=False)) - unet == 4_198_400
        assert count(UTransformer(mhsa=False, levels=1)) - unet == 2_625_536
        assert count(UTransformer(mhsa=False)) - unet == 2_625_536 + 657_408 + 164_864


@pytest.mark.parametrize(
    ("options", "bottom", "gated"),
    [
        ({"mhsa": False, "mhca": False}, nn.Identity, []),
        ({"mhca": False}, MultiHeadSelfAttention, []),
        ({"mhca": False, "block": True}, TransformerBlock, []),
        ({"mhsa": False, "levels": 1}, nn.Identity, [0]),
        ({"levels": 2}, MultiHeadSelfAttention, [0, 1]),
        ({}, MultiHeadSelfAttention, [0, 1, 2]),
    ],
)
@pytest.mark.parametrize("backbone", ["unet", "nnunet"])
def test_ablations(options, bottom, gated, backbone):
    network = small(backbone=backbone, **options)
    assert type(network.backbone.bottom) is bottom
    kinds = [type(gate) for gate in network.backbone.gates]
    assert kinds == [MultiHeadCrossAttention if level in gated else PlainSkip for level in range(3)]


def test_without_attention_it_is_the_backbone():
    network, image = small(mhsa=False, mhca=False), torch.randn(1, 1, 16, 16)
    torch.manual_seed(0)
    plain = UNet(out_channels=3, width=8, depth=4).eval()
    with torch.no_grad():
        assert torch.equal(network(image), plain(image))


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("backbone", BACKBONES)
def test_odd_sizes_features_and_gradients(backbone, dims):
    network = small(backbone=backbone, dims=dims, mhca=backbone != "attention_unet")
    image = torch.randn(2, 1, *(17, 11, 9)[:dims])
    logits = network(image)
    assert logits.shape == (2, 3, *image.shape[2:])
    assert torch.equal(network.head(network.features(image)), logits)
    logits.square().sum().backward()
    used = {name: p for name, p in network.named_parameters() if "coarse_heads" not in name}
    # A key's bias moves all scores of a query alike, which a softmax does not see.
    dead = [name for name, p in used.items() if p.grad is None or not p.grad.any()]
    assert [name for name in dead if not name.endswith("key.bias")] == []


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("backbone", ["unet", "nnunet"])
def test_autocast_and_memory_format(backbone, dtype):
    network, image = small(backbone=backbone), torch.randn(2, 1, 20, 24)
    with torch.no_grad():
        expected = network(image)
        network = network.to(memory_format=torch.channels_last)
        image = image.to(memory_format=torch.channels_last)
        assert torch.allclose(network(image), expected, atol=1e-5)
        with torch.autocast("cpu", dtype):
            assert torch.allclose(network(image).float(), expected, atol=0.1)


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("backbone", ["unet", "nnunet"])
def test_a_step_under_autocast_is_close_to_one_in_fp32(backbone, dtype, dims):
    # Instance norm: a batch's statistics would amplify the rounding of the few pixels of the deepest map.
    options = {"unet": {"norm": "instance"}, "nnunet": {"deep_supervision": True}}[backbone]
    network = small(backbone=backbone, dims=dims, depth=3, levels=2, options=options).train()
    image, label = torch.randn(2, 1, *(16, 24, 16)[:dims]), torch.randint(0, 4, (2, *(16, 24, 16)[:dims])).byte()
    batch: Any = {"label": label, "index_to_mm": torch.eye(4).repeat(2, 1, 1)}
    loss = deep_supervision(
        lambda logits, batch: partial_label_loss(logits, batch["label"], torch.ones(2, 3, dtype=torch.bool))
    )
    found = []
    for mixed in (False, True):
        network.zero_grad()
        with torch.autocast("cpu", dtype, enabled=mixed):
            value = loss(network(image), batch)
        value.backward()
        assert all(parameter.dtype == parameter.grad.dtype == torch.float32 for parameter in network.parameters())
        found.append((value.item(), torch.cat([parameter.grad.flatten() for parameter in network.parameters()])))
    (expected, exact), (value, rounded) = found
    assert value == pytest.approx(expected, rel=0.02)
    assert torch.nn.functional.cosine_similarity(rounded, exact, dim=0) > 0.95


@pytest.mark.parametrize("backbone", ["unet", "nnunet"])
def test_compilation_changes_neither_logits_nor_gradients(backbone):
    network, image = small(backbone=backbone, depth=2, levels=1, keys=6), torch.randn(2, 1, 7, 8)
    compiled = torch.compile(network, backend="aot_eager", fullgraph=True)
    found = []
    for module in (network, compiled):
        network.zero_grad()
        logits = module(image)
        logits.square().mean().backward()
        found.append([logits.detach(), *(p.grad.clone() for p in network.parameters() if p.grad is not None)])
    assert len(found[0]) == len(found[1]) > 20
    assert all(torch.allclose(*pair, atol=1e-5, rtol=1e-4) for pair in zip(*found, strict=True))


def seen(network, image, row: int, column: int):
    """Where the deepest map's unit looks."""
    found = []
    network.backbone.bottom.register_forward_hook(lambda *call: found.append(call[-1]))
    image.requires_grad_()
    network(image)
    found[0][0, :, row, column].sum().backward()
    return image.grad[0, 0] != 0


def test_self_attention_sees_the_whole_image():
    image = torch.randn(1, 1, 128, 128)
    assert seen(small(mhca=False), image.clone(), 0, 0).float().mean() > 0.99
    assert seen(small(mhsa=False, mhca=False), image.clone(), 0, 0).float().mean() < 0.25


def test_a_3d_patch_can_be_learned_by_heart():
    torch.manual_seed(0)
    network = UTransformer(out_channels=2, width=8, depth=3, levels=2, heads=2, dims=3)
    z, y, x = torch.meshgrid(*[torch.arange(16.0)] * 3, indexing="ij")
    label = torch.zeros(1, 16, 16, 16, dtype=torch.uint8)
    label[0][(z - 5) ** 2 + (y - 5) ** 2 + (x - 6) ** 2 < 16] = 1
    label[0][(z - 10) ** 2 + (y - 11) ** 2 + (x - 9) ** 2 < 16] = 2
    image = (label > 0).float()[:, None] + 0.5 * torch.randn(
        1, 1, 16, 16, 16
    )  # both look alike: places tell them apart
    optimizer = torch.optim.AdamW(network.parameters(), lr=3e-3)
    for _ in range(130):
        loss = partial_label_loss(network(image), label, torch.ones(1, 2, dtype=torch.bool))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    preds = network(image).sigmoid() >= 0.5
    for organ in (1, 2):
        truth = label[0] == organ
        dice = 2 * (preds[0, organ - 1] & truth).sum() / (preds[0, organ - 1].sum() + truth.sum())
        assert dice > 0.95


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"levels": 4}, "levels is 4; a backbone of depth 4 has skips 1 to 3"),
        ({"levels": 0}, "levels is 0"),
        ({"backbone": "attention_unet"}, "`mhca` would replace the gates of attention_unet"),
        ({"backbone": "vnet"}, "expected one of unet, attention_unet, nnunet"),
        ({"heads": 3}, "64 channels cannot be shared equally by 3 heads"),
        ({"mhsa": False, "block": True}, "`block` is an option of `mhsa`, which is off"),
        ({"mhca": False, "keys": 64}, "`keys` is an option of `mhca`, which is off"),
        ({"keys": 0}, "keys is 0; expected at least 1"),
        ({"backbone": "nnunet", "options": {"strides": [[2, 2]] * 4}}, "first strides of 1"),
    ],
)
def test_impossible_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        small(**options)


def test_levels_do_not_matter_without_cross_attention():
    assert small(depth=3, levels=3, mhca=False)(torch.randn(1, 1, 8, 8)).shape == (1, 3, 8, 8)


@pytest.mark.parametrize("dims", [2, 3])
def test_attention_unet_gates_every_skip(dims):
    torch.manual_seed(0)
    network = AttentionUNet(width=4, depth=3, dims=dims).eval()
    assert [type(gate) for gate in network.gates] == [AdditiveGate] * 2
    high, skip = torch.randn(1, 16, *(3, 2, 4)[:dims]), torch.randn(1, 8, *(6, 4, 8)[:dims])
    gate = network.gates[0].gate(high, skip)
    assert gate.shape == (1, 1, *skip.shape[2:]) and gate.min() > 0 and gate.max() < 1
    assert torch.equal(network.gates[0](high, skip), skip * gate)


def test_additive_gate_by_hand():
    gate = AdditiveGate(1, 1)
    for conv in (gate.from_high, gate.from_skip, gate.to_gate):
        conv.weight.data.fill_(0.25)
        if conv.bias is not None:
            conv.bias.data.zero_()
    high, skip = torch.full((1, 1, 1, 1), 8.0), torch.tensor([[[[1.0, 2], [3, 6]]]])
    # relu(8 / 4 + (1 + 2 + 3 + 6) / 4) = 5; sigmoid(5 / 4)
    expected = torch.sigmoid(torch.tensor(1.25))
    assert torch.allclose(gate(high, skip), skip * expected)
    assert torch.allclose(gate(-10 * high, skip), skip * 0.5)
