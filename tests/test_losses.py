"""METHOD.md 1.1 to 1.4; sigmoid(log 3) = 3/4, sigmoid(-log 3) = 1/4 and sigmoid(0) = 1/2 are exact by hand."""

import subprocess
import sys
from math import log

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from organseg.data.partial import hide_labels
from organseg.losses import ambiguity_map, confidence_loss, one_hot, partial_label_loss, true_class_probability

L3 = log(3)
SURE, HALF = log(4 / 3), log(2)
"""Cross-entropy at a probability of 3/4, and of 1/2, for what is true."""


def tensors(logits, label, annotated):
    """One case: lists [K][N], [N] and [K] -> batch of one with N voxels in a row."""
    return (
        torch.tensor(logits, dtype=torch.float32)[None].requires_grad_(),
        torch.tensor(label, dtype=torch.uint8)[None],
        torch.tensor(annotated)[None],
    )


# Probabilities 3/4 1/2 1/4 1/2 for organ 1, whose truth is 1 1 0 0;
# 1/2 1/2 3/4 1/4 for organ 2, whose truth is 0 0 1 0.
FULL = ([[L3, 0, -L3, 0], [0, 0, L3, -L3]], [1, 1, 2, 0], [True, True])


@pytest.mark.parametrize("balance", ["none", "organ"])
def test_all_annotated_is_the_plain_mean_of_cross_entropies(balance):
    logits, label, annotated = tensors(*FULL)
    loss = partial_label_loss(logits, label, annotated, balance=balance, dice=0)
    # Each organ: two voxels at 3/4 and two at 1/2.
    assert loss.item() == pytest.approx((2 * SURE + 2 * HALF) / 4)
    plain = F.binary_cross_entropy(torch.sigmoid(logits), one_hot(label, 2).float())
    assert loss.item() == pytest.approx(plain.item())


def test_all_annotated_dice():
    loss = partial_label_loss(*tensors(*FULL), dice=1.0) - partial_label_loss(*tensors(*FULL), dice=0)
    # Organ 1: positives 2, overlap 3/4 + 1/2 = 5/4, squares 9/16 + 1/4 + 1/16 + 1/4 = 9/8:
    #          1 - (5/2 + 1) / (2 + 9/8 + 1) = 1 - 28/33 = 5/33
    # Organ 2: positives 1, overlap 3/4, squares 1/4 + 1/4 + 9/16 + 1/16 = 9/8: 1 - (3/2 + 1) / (1 + 9/8 + 1) = 1/5
    assert loss.item() == pytest.approx((5 / 33 + 1 / 5) / 2)


def test_dice_weight_is_a_factor():
    at = [partial_label_loss(*tensors(*FULL), dice=dice).item() for dice in (0, 1, 2.5)]
    assert at[2] - at[0] == pytest.approx(2.5 * (at[1] - at[0]))
    assert at[1] > at[0]


# Organ 2 is not annotated, the last voxel is ignored.
# Known: organ 1 in voxels 0 1 2, organ 2 in 0 and 1, where organ 1 is.
PARTIAL = ([[L3, 0, -L3, 99], [0, -L3, 5, -7]], [1, 1, 0, 255], [True, False])


def test_voxels_of_others_are_negatives_and_ignored_ones_nothing():
    _, label, annotated = tensors(*PARTIAL)
    assert ambiguity_map(label, annotated)[0].tolist() == [[True, True, True, False], [True, True, False, False]]


def test_balance_none_divides_by_known_entries():
    loss = partial_label_loss(*tensors(*PARTIAL), balance="none", dice=0)
    # Organ 1: SURE HALF SURE; organ 2: HALF SURE; five known entries.
    assert loss.item() == pytest.approx((3 * SURE + 2 * HALF) / 5)


def test_balance_organ_averages_the_organs_means():
    loss = partial_label_loss(*tensors(*PARTIAL), balance="organ", dice=0)
    assert loss.item() == pytest.approx(((2 * SURE + HALF) / 3 + (HALF + SURE) / 2) / 2)


def test_balance_organ_leaves_out_an_organ_that_is_known_nowhere():
    loss = partial_label_loss(*tensors([[L3, 0], [5, 5]], [0, 0], [True, False]), balance="organ", dice=0)
    # Organ 1, all negative: -log(1/4) and -log(1/2). Organ 2 has no known voxel.
    assert loss.item() == pytest.approx((log(4) + HALF) / 2)


def test_dice_only_over_organs_with_a_known_positive():
    loss = partial_label_loss(*tensors(*PARTIAL), dice=1) - partial_label_loss(*tensors(*PARTIAL), dice=0)
    # Organ 1: positives 2, overlap 5/4, squares 9/16 + 1/4 + 1/16 = 7/8: 1 - 3.5 / 3.875.
    # Organ 2: known, never positive.
    assert loss.item() == pytest.approx(1 - 3.5 / 3.875)


def test_an_annotated_organ_that_is_absent_has_no_dice():
    arguments = [[L3, 0]], [0, 0], [True]
    assert partial_label_loss(*tensors(*arguments), dice=1) == partial_label_loss(*tensors(*arguments), dice=0)


# Organ 2 is not annotated but has a pseudo-label in voxel 0.
PSEUDO = ([[0, -L3], [L3, 9]], [2, 0], [True, False])


def test_a_pseudo_label_is_a_positive_of_its_own_organ_and_a_negative_of_others():
    loss = partial_label_loss(*tensors(*PSEUDO), balance="organ", dice=0)
    assert loss.item() == pytest.approx(((HALF + SURE) / 2 + SURE) / 2)
    dice = partial_label_loss(*tensors(*PSEUDO), dice=1) - loss
    # Organ 2, voxel 0 alone: positives 1, overlap 3/4, squares 9/16.
    assert dice.item() == pytest.approx(1 - 2.5 / 2.5625, abs=1e-6)


def test_naive_knows_everything_but_ignored_voxels():
    loss = partial_label_loss(*tensors(*PARTIAL), naive=True, balance="none", dice=0)
    # Organ 2 has a third entry: logit 5 in the background, log(1 + e^5).
    assert loss.item() == pytest.approx((3 * SURE + 2 * HALF + np.log1p(np.exp(5))) / 6)


@pytest.mark.parametrize("balance", ["none", "organ"])
@pytest.mark.parametrize(("value", "annotated"), [(0, False), (255, True), (255, False)])
def test_nothing_known_is_exactly_zero_with_zero_gradients(balance, value, annotated):
    logits, label, known = tensors([[3.0, -80, 0], [1e4, -1e4, 2]], [value] * 3, [annotated] * 2)
    loss = partial_label_loss(logits, label, known, balance=balance)
    loss.backward()
    assert loss.item() == 0
    assert logits.grad.tolist() == [[[0] * 3] * 2]


@st.composite
def batches(draw):
    cases, organs = draw(st.integers(1, 3)), draw(st.integers(1, 4))
    shape = tuple(draw(st.lists(st.integers(1, 4), min_size=1, max_size=3)))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    label = rng.choice([*range(organs + 1), 255], (cases, *shape)).astype(np.uint8)
    label[rng.random(label.shape) < draw(st.sampled_from([0, 0.5, 1]))] = 0
    annotated = rng.random((cases, organs)) < draw(st.sampled_from([0, 0.5, 1]))
    logits = rng.normal(0, 3, (cases, organs, *shape)).astype(np.float32)
    return torch.from_numpy(logits).requires_grad_(), torch.from_numpy(label), torch.from_numpy(annotated)


def known_by_loops(label, annotated):
    cases, organs = annotated.shape
    known = np.zeros((cases, organs, *label.shape[1:]), bool)
    for b, k, *at in np.ndindex(*known.shape):
        value = int(label[(b, *at)])
        known[(b, k, *at)] = value != 255 and (bool(annotated[b, k]) or value > 0)
    return known


@given(batches(), st.booleans(), st.sampled_from(["none", "organ"]), st.sampled_from([0.0, 1.0]))
@settings(max_examples=120, deadline=None)
def test_gradients_are_exactly_zero_where_the_truth_is_unknown_and_only_there(batch, naive, balance, dice):
    logits, label, annotated = batch
    loss = partial_label_loss(logits, label, annotated, naive=naive, balance=balance, dice=dice)
    loss.backward()
    known = known_by_loops(label, annotated | naive)
    assert torch.isfinite(loss)
    assert loss >= 0
    assert not logits.grad.numpy()[~known].any()
    if not dice:  # the two terms may cancel
        assert logits.grad.numpy()[known].all()


@given(batches())
@settings(max_examples=60, deadline=None)
def test_ambiguity_map_is_what_it_says_voxel_by_voxel(batch):
    _, label, annotated = batch
    assert (ambiguity_map(label, annotated).numpy() == known_by_loops(label, annotated)).all()


@given(batches())
@settings(max_examples=40, deadline=None)
def test_the_loss_does_not_know_the_shape_of_space(batch):
    logits, label, annotated = batch
    flat = partial_label_loss(logits.flatten(2), label.flatten(1), annotated)
    assert partial_label_loss(logits, label, annotated).item() == pytest.approx(flat.item(), rel=1e-5, abs=1e-7)


def test_shapes_that_do_not_fit_are_refused():
    logits, label, annotated = tensors(*FULL)
    with pytest.raises(ValueError, match="logits"):
        partial_label_loss(logits[..., :3], label, annotated)
    with pytest.raises(ValueError, match="logits"):
        partial_label_loss(logits[0], label, annotated)
    with pytest.raises(ValueError, match="annotated"):
        partial_label_loss(logits, label, annotated[0])
    with pytest.raises(ValueError, match="annotated"):
        ambiguity_map(label, annotated.expand(2, 2))


def test_autocast_computes_in_fp32():
    logits = torch.linspace(-4, 4, 2 * 3 * 40).view(2, 3, 40).bfloat16()
    label = torch.arange(80).view(2, 40) % 4
    annotated = torch.tensor([[True, False, True], [False, True, True]])
    with torch.autocast("cpu", torch.bfloat16):
        loss = partial_label_loss(logits, label, annotated)
    assert loss.dtype == torch.float32
    assert torch.equal(loss, partial_label_loss(logits.float(), label, annotated))


RANK = """
import sys
from datetime import timedelta
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from organseg.losses import partial_label_loss

rank, rendezvous, out = int(sys.argv[1]), sys.argv[2], sys.argv[3]
torch.set_num_threads(1)
batch = torch.load(f"{rendezvous}.batch", weights_only=True)
dist.init_process_group("gloo", f"file://{rendezvous}", timedelta(seconds=300), world_size=2, rank=rank)

def all_sum(sums):  # as in methods/base.py
    total = sums.detach().clone()
    dist.all_reduce(total)
    return sums + (total - sums.detach())

layer = torch.nn.Conv2d(2, 3, 3, padding=1)
layer.load_state_dict(batch["weights"])
model = DistributedDataParallel(layer)
mine = slice(0, 2) if rank == 0 else slice(2, 4)
found = {}
for balance in ("none", "organ"):
    layer.zero_grad()
    loss = partial_label_loss(
        model(batch["image"][mine]), batch["label"][mine], batch["annotated"][mine], balance=balance, all_sum=all_sum
    )
    (loss * 2).backward()
    found[balance] = [loss.detach(), layer.weight.grad.clone(), layer.bias.grad.clone()]
torch.save(found, f"{out}.{rank}")
dist.destroy_process_group()
"""


def test_two_ranks_are_one_process_on_the_whole_batch(tmp_path):
    torch.manual_seed(0)
    layer = torch.nn.Conv2d(2, 3, 3, padding=1)
    image = torch.randn(4, 2, 9, 8)
    label = torch.randint(0, 4, (4, 9, 8), dtype=torch.uint8)
    # Rank 0 knows almost everything, rank 1 almost nothing: a mean of the ranks' means would be far off.
    annotated = torch.tensor([[1, 1, 1], [1, 1, 0], [0, 0, 0], [0, 1, 0]], dtype=torch.bool)
    label[2] = 0
    label[3][label[3] != 2] = 0
    torch.save(
        {"image": image, "label": label, "annotated": annotated, "weights": layer.state_dict()}, tmp_path / "meet.batch"
    )
    ranks = [
        subprocess.Popen([sys.executable, "-c", RANK, str(rank), tmp_path / "meet", tmp_path / "out"])
        for rank in range(2)
    ]
    assert [rank.wait(300) for rank in ranks] == [0, 0]
    for balance in ("none", "organ"):
        layer.zero_grad()
        loss = partial_label_loss(layer(image), label, annotated, balance=balance)
        loss.backward()
        for rank in range(2):
            value, weight, bias = torch.load(tmp_path / f"out.{rank}", weights_only=True)[balance]
            assert value.item() == pytest.approx(loss.item(), abs=1e-6)
            assert torch.allclose(weight, layer.weight.grad, atol=1e-6)
            assert torch.allclose(bias, layer.bias.grad, atol=1e-6)
        alone = partial_label_loss(layer(image[:2]), label[:2], annotated[:2], balance=balance)
        assert abs(alone.item() - loss.item()) > 1e-3  # the other rank's share does matter


def weights_of_loss(label, annotated, *, naive):
    """The weights that the loss itself used: at logit 0 the gradient of its sum is w (1/2 - t)."""
    logits = torch.zeros(1, annotated.shape[1], *label.shape[1:], requires_grad=True)
    known = ambiguity_map(label, annotated | naive).sum()
    partial_label_loss(logits, label, annotated, naive=naive, balance="none", dice=0).backward()
    return torch.round(2 * logits.grad.abs() * known).bool()[0]


def test_table_3_1_in_shares_of_all_voxels_case_by_case():
    organs = ["liver", "spleen", "pancreas"]
    rng = np.random.default_rng(4)
    truths = {f"c{i}": rng.choice(4, (4, 6, 7), p=[0.55, 0.25, 0.15, 0.05]).astype(np.uint8) for i in range(10)}
    kept = hide_labels(dict.fromkeys(truths, organs), 0.4, seed=3)
    measured = {naive: np.zeros((3, 3)) for naive in (True, False)}  # [as positive, true negative, false negative][k]
    closed = {naive: np.zeros((3, 3)) for naive in (True, False)}
    for case, truth in truths.items():
        annotated = np.array([organ in kept[case] for organ in organs])
        shown = truth * np.isin(truth, 1 + np.flatnonzero(annotated))
        beta = np.array([(truth == k + 1).mean() for k in range(3)])
        # Other organs' labelled voxels: known negatives of an organ that is missing here (eps in METHOD.md 1.3).
        eps = np.array([sum(beta[j] for j in range(3) if annotated[j] and j != k) for k in range(3)])
        closed[True] += [annotated * beta, 1 - beta, ~annotated * beta]
        closed[False] += [annotated * beta, annotated * (1 - beta) + ~annotated * eps, 0 * beta]
        label, known = torch.from_numpy(shown)[None], torch.from_numpy(annotated)[None]
        for naive in (True, False):
            used = weights_of_loss(label, known, naive=naive).numpy()
            assert (used == ambiguity_map(label, known | naive)[0].numpy()).all()
            positive, true = one_hot(label, 3)[0].numpy(), one_hot(torch.from_numpy(truth)[None], 3)[0].numpy()
            shares = [used & positive, used & ~positive & ~true, used & ~positive & true]
            measured[naive] += [[share[k].mean() for k in range(3)] for share in shares]
    for naive in (True, False):
        assert measured[naive] == pytest.approx(closed[naive], abs=1e-12)
    assert measured[True][2].min() > 0  # the baseline does learn from false negatives,
    assert not measured[False][2].any()  # and the ambiguity map never


def test_confidence_loss_by_hand():
    # Two organs, one annotated; two voxels: the organ itself, and one that nobody named.
    label, annotated = torch.tensor([[1, 0]]), torch.tensor([[True, False]])
    probs = torch.tensor([[[0.9, 0.2], [0.3, 0.4]]])
    confidence = torch.tensor([[[0.5, 0.5], [0.5, 0.5]]], requires_grad=True)
    assert true_class_probability(probs, label).tolist() == [[pytest.approx([0.9, 0.8]), pytest.approx([0.7, 0.6])]]
    loss = confidence_loss(confidence, probs, label, annotated)
    # Known: organ 1 at both voxels; organ 2 at the first, which is organ 1's. (0.4^2 + 0.3^2 + 0.2^2) / 3
    assert loss.item() == pytest.approx((0.16 + 0.09 + 0.04) / 3)
    loss.backward()
    assert confidence.grad[0, 1, 1] == 0 and (confidence.grad[0, 0] != 0).all()


def test_confidence_loss_over_what_the_network_predicts():
    # Both organs annotated. Organ 1 is predicted at voxels 0 (right) and 1 (wrong), organ 2 at voxel 2 (right).
    label, annotated = torch.tensor([[1, 0, 2]]), torch.tensor([[True, True]])
    probs = torch.tensor([[[0.9, 0.6, 0.3], [0.1, 0.4, 0.5]]])
    confidence = torch.full((1, 2, 3), 0.5, requires_grad=True)
    loss = confidence_loss(confidence, probs, label, annotated, positives=True)
    # Targets 0.9 and 1 - 0.6 for organ 1, 0.5 for organ 2; the mean of the organs' means.
    assert loss.item() == pytest.approx(((0.16 + 0.01) / 2 + 0) / 2)
    loss.backward()
    assert confidence.grad[0].bool().tolist() == [[True, True, False], [False, False, False]]
    unknown = confidence_loss(confidence, probs, label, torch.tensor([[False, True]]), positives=True)
    assert unknown.item() == pytest.approx((0.16 + 0) / 2)  # voxel 0 names organ 1; voxel 1 may be anything


@pytest.mark.parametrize("positives", [False, True])
def test_confidence_loss_where_nothing_is_known(positives):
    confidence = torch.full((1, 2, 3), 0.5, requires_grad=True)
    nothing = torch.zeros(1, 3), torch.zeros(1, 2, dtype=torch.bool)
    loss = confidence_loss(confidence, torch.rand(1, 2, 3), *nothing, positives=positives)
    loss.backward()
    assert loss == 0 and not confidence.grad.any()


@pytest.mark.parametrize("positives", [False, True])
def test_confidence_loss_of_two_ranks_is_that_of_one_process(positives):
    torch.manual_seed(0)
    label, annotated = (
        torch.randint(0, 3, (4, 6)),
        torch.tensor([[True, True], [True, False], [False, False], [False, True]]),
    )
    probs, confidence = torch.rand(4, 2, 6), torch.rand(4, 2, 6, requires_grad=True)
    confidence_loss(confidence, probs, label, annotated, positives=positives).backward()
    whole, confidence.grad = confidence.grad, None
    parts = (slice(0, 1), slice(1, 4))
    sums = []

    def remember(own):
        sums.append(own.detach())
        return own

    for part in parts:
        ours = confidence[part], probs[part], label[part], annotated[part]
        confidence_loss(*ours, positives=positives, all_sum=remember)
    for part, other in zip(parts, reversed(sums), strict=True):
        ours = confidence[part], probs[part], label[part], annotated[part]
        loss = confidence_loss(*ours, positives=positives, all_sum=lambda own, other=other: own + other)
        loss.backward()
    assert torch.allclose(confidence.grad, whole, atol=1e-7)
