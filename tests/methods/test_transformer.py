"""Chapter 5's method as a module: channels, decision, options."""

import pytest
import torch
from shown import shown

from organseg.errors import UsageError
from organseg.methods import TransformerModule
from organseg.networks import MultiHeadCrossAttention
from organseg.networks.unet import PlainSkip

NETWORK = {"width": 4, "depth": 3}
FEW = {"heads": 2, "levels": 2}


def module(**options) -> TransformerModule:
    return TransformerModule(["liver", "spleen"], **{**FEW, "network": NETWORK, **options})


def test_one_channel_more_than_organs_and_probabilities_that_sum_to_1():
    method = module().eval()
    logits = method.network(torch.randn(2, 1, 8, 8))
    assert logits.shape == (2, 3, 8, 8)
    probs = method.activate(logits, shown(torch.zeros(2, 1, 8, 8)))
    assert torch.allclose(probs.sum(1), torch.ones(2, 8, 8))
    assert torch.equal(method.decide(probs), logits.argmax(1))


def test_channel_0_is_background():
    probs = torch.tensor([[[0.4], [0.3], [0.3]], [[0.2], [0.3], [0.5]]])
    assert module().decide(probs).tolist() == [[0], [2]]


def test_probabilities_of_organs_are_those_behind_the_background(monkeypatch):
    method = module()
    monkeypatch.setattr(method, "probabilities", lambda view: torch.arange(3.0).view(1, 3, 1, 1))
    assert method.organ_probabilities(shown(torch.zeros(1, 1, 1, 1))).flatten().tolist() == [1, 2]


def test_flat_options_reach_the_network():
    backbone = module(levels=1).network.backbone
    assert isinstance(backbone.gates[0], MultiHeadCrossAttention) and isinstance(backbone.gates[1], PlainSkip)
    assert backbone.bottom.heads == 2
    assert module(network={**NETWORK, "dims": 3}).dims == 3


def test_an_unannotated_organ_is_never_background():
    method = module().eval()
    logits = torch.zeros(1, 3, 4, 4, requires_grad=True)
    batch = {"label": torch.zeros(1, 4, 4, dtype=torch.uint8), "annotated": torch.tensor([[True, False]])}
    method.loss(logits, batch).backward()
    background, annotated, unknown = logits.grad[0].sum((1, 2)).tolist()
    assert background == pytest.approx(unknown) and background < 0 < annotated


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"heads": 3}, "cannot be shared equally by 3 heads"),
        ({"network": {**NETWORK, "depth": 1}}, "depth >= 2"),
        ({"mhsa": False, "network": {**NETWORK, "block": True}}, "`block` is an option of `mhsa`"),
        ({"network": {"widht": 4}}, "widht"),
        ({"network": {**NETWORK, "options": {"norm_after": "never", "nrom": 1}}}, "nrom"),
    ],
)
def test_wrong_options_are_one_line_for_the_user(options, message):
    with pytest.raises(UsageError, match=message):
        module(**options)
