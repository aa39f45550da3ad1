"""Steps without a finite gradient (FAULTS.md 7): they change nothing, and too many end the run."""

import copy
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from organseg.errors import NumericsError
from organseg.runtime.resume import FiniteLoss

TRAINER = SimpleNamespace(
    accumulate_grad_batches=1, global_step=7, global_rank=0, precision_plugin=SimpleNamespace(scaler=None)
)


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2))


def step(guard: FiniteLoss, net: nn.Module, optimizer: torch.optim.Optimizer, image: torch.Tensor) -> None:
    """One step as Lightning takes it."""
    guard.on_train_batch_start(TRAINER, net, {"case": ["set/a", "set/b", "set/a"]}, 0)
    optimizer.zero_grad()
    net(image).square().mean().backward()
    guard.on_before_optimizer_step(TRAINER, net, optimizer)
    optimizer.step()


def test_a_step_without_a_finite_gradient_changes_nothing(capsys):
    net, guard = network(), FiniteLoss()
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.1, weight_decay=0.1)
    step(guard, net, optimizer, torch.randn(2, 1, 8, 8))  # momentum and running means are there
    before, state = copy.deepcopy(net.state_dict()), copy.deepcopy(optimizer.state_dict())
    bad = torch.randn(2, 1, 8, 8)
    bad[0, 0, 0, 0] = torch.nan
    step(guard, net, optimizer, bad)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    after = optimizer.state_dict()["state"]
    assert all(torch.equal(after[k][n], v) for k, kept in state["state"].items() for n, v in kept.items())
    assert "step 7 has no finite gradient, and is left out (rank 0: set/a, set/b)" in capsys.readouterr().err
    step(guard, net, optimizer, torch.randn(2, 1, 8, 8))
    assert guard.bad == 0
    assert all(not torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert all(value.isfinite().all() for value in net.state_dict().values())


def test_a_scaler_is_left_to_leave_the_step_out():
    net, guard, scaler = network(), FiniteLoss(), torch.amp.GradScaler("cpu", init_scale=2.0)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    trainer = SimpleNamespace(**{**vars(TRAINER), "precision_plugin": SimpleNamespace(scaler=scaler)})
    before = copy.deepcopy(net.state_dict())
    guard.on_train_batch_start(trainer, net, {"case": ["set/a"]}, 0)
    scaler.scale(net(torch.full((2, 1, 8, 8), torch.inf)).square().mean()).backward()
    guard.on_before_optimizer_step(trainer, net, optimizer)
    scaler.step(optimizer)  # finds the infinities only now, as a fused optimiser's does
    scaler.update()
    assert scaler.get_scale() == 1.0
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


def test_too_many_in_a_row_end_the_run():
    net, guard = network(), FiniteLoss(patience=3)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    bad = torch.full((2, 1, 8, 8), torch.inf)
    step(guard, net, optimizer, bad)
    step(guard, net, optimizer, torch.randn(2, 1, 8, 8))
    for _ in range(2):
        step(guard, net, optimizer, bad)
    with pytest.raises(NumericsError, match="in 3 steps in a row"):
        step(guard, net, optimizer, bad)
