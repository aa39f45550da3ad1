"""Sizes by hand, and the memory estimate against what autograd keeps."""

import math

import pytest
import torch

from organseg.networks import NNUNet
from organseg.networks.nnunet_plan import MAPS, SMALLEST, memory_of, plan


def totals(strides):
    return [math.prod(axis) for axis in zip(*strides, strict=True)]


def test_isotropic_cases_are_halved_alike():
    found = plan((64, 64, 64), (2, 2, 2), memory_gb=100)
    assert found.patch_size == (64, 64, 64)
    assert found.strides == ((1, 1, 1), *((2, 2, 2),) * 4)  # 64, 32, 16, 8, 4
    assert set(found.kernels) == {(3, 3, 3)}


def test_thick_slices_are_halved_later_and_kernels_stay_in_the_plane():
    found = plan((40, 256, 256), (5, 0.8, 0.8), memory_gb=100)
    # In the plane 0.8, 1.6, 3.2 mm; only then 5 mm are not more than twice as coarse.
    assert found.strides[:4] == ((1, 1, 1), (1, 2, 2), (1, 2, 2), (2, 2, 2))
    assert found.kernels[:4] == ((1, 3, 3), (1, 3, 3), (3, 3, 3), (3, 3, 3))
    assert found.patch_size == (40, 256, 256)


@pytest.mark.parametrize(("shape", "spacing"), [((20, 512, 512), (5, 0.7, 0.7)), ((30, 320, 320), (4, 1, 1))])
def test_no_strided_convolution_skips_what_lies_between(shape, spacing):
    found = plan(shape, spacing, memory_gb=8)
    for strides, kernels in zip(found.strides, found.kernels, strict=True):
        assert all(kernel >= stride for stride, kernel in zip(strides, kernels, strict=True))


def test_thin_volumes_give_way_in_the_plane():
    found = plan((9, 512, 512), (5, 0.8, 0.8), memory_gb=3)
    assert found.memory_gb <= 3 and found.patch_size[0] >= 8 and found.patch_size[1] < 512


@pytest.mark.parametrize("shape", [(200, 200), (512, 384), (129, 128)])
def test_slices_are_neither_cut_nor_padded(shape):
    found = plan(shape, (2, 2), memory_gb=8, whole=True)
    assert found.patch_size == shape
    assert all(n % total == 0 for n, total in zip(shape, totals(found.strides), strict=True))
    with pytest.raises(ValueError, match="choose a smaller width"):
        plan(shape, (2, 2), memory_gb=0.51, whole=True)


@pytest.mark.parametrize("memory_gb", [1.5, 4, 12, 40])
@pytest.mark.parametrize(
    ("shape", "spacing"), [((512, 512), (0.8, 0.8)), ((100, 512, 512), (3, 0.8, 0.8)), ((800, 512, 512), (1, 0.7, 0.7))]
)
def test_the_budget_is_used_and_kept(shape, spacing, memory_gb):
    found = plan(shape, spacing, memory_gb, width=16)
    assert found.memory_gb <= memory_gb and found.batch_size >= 2
    sizes = totals(found.strides)
    for n, size in zip(found.patch_size, sizes, strict=True):
        assert n % size == 0 and (size == 1 or n >= SMALLEST * size)
    full = found.patch_size == plan(shape, spacing, 1e6, width=16).patch_size
    more = memory_of(found.patch_size, found.strides, 16, found.batch_size + 1)
    assert more > memory_gb or found.batch_size == 64
    assert full or found.batch_size < 8  # memory goes to the patch before it goes to the batch


def test_the_network_can_be_built_and_trained():
    found = plan((24, 40, 40), (5, 2, 2), memory_gb=2, width=4)
    network = NNUNet(width=4, dims=3, strides=found.strides, kernels=found.kernels)
    assert len(network.train()(torch.randn(1, 1, *found.patch_size))) >= 1


@pytest.mark.parametrize(("dims", "patch"), [(3, (32, 48, 48)), (2, (128, 128))])
def test_the_estimate_covers_what_autograd_keeps(dims, patch):
    network, kept = NNUNet(width=8, depth=4, dims=dims), {}

    def pack(tensor):
        if tensor.is_floating_point() and not isinstance(tensor, torch.nn.Parameter):
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
    with hooks, torch.autocast("cpu", torch.bfloat16):
        logits = network(torch.randn(1, 1, *patch))
    strides = [[1] * dims, *[[2] * dims] * 3]
    assert logits
    ours = (memory_of(patch, strides, 8, 1) - memory_of(patch, strides, 8, 0)) * 1e9
    assert 10 < MAPS * sum(kept.values()) / ours < 11 < MAPS


def test_a_budget_that_fits_nothing_is_refused():
    with pytest.raises(ValueError, match="choose a smaller width"):
        plan((512, 512), (1, 1), memory_gb=0.5)


@pytest.mark.parametrize(("memory_gb", "width"), [(8, 0), (8, 1000), (0, 8), (-1, 8), (float("nan"), 8)])
def test_nonsense_is_refused(memory_gb, width):
    with pytest.raises(ValueError, match="expected 1 to 320"):
        plan((64, 64, 64), (1, 1, 1), memory_gb, width)
