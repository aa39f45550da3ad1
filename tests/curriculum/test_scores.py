"""The confidence network: what it trains, what it leaves alone, what it is asked to predict."""

import lightning as L
import pytest
import torch
from shown import shown
from torch import nn
from torch.utils.data import DataLoader

from organseg.curriculum.scores import ConfidenceModule, LearnedConfidence, MaximumClassProbability
from organseg.errors import UsageError
from organseg.methods import PartialLabelModule
from organseg.networks import UNet, UTransformer


def small(in_channels: int, out_channels: int) -> nn.Module:
    return UNet(in_channels, out_channels, width=4, depth=2)


def batches():
    torch.manual_seed(1)
    label = torch.randint(0, 3, (4, 8, 8), dtype=torch.uint8)
    known = torch.tensor([[True, False]]).repeat(4, 1)
    return [{"image": torch.randn(4, 1, 8, 8), "label": label, "annotated": known}] * 3


def trainer(steps: int = 3) -> L.Trainer:
    return L.Trainer(max_steps=steps, accelerator="cpu", logger=False, enable_checkpointing=False,
                     enable_progress_bar=False, enable_model_summary=False)  # fmt: skip


def trained(mode: str) -> tuple[dict, dict, ConfidenceModule]:
    torch.manual_seed(0)
    method = PartialLabelModule(["liver", "spleen"], small)
    learner = LearnedConfidence(mode, "known", hidden=(6,), steps=3, lr=0.01).learner(method, None, {})
    before = {name: tensor.clone() for name, tensor in learner.state_dict().items()}
    trainer().fit(learner, DataLoader(batches(), batch_size=None))
    return before, learner.state_dict(), learner


@pytest.mark.parametrize("mode", ["fine-tune", "frozen"])
def test_training_leaves_the_segmentation_alone(mode):
    before, after, _ = trained(mode)
    changed = {name.split(".")[0] for name in before if not torch.equal(before[name], after[name])}
    assert changed == ({"features", "head"} if mode == "fine-tune" else {"head"})
    assert any(name.startswith("method.network.") for name in before)


def supervised(in_channels: int, out_channels: int) -> nn.Module:
    return UTransformer(in_channels, out_channels, "nnunet", width=4, depth=4, heads=2)


@pytest.mark.parametrize("network", [small, supervised])
def test_every_trained_parameter_has_a_gradient(network):
    # One without would stop DDP.
    learner = LearnedConfidence(hidden=(6,)).learner(PartialLabelModule(["liver", "spleen"], network), None, {})
    learner.confidence(shown(torch.randn(1, 1, 16, 16))).sum().backward()
    assert all(p.grad is not None for p in learner.parameters() if p.requires_grad)
    assert not any(p.requires_grad for p in learner.method.parameters())


def test_eval_mode_of_the_target_network():
    learner = LearnedConfidence("frozen", hidden=(6,)).learner(PartialLabelModule(["liver", "spleen"], small), None, {})
    learner.train()
    assert learner.head.training and not learner.method.network.training and not learner.features.training
    tuned = LearnedConfidence(hidden=(6,)).learner(PartialLabelModule(["liver", "spleen"], small), None, {})
    assert tuned.train().features.training and not tuned.method.network.training


def test_it_learns_the_true_class_probability():
    torch.manual_seed(0)
    method = PartialLabelModule(["liver", "spleen"], small)
    nn.init.constant_(method.network.head.bias, 0.0)
    nn.init.normal_(method.network.head.weight, std=40.0)  # sure of itself, and often wrong
    image = torch.randn(2, 1, 8, 8)
    label = (image[:, 0] > 0).to(torch.uint8)
    batch = {"image": image, "label": label, "annotated": torch.ones(2, 2, dtype=torch.bool)}
    learner = LearnedConfidence(over="known", hidden=(16,), steps=400, lr=0.01, lr_decay=0.1).learner(method, None, {})
    runner = trainer(400)
    runner.fit(learner, DataLoader([batch] * 400, batch_size=None))
    method.eval(), learner.eval()
    with torch.no_grad():
        probs, confidence = learner.probabilities_and_confidence(shown(image))
    truth = torch.stack([label == 1, label == 2], 1)
    target = torch.where(truth, probs, 1 - probs)
    assert (confidence - target).square().mean() < 0.3 * target.var()


def test_mcp_is_the_probability_itself():
    method = PartialLabelModule(["liver", "spleen"], small)
    method.trainer = trainer()
    both = MaximumClassProbability().scorer(method, None)(shown(torch.randn(1, 1, 8, 8)))
    assert both.shape == (1, 4, 8, 8) and torch.equal(both[:, :2], both[:, 2:])
    assert MaximumClassProbability().learner(method, None, {}) is None and MaximumClassProbability.steps == 0


def test_the_learned_confidence_is_what_ranks():
    torch.manual_seed(0)
    method = PartialLabelModule(["liver", "spleen"], small)
    score = LearnedConfidence(hidden=(6,))
    learner = score.learner(method, None, {})
    method.trainer = learner.trainer = trainer()
    nn.init.normal_(method.network.head.weight)
    image = torch.randn(2, 1, 8, 8)
    with torch.no_grad():
        both = score.scorer(method, learner.eval())(shown(image))
        probs, confidence = method.probabilities(shown(image)), learner.confidence(shown(image))
    assert both.shape == (2, 4, 8, 8)
    assert torch.equal(both[:, :2], probs) and torch.equal(both[:, 2:], confidence)
    assert not torch.allclose(probs, confidence, atol=0.01)


def test_options_are_checked():
    with pytest.raises(UsageError, match="steps 0"):
        LearnedConfidence(steps=0)
