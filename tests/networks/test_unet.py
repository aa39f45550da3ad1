"""METHOD.md 3.1 and 3.5."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from organseg.networks import UNet
from organseg.networks.unet import UpBlock, make_conv, multiple_of, pad_to_multiple


def small(dims=2, **options) -> UNet:
    torch.manual_seed(0)
    return UNet(**{"out_channels": 3, "width": 4, "depth": 3, "dims": dims, **options})


def test_parameters_of_the_thesis():
    with torch.device("meta"):
        network = UNet(in_channels=1, out_channels=7)
    assert sum(p.numel() for p in network.parameters()) == 31_038_663


def test_layers_are_those_of_table_a_1():
    with torch.device("meta"):
        network = UNet()
    layers = [
        (type(m).__name__, m.in_channels, m.out_channels, m.kernel_size[0])
        if isinstance(m, nn.Conv2d)
        else (type(m).__name__, m.num_features)
        for m in network.modules()
        if isinstance(m, nn.Conv2d | nn.BatchNorm2d)
    ]
    expected = []
    for before, after in [(1, 64), (64, 128), (128, 256), (256, 512), (512, 1024)]:
        expected += [("Conv2d", before, after, 3), ("Conv2d", after, after, 3), ("BatchNorm2d", after)]
    for deep in (1024, 512, 256, 128):
        expected += [("Conv2d", deep, deep // 2, 2), ("BatchNorm2d", deep // 2)]
    for fine in (512, 256, 128, 64):
        expected += [("Conv2d", 2 * fine, fine, 3), ("Conv2d", fine, fine, 3)]
        expected += [("BatchNorm2d", fine)] if fine > 64 else []
    assert layers == [*expected, ("Conv2d", 64, 7, 1)]
    assert all(m.bias is not None for m in network.modules() if isinstance(m, nn.Conv2d))


def test_receptive_field_of_the_encoder():
    network = UNet(width=1, depth=5).eval()
    network.pool = nn.AvgPool2d(2)  # a maximum passes the gradient to one voxel of four
    for parameter in network.parameters():
        parameter.data.fill_(0.1)
    image = torch.ones(1, 1, 320, 320, requires_grad=True)
    feature, sizes = image, []
    for level, block in enumerate(network.encoder):
        feature = block(network.pool(feature) if level else feature)
        middle = feature.shape[-1] // 2
        seen = torch.autograd.grad(feature[0, 0, middle, middle], image, retain_graph=True)[0][0, 0] != 0
        rows, columns = seen.any(1).sum().item(), seen.any(0).sum().item()
        assert rows == columns
        sizes.append(rows)
    assert sizes == [5, 14, 32, 68, 140]


def test_up_block_pads_one_zero_after_the_last_row_and_column():
    block = UpBlock(1, 1, 2, "batch").eval()
    block.conv.weight.data[:] = torch.tensor([[0.0, 0], [0, 1]])  # takes the voxel below and to the right
    block.conv.bias.data.zero_()
    out = block(torch.tensor([[[[1.0, 2], [3, 4]]]]))
    # Nearest upsampling gives 1 1 2 2 / 1 1 2 2 / 3 3 4 4 / 3 3 4 4.
    expected = torch.tensor([[1.0, 2, 2, 0], [3, 4, 4, 0], [3, 4, 4, 0], [0, 0, 0, 0]])
    assert torch.allclose(out[0, 0], expected, atol=1e-4)


@pytest.mark.parametrize(("dims", "size"), [(2, (13, 18)), (2, (1, 1)), (2, (3, 40)), (3, (5, 9, 6)), (3, (1, 2, 3))])
def test_any_size_is_padded_with_its_edge_and_cropped_back(dims, size):
    network = small(dims).eval()
    image = torch.randn(2, 1, *size)
    whole = image
    for axis, n in enumerate(size, start=2):
        edge = whole.narrow(axis, n - 1, 1)
        whole = torch.cat([whole, *[edge] * (-n % network.strides[0])], dim=axis)
    assert all(n % 4 == 0 for n in whole.shape[2:])
    with torch.no_grad():
        logits, expected = network(image), network(whole)
    assert logits.shape == (2, 3, *size)
    for axis, n in enumerate(size, start=2):
        expected = expected.narrow(axis, 0, n)
    assert torch.allclose(logits, expected, atol=1e-6)


def test_a_size_that_fits_is_not_padded():
    image = torch.randn(1, 1, 8, 12)
    assert pad_to_multiple(image, [4, 4]) is image


def test_next_multiple_by_hand():
    assert multiple_of((1, 8, 9), (4, 4, 4)) == [4, 8, 12]
    assert multiple_of((3, 5), (4, 8), 2) == [4, 16] and multiple_of((3, 9), (4, 8), 2) == [4, 16]
    assert multiple_of((5, 5), (4, 8), 2) == [8, 8] and multiple_of((1, 3, 3), (1, 4, 4), 2) == [1, 4, 8]


@pytest.mark.parametrize(("dims", "size"), [(2, (1, 1)), (2, (3, 4)), (3, (4, 2, 4))])
def test_instance_norm_has_two_voxels_at_least(dims, size):
    network, sizes = small(dims, norm="instance").train(), []
    network.bottom.register_forward_hook(lambda *call: sizes.append(call[-1].shape[2:]))
    logits = network(torch.randn(1, 1, *size))
    assert logits.shape == (1, 3, *size) and torch.isfinite(logits).all()
    assert sizes == [(*(1,) * (dims - 1), 2)]


@pytest.mark.parametrize(
    ("norm", "layer"), [("batch", nn.BatchNorm2d), ("instance", nn.InstanceNorm2d), ("group", nn.GroupNorm)]
)
def test_kind_and_place_of_norms(norm, layer):
    def norms(network):
        return sum(isinstance(m, layer) for m in network.modules())

    # Depth 3: three encoder blocks, two up blocks, two decoder blocks of which the last has none.
    assert norms(small(norm=norm)) == 3 + 2 + 1
    assert norms(small(norm=norm, norm_after="convolution")) == 2 * 3 + 2 + 2 * 2
    network = small(norm=norm, width=12)
    assert torch.isfinite(network(torch.randn(2, 1, 16, 16))).all()
    assert all(m.weight is not None for m in network.modules() if isinstance(m, layer))


def test_norm_follows_every_convolution_before_its_relu():
    block = [type(m).__name__ for m in small(norm_after="convolution").encoder[0]]
    assert block == ["Conv2d", "BatchNorm2d", "ReLU"] * 2


@pytest.mark.parametrize("dims", [2, 3])
def test_features_are_what_the_head_sees(dims):
    network = small(dims).eval()
    image = torch.randn(1, 1, *(9, 6, 7)[:dims])
    features = network.features(image)
    assert features.shape == (1, 4, *image.shape[2:])
    assert torch.equal(network.head(features), network(image))


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("norm_after", ["block", "convolution"])
def test_gradient_reaches_every_parameter(dims, norm_after):
    # In training mode a bias before a norm has none by design, so the running statistics are used.
    network = small(dims, width=8, norm_after=norm_after).eval()
    network(torch.randn(2, 1, *(16,) * dims)).square().sum().backward()
    dead = [name for name, p in network.named_parameters() if p.grad is None or not p.grad.any()]
    assert dead == []


def test_channels_last_gives_the_same():
    network = small().eval()
    image = torch.randn(2, 1, 16, 20)
    with torch.no_grad():
        expected = network(image)
        found = network.to(memory_format=torch.channels_last)(image.contiguous(memory_format=torch.channels_last))
    assert torch.allclose(found, expected, atol=1e-5)
    assert expected.std() > 1e-3


def test_a_3d_network_of_one_plane_sees_depth():
    network = small(3).eval()
    image = torch.randn(1, 1, 8, 8, 8)
    changed = image.clone()
    changed[:, :, 5] += 1
    with torch.no_grad():
        assert not torch.allclose(network(image)[:, :, 3], network(changed)[:, :, 3], atol=1e-6)


@pytest.mark.parametrize("options", [{"dims": 1}, {"dims": 4}, {"depth": 1}, {"width": 0}])
def test_impossible_options_are_refused(options):
    with pytest.raises(ValueError, match="UNet needs"):
        UNet(**options)


def test_skips_carry_what_pooling_loses():
    network = small().eval()
    checker = (torch.arange(16)[:, None] + torch.arange(16)) % 2 * 2.0 - 1
    image = torch.stack([checker, -checker])[:, None]  # equal after any pooling of 2 x 2
    assert torch.equal(F.max_pool2d(image[:1], 2), F.max_pool2d(image[1:], 2))
    with torch.no_grad():
        one, other = network(image)
    assert not torch.allclose(one, other, atol=1e-4)


@pytest.mark.parametrize("size", [(2, 2, 2), (2, 6, 6), (6, 6, 6)])
def test_gradients_of_small_volumes_in_bf16_are_gradients(size):
    # The library's own convolution returns uninitialised memory for the first two.
    torch.manual_seed(0)
    conv, image = make_conv(3)(16, 32, 3, padding=1), torch.randn(2, 16, *size)

    def gradient(enabled: bool) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            out = conv(image)
        (found,) = torch.autograd.grad(out.float().square().sum(), conv.weight)
        return found

    exact, found = gradient(False), [gradient(True) for _ in range(4)]
    assert all(torch.equal(one, found[0]) for one in found)
    assert (found[0] - exact).abs().max() < 0.03 * exact.abs().max()
