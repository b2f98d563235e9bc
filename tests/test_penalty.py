"""The KL penalty moves parameters: it has a gradient, and that gradient is the one of the KL."""

from typing import Any

import numpy as np
import pytest
import torch as th
from stable_baselines3.common.torch_layers import FlattenExtractor

from sb3_safe import SAFE, AdaptiveKL, FixedKL, SafeController
from sb3_safe.buffers import SafeSamples
from sb3_safe.trust_bound import trained_parameters


class InPrecisionOfPolicy(FlattenExtractor):
    """SB3 casts observations to single precision; finite differences need double."""

    def __init__(self, space: Any) -> None:
        super().__init__(space)
        self.register_buffer("one", th.ones(1))

    def forward(self, observations: th.Tensor) -> th.Tensor:
        return super().forward(observations) * self.one


ESTIMATORS = [("initial", "k2"), ("initial", "k3"), ("initial", "exact"), ("rollout", "k3")]
ENVS = ["CartPole-v1", "Pendulum-v1", "Tiny-vector-multi_discrete-v0", "Tiny-vector-multi_binary-v0"]


def make(env_id: str = "CartPole-v1", **kwargs: Any) -> SAFE:
    settings: dict[str, Any] = {"n_steps": 32, "batch_size": 16, "n_epochs": 2, "seed": 0, "learning_rate": 1e-3}
    policy_kwargs = {"net_arch": [6], "features_extractor_class": InPrecisionOfPolicy}
    return SAFE("MlpPolicy", env_id, policy_kwargs=policy_kwargs, **(settings | kwargs))


def flat(tensors: Any) -> np.ndarray:
    return th.cat([tensor.detach().flatten() for tensor in tensors]).numpy()


def update_again(model: SAFE, coef: float, seed: int = 1) -> np.ndarray:
    """One more rollout and update, with another coefficient and the same random numbers; the parameters after it."""
    model.controller.coef = coef
    model.set_random_seed(seed)
    model.env.seed(seed)
    model.env.reset()
    model.learn(32, reset_num_timesteps=True)
    return flat(trained_parameters(model.policy))


@pytest.mark.parametrize(("reference", "estimator"), [*ESTIMATORS, ("initial", "k1")])
def test_the_strength_of_the_penalty_changes_the_parameters_after_an_update(tmp_path, reference: Any, estimator: Any):
    model = make(kl_controller="fixed", kl_reference=reference, kl_estimator=estimator, max_preview_kl=None).learn(64)
    model.save(tmp_path / "model")
    results = []
    for coef in (0.0, 0.0, 1000.0):
        results.append(update_again(SAFE.load(tmp_path / "model", env=model.env), coef))
    np.testing.assert_array_equal(results[0], results[1])
    assert np.abs(results[2] - results[0]).max() > 1e-4


def test_a_strong_penalty_keeps_the_policy_near_the_start():
    distances = []
    for coef in (0.0, 10.0):
        model = make(
            kl_controller="fixed", kl_controller_kwargs={"coef": coef}, kl_reference="initial", kl_estimator="exact",
            learning_rate=1e-2, n_epochs=10,
        )  # fmt: skip
        model.learn(320)
        obs = model.policy.obs_to_tensor(model.rollout_buffer.observations[:, 0])[0]
        distances.append(model.policy.exact_kl(obs).mean().item())
    assert distances[1] < 0.2 * distances[0]


def double(batch: SafeSamples) -> SafeSamples:
    return SafeSamples(*(None if value is None else value.double() for value in batch))


def one_batch(model: SAFE) -> SafeSamples:
    """The first minibatch of the last rollout, everything in double precision."""
    model.policy.double()
    batch = double(next(model.rollout_buffer.in_order(16)))
    if batch.reference_log_prob is None:
        return batch
    with th.no_grad():
        reference = log_probs(model.policy.reference, batch)
    np.testing.assert_allclose(batch.reference_log_prob, reference, atol=1e-5)
    return batch._replace(reference_log_prob=reference)


def log_probs(policy: Any, batch: SafeSamples) -> th.Tensor:
    """By SB3's distributions, not by the formulas that training uses."""
    actions = batch.actions.long().flatten() if policy.action_space.shape == () else batch.actions
    return policy.get_distribution(batch.observations).log_prob(actions)


def objective(model: SAFE, batch: SafeSamples) -> float:
    """What the KL term of the loss should be, written anew."""
    with th.no_grad():
        log_prob, old = log_probs(model.policy, batch).numpy(), batch.old_log_prob.numpy()
        if model.kl_reference == "rollout":
            return float(np.mean(np.exp(log_prob - old) - 1 - (log_prob - old)))
        drift = log_prob - log_probs(model.policy.reference, batch).numpy()
        if model.kl_estimator == "k2":
            return float(np.mean(drift**2) / 2)
        if model.kl_estimator == "k3":
            return float(np.mean(np.exp(log_prob - old) * (np.exp(-drift) - 1 + drift)))
        p, q = (one.get_distribution(batch.observations).distribution for one in (model.policy, model.policy.reference))
        pairs = zip(p, q, strict=True) if isinstance(p, list) else [(p, q)]
        return float(sum(th.distributions.kl_divergence(*pair).sum() for pair in pairs) / len(log_prob))


def loss_and_gradient(model: SAFE, batch: SafeSamples) -> tuple[float, np.ndarray]:
    loss, _ = model._loss(batch)
    parameters = trained_parameters(model.policy)
    gradients = th.autograd.grad(loss, parameters, allow_unused=True)
    return loss.item(), flat(th.zeros_like(p) if g is None else g for p, g in zip(parameters, gradients, strict=True))


def slopes(model: SAFE, batch: SafeSamples, step: float = 1e-6) -> np.ndarray:
    """Central differences of :func:`objective` in every parameter."""
    found = []
    for parameter in trained_parameters(model.policy):
        entries = parameter.data.view(-1)
        for index in range(len(entries)):
            centre, values = entries[index].item(), []
            for shifted in (centre + step, centre - step):
                entries[index] = shifted
                values.append(objective(model, batch))
            entries[index] = centre
            found.append((values[0] - values[1]) / (2 * step))
    return np.array(found)


@pytest.mark.parametrize("env_id", ENVS)
@pytest.mark.parametrize(("reference", "estimator"), ESTIMATORS)
def test_the_gradient_of_the_penalty_is_the_coefficient_times_that_of_the_kl(
    env_id: str, reference: Any, estimator: Any
):
    model = make(env_id, kl_controller="fixed", kl_reference=reference, kl_estimator=estimator, learning_rate=1e-2)
    model.learn(64)
    batch = one_batch(model)
    results = []
    for coef in (0.0, 3.0):
        model.controller.coef = coef
        results.append(loss_and_gradient(model, batch))
    (loss, without), (punished, with_penalty) = results
    assert punished - loss == pytest.approx(3.0 * objective(model, batch), abs=1e-9)
    expected = 3.0 * slopes(model, batch)
    assert np.abs(expected).max() > 1e-3
    np.testing.assert_allclose(with_penalty - without, expected, atol=1e-7)


def test_the_safe_controller_punishes_only_beyond_its_threshold():
    model = make(
        kl_controller_kwargs={"threshold": "constant", "tau_base": 0.1, "coef": 2.0, "price": 0.0},
        kl_reference="initial",
        kl_estimator="k2",
        learning_rate=1e-2,
    )
    model.learn(64)
    batch = one_batch(model)
    assert isinstance(model.controller, SafeController)
    gradients = []
    for threshold in (1e6, 1e7, -1.0):
        model.controller.threshold = threshold
        gradients.append(loss_and_gradient(model, batch)[1])
    np.testing.assert_array_equal(gradients[0], gradients[1])
    drift = (log_probs(model.policy, batch) - log_probs(model.policy.reference, batch)).mean().item()
    coefficient = 2 * 2.0 * model.controller.gate * (max(drift, model.controller.kl_short) + 1.0) / 0.1
    np.testing.assert_allclose(gradients[2] - gradients[0], coefficient * slopes(model, batch), rtol=1e-4, atol=1e-6)


def certain(max_drift: float | None, log_odds: float = 12.0, **kwargs: Any) -> SAFE:
    """A policy that has become certain of one of three actions, which its start took a third of the time."""
    model = make(
        "Tiny-vector-discrete-v0",
        kl_reference="initial",
        kl_controller_kwargs={"max_drift": max_drift, "coef": 0.5},
        learning_rate=2e-2,
        **kwargs,
    )
    with th.no_grad():
        model.policy.action_net.bias[0] += log_odds
    return model


def share_of_certain_action(model: SAFE) -> float:
    observations = th.as_tensor(model.rollout_buffer.observations[:, 0])
    return model.policy.get_distribution(observations).distribution.probs[:, 0].mean().item()


def test_an_action_the_policy_is_certain_of_and_the_start_was_not_is_unlearned():
    shares = []
    for max_drift in (None, 2.0, 1.0):  # it drifts by log 3 = 1.1 nats
        model = certain(max_drift).learn(20 * 32, log_interval=1000)  # or the log is written and forgotten
        shares.append(share_of_certain_action(model))
        logged = model.logger.name_to_value.get("safe/lost")
        assert (logged is None) == (max_drift is None)
    without, within, beyond = shares
    # Neither reward nor penalty reach it.
    assert without > 0.999
    assert within == without
    assert beyond < 0.9


@pytest.mark.parametrize("log_odds", [25.0, 40.0])
def test_an_action_is_unlearned_however_certain_the_policy_is(log_odds: float):
    """Also where its probability is 1 in single precision."""
    model = certain(1.0, log_odds)

    def gap() -> float:
        logits = model.policy.action_net.bias.detach()
        return (logits[0] - logits[1:].logsumexp(0)).item()

    before = gap()
    model.learn(10 * 32)
    assert gap() < before - 1.0


def test_while_the_critics_warm_up_no_action_is_unlearned():
    model = certain(1.0, critic_warmup=2)
    head = model.policy.action_net.weight
    before = head.detach().clone()
    assert th.equal(model.learn(2 * 32).policy.action_net.weight, before)
    model.learn(32, reset_num_timesteps=False)
    assert not th.equal(head, before)


def test_a_limit_that_nothing_passes_changes_nothing():
    parameters = [
        flat(make(kl_reference="initial", kl_controller_kwargs={"max_drift": limit}).learn(96).policy.parameters())
        for limit in (None, 50.0)
    ]
    np.testing.assert_array_equal(*parameters)


def test_densities_have_no_limit_and_neither_has_the_rollout_policy():
    for env_id, reference in (("Pendulum-v1", "initial"), ("CartPole-v1", "rollout")):
        model = make(env_id, kl_reference=reference, kl_controller_kwargs={"max_drift": 1e-9})
        model.learn(64, log_interval=1000)
        assert next(model.rollout_buffer.in_order(16)).lost is None
        assert "safe/lost" not in model.logger.name_to_value


def test_k1_takes_the_log_ratio_off_the_reward_of_each_action():
    seen = {}

    class Recorder(SAFE):
        def train(self) -> None:
            buffer = self.rollout_buffer
            seen.update(
                rewards=buffer.rewards.copy(), log_probs=buffer.log_probs.copy(), observations=buffer.observations
            )
            seen["actions"] = th.as_tensor(buffer.actions).flatten()
            observations = th.as_tensor(buffer.observations).flatten(0, 1)
            seen["reference"] = self.policy.reference.get_distribution(observations).log_prob(seen["actions"])
            super().train()

    model = Recorder("MlpPolicy", "CartPole-v1", n_steps=32, batch_size=16, n_epochs=2, seed=0, learning_rate=1e-2,
                     kl_controller=FixedKL, kl_controller_kwargs={"coef": 0.5}, kl_reference="initial",
                     kl_estimator="k1")  # fmt: skip
    model.learn(96)
    drift = seen["log_probs"].flatten() - seen["reference"].detach().numpy()
    assert np.abs(drift).max() > 1e-2
    # Every step of a pole that stands pays 1, and no episode runs out of time here.
    np.testing.assert_allclose(seen["rewards"].flatten(), 1.0 - 0.5 * drift, atol=1e-5)


@pytest.mark.parametrize("reference", ["initial", "rollout"])
def test_the_controller_is_told_once_a_rollout_what_it_showed(reference: Any):
    told = []

    class Listener(AdaptiveKL):
        def update(self, returns: Any, kl: float, entropy: float) -> None:
            told.append((list(returns), kl, entropy))

    model = make("Tiny-vector-multi_discrete-v0", n_steps=30, kl_controller=Listener, kl_reference=reference)
    model.learn(120)
    # Episodes last 7 steps.
    assert [len(returns) for returns, _, _ in told] == [4, 4, 4, 5]
    episodes = [info["r"] for info in model.ep_info_buffer]
    assert [r for returns, _, _ in told for r in returns] == episodes
    assert told[0][1] == pytest.approx(0.0, abs=1e-6)
    assert all(kl != 0 for _, kl, _ in told[1:])
    # Two dimensions of 3 and 2 actions: an untrained policy is close to uniform.
    assert told[0][2] == pytest.approx((np.log(3) + np.log(2)) / 2, abs=0.1)
