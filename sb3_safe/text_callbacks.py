"""Evaluation of texts: what the policy writes on the same prompts as training goes on, and the best model so far."""

import itertools
import json
import math
import sys
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from gymnasium.vector import VectorEnv
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.logger import Logger
from stable_baselines3.common.vec_env import VecEnv

from sb3_safe.callbacks import SAMPLES_FILE, Infos, continue_file, write_json_lines, write_texts
from sb3_safe.environments import wrap_native
from sb3_safe.files import replacing

BEST_MODEL_FILE = "best_model.zip"
# Inside the model's file, where load() passes it over: a model and its reward cannot fall apart.
REWARD_MEMBER = "evaluation.json"


class SampleCallback(BaseCallback):
    """Evaluation on texts that the policy writes, on the same prompts and with the same random numbers each time.

    Before training, every so many rollouts, and at its end. Each time ``eval/mean_reward`` and ``eval/mean_ep_length``
    are logged, the means over the texts of their scores and tokens, and ``samples/texts`` for TensorBoard. An
    evaluation does not advance training's random generators. For any algorithm of SB3 whose policy writes texts.

    :param env: a text environment of its own, with as many rows as there are to be texts. It may have prompts and a
        reward model of its own; observations must be as long as in training.
    :param prompts: one per row; ``None``: those that the environment draws with ``seed``.
    :param every: rollouts between two evaluations.
    :param seed: of prompts and sampling.
    :param deterministic: whether each token is the likeliest one instead of a sampled one.
    :param n_shown: how many of the texts, the first ones, are kept, printed and sent to TensorBoard.
    :param folder: these go to ``samples.jsonl`` in it, which is begun and continued as the rows' file of
        :class:`~sb3_safe.callbacks.StabilityCallback` is.
    :param best_model_save_path: folder of ``best_model.zip``, the model with the highest mean reward so far, for the
        algorithm's ``load()``. A run that goes on replaces it by a better one only. A run that starts at step 0 first
        renames one that is there already (``best_model_1.zip``, ...).
    :param verbose: 1: print them too.
    :raises ValueError: an argument that cannot work, named.
    """

    def __init__(
        self,
        env: VecEnv | VectorEnv[Any, Any, Any],
        prompts: Sequence[Any] | None = None,
        every: int = 10,
        seed: int = 0,
        deterministic: bool = False,
        n_shown: int = 8,
        folder: str | Path | None = None,
        best_model_save_path: str | Path | None = None,
        verbose: int = 0,
    ) -> None:
        super().__init__(verbose)
        self.env: VecEnv = wrap_native(env)
        if not isinstance(self.env, VecEnv):
            raise ValueError(f"env must be a vector environment, with a row per text, got {type(env).__name__}")
        if prompts is not None and len(prompts) != self.env.num_envs:
            raise ValueError(f"prompts must have one entry per row of env, {self.env.num_envs}, got {len(prompts)}")
        if every < 1:
            raise ValueError(f"every must be at least 1, got {every}")
        if n_shown < 1:
            raise ValueError(f"n_shown must be at least 1, got {n_shown}")
        self.prompts = prompts
        self.every = every
        self.seed = seed
        self.deterministic = deterministic
        self.n_shown = n_shown
        self.path = None if folder is None else Path(folder) / SAMPLES_FILE
        self.best_model_path = None if best_model_save_path is None else Path(best_model_save_path) / BEST_MODEL_FILE
        #: Mean reward of the latest and of the best evaluation of the run.
        self.last_mean_reward = self.best_mean_reward = -math.inf
        #: Dicts with ``timesteps``, ``prompt``, ``completion``, ``reward``, ``finish_reason``.
        self.samples: list[dict[str, Any]] = []
        self._rollouts = 0

    def _init_callback(self) -> None:
        if self.env.observation_space != self.model.observation_space:
            raise ValueError(
                f"env has observations {self.env.observation_space}, training {self.model.observation_space}: give env "
                "training's model, max_prompt_tokens and max_new_tokens"
            )

    def _on_training_start(self) -> None:
        steps = self.model.num_timesteps
        # Training begins with an evaluation, so what the file may hold of this very step is written again.
        self.samples = continue_file(self.path, self.samples, steps - 1)
        self._rollouts = 0
        if steps == 0:
            self.best_mean_reward = -math.inf
        if self.best_model_path is not None and self.best_model_path.exists():
            known = saved_reward(self.best_model_path) if steps > 0 else None
            if known is None:
                set_aside(self.best_model_path)
            else:
                self.best_mean_reward = known

    def _on_rollout_start(self) -> None:
        if self._rollouts % self.every == 0:
            self._evaluate()
        self._rollouts += 1

    def _on_step(self) -> bool:
        return True

    def _on_training_end(self) -> None:
        self._evaluate()

    def _evaluate(self) -> None:
        texts = write_texts(self.model, self.env, self.prompts, self.seed, self.deterministic)
        self.last_mean_reward = float(np.mean([text["episode"]["r"] for text in texts]))
        self._show(texts)
        if self.last_mean_reward > self.best_mean_reward:
            self.best_mean_reward = self.last_mean_reward
            if self.best_model_path is not None:
                save_with_reward(self.model, self.best_model_path, self.last_mean_reward)

    def _show(self, texts: Infos) -> None:
        steps = self.model.num_timesteps
        samples = [
            {
                "timesteps": steps,
                "prompt": text["prompt"],
                "completion": text["completion"],
                "reward": float(text["episode"]["r"]),  # VecMonitor's numbers are not JSON
                "finish_reason": text["finish_reason"],
            }
            for text in texts[: self.n_shown]
        ]
        self.samples += samples
        if self.path is not None:
            write_json_lines(self.path, samples, append=True)
        lines = [f"{sample['reward']:+.2f} | {sample['prompt']} >>>{sample['completion']}" for sample in samples]
        if self.verbose >= 1:
            head = f"After {steps} steps, mean reward {self.last_mean_reward:+.2f}:"
            print(head, *map(printable, lines), sep="\n  ")
        # The run's own log is written after the next rollout, and what follows the last one never.
        log = Logger(self.logger.dir, self.logger.output_formats)
        log.record("eval/mean_reward", self.last_mean_reward)
        log.record("eval/mean_ep_length", float(np.mean([text["episode"]["l"] for text in texts])))
        log.record("time/total_timesteps", steps, exclude="tensorboard")
        # Indented by four, so that TensorBoard's Markdown shows the text as it is.
        markdown = "\n".join(f"    {line}" for line in "\n".join(lines).splitlines())
        log.record("samples/texts", markdown, exclude=("stdout", "log", "json", "csv"))
        log.dump(steps)


def printable(text: str) -> str:
    """A text with ``?`` for what standard output has no code for: on Windows that of a pipe is seldom UTF-8.

    :param text: any.
    """
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    return text.encode(encoding, errors="replace").decode(encoding)


# -- the best model ----------------------------------------------------------------------------------------------------


def save_with_reward(model: BaseAlgorithm, path: Path, mean_reward: float) -> None:
    """Save a model and its mean reward in one file, which replaces what is there only when it is complete."""
    path.parent.mkdir(parents=True, exist_ok=True)
    evaluation: Mapping[str, float] = {"timesteps": model.num_timesteps, "mean_reward": mean_reward}
    with replacing(path) as file:
        model.save(file)
        with zipfile.ZipFile(file, "a") as archive:
            archive.writestr(REWARD_MEMBER, json.dumps(evaluation))


def saved_reward(path: Path) -> float | None:
    """The mean reward that :func:`save_with_reward` put into a model's file; ``None`` for a file it did not write."""
    try:
        with zipfile.ZipFile(path) as archive:
            return float(json.loads(archive.read(REWARD_MEMBER))["mean_reward"])
    except (KeyError, zipfile.BadZipFile):
        return None


def set_aside(path: Path) -> Path:
    """Rename ``name.zip`` to the first free of ``name_1.zip``, ``name_2.zip``, ..., so that it is not written over."""
    free = next(p for n in itertools.count(1) if not (p := path.with_stem(f"{path.stem}_{n}")).exists())
    return path.rename(free)
