"""Linear layers by oneDNN: the same numbers, the same gradients."""

import copy

import numpy as np
import pytest
import torch as th
from torch import nn

from sb3_safe.language import onednn

pytestmark = pytest.mark.skipif(
    not hasattr(th.ops.mkldnn, "_linear_pointwise"), reason="this PyTorch was built without oneDNN"
)


@pytest.fixture(autouse=True)
def everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onednn, "is_faster", lambda: True)


@pytest.mark.parametrize("shape", [(5, 8), (2, 3, 8), (1, 8), (8,)])
@pytest.mark.parametrize("bias", [True, False])
def test_values_and_gradients_are_those_of_pytorch(shape: tuple[int, ...], bias: bool) -> None:
    plain = nn.Sequential(nn.Linear(8, 6, bias=bias), nn.Tanh(), nn.Linear(6, 3))
    fast = copy.deepcopy(plain)
    onednn.accelerate(fast)
    inputs = [th.randn(shape).requires_grad_() for _ in range(1)] * 2
    results = []
    for network, x in zip((plain, fast), inputs, strict=True):
        y = network(x)
        results.append([y, *th.autograd.grad(y.square().sum(), [x, *network.parameters()])])
        with th.no_grad():
            np.testing.assert_allclose(network(x), y.detach(), atol=1e-6)
    for one, other in zip(*results, strict=True):
        np.testing.assert_allclose(one.detach(), other.detach(), atol=1e-5)


def test_a_copy_computes_with_its_own_weights() -> None:
    layer = nn.Linear(4, 4)
    onednn.accelerate(layer)
    twin = copy.deepcopy(layer)
    with th.no_grad():
        layer.weight.zero_()
    x = th.randn(2, 4)
    np.testing.assert_allclose(twin(x).detach(), (x @ twin.weight.t() + twin.bias).detach(), atol=1e-6)


def test_other_precisions_and_frozen_weights_are_left_to_pytorch() -> None:
    layer = nn.Linear(4, 4)
    onednn.accelerate(layer)
    x = th.randn(3, 4)
    with th.autocast("cpu", th.bfloat16):
        assert layer(x).dtype == th.bfloat16
    assert layer(x[:0]).shape == (0, 4)
    layer.requires_grad_(False)
    assert not layer(x).requires_grad
    assert layer.double()(x.double()).dtype == th.float64


def test_the_names_of_parameters_stay() -> None:
    network = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1))
    names = list(network.state_dict())
    onednn.accelerate(network)
    assert list(network.state_dict()) == names
    assert all(type(layer) is nn.Linear for layer in network)
