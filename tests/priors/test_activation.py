"""Equations 4.2 and 4.3: identities, hand-worked values, finite at the ends (METHOD.md 2.2)."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from organseg.losses import partial_label_loss
from organseg.priors import prior_logits, prior_sigmoid, prior_softmax, with_background


def test_uniform_priors_change_nothing():
    logits = 5 * torch.randn(2, 4, 6, 5)
    assert torch.equal(prior_sigmoid(logits, torch.full_like(logits, 0.5)), logits.sigmoid())
    assert torch.equal(prior_logits(logits, torch.full_like(logits, 0.5)), logits)
    torch.testing.assert_close(prior_softmax(logits, torch.full_like(logits, 0.25)), logits.softmax(1))


def test_hand_worked():
    # A network that is undecided says what the prior says, and odds multiply.
    assert prior_sigmoid(torch.zeros(1, 1, 1), torch.full((1, 1, 1), 0.2)).item() == pytest.approx(0.2)
    likely = torch.full((1, 1, 1), math.log(3))
    assert prior_sigmoid(likely, torch.full((1, 1, 1), 0.2)).item() == pytest.approx(0.75 / 1.75)
    logits, prior = torch.log(torch.tensor([[[1.0], [2.0], [4.0]]])), torch.tensor([[[0.7], [0.2], [0.1]]])
    assert prior_softmax(logits, prior).flatten().tolist() == pytest.approx([0.7 / 1.5, 0.4 / 1.5, 0.4 / 1.5])


@given(st.floats(-40, 40), st.sampled_from([0.0, 1e-9, 1e-6, 0.5, 1 - 1e-7, 1.0]))
@settings(max_examples=100, deadline=None)
def test_finite_with_gradients_whatever_the_prior_is(logit, prior):
    logits = torch.full((1, 2, 3), logit, requires_grad=True)
    there = torch.full((1, 2, 3), prior)
    total = prior_sigmoid(logits, there).sum() + prior_softmax(logits, there).sum() + prior_logits(logits, there).sum()
    (gradient,) = torch.autograd.grad(total, logits)
    assert total.isfinite() and gradient.isfinite().all()


def test_a_prior_of_0_is_a_floor_and_no_veto():
    assert prior_sigmoid(torch.full((1, 1, 1), 20.0), torch.zeros(1, 1, 1)).item() > 0.99


def test_in_fp32_under_autocast():
    logits, prior = torch.randn(1, 2, 8, dtype=torch.bfloat16), torch.full((1, 2, 8), 0.3)
    with torch.autocast("cpu", torch.bfloat16):
        for activation in (prior_logits, prior_sigmoid, prior_softmax):
            assert activation(logits, prior).dtype == torch.float32


def test_the_masked_loss_takes_biased_logits():
    """METHOD.md 1.2 of what is known, at the biased logits; a gradient where the truth is known and nowhere else."""
    logits, prior = torch.randn(1, 2, 4, requires_grad=True), torch.tensor([[[0.9] * 4, [0.001] * 4]])
    label, annotated = torch.tensor([[1, 0, 0, 255]]), torch.tensor([[True, False]])
    loss = partial_label_loss(prior_logits(logits, prior), label, annotated, balance="none", dice=0)
    odds = torch.logit(prior)
    entropy = torch.nn.functional.softplus(-(logits + odds)) * torch.tensor([[[1, 0, 0, 0], [0, 0, 0, 0]]])
    entropy = entropy + torch.nn.functional.softplus(logits + odds) * torch.tensor([[[0, 1, 1, 0], [1, 0, 0, 0]]])
    torch.testing.assert_close(loss, entropy.sum() / 4)
    loss.backward()
    assert (logits.grad != 0).tolist() == [[[True, True, True, False], [True, False, False, False]]]


def test_the_background_is_what_organs_leave():
    prior = torch.tensor([[[0.2, 0.9], [0.3, 0.8]]])
    torch.testing.assert_close(with_background(prior, 0.01)[0, 0], torch.tensor([0.5, 0.01]))
    assert with_background(prior, 0.01).shape == (1, 3, 2)


def test_shapes_are_checked():
    with pytest.raises(ValueError, match="shape of `logits`"):
        prior_logits(torch.zeros(1, 2, 3), torch.zeros(1, 2, 1))


def test_an_organ_that_is_nowhere_leaves_the_softmax_to_its_logit():
    logits, prior = torch.randn(2, 4, 5), torch.full((2, 3, 5), 0.5)
    plain = prior_softmax(logits, with_background(prior, 1e-3, torch.zeros(2, 3, dtype=torch.bool)))
    torch.testing.assert_close(plain, torch.softmax(logits, 1))
    prior[:, 0] = 0.3
    known = torch.tensor([[True, False, False]] * 2)
    found = with_background(prior, 1e-3, known)
    torch.testing.assert_close(found, torch.tensor([0.7, 0.3, 0.7, 0.7])[None, :, None].expand(2, 4, 5))
    assert torch.equal(with_background(prior, 1e-3), with_background(prior, 1e-3, torch.ones(2, 3, dtype=torch.bool)))
