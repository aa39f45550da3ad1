"""The loss of partially labelled training (METHOD.md 1.1 to 1.3; thesis, equations 3.1 and 3.2).

K binary classifiers, each judged only where its truth is known. Pure functions of tensors; how sums cross ranks is the
caller's (`all_sum`). Legend: B cases, K organs, *S spatial axes.
"""

from collections.abc import Callable, Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from organseg.batch import IGNORE, Batch

Balance = Literal["none", "organ"]


def one_hot(label: Tensor, organs: int) -> Tensor:
    """Binary targets of K organs.

    Args:
        label: [B, *S] integers, channel k is label k + 1.
        organs: K.

    Returns:
        bool [B, K, *S].
    """
    values = torch.arange(1, organs + 1, device=label.device, dtype=torch.int16)
    return label.unsqueeze(1) == values.view(1, -1, *(1,) * (label.ndim - 1))


def ambiguity_map(label: Tensor, annotated: Tensor) -> Tensor:
    """Where the truth of each organ is known (METHOD.md 1.2).

    An annotated organ is known everywhere. Any other is known where the label names an organ: another one makes it a
    certain negative, a pseudo-label of its own a positive. Ignore voxels (255) are known for nobody.

    Args:
        label: [B, *S] integers in 0..K or 255.
        annotated: [B, K] bool.

    Returns:
        bool [B, K, *S], True where the truth of organ k is known.

    Raises:
        ValueError: If the shapes do not fit.
    """
    if annotated.ndim != 2 or annotated.shape[0] != label.shape[0]:
        msg = f"`annotated` must be [B, K] with B = {label.shape[0]}, got {tuple(annotated.shape)}"
        raise ValueError(msg)
    anywhere = annotated.view(*annotated.shape, *(1,) * (label.ndim - 1))
    named = (label > 0).unsqueeze(1)
    return (anywhere | named) & (label != IGNORE).unsqueeze(1)


def _identity(sums: Tensor) -> Tensor:
    return sums


def partial_label_loss(
    logits: Tensor,
    label: Tensor,
    annotated: Tensor,
    *,
    naive: bool = False,
    balance: Balance = "organ",
    dice: float = 1.0,
    all_sum: Callable[[Tensor], Tensor] = _identity,
) -> Tensor:
    """Binary cross-entropy over known voxels, plus `dice` times a soft Dice over organs with a known positive.

    Args:
        logits: [B, K, *S]; computed in fp32 whatever their type.
        label: [B, *S] integers, 0..K or 255 (ignore).
        annotated: [B, K] bool.
        naive: The baseline of METHOD.md 1.3: everything unlabelled counts as background.
        balance: `none` divides the sum by the number of known entries (thesis); `organ` averages each organ's mean.
        dice: Weight of the Dice term; 0 leaves it out (thesis).
        all_sum: Sums a tensor over ranks, the other ranks' part detached. The caller then multiplies the loss by the
            world size, because DDP averages gradients.

    Returns:
        Scalar; 0 with zero gradients where nothing is known.

    Raises:
        ValueError: If shapes do not fit.
    """
    if logits.ndim != label.ndim + 1 or logits.shape[:1] + logits.shape[2:] != label.shape:
        msg = f"`logits` must be [B, K, *S] and `label` [B, *S], got {tuple(logits.shape)} and {tuple(label.shape)}"
        raise ValueError(msg)
    organs = logits.shape[1]
    with torch.autocast(logits.device.type, enabled=False):
        logits = logits.float()
        target = one_hot(label, organs).float()
        known = ambiguity_map(label, annotated | naive).float()
        entropy = F.binary_cross_entropy_with_logits(logits, target, reduction="none")
        axes = (0, *range(2, logits.ndim))
        rows = [(known * entropy).sum(axes), known.sum(axes)]
        if dice:
            probs = torch.sigmoid(logits) * known
            positives = target * known
            rows += [positives.sum(axes), (positives * probs).sum(axes), (probs * probs).sum(axes)]
        sums = all_sum(torch.stack(rows))
        loss = _balanced(sums[0], sums[1], balance)
        if dice:
            loss = loss + dice * _soft_dice(sums[2], sums[3], sums[4])
    return loss


def confidence_loss(
    confidence: Tensor,
    probs: Tensor,
    label: Tensor,
    annotated: Tensor,
    *,
    positives: bool = False,
    all_sum: Callable[[Tensor], Tensor] = _identity,
) -> Tensor:
    """Mean squared error of confidences against the true class probability (METHOD.md 1.6; thesis, equation 3.3).

    Args:
        confidence: [B, K, *S] in 0..1.
        probs: [B, K, *S], of the untouched segmentation network.
        label: [B, *S] integers, 0..K or 255 (ignore): annotations, without pseudo-labels.
        annotated: [B, K] bool.
        positives: Judge the organs that the network predicts and nothing else: entries with a probability of at least
            0.5, each organ's mean first and then the mean of the organs that have any.
        all_sum: See `partial_label_loss`.

    Returns:
        Scalar, over known entries; 0 with zero gradients where nothing is known.
    """
    with torch.autocast(confidence.device.type, enabled=False):
        known = ambiguity_map(label, annotated)
        if positives:
            known = known & (probs >= 0.5)
        target = true_class_probability(probs, label)
        axes = (0, *range(2, probs.ndim))
        error = (known * (confidence.float() - target).square()).sum(axes)
        total, count = all_sum(torch.stack([error, known.float().sum(axes)]))
    return _balanced(total, count, "organ" if positives else "none")


def marginal_loss(
    logits: Tensor,
    label: Tensor,
    annotated: Tensor,
    *,
    dice: float = 1.0,
    all_sum: Callable[[Tensor], Tensor] = _identity,
) -> Tensor:
    """Cross-entropy of a softmax with a background, plus `dice` times a soft Dice, for partial labels.

    Where a case does not annotate every organ, a voxel without a label may be background or any organ that the case
    leaves out: their probabilities count together (the marginal of Shi et al., Marginal loss and exclusion loss for
    partially supervised multi-organ segmentation, MedIA 2021). The mean is over the voxels of which something is known:
    where every channel is possible there is nothing to learn. With every organ annotated it is the plain loss. The Dice
    of each organ is taken where its truth is known, as in `partial_label_loss`.

    Args:
        logits: [B, K + 1, *S], channel 0 the background; computed in fp32 whatever their type.
        label: [B, *S] integers, 0..K or 255 (ignore).
        annotated: [B, K] bool.
        dice: Weight of the Dice term; 0 leaves it out.
        all_sum: See `partial_label_loss`.

    Returns:
        Scalar; 0 with zero gradients where nothing is known.

    Raises:
        ValueError: If shapes do not fit.
    """
    if logits.shape[1] != annotated.shape[1] + 1 or logits.shape[:1] + logits.shape[2:] != label.shape:
        msg = (
            "`logits` must be [B, K + 1, *S], `label` [B, *S] and `annotated` [B, K], got "
            f"{tuple(logits.shape)}, {tuple(label.shape)} and {tuple(annotated.shape)}"
        )
        raise ValueError(msg)
    with torch.autocast(logits.device.type, enabled=False):
        logits = logits.float()
        organs = one_hot(label, annotated.shape[1])
        ambiguous = (label == 0).unsqueeze(1) & ~annotated.view(*annotated.shape, *(1,) * (label.ndim - 1))
        possible = torch.cat([(label == 0).unsqueeze(1), organs | ambiguous], dim=1)
        # Where the label is ignored nothing is possible, and log 0 must not meet the gradient.
        possible = possible | (label == IGNORE).unsqueeze(1)
        known = ~possible.all(1)
        entropy = logits.logsumexp(1) - logits.masked_fill(~possible, -torch.inf).logsumexp(1)
        sums = [(entropy * known).sum(), known.sum().float()]
        weight = ambiguity_map(label, annotated).float()
        axes = (0, *range(2, logits.ndim))
        probs = logits.softmax(1)[:, 1:] * weight
        positives = organs * weight
        rows = [positives.sum(axes), (positives * probs).sum(axes), (probs * probs).sum(axes)]
        total = all_sum(torch.cat([torch.stack(sums), *rows]))
        loss = total[0] / total[1].clamp(min=1)
        if dice:
            loss = loss + dice * _soft_dice(*total[2:].view(3, -1))
    return loss


def deep_supervision(loss: Callable[[Tensor, Batch], Tensor]) -> Callable[[Tensor | list[Tensor], Batch], Tensor]:
    """A loss of logits at several resolutions, from a loss of logits at one (Isensee et al., 2021).

    Each coarser output has half the weight of the one before, and labels of the nearest voxels; the weights sum to 1.
    Logits of a padded image are larger than the labels: what lies beyond the image is ignored.

    Args:
        loss: Of logits [B, C, *S] and a batch with labels [B, *S].

    Returns:
        The same for a list of logits, finest first; a single tensor is given on as it is.
    """

    def supervised(outputs: Tensor | list[Tensor], batch: Batch) -> Tensor:
        if isinstance(outputs, Tensor):
            return loss(outputs, batch)
        batch = _padded(batch, outputs[0].shape[2:])
        weights = [0.5**level for level in range(len(outputs))]
        terms = [
            weight * loss(logits, coarser(batch, logits.shape[2:]))
            for weight, logits in zip(weights, outputs, strict=True)
        ]
        return torch.stack(terms).sum() / sum(weights)

    return supervised


def _padded(batch: Batch, size: Sequence[int]) -> Batch:
    """The batch with labels [B, *size], `IGNORE` after the last index of each axis."""
    label = batch["label"]
    missing = [want - have for have, want in zip(label.shape[1:], size, strict=True)]
    return {**batch, "label": F.pad(label, [side for n in reversed(missing) for side in (0, n)], value=IGNORE)}


def coarser(batch: Batch, size: Sequence[int]) -> Batch:
    """The batch at a lower resolution, without its image: labels of the nearest voxels, positions in mm to match."""
    label, index_to_mm = batch["label"], batch["index_to_mm"].clone()
    for axis, (have, want) in enumerate(zip(label.shape[-len(size) :], size, strict=True), start=1):
        ratio = have / want
        index = ((torch.arange(want, device=label.device) + 0.5) * ratio).long()
        label = label.index_select(axis, index)
        column = 3 - len(size) + axis - 1  # z, y, x are the columns; slices have no z axis
        index_to_mm[:, :, 3] += index_to_mm[:, :, column] * (0.5 * ratio - 0.5)
        index_to_mm[:, :, column] *= ratio
    return {**batch, "label": label, "index_to_mm": index_to_mm}


def true_class_probability(probs: Tensor, label: Tensor) -> Tensor:
    """The probability p where the organ is, 1 - p where it is not: [B, K, *S], [B, *S] -> [B, K, *S]."""
    probs = probs.float()
    return torch.where(one_hot(label, probs.shape[1]), probs, 1 - probs)


def _balanced(entropy: Tensor, known: Tensor, balance: Balance) -> Tensor:
    """Mean over known entries, or mean over organs of each organ's mean; [K], [K] -> scalar."""
    if balance == "none":
        return entropy.sum() / known.sum().clamp(min=1)
    return (entropy / known.clamp(min=1)).sum() / (known > 0).sum().clamp(min=1)


def _soft_dice(positives: Tensor, overlap: Tensor, squares: Tensor) -> Tensor:
    """1 - Dice, averaged over the organs that have a known positive; all [K] -> scalar."""
    present = positives > 0
    score = 1 - (2 * overlap + 1) / (positives + squares + 1)
    return (score * present).sum() / present.sum().clamp(min=1)
