from typing import Any

import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3.common.buffers import DictRolloutBuffer, RolloutBuffer

from sb3_safe.buffers import AnnotatedRollout, SafeDictRolloutBuffer, SafeRolloutBuffer, buffer_class_for
from tests.tiny_envs import ACTIONS, OBSERVATIONS

T, N, GAMMA, LAMBDA = 5, 3, 0.9, 0.8


def fill(kind: type[RolloutBuffer], observation_space: spaces.Space[Any], action_space: spaces.Space[Any]) -> Any:
    """The same rollout whatever the class; its last state is taken for terminal in the second environment."""
    generator = np.random.default_rng(0)
    observation_space.seed(0)
    action_space.seed(0)
    buffer = kind(T, observation_space, action_space, gamma=GAMMA, gae_lambda=LAMBDA, n_envs=N)
    for _ in range(T):
        samples = [observation_space.sample() for _ in range(N)]
        observation: Any = (
            np.stack(samples)
            if not isinstance(observation_space, spaces.Dict)
            else {key: np.stack([sample[key] for sample in samples]) for key in observation_space}
        )
        buffer.add(
            observation,
            np.stack([action_space.sample() for _ in range(N)]),
            generator.normal(size=N),
            generator.random(N) < 0.3,
            th.from_numpy(generator.normal(size=N)),
            th.from_numpy(generator.normal(size=N)),
        )
    buffer.compute_returns_and_advantage(th.from_numpy(generator.normal(size=N)), np.array([False, True, False]))
    return buffer


def filled(observations: str = "vector", actions: str = "discrete") -> AnnotatedRollout:
    space = OBSERVATIONS[observations]
    return fill(buffer_class_for(space), space, ACTIONS[actions])


def gae(rewards: np.ndarray, buffer: AnnotatedRollout) -> np.ndarray:
    """Advantages ``[T, N]`` as the discounted sum of what each later step was better than expected."""
    alive = np.vstack([1 - buffer.episode_starts[1:], [[1, 0, 1]]])
    following = np.vstack([buffer.values[1:], buffer._last_values.numpy()[None]])
    surprise = rewards + GAMMA * following * alive - buffer.values
    advantages = np.zeros((T, N))
    for t in range(T):
        weight = np.ones(N)
        for later in range(t, T):
            advantages[t] += weight * surprise[later]
            weight *= GAMMA * LAMBDA * alive[later]
    return advantages


@pytest.mark.parametrize("actions", ACTIONS)
@pytest.mark.parametrize("observations", ["vector", "dict"])
def test_minibatches_are_those_of_sb3(observations: str, actions: str):
    ours = filled(observations, actions)
    base = DictRolloutBuffer if observations == "dict" else RolloutBuffer
    theirs = fill(base, OBSERVATIONS[observations], ACTIONS[actions])
    np.random.seed(3)
    mine = list(ours.get(4))
    np.random.seed(3)
    for a, b in zip(mine, theirs.get(4), strict=True):
        for name in ("actions", "old_values", "old_log_prob", "advantages", "returns"):
            assert th.equal(getattr(a, name), getattr(b, name)), name
            assert getattr(a, name).dtype == getattr(b, name).dtype
        if observations == "dict":
            assert a.observations.keys() == b.observations.keys()
            assert all(th.equal(a.observations[key], b.observations[key]) for key in b.observations)
        else:
            assert th.equal(a.observations, b.observations)


def test_minibatches_are_another_permutation_every_epoch_and_leave_nothing_out():
    buffer = filled()
    np.random.seed(0)
    epochs = [th.cat([batch.advantages for batch in buffer.get(4)]) for _ in range(2)]
    assert not th.equal(*epochs)
    for epoch in epochs:
        np.testing.assert_array_equal(np.sort(epoch), np.sort(buffer.advantages, axis=None))


def test_without_a_batch_size_there_is_one_minibatch():
    (batch,) = filled().get()
    assert len(batch.advantages) == T * N


def test_storage_keeps_its_shape_after_minibatches_were_taken():
    buffer = filled()
    list(buffer.get(4))
    assert buffer.rewards.shape == buffer.advantages.shape == (T, N)
    assert buffer.observations.shape == (T, N, 3)
    assert buffer.actions.shape == (T, N, 1)


def test_flat_order_goes_environment_by_environment():
    buffer = filled()
    expected = np.concatenate([buffer.rewards[:, env] for env in range(N)])
    np.testing.assert_array_equal(buffer.flat("rewards"), expected)
    np.testing.assert_array_equal(buffer.unflatten(expected), buffer.rewards)
    ordered = th.cat([batch.advantages for batch in buffer.in_order(4)])
    np.testing.assert_array_equal(ordered, np.concatenate([buffer.advantages[:, env] for env in range(N)]))


def test_going_through_in_order_draws_no_random_numbers():
    buffer = filled()
    np.random.seed(0)
    states = [np.random.get_state()[1].copy(), th.get_rng_state()]
    list(buffer.in_order(4))
    np.testing.assert_array_equal(np.random.get_state()[1], states[0])
    assert th.equal(th.get_rng_state(), states[1])


@pytest.mark.parametrize("observations", ["vector", "dict"])
def test_annotations_stay_with_their_actions(observations: str):
    buffer = filled(observations)
    buffer.annotate(
        lambda batch: {
            "reference_log_prob": 2 * batch.advantages,
            "old_critic_values": th.stack([batch.advantages, -batch.advantages], -1),
        },
        batch_size=5,
    )
    for batch in buffer.get(4):
        assert th.equal(batch.reference_log_prob, 2 * batch.advantages)
        assert th.equal(batch.old_critic_values, th.stack([batch.advantages, -batch.advantages], -1))


def test_a_new_rollout_has_no_annotations_of_the_old_one():
    buffer = filled()
    buffer.annotate(lambda batch: {"reference_log_prob": batch.advantages}, batch_size=4)
    list(buffer.get(4))
    buffer.reset()
    assert next(buffer.in_order(4)).reference_log_prob is None
    assert next(buffer.in_order(4)).advantages.abs().max() == 0


def test_log_probabilities_can_be_replaced_by_what_training_computes():
    buffer = filled()
    list(buffer.get(4))
    buffer.annotate(lambda batch: {"log_probs": -batch.advantages}, batch_size=5)
    for batch in buffer.get(4):
        assert th.equal(batch.old_log_prob, -batch.advantages)
    np.testing.assert_array_equal(buffer.log_probs, -buffer.advantages)


def test_advantages_are_discounted_sums_of_temporal_differences():
    buffer = filled()
    expected = gae(buffer.rewards, buffer)
    np.testing.assert_allclose(buffer.advantages, expected, atol=1e-5)
    np.testing.assert_allclose(buffer.returns, expected + buffer.values, atol=1e-5)


def test_a_penalty_on_rewards_reaches_advantages_and_minibatches():
    buffer = filled()
    list(buffer.in_order(4))
    penalties = np.arange(T * N, dtype=np.float32)
    rewards = buffer.rewards - np.stack([penalties[env * T : (env + 1) * T] for env in range(N)], axis=1)
    buffer.subtract_from_rewards(penalties)
    expected = gae(rewards, buffer)
    np.testing.assert_allclose(buffer.rewards, rewards)
    np.testing.assert_allclose(buffer.advantages, expected, atol=1e-4)
    np.testing.assert_allclose(th.cat([b.advantages for b in buffer.in_order(4)]), expected.T.flatten(), atol=1e-4)


def test_a_penalty_on_rewards_leaves_advantages_of_ones_own():
    class Scaled(SafeRolloutBuffer):
        def compute_returns_and_advantage(self, last_values: th.Tensor, dones: np.ndarray) -> None:
            super().compute_returns_and_advantage(last_values, dones)
            self.advantages *= 10.0

    buffer = fill(Scaled, OBSERVATIONS["vector"], ACTIONS["discrete"])
    buffer.subtract_from_rewards(np.ones(T * N, dtype=np.float32))
    np.testing.assert_allclose(buffer.advantages, 10.0 * gae(buffer.rewards, buffer), atol=1e-4)


def test_an_incomplete_rollout_has_no_minibatches():
    buffer = SafeRolloutBuffer(T, OBSERVATIONS["vector"], ACTIONS["discrete"], n_envs=N)
    with pytest.raises(AssertionError, match="not complete"):
        next(buffer.get(4))


def test_the_buffer_fits_the_observations():
    assert buffer_class_for(OBSERVATIONS["dict"]) is SafeDictRolloutBuffer
    assert buffer_class_for(OBSERVATIONS["image"]) is SafeRolloutBuffer
