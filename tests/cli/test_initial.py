"""`fit --init`: what a new network takes from a checkpoint, organ by organ."""

from functools import partial
from pathlib import Path

import pytest
import torch

from organseg.cli.initial import begin_with
from organseg.errors import IntegrityError, UsageError
from organseg.methods import PartialLabelModule, TransformerModule
from organseg.methods.base import SegmentationModule
from organseg.networks import NNUNet, UNet
from organseg.runtime.checkpoint_io import save_checkpoint

SMALL = partial(UNet, width=2, depth=2)


def saved(module: SegmentationModule, path: Path) -> Path:
    """A checkpoint with values that no initialisation has."""
    with torch.no_grad():
        for number, tensor in enumerate(module.state_dict().values()):
            tensor.fill_(number) if tensor.ndim < 1 else tensor.copy_(torch.rand_like(tensor.float()) + number)
    save_checkpoint({"state_dict": module.state_dict(), "organseg": {"organs": list(module.organs)}}, path)
    return path


def test_each_organ_keeps_its_channel_wherever_that_is(tmp_path):
    old = PartialLabelModule(["liver", "spleen", "pancreas"], SMALL)
    path = saved(old, tmp_path / "last.ckpt")
    new = PartialLabelModule(["pancreas", "stomach", "liver"], SMALL)
    fresh = new.network.head.weight.detach().clone()
    assert begin_with(new, path) == ("stomach",)
    for name in ("weight", "bias"):
        theirs, ours = getattr(old.network.head, name), getattr(new.network.head, name)
        assert (ours[0] == theirs[2]).all() and (ours[2] == theirs[0]).all()
    assert (new.network.head.weight[1] == fresh[1]).all()
    rest = {name: tensor for name, tensor in new.network.state_dict().items() if not name.startswith("head.")}
    assert rest and all((tensor == old.network.state_dict()[name]).all() for name, tensor in rest.items())


def test_heads_of_deep_supervision_too(tmp_path):
    network = partial(NNUNet, width=2, depth=4, deep_supervision=True)
    old = PartialLabelModule(["liver", "spleen"], network)
    new = PartialLabelModule(["spleen", "liver"], network)
    assert begin_with(new, saved(old, tmp_path / "last.ckpt")) == ()
    heads = [name for name in new.network.state_dict() if "coarse_heads." in name]
    assert heads
    for name in heads:
        assert (new.network.state_dict()[name].flip(0) == old.network.state_dict()[name]).all()


def test_the_background_of_a_softmax_stays_and_another_activation_begins_anew(tmp_path):
    network = {"width": 8, "depth": 2}
    old = TransformerModule(["liver", "spleen"], network=network, levels=1, heads=2)
    path = saved(old, tmp_path / "last.ckpt")
    new = TransformerModule(["spleen", "liver"], network=network, levels=1, heads=2)
    assert begin_with(new, path) == ()
    assert (new.network.head.bias == old.network.head.bias[[0, 2, 1]]).all()
    plain = PartialLabelModule(["liver", "spleen"], lambda *channels: old.network.__class__(
        *channels, mhsa=True, mhca=True, levels=1, heads=2, positional_encoding=True, **network
    ))  # fmt: skip
    assert begin_with(plain, path) == ("liver", "spleen")


def test_what_a_network_cannot_begin_with(tmp_path):
    path = saved(PartialLabelModule(["liver"], SMALL), tmp_path / "last.ckpt")
    wider = PartialLabelModule(["liver"], partial(UNet, width=4, depth=2))
    with pytest.raises(
        UsageError, match=r"(?s)encoder.0.0.weight: \[2, 1, 3, 3\] there, \[4, 1, 3, 3\] here.*and 24 more"
    ):
        begin_with(wider, path)
    save_checkpoint({"state_dict": {}}, tmp_path / "foreign.ckpt")
    with pytest.raises(IntegrityError, match="not a checkpoint of organseg"):
        begin_with(wider, tmp_path / "foreign.ckpt")
    wider.start = "coarse"
    with pytest.raises(UsageError, match="begins with its coarse model"):
        begin_with(wider, path)
