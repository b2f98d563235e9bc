"""Environments of a few numbers, one per kind of observation and action space."""

from typing import Any, ClassVar

import gymnasium as gym
import numpy as np
from gymnasium import spaces

OBSERVATIONS: dict[str, spaces.Space[Any]] = {
    "vector": spaces.Box(-np.inf, np.inf, (3,), np.float32),
    "dict": spaces.Dict({"numbers": spaces.Box(-1.0, 1.0, (2,), np.float32), "sign": spaces.Discrete(3)}),
    "image": spaces.Box(0, 255, (36, 36, 1), np.uint8),
}
ACTIONS: dict[str, spaces.Space[Any]] = {
    "discrete": spaces.Discrete(3),
    "box": spaces.Box(-1.0, 1.0, (2,), np.float32),
    "multi_discrete": spaces.MultiDiscrete([3, 2]),
    "multi_binary": spaces.MultiBinary(3),
}


class TinyEnv(gym.Env[Any, Any]):
    """Independent random observations; a random sign decides which action pays."""

    metadata: ClassVar[dict[str, Any]] = {"render_modes": ["rgb_array"]}

    def __init__(
        self, observations: str = "vector", actions: str = "discrete", length: int = 7, render_mode: str | None = None
    ) -> None:
        self.render_mode = render_mode
        self.observation_space = OBSERVATIONS[observations]
        self.action_space = ACTIONS[actions]
        self.kind, self.length = observations, length

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        self.steps = 0
        return self._observe(), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        self.steps += 1
        reward = float(np.sum(action) * self.sign)
        over = self.steps >= self.length
        # Odd lengths end, even lengths run out of time, so that both ways of finishing occur.
        return self._observe(), reward, over and self.length % 2 == 1, over and self.length % 2 == 0, {}

    def _observe(self) -> Any:
        numbers = self.np_random.uniform(-1, 1, 2).astype(np.float32)
        self.sign = int(self.np_random.integers(-1, 2))
        if self.kind == "dict":
            return {"numbers": numbers, "sign": self.sign + 1}
        if self.kind == "image":
            return np.full((36, 36, 1), 100 * (self.sign + 1), np.uint8)
        return np.array([*numbers, self.sign], np.float32)


class PoisonedEnv(TinyEnv):
    """A tiny environment that, from one step on, hands out a value that is not finite."""

    def __init__(
        self, after: int = 100, reward: float | None = None, observation: float | None = None, **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        self.after, self.reward, self.observation, self.total = after, reward, observation, 0

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        observation, reward, terminated, truncated, info = super().step(action)
        self.total += 1
        if self.total > self.after:
            reward = reward if self.reward is None else self.reward
            if self.observation is not None:
                observation = np.full_like(observation, self.observation)
        return observation, reward, terminated, truncated, info
