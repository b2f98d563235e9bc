"""FusedAdam is Adam."""

from typing import Any

import numpy as np
import pytest
import torch as th
from torch import nn

from sb3_safe.fused_adam import FusedAdam


def parameters() -> list[nn.Parameter]:
    th.manual_seed(0)
    return [nn.Parameter(th.randn(shape)) for shape in ((4, 3), (3,), (2, 5), ())]


def step(optimizer: th.optim.Optimizer, number: int, missing: int | None = None) -> None:
    """One step along gradients that depend on its number; one of the parameters may have none."""
    generator = th.Generator().manual_seed(number)
    optimizer.zero_grad()
    trained = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for index, parameter in enumerate(trained):
        gradient = th.randn(parameter.shape, generator=generator)
        if index != missing:
            parameter.grad = gradient
    optimizer.step()


def assert_equal(ours: list[nn.Parameter], theirs: list[nn.Parameter]) -> None:
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(a.detach(), b.detach(), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(
    "kwargs",
    [
        {},
        {"lr": 0.1, "betas": (0.5, 0.9), "eps": 1e-3},
        {"weight_decay": 0.1},
        {"maximize": True},
        {"amsgrad": True},
    ],
)
@pytest.mark.parametrize("missing", [None, 1])
def test_steps_are_those_of_adam(kwargs: dict[str, Any], missing: int | None):
    ours, theirs = parameters(), parameters()
    optimizers = FusedAdam(ours, **kwargs), th.optim.Adam(theirs, **kwargs)
    for optimizer in optimizers:
        for number in range(5):
            step(optimizer, number, missing if number in (0, 3) else None)
    assert_equal(ours, theirs)


def test_each_group_has_its_own_rate():
    ours, theirs = parameters(), parameters()
    for kind, ps in ((FusedAdam, ours), (th.optim.Adam, theirs)):
        optimizer = kind([{"params": ps[:2], "lr": 0.1}, {"params": ps[2:]}], lr=0.01)
        for number in range(4):
            step(optimizer, number)
    assert_equal(ours, theirs)


def test_the_state_of_adam_goes_on_in_it_and_back():
    ours, theirs = parameters(), parameters()
    first, second = FusedAdam(ours), th.optim.Adam(theirs, fused=True)
    for optimizer in (first, second):
        step(optimizer, 0)
        step(optimizer, 1)
    exchanged = FusedAdam(ours), th.optim.Adam(theirs)
    for optimizer, state in zip(exchanged, (second.state_dict(), first.state_dict()), strict=True):
        optimizer.load_state_dict(state)
        step(optimizer, 2)
    assert_equal(ours, theirs)


def test_gradients_are_forgotten_or_set_to_zero():
    optimizer = FusedAdam(parameters())
    step(optimizer, 0)
    trained = optimizer.param_groups[0]["params"]
    optimizer.zero_grad(set_to_none=False)
    assert all(parameter.grad.abs().max() == 0 for parameter in trained)
    optimizer.zero_grad()
    assert all(parameter.grad is None for parameter in trained)


def test_a_closure_gives_loss_and_gradient():
    weight = nn.Parameter(th.tensor([3.0]))
    optimizer = FusedAdam([weight], lr=0.5)

    def closure() -> th.Tensor:
        optimizer.zero_grad()
        loss = weight.square().sum()
        loss.backward()
        return loss

    losses = [optimizer.step(closure).item() for _ in range(3)]
    assert losses[0] == 9.0
    assert losses == sorted(losses, reverse=True)
