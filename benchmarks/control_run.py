"""One training run of the control benchmark: its environment and the stress on it, what is recorded of it.

Called by control.py, a process a run: ``python benchmarks/control_run.py '{"setting": "tuned", ...}' FILE``.
"""

import json
import math
import sys
import time
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import torch as th
from control_settings import ALGORITHMS, SETTINGS, arguments_of, described
from runs import PartialResult, Run, learn, short, versions, write_json
from stable_baselines3.common.buffers import RolloutBuffer
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import VecEnv, VecNormalize

import sb3_safe
from sb3_safe import SAFE
from sb3_safe.buffers import SafeRolloutBuffer
from sb3_safe.functional import k3
from sb3_safe.presets import preset

RESULTS = Path(__file__).parent / "results" / "control"
RANDOM_FILE = RESULTS / "random.json"
MAX_POINTS = 100
"""Of a curve: rollouts are joined to at most so many points, which makes tasks with short rollouts comparable."""
BIAS_DECAY = 0.9
KL_SAMPLE = 1024
"""Actions of a rollout that the KL of its update is measured on."""

PACKAGES = ("torch", "numpy", "gymnasium", "stable-baselines3", "sb3-contrib")

# -- stress ------------------------------------------------------------------------------------------------------------


class NoisyReward(gym.Wrapper[Any, Any, Any, Any]):
    """Gaussian noise on every reward. To be put around a ``Monitor``.

    The algorithm sees noisy rewards and noisy returns (``info["episode"]["r"]``, which SAFE's controller reads);
    ``info["true_return"]`` keeps what the curves are made of.

    :param env: an environment in a ``Monitor``.
    :param std: standard deviation of the noise, units of reward.
    """

    def __init__(self, env: gym.Env[Any, Any], std: float) -> None:
        super().__init__(env)
        self.std = std
        self.noise = np.random.default_rng()
        self.noisy_return = 0.0

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """Begin an episode; a seed also seeds the noise."""
        if seed is not None:
            self.noise = np.random.default_rng([seed, 1])
        self.noisy_return = 0.0
        return self.env.reset(seed=seed, options=options)

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        """A step, with noise on its reward."""
        observation, reward, terminated, truncated, info = self.env.step(action)
        noisy = float(reward) + self.std * float(self.noise.standard_normal())
        self.noisy_return += noisy
        if "episode" in info:
            info["true_return"] = info["episode"]["r"]
            info["episode"] = info["episode"] | {"r": self.noisy_return}
        return observation, noisy, terminated, truncated, info


class OptimisticTargets(RolloutBuffer):
    """Critic targets that are too high by ``bias`` running standard deviations of the returns; advantages as they are.

    The critic learns them and the next rollout's advantages are made of it, so the error feeds itself, as an
    overestimating critic's does.
    """

    def __init__(self, *args: Any, bias: float, **kwargs: Any) -> None:
        self.bias = bias
        self.return_spread: float | None = None
        super().__init__(*args, **kwargs)

    def compute_returns_and_advantage(self, last_values: th.Tensor, dones: np.ndarray) -> None:
        """GAE, then the bias on the returns."""
        super().compute_returns_and_advantage(last_values, dones)
        spread = float(self.returns.std())
        if self.return_spread is not None:
            spread = BIAS_DECAY * self.return_spread + (1 - BIAS_DECAY) * spread
        self.return_spread = spread
        self.returns += self.bias * spread


class OptimisticSafeTargets(OptimisticTargets, SafeRolloutBuffer):
    """The same for SAFE's buffer."""


# -- recording ---------------------------------------------------------------------------------------------------------


class Recorder(BaseCallback):
    """Notes of every rollout its true returns, and of its update the KL, measured in one way for all algorithms.

    :param result: file of the result, beside which the curve so far is written now and then.
    """

    def __init__(self, result: Path | None = None) -> None:
        super().__init__()
        self.partial = PartialResult(result)
        self.rollouts: list[dict[str, Any]] = []
        #: CPU seconds of measuring, which are no part of training.
        self.seconds_measuring = 0.0
        self._returns: list[float] = []
        self._actions: tuple[np.ndarray, np.ndarray, np.ndarray] | None = None

    def _on_step(self) -> bool:
        for info in self.locals["infos"]:
            if "episode" in info:
                self._returns.append(float(info.get("true_return", info["episode"]["r"])))
        return True

    def _on_rollout_end(self) -> None:
        start = time.process_time()
        buffer: RolloutBuffer = self.model.rollout_buffer  # type: ignore[attr-defined]
        self.rollouts.append({"timesteps": self.num_timesteps, "returns": self._returns})
        self._returns = []
        # The buffer is emptied before the next callback, so a sample of it is kept: whole rows of storage order.
        rows = slice(None, None, max(1, buffer.buffer_size * buffer.n_envs // KL_SAMPLE))
        self._actions = (buffer.observations[rows].copy(), buffer.actions[rows].copy(), buffer.log_probs[rows].copy())
        self.seconds_measuring += time.process_time() - start

    def _on_rollout_start(self) -> None:
        self._after_update()

    def _on_training_end(self) -> None:
        self._after_update()

    @th.no_grad()
    def _after_update(self) -> None:
        if self._actions is None:
            return
        start = time.process_time()
        policy: Any = self.model.policy
        observations, actions, log_probs = (array.reshape(-1, *array.shape[2:]) for array in self._actions)
        self._actions = None
        if isinstance(policy.action_space, gym.spaces.Discrete):
            actions = actions.flatten()
        policy.set_training_mode(False)
        _, after, _ = policy.evaluate_actions(
            th.as_tensor(observations, device=policy.device), th.as_tensor(actions, device=policy.device)
        )
        kl = float(k3(after.cpu() - th.as_tensor(log_probs.flatten())).mean())
        kept = self.logger.name_to_value.get("safe/update_kept")
        self.rollouts[-1] |= {"kl": kl, "kept": None if kept is None else float(kept)}
        self.partial.update(lambda: curve(self.rollouts))
        self.seconds_measuring += time.process_time() - start


def curve(rollouts: list[dict[str, Any]], max_points: int = MAX_POINTS) -> dict[str, list[float | None]]:
    """A run's curve in columns: as few rollouts a point as make at most ``max_points``.

    ``timesteps`` at the end of the point, mean ``return`` and sample deviation ``std`` of the ``episodes`` that ended
    in it, mean ``kl`` and largest ``kl_max`` of its updates, smallest share of an update that was ``kept``.

    :param rollouts: as :class:`Recorder` notes them.
    :param max_points: of the curve.
    """
    size = max(1, math.ceil(len(rollouts) / max_points))
    names = ("timesteps", "return", "std", "episodes", "kl", "kl_max", "kept")
    columns: dict[str, list[float | None]] = {name: [] for name in names}
    for start in range(0, len(rollouts), size):
        joined = rollouts[start : start + size]
        returns = [value for rollout in joined for value in rollout["returns"]]
        kls = [rollout["kl"] for rollout in joined if rollout.get("kl") is not None]
        kept = [rollout["kept"] for rollout in joined if rollout.get("kept") is not None]
        point = {
            "timesteps": joined[-1]["timesteps"],
            "return": np.mean(returns) if returns else None,
            "std": np.std(returns, ddof=1) if len(returns) > 1 else None,
            "episodes": len(returns),
            "kl": np.mean(kls) if kls else None,
            "kl_max": max(kls) if kls else None,
            "kept": min(kept) if kept else None,
        }
        for name, value in point.items():
            columns[name].append(short(value))
    return columns


# -- a run -------------------------------------------------------------------------------------------------------------


def make_env(run: Run) -> VecEnv:
    """The vector environment of a run, as the RL Zoo builds it."""
    settings, stress = preset(run.task), SETTINGS[run.setting]
    wrapper: dict[str, Any] = {}
    if "noise" in stress:
        std = stress["noise"] * json.loads(RANDOM_FILE.read_text())[run.task]["step_reward_rms"]
        wrapper = {"wrapper_class": NoisyReward, "wrapper_kwargs": {"std": std}}
    env: VecEnv = make_vec_env(run.task, settings["n_envs"], seed=run.seed, **wrapper)
    return VecNormalize(env, gamma=settings.get("gamma", 0.99)) if settings.get("normalize") else env


def make_model(run: Run) -> Any:
    """The algorithm of a run, on its environment."""
    algorithm, _ = ALGORITHMS[run.algorithm]
    arguments, stress = arguments_of(run), SETTINGS[run.setting]
    if "bias" in stress:
        arguments["rollout_buffer_class"] = OptimisticSafeTargets if algorithm is SAFE else OptimisticTargets
        arguments["rollout_buffer_kwargs"] = {"bias": stress["bias"]}
    return algorithm("MlpPolicy", make_env(run), seed=run.seed, device="cpu", **arguments)


def train(run: Run, path: Path) -> dict[str, Any]:
    """Train, and write everything that there is to know about it.

    :param run: which.
    :param path: file of the result; the same with ``.partial`` holds the curve while it trains.
    """
    th.set_num_threads(1)
    recorder, model = Recorder(path), make_model(run)
    result = described(run) | learn(model, run, recorder)
    result |= {
        "curve": curve(recorder.rollouts),
        "versions": versions(PACKAGES, sb3_safe),
    }
    write_json(path, result)
    recorder.partial.remove()
    return result


def measure_random_policy(task: str, episodes: int = 20, seed: int = 0) -> dict[str, float]:
    """Score of uniformly random actions: where normalised scores are 0.

    :return: mean ``return`` and its sample deviation ``std``; ``step_reward_rms``, the root mean square of the
        reward of a step, which reward noise is scaled with. (Not its deviation, which is 0 where every step costs the
        same.)
    """
    env = gym.make(task)
    env.action_space.seed(seed)
    returns, squares, steps = [], 0.0, 0
    for episode in range(episodes):
        env.reset(seed=seed + episode)
        total, over = 0.0, False
        while not over:
            _, reward, terminated, truncated, _ = env.step(env.action_space.sample())
            total, squares, steps = total + float(reward), squares + float(reward) ** 2, steps + 1
            over = terminated or truncated
        returns.append(total)
    return {
        "return": round(float(np.mean(returns)), 4),
        "std": round(float(np.std(returns, ddof=1)), 4),
        "step_reward_rms": round(math.sqrt(squares / steps), 4),
        "episodes": episodes,
    }


if __name__ == "__main__":
    train(Run(**json.loads(sys.argv[1])), Path(sys.argv[2]))
