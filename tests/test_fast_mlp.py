"""The fast path computes what the general path computes."""

import copy
import pickle
from typing import Any

import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3.common.torch_layers import FlattenExtractor
from torch import nn
from torch.nn.utils import prune

from sb3_safe import SAFE, FixedKL, fast_mlp, functional
from sb3_safe.buffers import SafeSamples
from sb3_safe.fast_mlp import FastMlp, soft_min
from sb3_safe.policies import TwinCriticCnnPolicy, TwinCriticMultiInputPolicy, TwinCriticPolicy
from sb3_safe.trust_bound import trained_parameters
from tests.test_policies import BOX, DISCRETE, IMAGE, VECTOR, jolt, make, observations
from tests.tiny_envs import ACTIONS, OBSERVATIONS

NETWORKS: list[dict[str, Any]] = [
    {},
    {"n_critics": 1, "net_arch": [5]},
    {"n_critics": 3, "net_arch": [7, 6, 5]},
    {"activation_fn": nn.ReLU, "net_arch": [16, 16]},
    {"ortho_init": False},
]
EITHER_ACTIONS = pytest.mark.parametrize("action_space", [DISCRETE, BOX], ids=["discrete", "box"])


def both(kind: Any = TwinCriticPolicy, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
    """Two equal policies; only the first has a fast path. Their weights are not those of the start."""
    fast, general = (make(kind, *args, **kwargs) for _ in range(2))
    for policy in (fast, general):
        th.manual_seed(3)
        jolt(policy)
    fast.set_training_mode(True)
    assert fast._fast is not None
    assert general._fast is None
    return fast, general


def some_actions(space: spaces.Space[Any], number: int) -> th.Tensor:
    """As the rollout buffer yields them."""
    space.seed(1)
    return th.as_tensor(np.stack([np.atleast_1d(space.sample()) for _ in range(number)]), dtype=th.float32)


def assert_equal(ours: Any, theirs: Any, tolerance: float = 1e-5) -> None:
    """To rounding, relative to the largest number."""
    for a, b in zip(ours, theirs, strict=True):
        assert a.shape == b.shape
        assert a.dtype == b.dtype
        np.testing.assert_allclose(
            a.detach(), b.detach(), rtol=0, atol=tolerance * (float(b.detach().abs().max()) + 1e-2)
        )


# -- acting --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("number", [1, 5, 40])
@EITHER_ACTIONS
def test_actions_values_and_log_probabilities_are_those_of_the_general_path(
    network: dict[str, Any], deterministic: bool, number: int, action_space: spaces.Space[Any]
):
    obs, results = observations(number=number), []
    for policy in both(TwinCriticPolicy, VECTOR, action_space, **network):
        th.manual_seed(5)
        with th.no_grad():  # twice, because the second draw tells whether the first took as many random numbers
            results.append([*policy(obs, deterministic), *policy(obs, deterministic), policy._predict(obs)])
    assert_equal(*results)
    assert results[0][0].is_contiguous()  # an environment may hand the memory of its row to C


@pytest.mark.parametrize("action_space", [spaces.Discrete(40), spaces.Box(-1, 1, (3, 7))], ids=["discrete", "box"])
def test_many_actions_are_drawn_as_on_the_general_path(action_space: spaces.Space[Any]):
    obs, results = observations(number=9), []
    for policy in both(TwinCriticPolicy, VECTOR, action_space):
        th.manual_seed(5)
        with th.no_grad():
            results.append([*policy(obs), *policy(obs)])
    assert results[0][0].shape == (9, *action_space.shape)
    assert_equal(*results)


def test_categorical_actions_have_the_frequencies_of_their_probabilities():
    policy, _ = both()
    obs = observations(number=1).expand(20_000, -1)
    with th.no_grad():
        actions, _, log_prob = policy(obs)
    for action in range(3):
        taken = actions == action
        expected = float(th.exp(log_prob[taken][0]))
        assert taken.float().mean().item() == pytest.approx(expected, abs=4 * (expected / 20_000) ** 0.5)


@pytest.mark.parametrize("alpha", [0.0, 1e-6, 0.3, 1e4, np.inf])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e6])
@pytest.mark.parametrize("n_critics", [1, 2, 5])
def test_soft_min_is_that_of_the_general_path(alpha: float, scale: float, n_critics: int):
    values = (scale * np.random.default_rng(0).normal(size=(n_critics, 50))).astype(np.float32)
    expected = functional.soft_min(th.from_numpy(values.T).double(), alpha * scale)
    found = soft_min(values, alpha * scale)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-6 * scale)


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1e7, 1e8, 1e12, 1e38, np.inf])
def test_the_value_used_has_the_temperature_in_units_of_the_returns_spread(alpha: float):
    results = []
    for policy in both(TwinCriticPolicy, VECTOR, DISCRETE, n_critics=3, soft_min_alpha=alpha):
        policy.return_scale.fill_(0.2)
        with th.no_grad():
            results.append([policy(observations())[1]])
    assert_equal(*results)


def test_target_critics_supply_the_values():
    fast, general = both()
    for policy in (fast, general):
        policy.make_target_critics()
        th.manual_seed(0)
        jolt(policy)
    with th.no_grad():
        assert_equal([fast(observations())[1]], [general(observations())[1]])


def test_probabilities_that_are_nan_are_refused_as_torch_refuses_them():
    fast, general = both()
    for policy in (fast, general):
        policy.action_net.bias.data.fill_(np.nan)
        with th.no_grad(), pytest.raises(RuntimeError):
            policy(observations())


# -- training ------------------------------------------------------------------------------------------------------


def gradients(policy: Any, obs: Any, actions: th.Tensor, weights: list[float]) -> list[th.Tensor]:
    """Of a sum that weighs values, log-probabilities and entropies, each action differently."""
    outputs = policy.evaluate(obs, actions)[:3]
    factors = th.linspace(-1, 2, len(actions))
    parts = [w * (factors * (o.T if o.dim() > 1 else o)).sum() for w, o in zip(weights, outputs, strict=True) if w]
    policy.zero_grad()
    th.stack(parts).sum().backward()
    return [th.zeros_like(p) if p.grad is None else p.grad for p in policy.parameters()]


@pytest.mark.parametrize("weights", [[1, 1, 1], [1, 0, 0], [0, 1, 0], [0, 0, 1], [0.5, 2, 0]])
@pytest.mark.parametrize("network", NETWORKS)
@EITHER_ACTIONS
def test_values_log_probabilities_entropies_and_their_gradients_are_those_of_autograd(
    network: dict[str, Any], weights: list[float], action_space: spaces.Space[Any]
):
    fast, general = both(TwinCriticPolicy, VECTOR, action_space, **network)
    obs, actions = observations(number=11), some_actions(action_space, 11)
    assert_equal(fast.evaluate(obs, actions)[:3], general.evaluate(obs, actions)[:3])
    ours, theirs = (gradients(policy, obs, actions, weights) for policy in (fast, general))
    assert max(float(gradient.abs().max()) for gradient in theirs) > 0.1
    assert_equal(ours, theirs)


@pytest.mark.parametrize(
    ("kind", "space"),
    [
        (TwinCriticMultiInputPolicy, OBSERVATIONS["dict"]),
        (TwinCriticCnnPolicy, IMAGE),
        (TwinCriticPolicy, spaces.Discrete(4)),
        (TwinCriticPolicy, spaces.Box(-1, 1, (2, 3))),
    ],
    ids=["dict", "image", "one-hot", "matrix"],
)
def test_features_extractors_are_trained_as_by_autograd(kind: Any, space: spaces.Space[Any]):
    fast, general = both(kind, space)
    obs, actions = observations(space), some_actions(DISCRETE, 5)
    ours, theirs = (gradients(policy, obs, actions, [1, 1, 1]) for policy in (fast, general))
    assert_equal(ours, theirs, tolerance=1e-4)


def test_the_gradient_reaches_the_observations():
    results = []
    for policy in both():
        obs = observations().requires_grad_()
        policy.evaluate(obs, th.zeros(5)).values.sum().backward()
        results.append([obs.grad])
    assert results[0][0].abs().max() > 0
    assert_equal(*results)


@pytest.mark.parametrize("wanted", ["everything", "observations", "head"])
@pytest.mark.parametrize("power", [1, 2])  # with 1 nothing that comes in has a gradient itself
@EITHER_ACTIONS
def test_the_gradient_of_a_gradient_is_that_of_autograd(action_space: spaces.Space[Any], power: int, wanted: str):
    actions, results = some_actions(action_space, 5), []
    for policy in both(TwinCriticPolicy, VECTOR, action_space):
        obs = observations().requires_grad_(wanted != "head")
        policy.requires_grad_(wanted == "everything")
        policy.action_net.requires_grad_(wanted != "observations")
        values, log_prob, entropy = policy.evaluate(obs, actions)[:3]
        outputs = log_prob if wanted == "head" else th.cat([values.flatten(), log_prob, entropy])
        penalised = [tensor for tensor in (obs, *policy.parameters()) if tensor.requires_grad]
        first = th.autograd.grad((outputs**power).sum(), penalised, create_graph=True, materialize_grads=True)
        penalty = th.cat([gradient.flatten() for gradient in first]).square().sum()
        second = th.autograd.grad(penalty, penalised, materialize_grads=True)
        assert max(float(gradient.abs().max()) for gradient in second) > 0.1
        results.append([*first, *second])
    assert_equal(*results)


def test_the_gradient_of_a_gradient_knows_that_observations_may_depend_on_the_policy():
    results = []
    for policy in both():
        parameters = [p for p in policy.parameters() if p.requires_grad]
        obs = observations()
        obs = obs + policy.evaluate(obs, th.zeros(5)).log_prob[:, None]  # as where a model predicts the next ones
        loss = policy.evaluate(obs, th.zeros(5)).log_prob.sum()
        first = th.autograd.grad(loss, parameters, create_graph=True, materialize_grads=True)
        penalty = th.cat([gradient.flatten() for gradient in first]).square().sum()
        results.append([*first, *th.autograd.grad(penalty, parameters, materialize_grads=True)])
    assert_equal(*results)


@pytest.mark.parametrize("output", ["values", "log_prob"])
def test_a_head_that_is_not_in_the_loss_has_no_gradient(output: str):
    """Not even zeros, which an optimizer would count, and by which weight decay would move it."""
    without = []
    for policy in both():
        getattr(policy.evaluate(observations(), th.zeros(5)), output).sum().backward()
        without.append({name for name, parameter in policy.named_parameters() if parameter.grad is None})
    assert without[0] == without[1] != set()


def test_the_gradient_reaches_actions_that_are_made_by_something_trained():
    results = []
    for policy in both(TwinCriticPolicy, VECTOR, BOX):
        actions = some_actions(BOX, 5).requires_grad_()
        policy.evaluate(observations(), actions).log_prob.sum().backward()
        results.append([actions.grad])
    assert_equal(*results)


def test_a_graph_can_be_used_twice_where_it_is_kept():
    policy, _ = both()
    loss = th.cat([output.flatten() for output in policy.evaluate(observations(), th.zeros(5))[:3]]).sum()
    parameters = [p for p in policy.parameters() if p.requires_grad]
    first = th.autograd.grad(loss, parameters, retain_graph=True)
    assert_equal(first, th.autograd.grad(loss, parameters))


def test_a_gradient_at_parameters_that_have_changed_is_refused():
    policy, _ = both()
    loss = policy.evaluate(observations(), th.zeros(5)).values.sum()
    jolt(policy)
    with pytest.raises(RuntimeError, match="changed"):
        loss.backward()


# -- the whole loss ------------------------------------------------------------------------------------------------


def trained(env_id: str, **kwargs: Any) -> tuple[SAFE, SafeSamples]:
    """A model between two updates, and a minibatch with ratios on either side of every limit."""
    settings = {
        "n_steps": 64,
        "batch_size": 32,
        "n_epochs": 2,
        "seed": 0,
        "learning_rate": 3e-3,
        "kl_controller": "none",
    }
    model = SAFE("MlpPolicy", env_id, policy_kwargs={"net_arch": [8, 8]}, **(settings | kwargs)).learn(64)
    batch = next(model.rollout_buffer.get(32))
    generator = th.Generator().manual_seed(0)
    shift = 0.3 * th.randn(32, generator=generator)
    shift[:2] = th.tensor([-40.0, 40.0])
    advantages = batch.advantages.clone()
    advantages[:2] = th.tensor([-1.0, 1.0])
    batch = batch._replace(old_log_prob=batch.old_log_prob + shift, advantages=advantages)
    if model.policy.reference is not None:
        drift = 0.5 * th.randn(32, generator=generator)
        drift[2:4] = th.tensor([-40.0, 40.0])
        batch = batch._replace(reference_log_prob=batch.old_log_prob - drift)
    if model.clip_range_vf is not None:
        old = model.policy.evaluate(batch.observations, batch.actions).values.detach()
        batch = batch._replace(old_critic_values=old + th.randn(old.shape, generator=generator))
    return model, batch


def penalised(coef: float, **kwargs: Any) -> dict[str, Any]:
    return {"kl_controller": FixedKL, "kl_controller_kwargs": {"coef": coef}} | kwargs


@pytest.mark.parametrize(
    "settings",
    [
        pytest.param({"huber_delta": None}, id="ppo"),
        pytest.param({"huber_delta": 0.05}, id="huber"),
        pytest.param({"clip_range_vf": 0.5}, id="clipped-critics"),
        pytest.param({"clip_range_vf": 0.5, "huber_delta": None}, id="clipped-squares"),
        pytest.param({"ent_coef": 0.3, "vf_coef": 0.1}, id="coefficients"),
        pytest.param({"normalize_advantage": False}, id="raw-advantages"),
        pytest.param({"critic_warmup": 10, "ent_coef": 0.3, "kl_controller": "safe"}, id="critic-warmup"),
        pytest.param({"kl_controller": "safe"}, id="safe"),
        pytest.param(penalised(2.0, kl_reference="rollout"), id="k3-rollout"),
        pytest.param(penalised(2.0, kl_reference="initial", kl_estimator="k1"), id="k1"),
        pytest.param(penalised(2.0, kl_reference="initial", kl_estimator="k2"), id="k2"),
        pytest.param(penalised(2.0, kl_reference="initial", kl_estimator="k3"), id="k3"),
    ],
)
@pytest.mark.parametrize("env_id", ["CartPole-v1", "Pendulum-v1"])
def test_loss_gradient_and_statistics_are_those_of_autograd(env_id: str, settings: dict[str, Any]):
    model, batch = trained(env_id, **settings)
    policy, parameters = model.policy, trained_parameters(model.policy)
    model.policy.optimizer.zero_grad()
    found = policy.fast_gradient(batch, model._objective)
    ours = [th.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    without = [p.grad is None for p in parameters]
    policy._fast = None
    model.policy.optimizer.zero_grad()
    advantages = functional.normalize(batch.advantages) if model.normalize_advantage else batch.advantages
    loss, expected = model._loss(batch._replace(advantages=advantages))
    loss.backward()
    assert found == pytest.approx(expected, rel=1e-5, abs=1e-5)
    assert_equal(ours, [th.zeros_like(p) if p.grad is None else p.grad for p in parameters])
    assert without == [p.grad is None for p in parameters]  # to an optimizer zero is a gradient


def test_while_the_critics_warm_up_the_actors_head_has_no_gradient_and_its_hidden_layers_have_zeros():
    model, batch = trained("CartPole-v1", critic_warmup=10)
    policy = model.policy
    policy.optimizer.zero_grad()
    assert policy.fast_gradient(batch, model._objective) is not None
    assert policy.action_net.weight.grad is policy.action_net.bias.grad is None
    for parameter in policy.bodies.parameters():
        actor, *critics = parameter.grad
        assert not actor.any()
        assert all(critic.any() for critic in critics)


def test_equal_advantages_teach_the_actor_nothing():
    model, batch = trained("CartPole-v1")
    model.policy.optimizer.zero_grad()
    model.policy.fast_gradient(batch._replace(advantages=th.full((32,), 3.0)), model._objective)
    assert model.policy.action_net.weight.grad.abs().max() == 0
    assert all(th.isfinite(parameter.grad).all() for parameter in trained_parameters(model.policy))


def test_gradients_of_minibatches_add_up():
    model, batch = trained("CartPole-v1")
    sums = []
    for times in (1, 2):
        model.policy.optimizer.zero_grad()
        for _ in range(times):
            model.policy.fast_gradient(batch, model._objective)
        sums.append([parameter.grad.clone() for parameter in trained_parameters(model.policy)])
    assert_equal(sums[1], [2 * gradient for gradient in sums[0]])


def test_a_penalty_without_closed_form_is_left_to_autograd():
    model, batch = trained("CartPole-v1", **penalised(1.0, kl_reference="initial", kl_estimator="exact"))
    assert model.policy.fast_gradient(batch, model._objective) is None


def test_frozen_parameters_get_no_gradient():
    model, batch = trained("CartPole-v1")
    model.policy.action_net.weight.requires_grad_(False)
    model.policy.optimizer.zero_grad()
    assert model.policy.fast_gradient(batch, model._objective) is not None
    assert model.policy.action_net.weight.grad is None
    assert model.policy.action_net.bias.grad is not None


def test_trained_features_are_left_to_autograd():
    class Scaled(FlattenExtractor):
        def __init__(self, space: Any) -> None:
            super().__init__(space)
            self.scale = nn.Parameter(th.ones(4))

        def forward(self, obs: th.Tensor) -> th.Tensor:
            return super().forward(obs) * self.scale

    model = SAFE(
        "MlpPolicy", "CartPole-v1", n_steps=32, batch_size=16, policy_kwargs={"features_extractor_class": Scaled}
    )
    model.learn(32)
    batch = next(model.rollout_buffer.get(16))
    assert model.policy._fast is not None
    assert model.policy.fast_gradient(batch, model._objective) is None
    model.policy.features_extractor.requires_grad_(False)
    assert model.policy.fast_gradient(batch, model._objective) is not None


class Embedding(TwinCriticPolicy):
    """Makes features of a layer that is no part of the features extractor."""

    def _build(self, lr_schedule: Any) -> None:
        self.embedding = nn.Linear(4, 4)
        super()._build(lr_schedule)

    def extract_features(self, obs: Any, features_extractor: Any = None) -> Any:
        return self.embedding(super().extract_features(obs, features_extractor))


def test_what_a_policy_makes_features_of_is_trained():
    model = SAFE(Embedding, "CartPole-v1", n_steps=32, batch_size=16, seed=0)
    before = model.policy.embedding.weight.detach().clone()
    model.learn(32)
    assert not th.equal(model.policy.embedding.weight, before)


@pytest.mark.parametrize("where", ["parameter", "accumulated", "module"])
def test_hooks_on_gradients_are_called(where: str):
    model = SAFE("MlpPolicy", "CartPole-v1", n_steps=32, batch_size=16, seed=0)
    head, calls = model.policy.action_net, []
    register = {
        "parameter": head.weight.register_hook,
        "accumulated": head.weight.register_post_accumulate_grad_hook,
        "module": head.register_full_backward_hook,
    }
    register[where](lambda *_: calls.append(where))  # type: ignore[func-returns-value]
    model.learn(32)
    assert len(calls) > 1


class OwnLoss(SAFE):
    def _loss(self, *args: Any) -> Any:
        loss, parts = super()._loss(*args)
        return 0 * loss, parts


def test_a_loss_of_ones_own_is_minimised():
    model = OwnLoss("MlpPolicy", "CartPole-v1", n_steps=32, batch_size=16)
    before = [parameter.clone() for parameter in model.policy.parameters()]
    model.learn(32)
    assert model.policy._fast is not None
    assert all(th.equal(a, b) for a, b in zip(before, model.policy.parameters(), strict=True))


def test_a_kl_term_of_ones_own_is_asked_for():
    asked: list[int] = []

    class OwnTerm(SAFE):
        def _kl_term(self, batch: SafeSamples, *args: Any) -> Any:
            asked.append(len(batch.actions))
            return super()._kl_term(batch, *args)

    OwnTerm("MlpPolicy", "CartPole-v1", n_steps=32, batch_size=16, n_epochs=1, **penalised(2.0)).learn(32)
    assert asked == [16, 16]


def test_a_kl_of_ones_own_is_what_the_controller_goes_by():
    told: list[float] = []

    class Listener(FixedKL):
        def coefficient(self, kl: float = 0.0) -> float:
            told.append(kl)
            return super().coefficient(kl)

    class OwnKl(SAFE):
        def _kl(self, batch: SafeSamples, log_prob: th.Tensor) -> th.Tensor:
            return th.full_like(log_prob, 7.0)

    OwnKl("MlpPolicy", "CartPole-v1", n_steps=32, batch_size=16, n_epochs=1, kl_controller=Listener).learn(32)
    assert told == [7.0, 7.0]


# -- learning ------------------------------------------------------------------------------------------------------


class General(TwinCriticPolicy):
    """No fast path, because it overrides a method that the fast path stands in for."""

    def aggregate(self, values: th.Tensor) -> th.Tensor:
        return super().aggregate(values)


@pytest.mark.parametrize("env_id", ["CartPole-v1", "Pendulum-v1"])
def test_updates_are_those_of_the_general_path(env_id: str):
    results = []
    for kind in (TwinCriticPolicy, General):
        model = SAFE(kind, env_id, n_steps=64, batch_size=32, n_epochs=2, seed=0, policy_kwargs={"net_arch": [8, 8]})
        model.learn(128)
        results.append(list(model.policy.state_dict().values()))
    assert_equal(*results, tolerance=1e-3)


@pytest.mark.slow
def test_learning_is_that_of_the_general_path():
    settings = {"n_envs": 8, "n_steps": 32, "batch_size": 256, "n_epochs": 20, "gae_lambda": 0.8, "gamma": 0.98}
    averages = {}
    for kind in (TwinCriticPolicy, General):
        averages[kind] = [
            SAFE(kind, "CartPole-v1", learning_rate=1e-3, seed=seed, stats_window_size=10_000, **settings).learn(25_000)
            for seed in range(10)
        ]
    fast, general = ([np.mean([i["r"] for i in model.ep_info_buffer]) for model in averages[kind]] for kind in averages)
    error = np.sqrt((np.var(fast, ddof=1) + np.var(general, ddof=1)) / 10)
    assert min(np.mean(fast), np.mean(general)) > 50  # acting at random brings about 22
    assert abs(np.mean(fast) - np.mean(general)) < 3 * error, (fast, general)


# -- where it applies ----------------------------------------------------------------------------------------------


class OwnScore(TwinCriticPolicy):
    def _score(self, latent_pi: th.Tensor, actions: th.Tensor) -> Any:
        return super()._score(latent_pi, actions)


class OwnAggregate(TwinCriticPolicy):
    def aggregate(self, values: th.Tensor) -> th.Tensor:
        return values.mean(-1, keepdim=True)


class OwnHead(TwinCriticPolicy):
    def _build(self, lr_schedule: Any) -> None:
        super()._build(lr_schedule)
        self.action_net = nn.Sequential(self.action_net, nn.Tanh())


@pytest.mark.parametrize(
    ("kind", "action_space", "kwargs"),
    [
        pytest.param(TwinCriticPolicy, BOX, {"use_sde": True}, id="sde"),
        pytest.param(TwinCriticPolicy, ACTIONS["multi_discrete"], {}, id="multi_discrete"),
        pytest.param(TwinCriticPolicy, ACTIONS["multi_binary"], {}, id="multi_binary"),
        pytest.param(TwinCriticPolicy, DISCRETE, {"activation_fn": nn.PReLU}, id="prelu"),
        pytest.param(TwinCriticPolicy, DISCRETE, {"activation_fn": nn.ELU}, id="elu"),
        pytest.param(TwinCriticPolicy, DISCRETE, {"net_arch": {"pi": [8], "vf": [16, 4]}}, id="two-shapes"),
        pytest.param(TwinCriticPolicy, DISCRETE, {"net_arch": []}, id="linear"),
        pytest.param(TwinCriticPolicy, DISCRETE, {"share_features_extractor": False}, id="two-extractors"),
        pytest.param(TwinCriticPolicy, DISCRETE, {"net_arch": [600, 600]}, id="wide"),
        pytest.param(OwnScore, DISCRETE, {}, id="own-score"),
        pytest.param(OwnAggregate, DISCRETE, {}, id="own-aggregate"),
        pytest.param(OwnHead, DISCRETE, {}, id="own-head"),
    ],
)
def test_whatever_is_not_plain_takes_the_general_path(
    kind: Any, action_space: spaces.Space[Any], kwargs: dict[str, Any]
):
    policy = make(kind, VECTOR, action_space, **kwargs)
    policy.set_training_mode(False)
    assert policy._fast is None
    if policy.use_sde:
        policy.reset_noise(5)
    with th.no_grad():
        actions, values, _ = policy(observations())
    assert values.shape == (5, 1)
    policy.evaluate(observations(), actions).values.sum().backward()
    assert policy.value_weight.grad is not None


class TwoThreads:
    """A library of matrix products, as threadpoolctl has it."""

    def __init__(self) -> None:
        self.set_num_threads(2)

    def set_num_threads(self, number: int) -> None:
        self.number = number

    def get_num_threads(self) -> int:
        return self.number


@pytest.fixture
def openblas(monkeypatch: pytest.MonkeyPatch) -> TwoThreads:
    """In place of NumPy's, whatever that is on this machine."""
    library = TwoThreads()
    monkeypatch.setattr(fast_mlp, "_openblas", lambda: [library])
    return library


def test_numpys_openblas_is_found_and_takes_orders():
    name = np.show_config(mode="dicts")["Build Dependencies"]["blas"]["name"]
    assert fast_mlp._openblas() or "openblas" not in name
    for library in fast_mlp._openblas():
        before = library.get_num_threads()
        library.set_num_threads(2)
        assert fast_mlp.on_one_thread(library.get_num_threads)() == 1
        assert library.get_num_threads() == 2
        library.set_num_threads(before)


def test_acting_and_training_multiply_on_one_thread(openblas: TwoThreads, monkeypatch: pytest.MonkeyPatch):
    threads: list[int] = []
    layers = FastMlp._layers

    def counted(*args: Any) -> Any:
        threads.append(openblas.get_num_threads())
        return layers(*args)

    monkeypatch.setattr(FastMlp, "_layers", counted)
    settings = {"n_steps": 8, "batch_size": 4, "n_epochs": 1, "max_preview_kl": None}
    SAFE("MlpPolicy", "CartPole-v1", device="cpu", **settings).learn(8)
    assert len(threads) == 8 + 2  # steps, minibatches
    policy, _ = both()
    policy.evaluate(observations(), some_actions(policy.action_space, 5)).values.sum().backward()
    assert set(threads) == {1}
    assert openblas.get_num_threads() == 2


def test_threads_come_back_after_an_error(openblas: TwoThreads):
    with pytest.raises(ZeroDivisionError):
        fast_mlp.on_one_thread(lambda: 1 / 0)()
    assert openblas.get_num_threads() == 2


def test_other_precisions_take_the_general_path():
    policy, _ = both()
    policy.double().set_training_mode(True)
    assert policy._fast is None


class Doubled(FlattenExtractor):
    def forward(self, obs: th.Tensor) -> th.Tensor:
        return 2 * super().forward(obs)


REPLACEMENTS: dict[str, Any] = {
    "head": lambda policy: setattr(policy, "action_net", nn.Linear(8, 3)),
    "weight": lambda policy: setattr(policy.action_net, "weight", nn.Parameter(th.ones(3, 8))),
    "critics": lambda policy: setattr(policy, "value_bias", nn.Parameter(th.ones(2, 1, 1))),
    "layer": lambda policy: policy.bodies.weights.__setitem__(0, nn.Parameter(th.ones(3, 3, 16))),
    "activation": lambda policy: policy.bodies.activations.__setitem__(1, nn.ELU()),
    "bodies": lambda policy: setattr(policy, "bodies", make(TwinCriticPolicy).bodies),
    "extractor": lambda policy: setattr(policy, "features_extractor", Doubled(policy.observation_space)),
    "flattening": lambda policy: setattr(policy.features_extractor, "flatten", nn.Hardtanh(-0.1, 0.1)),
    "assigned": lambda policy: policy.load_state_dict(
        {name: 1.5 * tensor for name, tensor in policy.state_dict().items()}, assign=True
    ),
    "pruned": lambda policy: prune.l1_unstructured(policy.action_net, "weight", 0.9),
    "normed": lambda policy: nn.utils.parametrizations.spectral_norm(policy.action_net),
}


def outputs(policy: Any) -> list[th.Tensor]:
    with th.no_grad():
        obs = observations()
        return [policy(obs)[1], policy(obs, deterministic=True)[2], *policy.evaluate(obs, th.zeros(5))[:2]]


@pytest.mark.parametrize("replace", REPLACEMENTS.values(), ids=REPLACEMENTS)
def test_what_is_replaced_is_used_at_once(replace: Any):
    policy, _ = both()
    policy.set_training_mode(False)
    before = outputs(policy)
    replace(policy)
    after = outputs(policy)
    policy._fast = None
    assert_equal(after, outputs(policy))
    assert any(not th.allclose(a, b, atol=1e-3) for a, b in zip(before, after, strict=True))


def test_parameters_lent_for_one_call_are_used_in_it_and_not_after():
    policy, _ = both()
    before = outputs(policy)
    ones = {name: th.ones_like(tensor) for name, tensor in policy.state_dict().items()}
    with th.no_grad():
        values = th.func.functional_call(policy, ones, (observations(),))[1]
    policy.load_state_dict(ones)
    assert_equal([values], outputs(policy)[:1])
    policy.load_state_dict(both()[1].state_dict())
    assert policy._fast.applies()
    assert_equal(outputs(policy), before)


@pytest.mark.parametrize(
    "module", ["action_net", "bodies", "bodies.activations.1", "features_extractor", "features_extractor.flatten"]
)
def test_hooks_are_called_from_when_they_are_registered_on(module: str):
    policy, _ = both()
    calls: list[str] = []
    handle = policy.get_submodule(module).register_forward_hook(lambda *_: calls.append(module))
    outputs(policy)
    assert len(calls) == 3
    policy.set_training_mode(True)
    outputs(policy)
    assert len(calls) == 6
    handle.remove()
    policy.set_training_mode(True)
    assert policy._fast is not None
    assert policy._takes_vectors


def test_parameters_that_change_in_place_or_move_are_seen_at_once():
    fast, general = both()
    obs = observations()
    th.manual_seed(9)
    jolt(general)
    changes: list[Any] = [
        lambda: fast.load_state_dict(general.state_dict()),
        lambda: setattr(fast.action_net.bias, "data", fast.action_net.bias.data + 1.0),
        lambda: fast._apply(lambda tensor: tensor.clone() * 0.5),
    ]
    for change in changes:
        change()
        with th.no_grad():
            expected = fast.aggregate(fast._values(fast._latents(obs)[1]))
            assert_equal([fast(obs)[1]], [expected])
            expected = fast.get_distribution(obs).log_prob(th.zeros(5))
            assert_equal([fast.evaluate(obs, th.zeros(5)).log_prob], [expected])


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda policy: pickle.loads(pickle.dumps(policy))])
def test_a_copy_has_parameters_of_its_own(duplicate: Any):
    policy, general = both()
    other = duplicate(policy)
    assert other._fast.applies()
    jolt(policy)
    obs = observations()
    assert_equal(other.evaluate(obs, th.zeros(5))[:3], general.evaluate(obs, th.zeros(5))[:3])


def test_transforms_of_torch_func_see_through_a_policy():
    policy, _ = both()
    obs = observations()
    gradient = th.func.grad(lambda obs: policy.evaluate(obs, th.zeros(5)).values.sum())(obs)
    expected = obs.clone().requires_grad_()
    policy.evaluate(expected, th.zeros(5)).values.sum().backward()
    assert_equal([gradient], [expected.grad])


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_a_policy_that_is_traced_answers_other_observations():
    policy, _ = both()
    policy.set_training_mode(False)
    first, second = observations(number=10).split(5)
    with th.no_grad():
        traced = th.jit.trace(policy, first, check_trace=False)
        assert_equal(traced(second)[1:2], policy(second)[1:2])


class Deterministic(nn.Module):
    """What SB3's guide exports."""

    def __init__(self, policy: TwinCriticPolicy) -> None:
        super().__init__()
        self.policy = policy

    def forward(self, obs: th.Tensor) -> tuple[th.Tensor, th.Tensor, th.Tensor]:
        return self.policy(obs, deterministic=True)


@EITHER_ACTIONS
@pytest.mark.parametrize("with_gradient", [False, True])
def test_a_policy_that_is_exported_answers_batches_of_any_size(action_space: spaces.Space[Any], with_gradient: bool):
    policy, _ = both(action_space=action_space)
    policy.set_training_mode(False)
    module, batch = Deterministic(policy), th.export.Dim("batch")
    with th.set_grad_enabled(with_gradient):
        exported = th.export.export(module, (observations(number=3),), dynamic_shapes=({0: batch},))
    with th.no_grad():
        obs = observations(number=7)
        assert_equal(exported.module()(obs), module(obs))
