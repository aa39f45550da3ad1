"""Maps beside the image: they enter where they should, and a trained plain network goes on unchanged."""

import copy

import pytest
import torch
from torch import nn

from organseg.networks import NNUNet, UNet, UTransformer
from organseg.networks.guided import MapsAtBottleneck, go_on_from


def unet(in_channels: int, out_channels: int, dims: int = 2) -> UNet:
    return UNet(in_channels, out_channels, width=4, depth=3, dims=dims).eval()


def attended(in_channels: int, out_channels: int) -> UTransformer:
    return UTransformer(in_channels, out_channels, width=4, depth=3, heads=2, levels=1).eval()


def at_bottleneck(network, maps: int, out_channels: int) -> nn.Module:
    return MapsAtBottleneck(network, maps, out_channels).eval()


@pytest.mark.parametrize("factory", [unet, attended])
@pytest.mark.parametrize("enter", [at_bottleneck, lambda network, maps, out: network(1 + maps, out)])
def test_a_trained_network_goes_on_as_it_was_whatever_the_maps_say(factory, enter):
    torch.manual_seed(0)
    plain, guided = factory(1, 3), enter(factory, 2, 3).eval()
    go_on_from(guided, plain.state_dict())
    image = torch.randn(2, 1, 16, 16)
    with torch.no_grad():
        for maps in (torch.zeros(2, 2, 16, 16), torch.randn(2, 2, 16, 16)):
            torch.testing.assert_close(guided(torch.cat([image, maps], 1)), plain(image))


@pytest.mark.parametrize("factory", [unet, attended])
def test_after_a_step_the_maps_matter(factory):
    torch.manual_seed(0)
    guided = at_bottleneck(factory, 2, 3).train()
    seen = torch.randn(2, 3, 16, 16)
    guided(seen).square().mean().backward()
    assert all(parameter.grad is not None for parameter in guided.parameters())
    with torch.no_grad():
        for parameter in guided.parameters():
            parameter -= 0.1 * parameter.grad
        other = torch.cat([seen[:, :1], torch.randn(2, 2, 16, 16)], 1)
        assert not torch.allclose(guided(seen), guided(other))


def test_in_3d_and_odd_sizes():
    guided = at_bottleneck(lambda i, o: unet(i, o, 3), 2, 3)
    assert guided(torch.randn(1, 3, 9, 7, 10)).shape == (1, 3, 9, 7, 10)


def test_maps_lie_under_the_image_where_strides_do_not_divide_it():
    """Nine pixels at strides of 4 are three cells, the last of one pixel and its padding."""
    guided = at_bottleneck(unet, 1, 2)
    weight = guided.plain.bottom.entry
    nn.init.ones_(weight.weight)
    guided.plain.bottom.before = nn.Identity()
    maps = torch.zeros(1, 1, 9, 9)
    maps[..., 8] = 1.0
    guided.plain.bottom.maps = maps
    added = guided.plain.bottom(torch.zeros(1, 16, 3, 3))[0, 0]
    torch.testing.assert_close(added, torch.tensor([0.0, 0, 1]).expand(3, 3))


def test_maps_lie_under_an_image_that_is_padded_to_two_cells():
    guided = at_bottleneck(lambda i, o: NNUNet(i, o, width=4, depth=3, deep_supervision=False), 1, 2)
    nn.init.ones_(guided.plain.bottom.entry.weight)
    guided.plain.bottom.before = nn.Identity()
    added = []
    guided.plain.bottom.register_forward_hook(lambda _, given, out: added.append((out - given[0])[0, 0]))
    maps = torch.tensor([1.0, 1, 0, 0]).expand(1, 1, 4, 4)
    with torch.no_grad():
        guided(torch.cat([torch.randn(1, 1, 4, 4), maps], 1))
    torch.testing.assert_close(added[0], torch.tensor([[0.5, 0]]))


def test_an_nnunet_without_deep_supervision():
    guided = at_bottleneck(lambda i, o: NNUNet(i, o, width=4, depth=3, deep_supervision=False), 2, 3).train()
    guided(torch.randn(2, 3, 8, 8)).square().mean().backward()
    assert guided.plain.bottom.entry.weight.grad.abs().sum() > 0


def test_a_copy_sees_its_own_maps():
    torch.manual_seed(0)
    guided = at_bottleneck(unet, 1, 2)
    for parameter in guided.plain.bottom.entry.parameters():
        nn.init.normal_(parameter)
    seen, other = torch.randn(1, 2, 8, 8), torch.randn(1, 2, 8, 8)
    with torch.no_grad():
        expected = guided(seen)
        twin = copy.deepcopy(guided)
        guided(other)
        torch.testing.assert_close(twin(seen), expected)


def test_the_head_can_be_taken_away():
    guided = at_bottleneck(unet, 1, 2)
    guided.head = nn.Identity()
    assert guided(torch.randn(1, 2, 8, 8)).shape == (1, 4, 8, 8)


def test_another_network_is_refused():
    with pytest.raises(RuntimeError, match="it has no "):
        go_on_from(UNet(1, 3, width=4, depth=4), unet(1, 3).state_dict())
    with pytest.raises(RuntimeError, match="more weights"):
        go_on_from(unet(1, 3), UNet(1, 3, width=4, depth=4).state_dict())
    with pytest.raises(RuntimeError, match="size mismatch"):
        go_on_from(unet(1, 3), UNet(1, 3, width=8, depth=3).state_dict())
    with pytest.raises(ValueError, match="deep_supervision"):
        at_bottleneck(lambda i, o: NNUNet(i, o, width=4, depth=4), 1, 2)
