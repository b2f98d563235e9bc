"""One training run of the RLHF laboratory, and what is recorded of it.

Called by rlhf.py, a process a run: ``python benchmarks/rlhf_run.py '{"setting": "tuned", ...}' FILE``.
"""

import json
import math
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import textgen_env
import torch as th
from rl_statistics import best_of_n
from rlhf_settings import ENV_ID, GRPO, METHODS, arguments_of, described
from rlhf_tasks import PROMPTS, TASKS
from runs import PartialResult, Run, learn, short, versions, write_json
from stable_baselines3.common.vec_env import VecEnv
from transformers.utils import logging

import sb3_safe
from sb3_safe import SAFE, environments
from sb3_safe.callbacks import Infos, StabilityCallback, episode_columns, write_texts

RESULTS = Path(__file__).parent / "results" / "rlhf"
START_FILE = RESULTS / "start.json"
MAX_POINTS = 100
"""Of a curve: rollouts are joined to at most so many points."""
PACKAGES = ("torch", "transformers", "numpy", "gymnasium", "stable-baselines3")
SOURCES = (sb3_safe, textgen_env)

# Columns of StabilityCallback's rows that a curve keeps: means over the texts of a point, ...
OF_TEXTS = ("reward", "gold", "length", "stop_share")
# ... means over its rollouts.
OF_ROLLOUTS = (
    "kl_per_text", "entropy", "distinct_2", "update_kl", "update_kept", "clip_fraction", "explained_variance",
    "critic_gap", "threshold", "coefficient", "gate",
)  # fmt: skip

# -- recording ---------------------------------------------------------------------------------------------------------


class Recorder(StabilityCallback):
    """A row per rollout, with the gold score and the KL to the start, measured in one way for all methods.

    :param task: whose gold score is meant.
    :param result: file of the result, beside which the curve so far is written now and then.
    """

    def __init__(self, task: str, result: Path | None = None) -> None:
        super().__init__(extra=self._columns)
        self.gold = TASKS[task].gold
        self.partial = PartialResult(result)
        #: CPU seconds of measuring, which are no part of training.
        self.seconds_measuring = 0.0

    def _on_training_start(self) -> None:
        super()._on_training_start()
        policy: Any = self.model.policy
        if policy.reference is None and getattr(policy, "adapters", None) is None:
            policy.freeze_reference()

    def _on_rollout_end(self) -> None:
        start = time.process_time()
        super()._on_rollout_end()
        self.seconds_measuring += time.process_time() - start

    def _columns(self, texts: Infos) -> dict[str, float]:
        length = float(np.mean([text["episode"]["l"] for text in texts]))
        return {
            **gold_columns(self.gold, texts),
            # A mean over all tokens of the rollout, times tokens a text: less noise than the sums of the few texts.
            "kl_per_text": self._kl_per_token() * length,
        }

    @th.no_grad()
    def _kl_per_token(self) -> float:
        """Mean ``log pi - log pi_start`` of the rollout's tokens, nats."""
        model: Any = self.model
        buffer = model.rollout_buffer
        total = 0.0
        for batch in buffer.in_order(model.batch_size):
            drift = batch.old_log_prob - model.policy.reference_log_prob(batch.observations, batch.actions)
            total += drift.sum().item()
        return total / float(buffer.buffer_size * buffer.n_envs)

    def _complete_row(self) -> None:
        kept = self.logger.name_to_value.get("safe/update_kept")
        if self._row is not None and kept is not None:
            self._row["update_kept"] = float(kept)
        super()._complete_row()
        self.partial.update(lambda: curve(self.rows))


def gold_scores(gold: Any, texts: Infos) -> np.ndarray:
    """Gold scores ``[n]`` of finished texts."""
    columns = {f"{name}s": [text[name] for text in texts] for name in ("prompt", "completion")}
    return np.array(gold(**columns, completion_ids=[text["completion_ids"] for text in texts]), dtype=np.float64)


def gold_columns(gold: Any, texts: Infos) -> dict[str, float]:
    """Their mean and its sample deviation, as a row has them."""
    scores = gold_scores(gold, texts)
    return {"gold": float(scores.mean())} | ({"gold_std": float(scores.std(ddof=1))} if len(scores) > 1 else {})


def curve(rows: Sequence[Mapping[str, float]], max_points: int = MAX_POINTS) -> dict[str, list[float | None]]:
    """A run's curve in columns: as few rollouts a point as make at most ``max_points``.

    ``timesteps`` at the end of the point, ``episodes`` (texts) that ended in it, means of :data:`OF_TEXTS` over them
    with sample deviations ``reward_std`` and ``gold_std``, means of :data:`OF_ROLLOUTS`, and the largest KL of an
    update, ``update_kl_max``.

    :param rows: as :class:`Recorder` makes them.
    :param max_points: of the curve.
    """
    size = max(1, math.ceil(len(rows) / max_points))
    points = [_point(rows[start : start + size]) for start in range(0, len(rows), size)]
    return {name: [short(point[name]) for point in points] for name in points[0]} if points else {}


def _point(rows: Sequence[Mapping[str, float]]) -> dict[str, Any]:
    texts = sum(int(row["episodes"]) for row in rows)
    point: dict[str, Any] = {"timesteps": int(rows[-1]["timesteps"]), "episodes": texts}
    for name in OF_TEXTS:
        point[name] = _mean(rows, name, "episodes")
    for name in ("reward", "gold"):
        deviations = [{"square": row[f"{name}_std"] ** 2, **row} for row in rows if f"{name}_std" in row]
        variance = _mean(deviations, "square", "episodes")
        point[f"{name}_std"] = None if variance is None else math.sqrt(variance)
    for name in OF_ROLLOUTS:
        point[name] = _mean(rows, name)
    point["update_kl_max"] = max((row["update_kl"] for row in rows if "update_kl" in row), default=None)
    return point


def _mean(rows: Sequence[Mapping[str, float]], name: str, weight: str | None = None) -> float | None:
    known = [row for row in rows if name in row]
    weights = None if weight is None else [row[weight] for row in known]
    return float(np.average([row[name] for row in known], weights=weights)) if known else None


# -- a run -------------------------------------------------------------------------------------------------------------


def prepare() -> None:
    """One thread, and no progress bars."""
    th.set_num_threads(1)
    logging.disable_progress_bar()


def text_env(task: str, n_texts: int) -> VecEnv:
    """An environment of a task that writes so many texts side by side."""
    return environments.make(ENV_ID, n_texts, {"reward_model": TASKS[task].proxy})


def make_model(run: Run) -> SAFE:
    """The algorithm of a run, on its environment."""
    algorithm: Any = METHODS[run.algorithm][0]
    env_kwargs = {"reward_model": TASKS[run.task].proxy}
    return algorithm("auto", ENV_ID, env_kwargs=env_kwargs, seed=run.seed, device="cpu", **arguments_of(run))


def samples(model: SAFE, task: str) -> list[dict[str, Any]]:
    """Texts on the same prompts, with the same random numbers, whoever writes them."""
    env = text_env(task, len(PROMPTS))
    texts = write_texts(model, env, PROMPTS, seed=0)
    scores = gold_scores(TASKS[task].gold, texts)
    return [
        {"prompt": t["prompt"], "completion": t["completion"], "reward": short(t["episode"]["r"]), "gold": short(gold)}
        for t, gold in zip(texts, scores.tolist(), strict=True)
    ]


def train(run: Run, path: Path) -> dict[str, Any]:
    """Train, and write everything that there is to know about it.

    :param run: which.
    :param path: file of the result; the same with ``.partial`` holds the curve while it trains.
    """
    if METHODS[run.algorithm][0] == GRPO:
        import rlhf_grpo  # on demand: TRL takes seconds

        return rlhf_grpo.train(run, path)
    prepare()
    recorder, model = Recorder(run.task, path), make_model(run)
    result = described(run) | learn(model, run, recorder)
    result |= {
        "curve": curve(recorder.rows),
        "samples": [] if result["diverged"] else samples(model, run.task),
        "versions": versions(PACKAGES, *SOURCES),
    }
    write_json(path, result)
    recorder.partial.remove()
    return result


def measure_start(task: str, n_texts: int = 1000) -> dict[str, Any]:
    """The untrained model: where every run begins.

    :return: columns of its texts with ``gold`` and ``gold_std``, and ``samples``.
    """
    prepare()
    model = SAFE("auto", ENV_ID, kl_controller="none", seed=0, device="cpu")
    texts = write_texts(model, text_env(task, n_texts), seed=0)
    scores = gold_scores(TASKS[task].gold, texts)
    columns = episode_columns(texts) | {"gold": scores.mean(), "gold_std": scores.std(ddof=1)}
    kept = ("episodes", "reward", "reward_std", "length", "stop_share", "gold", "gold_std")
    return {
        **{name: short(float(columns[name])) for name in kept},
        "best_of_n": measure_best_of_n(model, task),
        "samples": samples(model, task),
    }


def measure_best_of_n(model: SAFE, task: str, max_n: int = 512, batches: int = 32) -> dict[str, list[float | None]]:
    """What the proxy gives without training: of ``n`` texts on a prompt the one with the highest reward is taken.

    A measure for what training makes of the same distance from the start.

    :param model: the untrained one.
    :param task: whose proxy chooses.
    :param max_n: largest ``n``; all are powers of two.
    :param batches: of 64 texts on each of :data:`rlhf_tasks.PROMPTS`.
    :return: columns ``n``; ``kl``, nats per text at most, ``log n - (n - 1) / n``; ``reward`` and ``gold``, means
        over prompts.

    See Gao et al. 2022, https://arxiv.org/abs/2210.10760; on the KL, Beirami et al. 2024, https://arxiv.org/abs/2401.01879
    """
    prompts = [prompt for prompt in PROMPTS for _ in range(64)]
    env = text_env(task, len(prompts))
    texts = [text for seed in range(batches) for text in write_texts(model, env, prompts, seed=1 + seed)]
    scores = {
        "reward": np.array([text["episode"]["r"] for text in texts]),
        "gold": gold_scores(TASKS[task].gold, texts),
    }
    groups = [[i for i, text in enumerate(texts) if text["prompt"] == prompt] for prompt in PROMPTS]
    counts = [2**i for i in range(int(math.log2(max_n)) + 1)]
    worth = {
        name: [fmean(best_of_n(scores["reward"][group], values[group], n) for group in groups) for n in counts]
        for name, values in scores.items()
    }
    columns = {"n": counts, "kl": [math.log(n) - (n - 1) / n for n in counts], **worth}
    return {name: [short(value) for value in column] for name, column in columns.items()}


if __name__ == "__main__":
    train(Run(**json.loads(sys.argv[1])), Path(sys.argv[2]))
