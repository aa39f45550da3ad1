"""The judges: each learns from its own half of the annotations, and from nothing else."""

import lightning as L
import numpy as np
import pytest
import torch
from shown import shown
from torch import nn
from torch.utils.data import DataLoader

from organseg.curriculum.cross_fitted import CrossFittedConfidence, Judges, halves, seen
from organseg.errors import UsageError
from organseg.methods import PartialLabelModule
from organseg.networks import UNet

ORGANS = ["liver", "spleen"]


def small(in_channels: int, out_channels: int) -> nn.Module:
    return UNet(in_channels, out_channels, width=4, depth=2, norm="instance")


def fresh() -> PartialLabelModule:
    return PartialLabelModule(ORGANS, small)


def known(*rows: str) -> dict[str, np.ndarray]:
    return {f"set/{i}": np.array([letter == "+" for letter in row]) for i, row in enumerate(rows)}


def test_halves_share_each_organ_s_cases():
    annotated = known("++", "-+", "++", "+-", "++")
    first = halves(dict(reversed(annotated.items())))  # the order of the mapping does not matter
    assert [first[key].tolist() for key in sorted(first)] == [
        [True, True], [False, False], [False, True], [True, False], [False, False],
    ]  # fmt: skip
    for k in range(2):
        mine = sum(first[key][k] for key in first)
        theirs = sum((annotated[key] & ~first[key])[k] for key in first)
        assert 0 <= mine - theirs <= 1
    assert not any((first[key] & ~annotated[key]).any() for key in first)


def test_a_judge_does_not_see_the_other_s_labels():
    label = torch.tensor([[[0, 1, 2, 255]], [[0, 1, 2, 255]]], dtype=torch.uint8)
    visible = seen(label, torch.tensor([[True, False], [False, True]]))
    assert visible.tolist() == [[[0, 1, 0, 255]], [[0, 0, 2, 255]]]
    assert visible.dtype == label.dtype


def batch(label: torch.Tensor, cases: list[str], annotated: torch.Tensor) -> dict:
    torch.manual_seed(3)
    image = torch.randn(len(cases), 1, 8, 8)
    return {"image": image, "label": label, "annotated": annotated, "case": cases}


def trained(label: torch.Tensor) -> Judges:
    torch.manual_seed(0)
    annotated = known("+-", "+-")  # case 0 is of the first half, case 1 of the second
    judges = CrossFittedConfidence(steps=3).learner(None, fresh, annotated)
    one = batch(label, list(annotated), torch.tensor([[True, False]] * 2))
    trainer = L.Trainer(max_steps=3, accelerator="cpu", logger=False, enable_checkpointing=False,
                        enable_progress_bar=False, enable_model_summary=False)  # fmt: skip
    trainer.fit(judges, DataLoader([one] * 3, batch_size=None))
    return judges


def changed(one: nn.Module, other: nn.Module) -> bool:
    return any(not torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


def test_each_judge_learns_from_its_own_half_alone():
    label = torch.zeros(2, 8, 8, dtype=torch.uint8)
    label[:, 2:5, 2:5] = 1
    plain = trained(label)
    other = label.clone()
    other[1, :4] = 1  # an annotation of the second half
    found = trained(other)
    assert not changed(plain.first, found.first)
    assert changed(plain.second, found.second)


def test_both_judges_start_from_weights_of_their_own_and_both_move():
    torch.manual_seed(0)
    judges = CrossFittedConfidence(steps=1).learner(None, fresh, known("++", "++"))
    assert changed(judges.first, judges.second)
    label = torch.ones(2, 8, 8, dtype=torch.uint8)
    after = trained(label)
    torch.manual_seed(0)
    before = CrossFittedConfidence(steps=1).learner(None, fresh, known("+-", "+-"))
    assert changed(before.first, after.first) and changed(before.second, after.second)


def test_the_score_is_the_mean_of_three():
    torch.manual_seed(0)
    method, score = fresh(), CrossFittedConfidence()
    judges = score.learner(method, fresh, known("++", "++"))
    for module in (method, judges.first, judges.second):
        module.trainer = L.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, max_steps=1)
        nn.init.normal_(module.network.head.weight)
    image = torch.randn(2, 1, 8, 8)
    both = score.scorer(method, judges)(shown(image))
    probs = [module.probabilities(shown(image)) for module in (method, judges.first, judges.second)]
    torch.testing.assert_close(both[:, :2], probs[0])
    torch.testing.assert_close(both[:, 2:], torch.stack(probs).mean(0))
    assert not torch.allclose(both[:, :2], both[:, 2:])


def test_impossible_options_are_refused():
    with pytest.raises(UsageError, match="steps 0"):
        CrossFittedConfidence(steps=0)
