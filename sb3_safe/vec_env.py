"""Gymnasium's own vector environments as Stable-Baselines3 vector environments."""

from collections.abc import Sequence
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium.vector import AutoresetMode, VectorEnv, VectorWrapper
from gymnasium.wrappers.vector import RecordEpisodeStatistics
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env.base_vec_env import VecEnv, VecEnvIndices, VecEnvObs, VecEnvStepReturn


class GymVecEnv(VecEnv):
    """A ``gymnasium.vector.VectorEnv`` behind SB3's interface.

    SB3 expects an environment that ends to start anew in the same step, the last observation being handed over in
    ``info["terminal_observation"]``: gymnasium calls that ``AutoresetMode.SAME_STEP``.

    :param envs: the vector environment.
    :raises ValueError: it resets in another mode.
    """

    def __init__(self, envs: VectorEnv[Any, Any, Any]) -> None:
        mode = envs.metadata.get("autoreset_mode")
        if mode != AutoresetMode.SAME_STEP:
            raise ValueError(
                f"env: {type(envs).__name__} has autoreset_mode={mode}, but SB3 needs SAME_STEP; create it with "
                "gymnasium.make_vec(id, n, 'sync', vector_kwargs={'autoreset_mode': AutoresetMode.SAME_STEP})"
            )
        self.envs = envs
        super().__init__(envs.num_envs, envs.single_observation_space, envs.single_action_space)
        self._actions: np.ndarray | None = None

    def reset(self) -> VecEnvObs:
        """Start every environment anew, with the seed and options set since the last reset (those of the first row)."""
        observations, infos = self.envs.reset(seed=self._seeds[0], options=self._options[0] or None)
        self.reset_infos = [_row(infos, index) for index in range(self.num_envs)]
        self._reset_seeds()
        self._reset_options()
        return _copied(observations)

    def step_async(self, actions: np.ndarray) -> None:
        """Keep the actions for :meth:`step_wait`."""
        self._actions = actions

    def step_wait(self) -> VecEnvStepReturn:
        """Step every environment."""
        observations, rewards, terminations, truncations, infos = self.envs.step(self._actions)
        dones = np.logical_or(terminations, truncations)
        # Rows share one empty dict until something happens in them: 64 dicts a token would cost more than the step.
        rows: list[dict[str, Any]] = [{} for _ in range(self.num_envs)]
        step_infos = {key: value for key, value in infos.items() if key not in _FINAL}
        if step_infos:
            rows = [_row(step_infos, index) for index in range(self.num_envs)]
        for index in np.flatnonzero(dones).tolist():
            rows[index] = _row(infos.get("final_info", {}), index)
            rows[index]["terminal_observation"] = infos["final_obs"][index]
            rows[index]["TimeLimit.truncated"] = bool(truncations[index] and not terminations[index])
            self.reset_infos[index] = _row(step_infos, index)
            # Gymnasium's RecordEpisodeStatistics reports the episode that ended beside the infos of the new one.
            if "episode" in self.reset_infos[index]:
                rows[index].setdefault("episode", self.reset_infos[index].pop("episode"))
        return _copied(observations), np.asarray(rewards, dtype=np.float32), dones, rows

    def close(self) -> None:
        """Close the vector environment."""
        self.envs.close()

    def get_images(self) -> Sequence[np.ndarray | None]:
        """What the environments render, if pictures."""
        frames: Any = self.envs.render()
        return [None] * self.num_envs if frames is None else list(frames)

    def render(self, mode: str | None = None) -> Any:
        """Render; texts are returned as gymnasium gives them, pictures tiled by SB3."""
        if self.envs.render_mode == "ansi":
            return self.envs.render()
        return super().render(mode)

    def get_attr(self, attr_name: str, indices: VecEnvIndices = None) -> list[Any]:
        """An attribute of the vector environment, once per index."""
        value = getattr(self.envs, attr_name)
        return [value for _ in self._get_indices(indices)]

    def set_attr(self, attr_name: str, value: Any, indices: VecEnvIndices = None) -> None:
        """Set an attribute of the vector environment: of all rows, since they share it."""
        setattr(self.envs, attr_name, value)

    def env_method(self, method_name: str, *args: Any, indices: VecEnvIndices = None, **kwargs: Any) -> list[Any]:
        """Call a method of the vector environment ONCE; its answer is repeated per index."""
        answer = getattr(self.envs, method_name)(*args, **kwargs)
        return [answer for _ in self._get_indices(indices)]

    def env_is_wrapped(
        self, wrapper_class: type[gym.Wrapper[Any, Any, Any, Any]], indices: VecEnvIndices = None
    ) -> list[bool]:
        """Never, but an environment that reports its episodes counts as monitored.

        That is one that says so in its metadata, or that is in gymnasium's ``RecordEpisodeStatistics``.
        """
        level = self.envs
        while isinstance(level, VectorWrapper) and not isinstance(level, RecordEpisodeStatistics):
            level = level.env
        reports = isinstance(level, RecordEpisodeStatistics) or bool(self.envs.metadata.get("reports_episodes"))
        return [wrapper_class is Monitor and reports for _ in self._get_indices(indices)]


_FINAL = {"final_obs", "_final_obs", "final_info", "_final_info"}


def _copied(observations: Any) -> VecEnvObs:
    """What SB3 may keep until after the next step, in which an environment may write into the array that it gave."""
    if isinstance(observations, dict):
        return {key: values.copy() for key, values in observations.items()}
    return observations.copy()  # type: ignore[no-any-return]


def _row(infos: dict[str, Any], index: int) -> dict[str, Any]:
    """One row of gymnasium's dict of arrays, where ``_key`` masks ``key``."""
    row: dict[str, Any] = {}
    for key, value in infos.items():
        mask = infos.get(f"_{key}")  # a key without one has a value in every row
        if not key.startswith("_") and (mask is None or mask[index]):
            row[key] = _row(value, index) if isinstance(value, dict) else _scalar(value[index])
    return row


def _scalar(value: Any) -> Any:
    return value.item() if isinstance(value, np.generic) else value
