"""Sizes by hand, and the memory estimate against what autograd keeps."""

import math

import pytest
import torch

from organseg.batch import Batch
from organseg.methods import PartialLabelModule, TransformerModule
from organseg.networks import NNUNet, UTransformer
from organseg.networks.nnunet_plan import OVERHEAD_GB, SMALLEST, WEIGHT_BYTES, Training, memory_of, plan


def totals(strides):
    return [math.prod(axis) for axis in zip(*strides, strict=True)]


def test_isotropic_cases_are_halved_alike():
    found = plan((64, 64, 64), (2, 2, 2), 100, Training())
    assert found.patch_size == (64, 64, 64)
    assert found.strides == ((1, 1, 1), *((2, 2, 2),) * 4)  # 64, 32, 16, 8, 4
    assert set(found.kernels) == {(3, 3, 3)}


def test_thick_slices_are_halved_later_and_kernels_stay_in_the_plane():
    found = plan((40, 256, 256), (5, 0.8, 0.8), 100, Training())
    # In the plane 0.8, 1.6, 3.2 mm; only then 5 mm are not more than twice as coarse.
    assert found.strides[:4] == ((1, 1, 1), (1, 2, 2), (1, 2, 2), (2, 2, 2))
    assert found.kernels[:4] == ((1, 3, 3), (1, 3, 3), (3, 3, 3), (3, 3, 3))
    assert found.patch_size == (40, 256, 256)


@pytest.mark.parametrize(("shape", "spacing"), [((20, 512, 512), (5, 0.7, 0.7)), ((30, 320, 320), (4, 1, 1))])
def test_no_strided_convolution_skips_what_lies_between(shape, spacing):
    found = plan(shape, spacing, 8, Training())
    for strides, kernels in zip(found.strides, found.kernels, strict=True):
        assert all(kernel >= stride for stride, kernel in zip(strides, kernels, strict=True))


def test_thin_volumes_give_way_in_the_plane():
    found = plan((9, 512, 512), (5, 0.8, 0.8), 3, Training())
    assert found.memory_gb <= 3 and found.patch_size[0] >= 8 and found.patch_size[1] < 512


@pytest.mark.parametrize("shape", [(200, 200), (512, 384), (129, 128)])
def test_slices_are_neither_cut_nor_padded(shape):
    found = plan(shape, (2, 2), 8, Training(), whole=True)
    assert found.patch_size == shape
    assert all(n % total == 0 for n, total in zip(shape, totals(found.strides), strict=True))
    with pytest.raises(ValueError, match="choose a smaller width"):
        plan(shape, (2, 2), 0.51, Training(), whole=True)


@pytest.mark.parametrize("memory_gb", [1.5, 4, 12, 40])
@pytest.mark.parametrize(
    ("shape", "spacing"), [((512, 512), (0.8, 0.8)), ((100, 512, 512), (3, 0.8, 0.8)), ((800, 512, 512), (1, 0.7, 0.7))]
)
def test_the_budget_is_used_and_kept(shape, spacing, memory_gb):
    found = plan(shape, spacing, memory_gb, Training(16))
    assert found.memory_gb <= memory_gb and found.batch_size >= 2
    sizes = totals(found.strides)
    for n, size in zip(found.patch_size, sizes, strict=True):
        assert n % size == 0 and (size == 1 or n >= SMALLEST * size)
    full = found.patch_size == plan(shape, spacing, 1e6, Training(16)).patch_size
    more = memory_of(found.patch_size, found.strides, Training(16), found.batch_size + 1)
    assert more > memory_gb or found.batch_size == 64
    assert full or found.batch_size < 8  # memory goes to the patch before it goes to the batch


def test_the_network_can_be_built_and_trained():
    found = plan((24, 40, 40), (5, 2, 2), 2, Training(4))
    network = NNUNet(width=4, dims=3, strides=found.strides, kernels=found.kernels)
    assert len(network.train()(torch.randn(1, 1, *found.patch_size))) >= 1


SIZES = {2: (128, 128), 3: (16, 32, 32)}
"""Patches of four levels."""


def kept_bytes(network, run) -> int:
    """What autograd keeps of `run` but the weights, and the copies of them that autocast makes."""
    kept, own = {}, {tuple(parameter.shape) for parameter in network.parameters()}

    def pack(tensor):
        if tensor.is_floating_point() and tuple(tensor.shape) not in own:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes(), tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        run()
    return sum(size for size, _ in kept.values())


def a_case_more(training: Training, dims: int) -> float:
    """Estimated bytes."""
    strides = [[1] * dims, *[[2] * dims] * 3]
    return (memory_of(SIZES[dims], strides, training, 1) - memory_of(SIZES[dims], strides, training, 0)) * 1e9


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("mixed", [True, False])
@pytest.mark.parametrize(("residual", "attention"), [(False, False), (True, False), (False, True)])
def test_the_estimate_covers_what_autograd_keeps_of_the_network(dims, mixed, residual, attention):
    options = {"width": 8, "depth": 4, "dims": dims}
    network: torch.nn.Module = NNUNet(1, 1, residual=residual, **options)
    if attention:
        network = UTransformer(1, 1, "nnunet", heads=4, **options)
    image = torch.randn(1, 1, *SIZES[dims])
    with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
        kept = kept_bytes(network, lambda: network(image))
    ours = a_case_more(Training(8, 0, residual, attention, 2 if mixed else 4), dims)
    assert 0.65 < kept / ours < 1  # the rest is in flight


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("organs", [1, 7, 13])
@pytest.mark.parametrize("softmax", [False, True])
def test_the_estimate_covers_what_autograd_keeps_of_the_loss(dims, organs, softmax):
    names, options = [f"organ {k}" for k in range(organs)], {"width": 4, "depth": 4, "dims": dims}
    method: PartialLabelModule | TransformerModule
    if softmax:
        method = TransformerModule(names, False, False, network={"backbone": "nnunet", **options})
    else:
        method = PartialLabelModule(names, lambda *channels: NNUNet(*channels, **options))
    batch = batch_of(SIZES[dims], organs)
    with torch.autocast("cpu", torch.bfloat16):
        network = kept_bytes(method, lambda: method.network(method.inputs(batch)))
        kept = kept_bytes(method, lambda: method.batch_loss(batch)) - network
    channels = organs + softmax
    ours = a_case_more(Training(4, channels), dims) - a_case_more(Training(4, 0), dims)
    assert 0.6 < kept / ours < 0.95


def batch_of(size, organs: int) -> Batch:
    return {
        "image": torch.randn(1, 1, *size),
        "label": torch.randint(0, organs + 1, (1, *size)).byte(),
        "annotated": torch.ones(1, organs, dtype=torch.bool),
        "case": ["a"],
        "index_to_mm": torch.eye(4)[None],
        "centre": torch.zeros(1, organs, 3),
    }


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("residual", [False, True])
def test_the_estimate_covers_the_weights(dims, residual):
    with torch.device("meta"):
        network = NNUNet(width=32, depth=6, dims=dims, residual=residual)
    training = Training(32, residual=residual)
    ours = (memory_of([64] * dims, [[1] * dims] * 6, training, 0) - OVERHEAD_GB) * 1e9 / WEIGHT_BYTES
    assert 0.7 < sum(p.numel() for p in network.parameters()) / ours < 1


def test_more_organs_and_more_blocks_leave_less_room():
    more = ({}, {"channels": 14}, {"residual": True}, {"attention": True}, {"value_bytes": 4})
    plans = [plan((160, 320, 320), (2, 1, 1), 8, Training(**options)) for options in more]
    plain, organs, residual, attention, fp32 = plans
    for found in (organs, residual, attention, fp32):
        assert math.prod(found.patch_size) <= math.prod(plain.patch_size)
    for found in (organs, residual, fp32):
        assert math.prod(found.patch_size) < math.prod(plain.patch_size)


def test_a_budget_that_fits_nothing_is_refused():
    with pytest.raises(ValueError, match="choose a smaller width"):
        plan((512, 512), (1, 1), 0.5, Training())


@pytest.mark.parametrize(("memory_gb", "width"), [(8, 0), (8, 1000), (0, 8), (-1, 8), (float("nan"), 8)])
def test_nonsense_is_refused(memory_gb, width):
    with pytest.raises(ValueError, match="expected 1 to 320"):
        plan((64, 64, 64), (1, 1, 1), memory_gb, Training(width))
