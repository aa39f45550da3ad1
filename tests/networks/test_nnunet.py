"""nnU-Net's networks: sizes by axis, blocks, and logits of several levels."""

import pytest
import torch
from torch import nn

from organseg.batch import IGNORE
from organseg.losses import deep_supervision, marginal_loss, partial_label_loss
from organseg.networks import NNUNet
from organseg.networks.nnunet import ResidualBlock
from organseg.networks.unet import pad_to_multiple


def small(**options) -> NNUNet:
    torch.manual_seed(0)
    return NNUNet(**{"out_channels": 3, "width": 4, "depth": 4, **options})


def test_strides_and_kernels_by_axis():
    strides, kernels = [[1, 1, 1], [1, 2, 2], [2, 2, 2]], [[1, 3, 3], [3, 3, 3], [3, 3, 3]]
    network = small(dims=3, strides=strides, kernels=kernels).eval()
    assert network.strides == [2, 4, 4]
    assert [block[0].first[0].kernel_size for block in network.encoder] == [tuple(k) for k in kernels]
    assert [block[0].first[0].stride for block in network.encoder] == [tuple(s) for s in strides]
    shapes = []
    for block in network.encoder:
        block.register_forward_hook(lambda *call: shapes.append(tuple(call[-1].shape[1:])))
    with torch.no_grad():
        assert network(torch.randn(1, 1, 6, 16, 12)).shape == (1, 3, 6, 16, 12)
    assert shapes == [(4, 6, 16, 12), (8, 6, 8, 6), (16, 3, 4, 3)]


@pytest.mark.parametrize(("dims", "most"), [(2, 512), (3, 320)])
def test_channels_stop_growing(dims, most):
    with torch.device("meta"):
        assert NNUNet(width=32, depth=7, dims=dims).channels == [min(32 * 2**level, most) for level in range(7)]


def test_no_batch_norm_and_no_relu():
    kinds = {type(module) for module in small().modules()}
    assert nn.InstanceNorm2d in kinds and not kinds & {nn.BatchNorm2d, nn.ReLU, nn.MaxPool2d}


def test_residual_encoder():
    network = small(residual=True)
    assert [len(block) for block in network.encoder] == [1, 3, 4, 6]
    assert all(isinstance(unit, ResidualBlock) for block in network.encoder for unit in block)
    block = ResidualBlock(4, 4, [3, 3]).eval()
    block.second[1].weight.data.zero_()  # only the shortcut is left
    image = torch.randn(1, 4, 5, 5)
    assert torch.equal(block(image), nn.functional.leaky_relu(image))


def test_logits_of_several_levels_in_training_alone():
    network, image = small(), torch.randn(1, 1, 16, 24)
    shapes = [tuple(logits.shape) for logits in network.train()(image)]
    assert shapes == [(1, 3, 16, 24), (1, 3, 8, 12)]
    assert network.eval()(image).shape == (1, 3, 16, 24)
    assert small(deep_supervision=False).train()(image).shape == (1, 3, 16, 24)
    sum(logits.square().sum() for logits in network.train()(image)).backward()
    assert [name for name, p in network.named_parameters() if p.grad is None] == []


@pytest.mark.parametrize(("size", "padded"), [((20, 13), (24, 16)), ((9, 12, 17), (16, 16, 24))])
@pytest.mark.parametrize("loss", [partial_label_loss, marginal_loss])
def test_any_size_is_trained_as_if_it_were_padded_and_the_padding_ignored(size, padded, loss):
    network = small(dims=len(size)).train()
    torch.manual_seed(1)
    annotated = torch.ones(2, 3 - (loss is marginal_loss), dtype=torch.bool)
    label = torch.randint(0, annotated.shape[1] + 1, (2, *size)).byte()
    image = torch.randn(2, 1, *size)
    whole = torch.full((2, *padded), IGNORE, dtype=torch.uint8)
    whole[(slice(None), *map(slice, size))] = label

    def step(seen, truth):
        network.zero_grad()
        batch = {"label": truth, "annotated": annotated, "index_to_mm": torch.eye(4).repeat(2, 1, 1)}
        supervised = deep_supervision(lambda logits, batch: loss(logits, batch["label"], batch["annotated"]))
        value = supervised(network(seen), batch)
        value.backward()
        return value.item(), [parameter.grad.clone() for parameter in network.parameters()]

    found, gradients = step(image, label)
    expected, theirs = step(pad_to_multiple(image, network.strides), whole)
    assert found == expected > 0
    assert all(torch.equal(*pair) for pair in zip(gradients, theirs, strict=True))
    assert sum(gradient.abs().sum() for gradient in gradients) > 0


@pytest.mark.parametrize(("depth", "dims", "size"), [(6, 2, (32, 32)), (5, 2, (16, 16)), (6, 3, (1, 20, 9))])
@pytest.mark.parametrize("residual", [False, True])
def test_a_bottleneck_of_one_voxel_is_padded_to_two(depth, dims, size, residual):
    network, image = small(depth=depth, dims=dims, residual=residual), torch.randn(1, 1, *size)
    with torch.no_grad():
        assert network.eval()(image).shape == (1, 3, *size)
    label = torch.randint(0, 4, (1, *size)).byte()
    batch = {"label": label, "annotated": torch.ones(1, 3, dtype=torch.bool), "index_to_mm": torch.eye(4)[None]}
    supervised = deep_supervision(lambda logits, part: partial_label_loss(logits, part["label"], part["annotated"]))
    value = supervised(network.train()(image), batch)
    value.backward()
    assert torch.isfinite(value) and all(torch.isfinite(p.grad).all() for p in network.parameters())


@pytest.mark.parametrize(
    "options",
    [
        {"dims": 1},
        {"depth": 1},
        {"width": 0},
        {"strides": [[1, 1], [2]]},
        {"kernels": [[3, 3]]},
        {"kernels": [[2, 3]] * 4},
        {"strides": [[2, 1], [2, 2], [2, 2], [2, 2]]},
    ],
)
def test_impossible_sizes_are_refused(options):
    with pytest.raises(ValueError, match="NNUNet needs"):
        small(**options)
