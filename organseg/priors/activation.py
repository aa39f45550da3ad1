"""The activation with a prior (METHOD.md 2.2; thesis, equations 4.2 and 4.3).

By Bayes' rule a prior multiplies what the network says of a voxel, so in logits it is a sum. Everything is computed in
fp32, with priors clamped to [eps, 1 - eps]: finite also where a prior is 0 or 1.
"""

import torch
from torch import Tensor

EPS = 1e-6


def prior_logits(logits: Tensor, prior: Tensor, eps: float = EPS) -> Tensor:
    """Logits of binary classifiers, shifted by the log odds of their priors: what losses take.

    Args:
        logits: [B, K, *S].
        prior: [B, K, *S] in 0..1; 0.5 changes nothing.
        eps: How far from 0 and 1 priors are kept.

    Returns:
        fp32 [B, K, *S].
    """
    with torch.autocast(logits.device.type, enabled=False):
        return logits.float() + torch.logit(_checked(logits, prior), eps)


def prior_sigmoid(logits: Tensor, prior: Tensor, eps: float = EPS) -> Tensor:
    """Probabilities of binary classifiers with priors; see `prior_logits`."""
    return torch.sigmoid(prior_logits(logits, prior, eps))


def prior_softmax(logits: Tensor, prior: Tensor, eps: float = EPS) -> Tensor:
    """Probabilities of exclusive classes with priors.

    Args:
        logits: [B, C, *S].
        prior: [B, C, *S] in 0..1; the same for all classes changes nothing.
        eps: How far from 0 and 1 priors are kept.

    Returns:
        fp32 [B, C, *S].
    """
    with torch.autocast(logits.device.type, enabled=False):
        return torch.softmax(logits.float() + _checked(logits, prior).clamp(eps, 1 - eps).log(), dim=1)


def with_background(prior: Tensor, floor: float, known: Tensor | None = None) -> Tensor:
    """Priors of K organs -> of background and organs: what the organs leave, but at least `floor`.

    An organ that is nowhere is as probable as the background, so that its logit alone decides; where no organ is
    anywhere the activation is plain.

    Args:
        prior: [B, K, *S].
        floor: Least prior of the background.
        known: [B, K] bool, organs with a position; default: all.

    Returns:
        [B, K + 1, *S], channel 0 the background.
    """
    if known is None:
        known = torch.ones(prior.shape[:2], dtype=torch.bool, device=prior.device)
    there = known.view(*known.shape, *(1,) * (prior.ndim - 2))
    background = (1 - (prior * there).sum(dim=1, keepdim=True)).clamp(min=floor)
    return torch.cat([background, torch.where(there, prior, background)], dim=1)


def _checked(logits: Tensor, prior: Tensor) -> Tensor:
    if logits.shape != prior.shape:
        msg = f"`prior` must have the shape of `logits`, got {tuple(prior.shape)} and {tuple(logits.shape)}"
        raise ValueError(msg)
    return prior.float()
