"""Linear layers by oneDNN: the same numbers and gradients; packed weights do not outlive those that they are of."""

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch as th
from torch import nn

from sb3_safe import SAFE
from sb3_safe.language import onednn
from sb3_safe.language.policy import LanguagePolicy

from .test_agreement import Silent, rollout, text_model

pytestmark = pytest.mark.skipif(
    not onednn.is_available(), reason="this PyTorch was built without oneDNN: linear layers stay PyTorch's own"
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


@pytest.mark.parametrize("shape", [(5, 8), (2, 3, 8), (2, 1, 3, 8), (8,)])
def test_outputs_may_be_changed_in_place(shape: tuple[int, ...]) -> None:
    """As OLMo clamps its queries."""
    plain = nn.Linear(8, 6)
    fast = copy.deepcopy(plain)
    onednn.accelerate(fast)
    inputs = th.randn(shape).requires_grad_()
    results = []
    for layer in (plain, fast):
        y = layer(inputs)
        y *= 2
        y.clamp_(-1, 1)
        results.append([y, *th.autograd.grad(y.square().sum(), [inputs, *layer.parameters()])])
    for one, other in zip(*results, strict=True):
        np.testing.assert_allclose(one.detach(), other.detach(), atol=1e-5)


def pickled(module: Any) -> Any:
    return pickle.loads(pickle.dumps(module))


@pytest.mark.parametrize("copied", [copy.deepcopy, pickled])
def test_a_copy_computes_with_its_own_weights(copied: Callable[[nn.Linear], nn.Linear]) -> None:
    layer = nn.Linear(4, 4)
    onednn.accelerate(layer)
    twin = copied(layer)
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


@pytest.mark.parametrize("lora", [False, {"r": 4}])
def test_a_policy_can_be_pickled(env_kwargs: dict[str, Any], lora: Any) -> None:
    model = text_model(env_kwargs, policy_kwargs={"lora": lora})
    obs = model.env.reset()
    expected = model.policy.predict(obs, deterministic=True)[0]
    np.testing.assert_array_equal(pickled(model.policy).predict(obs, deterministic=True)[0], expected)


def test_the_names_of_parameters_stay() -> None:
    network = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1))
    names = list(network.state_dict())
    onednn.accelerate(network)
    assert list(network.state_dict()) == names
    assert all(type(layer) is nn.Linear for layer in network)


# -- packed weights ----------------------------------------------------------------------------------------------------


def pair() -> tuple[nn.Linear, nn.Linear]:
    """A layer that is accelerated, and the same by PyTorch."""
    layer = nn.Linear(40, 24)
    plain = copy.deepcopy(layer)
    onednn.accelerate(layer)
    return layer, plain


def packed(module: nn.Module) -> list[nn.Module]:
    return [layer for layer in module.modules() if onednn._packed.get(layer) is not None]


@pytest.mark.parametrize("rows", [1, 7, 32, 300])
def test_packed_weights_give_what_others_give(rows: int) -> None:
    layer, plain = pair()
    x = th.randn(rows, 40)
    with onednn.packing(layer), th.no_grad():
        for _ in range(2):
            np.testing.assert_allclose(layer(x), plain(x), atol=1e-6)
        assert packed(layer) == [layer]
        with th.enable_grad():
            assert layer(x).requires_grad
    assert layer not in onednn._packed


def step(layer: nn.Linear) -> None:
    layer.weight.grad = th.ones_like(layer.weight)
    th.optim.Adam([layer.weight], lr=0.1).step()


def swap(layer: nn.Linear) -> None:
    layer.weight.data = layer.weight.data.flip(0)


@pytest.mark.parametrize(
    "change",
    [
        step,
        swap,
        lambda layer: layer.weight.mul_(2),
        lambda layer: layer.load_state_dict(nn.Linear(40, 24).state_dict()),
        lambda layer: setattr(layer, "weight", nn.Parameter(th.randn(24, 40))),
    ],
)
@th.no_grad()
def test_weights_that_changed_are_packed_again(change: Callable[[nn.Linear], Any]) -> None:
    layer, _ = pair()
    x = th.randn(5, 40)
    with onednn.packing(layer):
        before = layer(x)
        change(layer)
        after = layer(x)
        np.testing.assert_allclose(after, nn.functional.linear(x, layer.weight, layer.bias), atol=1e-5)
        assert (after - before).abs().max() > 1e-2


def test_copies_and_files_of_a_layer_have_nothing_packed() -> None:
    layer, _ = pair()
    x = th.randn(5, 40)
    with onednn.packing(layer), th.no_grad():
        expected = layer(x)
        twin = copy.deepcopy(layer)
        file = io.BytesIO()
        th.save(layer.state_dict(), file)
        layer.weight.zero_()
        assert packed(twin) == []
        np.testing.assert_allclose(twin(x), expected, atol=1e-6)
        layer.load_state_dict(th.load(io.BytesIO(file.getvalue())))
        np.testing.assert_allclose(layer(x), expected, atol=1e-6)


class Witness(Silent):
    """Notes after every step how many layers of the policy have their weights packed."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: list[int] = []

    def _on_step(self) -> bool:
        self.counts.append(len(packed(self.model.policy)))
        return True


def test_weights_are_packed_while_a_rollout_is_collected_and_at_no_other_time(
    env_kwargs: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, witness = text_model(env_kwargs), Witness()
    when: dict[str, set[int]] = {"annotating": set(), "training": set()}
    for method, label in (("_observe_rollout", "annotating"), ("_loss", "training")):
        original = getattr(model, method)

        def spy(*args: Any, original: Any = original, label: str = label) -> Any:
            result = original(*args)
            when[label].add(len(packed(model.policy)))
            return result

        monkeypatch.setattr(model, method, spy)
    model.learn(2 * 13 * 6, callback=witness)
    linear = [layer for part in (model.policy.lm, model.policy.heads) for layer in part.modules()]
    assert set(witness.counts) == {sum(type(layer) is nn.Linear for layer in linear)}
    assert when == {"annotating": {0}, "training": {0}}
    assert len(packed(model.policy)) == 0


def test_rollouts_are_the_same_to_rounding_with_packed_weights_and_without(
    env_kwargs: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With updates in between, whose weights the next rollout has to be written with."""
    models = [text_model(env_kwargs, learning_rate=1e-3) for _ in range(2)]
    for _ in range(3):
        buffers = []
        for number, model in enumerate(models):
            with monkeypatch.context() as patch:
                if number == 1:
                    patch.setattr(onednn, "_pack", lambda layer: layer.weight)
                th.manual_seed(1)
                np.random.seed(1)
                buffers.append(rollout(model))
                model.train()
        for name in ("actions", "values", "log_probs", "advantages", "returns"):
            np.testing.assert_allclose(getattr(buffers[0], name), getattr(buffers[1], name), atol=1e-4, err_msg=name)


def test_nothing_stays_packed_after_a_rollout_that_broke_down(env_kwargs: dict[str, Any]) -> None:
    class Breaks(Silent):
        def _on_step(self) -> bool:
            raise KeyError

    model = text_model(env_kwargs)
    with pytest.raises(KeyError):
        model.learn(100, callback=Breaks())
    assert len(packed(model.policy)) == 0
    assert model.policy._ended is None


def test_adapters_merged_anew_are_packed_anew(env_kwargs: dict[str, Any]) -> None:
    """They are swapped in and out of one place."""
    policy: LanguagePolicy = text_model(env_kwargs, policy_kwargs={"lora": {"r": 4}}).policy
    ids, length = th.randint(2, 300, (6, 9)), th.full((6,), 9)
    with policy.collecting(lambda: None), th.no_grad():
        before = policy._continue(ids, length).clone()
        for name, parameter in policy.lm.named_parameters():
            if "lora_" in name:
                parameter.add_(0.1)
        policy._invalidate()
        found = policy._continue(ids, length).clone()
    assert policy.adapters is not None
    policy.adapters.unmerge()
    with th.no_grad():
        expected = policy._body(policy.lm, ids)[:, -1]
    np.testing.assert_allclose(found, expected, atol=2e-5)
    assert (found - before).abs().max() > 1e-3


def test_a_model_is_saved_and_loaded_in_the_middle_of_a_rollout(env_kwargs: dict[str, Any], tmp_path: Any) -> None:
    class Saves(Silent):
        def _on_step(self) -> bool:
            if self.n_calls == 5:
                self.model.save(tmp_path / "model")
                memo: dict[int, Any] = {}
                twin = copy.deepcopy(self.model.policy, memo)
                assert id(self.model) not in memo
                assert packed(self.model.policy) and not packed(twin)
            return True

    model = text_model(env_kwargs)
    rollout(model)
    model.learn(13 * 6, callback=Saves())
    loaded = SAFE.load(tmp_path / "model", device="cpu")
    obs = model.env.reset()
    assert loaded.predict(obs)[0].shape == (6,)
