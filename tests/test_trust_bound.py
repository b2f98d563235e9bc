"""The promise: after every update the KL to the rollout policy, over the whole batch, is within ``max_preview_kl``."""

import math
import warnings
from typing import Any

import numpy as np
import pytest
import torch as th
from hypothesis import given, settings
from hypothesis import strategies as st
from stable_baselines3.common.env_util import make_vec_env

from sb3_safe import SAFE
from sb3_safe.trust_bound import TrustBound, preview_scale, surely_within, trained_parameters, walk_back
from tests.tiny_envs import TinyEnv

FAR = [{"approx_kl": 1.0, "actions": 64}] * 2
"""Of an update that has left the bound behind in its first minibatch."""


def whole_batch_kl(model: SAFE) -> float:
    """KL(rollout || policy) of the last rollout from the buffer's own arrays and SB3's distributions."""
    buffer, policy = model.rollout_buffer, model.policy
    policy.set_training_mode(False)
    total = []
    for t in range(buffer.buffer_size):
        actions = th.as_tensor(buffer.actions[t]).float()
        actions = actions.flatten() if policy.action_space.shape == () else actions
        with th.no_grad():
            log_prob = policy.get_distribution(policy.obs_to_tensor(buffer.observations[t])[0]).log_prob(actions)
        log_ratio = log_prob.numpy().astype(np.float64) - buffer.log_probs[t]
        total.append(np.expm1(log_ratio) - log_ratio)
    return float(np.mean(total))


class Watched(SAFE):
    """Measures what every update did."""

    def train(self) -> None:
        super().train()
        self.__dict__.setdefault("kls", []).append(whole_batch_kl(self))
        self.__dict__.setdefault("kept", []).append(self.logger.name_to_value["safe/update_kept"])


def watched(kind: type[Watched] = Watched, env_id: str = "CartPole-v1", **kwargs: Any) -> Watched:
    # PPO's own clip would hold back much of what is tried here, and so would a threshold for so few actions.
    defaults: dict[str, Any] = {"n_steps": 64, "batch_size": 32, "n_epochs": 4, "seed": 0, "clip_range": 100.0}
    defaults["kl_controller_kwargs"] = {"tau_base": 0.02}
    return kind("MlpPolicy", make_vec_env(env_id, 2, seed=0), policy_kwargs={"net_arch": [16]}, **(defaults | kwargs))


@pytest.mark.parametrize("learning_rate", [1e-2, 1e-1, 1.0])
@pytest.mark.parametrize(
    ("env_id", "kwargs"),
    [
        ("CartPole-v1", {}),
        ("Pendulum-v1", {}),
        ("Pendulum-v1", {"use_sde": True}),
        ("Tiny-vector-multi_discrete-v0", {}),
        ("Tiny-vector-multi_binary-v0", {}),
    ],
    ids=["discrete", "box", "sde", "multi_discrete", "multi_binary"],
)
def test_no_update_moves_the_policy_beyond_the_bound_and_training_goes_on(
    env_id: str, kwargs: dict[str, Any], learning_rate: float
):
    model = watched(env_id=env_id, learning_rate=learning_rate, max_preview_kl=0.01, **kwargs).learn(5 * 128)
    assert len(model.kls) == 5
    assert max(model.kls) <= 0.01 * (1 + 1e-4)
    assert max(model.kls) > 1e-4
    assert all(th.isfinite(parameter).all() for parameter in model.policy.parameters())


@pytest.mark.parametrize("learning_rate", [1e-2, 1e-1, 1.0])
def test_without_a_bound_the_same_training_goes_beyond_it(learning_rate: float):
    assert max(watched(learning_rate=learning_rate, max_preview_kl=None).learn(5 * 128).kls) > 0.02


@settings(max_examples=15)
@given(
    st.floats(-4, 1).map(lambda x: 10**x),
    st.floats(-3, 0).map(lambda x: 10**x),
    st.integers(1, 3),
    st.sampled_from([16, 64, 128]),
    st.integers(0, 10_000),
)
def test_the_bound_holds_for_any_learning_rate_bound_and_schedule(
    learning_rate: float, bound: float, n_epochs: int, batch_size: int, seed: int
):
    model = watched(
        learning_rate=learning_rate, max_preview_kl=bound, n_epochs=n_epochs, batch_size=batch_size, seed=seed
    )
    model.learn(2 * 128)
    assert max(model.kls) <= bound * (1 + 1e-4)


def test_a_small_update_is_kept_whole():
    model = watched(learning_rate=1e-5, max_preview_kl=0.5).learn(256)
    assert model.kept == [1.0, 1.0]


def learned(**kwargs: Any) -> tuple[Watched, list[th.Tensor]]:
    model = watched(**kwargs).learn(128)
    return model, [parameter.detach().clone() for parameter in trained_parameters(model.policy)]


def collect(model: SAFE) -> TrustBound:
    """A fresh rollout, so that the policy as it is now is the one that collected the data."""
    _, callback = model._setup_learn(10**6, None)
    assert model.collect_rollouts(model.env, callback, model.rollout_buffer, model.n_steps)
    return TrustBound(model.policy, model.max_preview_kl)


def keep(bound: TrustBound, model: SAFE) -> float:
    return bound.keep(FAR, lambda: model.rollout_buffer.in_order(model.batch_size))


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize(
    "env_id", ["CartPole-v1", "Pendulum-v1", "Tiny-vector-multi_discrete-v0", "Tiny-vector-multi_binary-v0"]
)
def test_parameters_that_are_not_finite_go_back_to_exactly_the_old_ones(env_id: str, value: float):
    model, start = learned(env_id=env_id)
    bound = collect(model)
    with th.no_grad():
        for parameter in trained_parameters(model.policy):
            parameter.view(-1)[0] = value
    assert keep(bound, model) == 0.0
    for before, after in zip(start, trained_parameters(model.policy), strict=True):
        assert th.equal(before, after)


def test_walking_back_stays_on_the_line_to_the_old_parameters():
    model, start = learned(max_preview_kl=0.01)
    bound = collect(model)
    direction = [th.randn_like(parameter) for parameter in start]
    with th.no_grad():
        for parameter, step in zip(trained_parameters(model.policy), direction, strict=True):
            parameter.add_(3.0 * step)
    kept = keep(bound, model)
    assert 0.0 < kept < 1.0
    assert whole_batch_kl(model) <= 0.01
    for before, after, step in zip(start, trained_parameters(model.policy), direction, strict=True):
        np.testing.assert_allclose((after - before).detach(), kept * 3.0 * step, atol=1e-5)


@pytest.mark.parametrize("unknown", [math.inf, math.nan])
def test_a_kl_that_cannot_be_measured_is_walked_back_from_and_not_all_is_given_up(unknown: float):
    place = [1.0]

    def move(values: Any) -> None:
        place[:] = [float(value) for value in values]

    kept = walk_back([th.zeros(())], [th.ones(())], move, lambda: unknown if place[0] > 0.5 else place[0] ** 2, 0.04)
    assert 0.0 < kept <= 0.2
    assert place[0] == pytest.approx(kept)


def state(model: SAFE) -> dict[str, th.Tensor]:
    return {name: tensor.clone() for name, tensor in model.policy.state_dict().items()}


@pytest.mark.parametrize("bound", [0.01, 1e-30])
def test_target_critics_go_back_by_the_share_by_which_the_critics_do(bound: float, monkeypatch: pytest.MonkeyPatch):
    model = watched(critic_tau=0.5, learning_rate=0.1, max_preview_kl=bound)
    keep, ends = TrustBound.keep, []
    monkeypatch.setattr(TrustBound, "keep", lambda *args: (ends.append(state(model)), keep(*args))[1])
    starts = state(model)
    model.learn(128)
    kept = model.kept[0]
    assert kept == 0 if bound < 1e-10 else 0 < kept < 1
    moved = {name for name in starts if not th.equal(starts[name], ends[0][name]) and name != "return_scale"}
    assert {"target_bodies.weights.0", "target_weight", "target_bias"} <= moved
    for name in moved:
        expected = th.lerp(starts[name], ends[0][name], kept)
        np.testing.assert_allclose(state(model)[name], expected, atol=1e-6, err_msg=name)


def test_a_leap_of_the_last_step_is_walked_back_though_no_minibatch_measured_it():
    model = watched(learning_rate=1.0, max_preview_kl=0.05, n_epochs=1, batch_size=64)
    step, taken = model._step, iter([False, True])
    # The first step of the update is skipped, as one whose gradient is not finite is.
    model._step = lambda *args: next(taken) and step(*args)  # type: ignore[method-assign]
    model.learn(128)
    assert model.kls[0] <= 0.05 * (1 + 1e-4)


def test_minibatches_of_a_few_actions_do_not_vouch_for_the_rest():
    settings = {"n_steps": 3, "batch_size": 2, "n_epochs": 1, "learning_rate": 0.3, "max_preview_kl": 0.02, "seed": 2}
    model = watched(env_id="Acrobot-v1", **settings).learn(6 * 40)
    assert max(model.kls) <= 0.02 * 1.01
    assert max(model.kept) == 1


def test_a_last_minibatch_of_one_action_does_not_leap_unmeasured():
    # A single advantage is not normalised, and this one is large.
    class Generous(TinyEnv):
        def step(self, action: Any) -> Any:
            observation, reward, *rest = super().step(action)
            return observation, 1e3 * (reward > 0), *rest

    model = Watched(
        "MlpPolicy",
        Generous(),
        n_steps=65,
        batch_size=64,
        n_epochs=1,
        learning_rate=1e-2,
        max_grad_norm=1e9,
        vf_coef=0.0,
        max_preview_kl=0.01,
        seed=0,
        policy_kwargs={"optimizer_class": th.optim.SGD},
    )
    model.learn(15 * model.n_steps)
    assert max(model.kls) <= 0.01 * (1 + 1e-4)


def test_a_bound_below_rounding_ends_and_keeps_the_old_parameters():
    model, start = learned(max_preview_kl=1e-30)
    bound = collect(model)
    # The rollout's own log-probabilities are a rounding away from those that are computed anew.
    model.rollout_buffer.log_probs += 1e-4
    model.rollout_buffer._flat = {}
    calls = iter(range(50))

    def counted(batches: Any, measure: Any = bound.kl) -> float:
        assert next(calls, None) is not None, "walks back for ever"
        return float(measure(batches))

    bound.kl = counted  # type: ignore[method-assign]
    with th.no_grad():
        for parameter in trained_parameters(model.policy):
            parameter.add_(0.1)
    assert keep(bound, model) == 0.0
    for before, after in zip(start, trained_parameters(model.policy), strict=True):
        assert th.equal(before, after)


def preview(*kls: float) -> float:
    return TrustBound(watched().policy, 0.04).step_scale([{"approx_kl": kl} for kl in kls])


def test_the_preview_shrinks_a_step_by_the_root_of_the_foreseen_excess():
    # KL grows with the square of the distance: 0.01 after one step, 0.04 after two, 0.09 after three.
    assert preview(0.0) == 1.0
    assert preview(0.0, 0.01) == pytest.approx(1.0)
    assert preview(0.01, 0.04) == pytest.approx(math.sqrt(0.04 / 0.09))
    # Coming back: the KL is taken to stay.
    assert preview(0.16, 0.09) == pytest.approx(math.sqrt(0.04 / 0.09))


@pytest.mark.parametrize("kls", [(0.1, math.inf), (math.inf, math.inf), (0.0, math.inf)])
def test_an_infinite_kl_stops_the_next_step(kls: tuple[float, float]):
    assert preview(*kls) == 0.0


def test_minibatches_vouch_for_a_last_step_of_twice_the_longest_before():
    kls = [0.0, 0.01, 0.04, 0.04]  # at distances of 0, 0.1, 0.2 and 0.2, so the end is within 0.4
    assert surely_within(kls, 0.161)
    assert not surely_within(kls, 0.159)
    assert not surely_within(kls[:1], 0.161)
    assert not surely_within([*kls, math.nan], 0.161)


def test_a_kl_that_rounding_made_negative_is_no_distance():
    assert preview_scale(-1e-9, -1e-9, 0.04) == 1.0
    assert surely_within([-1e-9, 0.01], 0.1)


def test_the_controller_is_told_the_kl_of_the_last_epoch_at_the_share_of_the_update_that_was_kept():
    for bound, whole in ((None, True), (1e-3, False)):
        measured: list[float] = []

        class Recorder(Watched):
            def _gradient(self, pieces: Any, seen: list[float] = measured) -> dict[str, float]:
                means = super()._gradient(pieces)
                seen.append(means["approx_kl"])
                return means

        model = watched(Recorder, learning_rate=0.03, n_epochs=3, max_preview_kl=bound).learn(128)
        assert (model.kept == [1.0]) == whole
        # The KL grows with the square of the distance.
        assert model.measured_kl == pytest.approx(np.mean(measured[-4:]) * model.kept[0] ** 2) != 0


def test_an_update_that_was_undone_after_an_epoch_that_is_not_finite_leaves_the_controller_a_kl_of_zero():
    leap = {"learning_rate": 1e38, "n_epochs": 2, "batch_size": 128, "max_preview_kl": 0.5}
    model = watched(**leap).learn(128)
    assert model.kept == [0.0]
    assert model.measured_kl == 0.0
    model.learn(128, reset_num_timesteps=False)
    assert model.controller.kl_short == 0.0


def test_a_shrunken_step_does_not_stay_in_the_learning_rate():
    model, _ = learned(learning_rate=1e-2)
    batch = next(model.rollout_buffer.get(64))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model._gradient([batch])
        model._step(0.25)
    assert [group["lr"] for group in model.policy.optimizer.param_groups] == [1e-2]


def test_the_length_of_a_step_is_scaled():
    steps = []
    for scale in (1.0, 0.25):
        model, before = learned(learning_rate=1e-2)
        model._gradient([next(model.rollout_buffer.in_order(64))])
        model._step(scale)
        steps.append(
            th.cat(
                [
                    (now - old).detach().flatten()
                    for now, old in zip(trained_parameters(model.policy), before, strict=True)
                ]
            )
        )
    np.testing.assert_allclose(steps[1], 0.25 * steps[0], atol=1e-6)


def test_a_gradient_that_is_not_finite_is_skipped():
    model, before = learned()
    model._gradient([next(model.rollout_buffer.in_order(64))])
    trained_parameters(model.policy)[0].grad[0] = math.nan
    assert not model._step(1.0)
    for old, now in zip(before, trained_parameters(model.policy), strict=True):
        assert th.equal(old, now)
