"""It learns: end to end, by the preset of an environment."""

import gymnasium as gym
import pytest
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.monitor import Monitor

from sb3_safe import SAFE


def score(model: SAFE, env_id: str, episodes: int = 10) -> float:
    env = Monitor(gym.make(env_id))
    env.reset(seed=1)
    mean, _ = evaluate_policy(model, env, n_eval_episodes=episodes)
    assert isinstance(mean, float)
    return mean


def test_cartpole_is_learned_within_seconds():
    # Acting at random brings about 22.
    assert score(SAFE("CartPole-v1", seed=0).learn(20_000), "CartPole-v1") > 100


@pytest.mark.slow
@pytest.mark.parametrize("estimator", ["k1", "k2", "k3", "exact"])
def test_cartpole_is_learned_near_the_initial_policy(estimator: str):
    model = SAFE("CartPole-v1", seed=0, kl_reference="initial", kl_estimator=estimator).learn(40_000)
    assert score(model, "CartPole-v1") > 200


@pytest.mark.slow
def test_cartpole_is_solved_within_the_budget_of_its_preset():
    assert score(SAFE("CartPole-v1", seed=0).learn(), "CartPole-v1", 50) > 475


@pytest.mark.slow
def test_the_pendulum_is_swung_up():
    # Acting at random brings about -1200.
    assert score(SAFE("Pendulum-v1", seed=0).learn(), "Pendulum-v1", 20) > -300
