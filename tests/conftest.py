import itertools

import gymnasium as gym
import pytest
import torch as th
from hypothesis import settings

from tests.tiny_envs import ACTIONS, OBSERVATIONS

th.set_num_threads(1)
# The first example of a test may load half of torch: no deadline. Derandomised: a failure is found again.
settings.register_profile("sb3_safe", deadline=None, derandomize=True, max_examples=60)
settings.load_profile("sb3_safe")

for observations, actions in itertools.product(OBSERVATIONS, ACTIONS):
    gym.register(
        f"Tiny-{observations}-{actions}-v0",
        entry_point="tests.tiny_envs:TinyEnv",
        kwargs={"observations": observations, "actions": actions},
    )
gym.register("Poisoned-v0", entry_point="tests.tiny_envs:PoisonedEnv")


@pytest.fixture(autouse=True)
def _seeded() -> None:
    th.manual_seed(0)
