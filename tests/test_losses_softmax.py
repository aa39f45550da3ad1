"""The softmax's marginal loss and deep supervision, by hand; exp(log 2) = 2 makes probabilities of quarters."""

from math import log

import pytest
import torch
import torch.nn.functional as F

from organseg.batch import IGNORE
from organseg.losses import coarser, deep_supervision, marginal_loss

L2 = log(2)


def one_voxel(label: int, annotated, dice=0.0, logits=(L2, 0.0, 0.0)):
    """Probabilities 1/2 (background), 1/4, 1/4."""
    scores = torch.tensor(logits)[None, :, None].requires_grad_()
    loss = marginal_loss(scores, torch.tensor([[label]], dtype=torch.uint8), torch.tensor([annotated]), dice=dice)
    loss.backward()
    return loss.item(), scores.grad[0, :, 0]


@pytest.mark.parametrize(
    ("label", "annotated", "probability"),
    [
        (0, [True, True], 1 / 2),
        (1, [True, True], 1 / 4),
        (0, [True, False], 3 / 4),  # background, or the organ that nobody annotated
        (0, [False, False], 1),
        (1, [True, False], 1 / 4),
        (2, [True, False], 1 / 4),  # a pseudo-label
    ],
)
def test_cross_entropy_of_what_a_voxel_may_be(label, annotated, probability):
    loss, _ = one_voxel(label, annotated)
    assert loss == pytest.approx(-torch.tensor(probability).log().item(), abs=1e-6)


def test_unannotated_organ_and_background_are_pushed_alike():
    # d loss / d logit = p - p / (sum of the possible) for what is possible, p for the rest.
    _, gradient = one_voxel(0, [True, False])
    assert gradient.tolist() == pytest.approx([1 / 2 - 2 / 3, 1 / 4, 1 / 4 - 1 / 3])
    _, gradient = one_voxel(0, [False, False])
    assert gradient.tolist() == pytest.approx([0, 0, 0], abs=1e-7)


@pytest.mark.parametrize("dice", [0.0, 1.0])
def test_ignored_voxels_count_for_nothing(dice):
    loss, gradient = one_voxel(255, [True, True], dice)
    assert loss == 0 and not gradient.any() and torch.isfinite(gradient).all()
    logits = torch.randn(1, 3, 4, requires_grad=True)
    label = torch.tensor([[1, 0, 255, 2]], dtype=torch.uint8)
    whole = marginal_loss(logits, label, torch.tensor([[True, False]]), dice=dice)
    kept = marginal_loss(logits[..., [0, 1, 3]], label[:, [0, 1, 3]], torch.tensor([[True, False]]), dice=dice)
    assert whole.item() == pytest.approx(kept.item())


@pytest.mark.parametrize("dice", [0.0, 1.0])
def test_a_case_that_annotates_nothing_changes_nothing(dice):
    torch.manual_seed(0)
    logits, label = torch.randn(3, 3, 7), torch.randint(0, 3, (3, 7)).byte()
    annotated = torch.tensor([[True, True], [True, False], [False, False]])
    label[2] = 0
    without = marginal_loss(logits[:2], label[:2], annotated[:2], dice=dice)
    assert marginal_loss(logits, label, annotated, dice=dice).item() == pytest.approx(without.item(), rel=1e-6)
    label[2, 0] = 1  # a pseudo-label: there something is known
    assert abs(marginal_loss(logits, label, annotated, dice=dice) - without) > 1e-3


def test_all_annotated_is_cross_entropy():
    logits, label = torch.randn(2, 4, 5, 6), torch.randint(0, 4, (2, 5, 6))
    found = marginal_loss(logits, label.byte(), torch.ones(2, 3, dtype=torch.bool), dice=0)
    assert found.item() == pytest.approx(F.cross_entropy(logits, label).item(), rel=1e-5)


def test_dice_of_known_truth_alone():
    # Organ 1 known: positives 1, overlap 1/4, squares 1/16: 1 - (1/2 + 1) / (1 + 1/16 + 1) = 1 - 24/33.
    loss, _ = one_voxel(1, [True, False], dice=1.0)
    assert loss - one_voxel(1, [True, False])[0] == pytest.approx(1 - 24 / 33)
    loss, _ = one_voxel(0, [True, False], dice=1.0)  # no organ has a known positive
    assert loss == pytest.approx(one_voxel(0, [True, False])[0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_logits_are_judged_in_fp32(dtype):
    logits = 30 * torch.randn(1, 3, 8).to(dtype)
    label, annotated = torch.randint(0, 3, (1, 8)).byte(), torch.tensor([[True, False]])
    with torch.autocast("cpu", torch.bfloat16):
        found = marginal_loss(logits, label, annotated)
    assert found.dtype == torch.float32
    assert found.item() == pytest.approx(marginal_loss(logits.float(), label, annotated).item())


def test_sums_cross_ranks():
    logits, label = torch.randn(4, 3, 6), torch.randint(0, 3, (4, 6)).byte()
    annotated = torch.tensor([[True, True], [True, False], [False, False], [False, True]])
    seen = []
    whole = marginal_loss(logits, label, annotated, all_sum=lambda sums: seen.append(sums) or sums)
    marginal_loss(logits[:2], label[:2], annotated[:2], all_sum=lambda sums: seen.append(sums) or sums)
    other = seen[1]
    shared = marginal_loss(logits[2:], label[2:], annotated[2:], all_sum=lambda sums: sums + other)
    assert shared.item() == pytest.approx(whole.item(), rel=1e-5)


def test_shapes_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match=r"\[B, K \+ 1, \*S\]"):
        marginal_loss(torch.zeros(1, 2, 4), torch.zeros(1, 4, dtype=torch.uint8), torch.tensor([[True, True]]))


def batch_of(label, index_to_mm=None):
    return {
        "label": label,
        "index_to_mm": torch.eye(4).repeat(len(label), 1, 1) if index_to_mm is None else index_to_mm,
    }


def test_deep_supervision_weighs_coarser_levels_half():
    label = torch.zeros(1, 4, 4, dtype=torch.uint8)
    outputs = [torch.zeros(1, 1, n, n) for n in (4, 2, 1)]
    sizes = []

    def loss(logits, batch):
        sizes.append(tuple(batch["label"].shape))
        return torch.tensor(float(logits.shape[-1]))

    found = deep_supervision(loss)(outputs, batch_of(label))
    assert sizes == [(1, 4, 4), (1, 2, 2), (1, 1, 1)]
    assert found.item() == pytest.approx((4 + 2 / 2 + 1 / 4) / (1 + 1 / 2 + 1 / 4))
    assert deep_supervision(loss)(outputs[0], batch_of(label)).item() == 4


@pytest.mark.parametrize("dims", [2, 3])
def test_deep_supervision_ignores_what_lies_beyond_the_image(dims):
    size, padded = (5, 3, 6)[:dims], (8, 4, 8)[:dims]
    label = torch.ones(1, *size, dtype=torch.uint8)
    outputs = [torch.randn(1, 2, *(n // stride for n in padded)).requires_grad_() for stride in (1, 2, 4)]
    seen = []

    def loss(logits, batch):
        seen.append((batch["label"], batch["index_to_mm"]))
        return marginal_loss(logits, batch["label"], torch.tensor([[True]]))

    deep_supervision(loss)(outputs, batch_of(label)).backward()
    for (coarse, index_to_mm), logits, stride in zip(seen, outputs, (1, 2, 4), strict=True):
        # A coarse voxel is known where its middle, rounded up, lies in the image: 5 pixels of 8 are 5, 2 and 1 voxels.
        known = [len(range(stride // 2, n, stride)) for n in size]
        expected = torch.full_like(coarse, IGNORE)
        expected[(slice(None), *map(slice, known))] = 1
        assert torch.equal(coarse, expected)
        assert torch.equal(logits.grad[0].abs().sum(0) != 0, coarse[0] == 1)
        assert index_to_mm[0].diagonal()[3 - dims : 3].tolist() == [stride] * dims
        assert index_to_mm[0, 3 - dims : 3, 3].tolist() == [(stride - 1) / 2] * dims


def test_a_coarser_batch_has_the_nearest_labels_and_the_same_places():
    label = torch.arange(8 * 6, dtype=torch.uint8).view(1, 8, 6)
    small = coarser(batch_of(label), (4, 2))
    assert small["label"][0].tolist() == [[7, 10], [19, 22], [31, 34], [43, 46]]
    # The middle of pixel (0, 0) of the coarse grid lies between the fine pixels 0 and 1 (rows), and on 1 (columns).
    place = small["index_to_mm"][0] @ torch.tensor([0.0, 0, 0, 1])
    assert place.tolist() == [0, 0.5, 1, 1]
    place = small["index_to_mm"][0] @ torch.tensor([0.0, 3, 1, 1])
    assert place.tolist() == [0, 6.5, 4, 1]
    volume = coarser(batch_of(torch.zeros(1, 4, 4, 4, dtype=torch.uint8)), (2, 4, 1))
    assert volume["label"].shape == (1, 2, 4, 1)
    assert (volume["index_to_mm"][0] @ torch.tensor([1.0, 2, 0, 1])).tolist() == [2.5, 2, 1.5, 1]
