"""Callbacks that watch a run: how stable it is, how far it is and how well it does."""

import json
import math
import time
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch as th
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.callbacks import BaseCallback, ConvertCallback, ProgressBarCallback
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import VecEnv, VecMonitor

from sb3_safe.stability import distinct_n, stability_metrics

ROWS_FILE = "stability.jsonl"
SAMPLES_FILE = "samples.jsonl"
# Column of a row, and the name under which train() logs it.
TRAINING_LOG = {
    "update_kl": "train/approx_kl",
    "explained_variance": "train/explained_variance",
    "clip_fraction": "train/clip_fraction",
    "critic_gap": "safe/critic_gap",
}
LOGGED = ("crashes", "dispersion", "dispersion_net", "kl_spikes", "entropy_floor_hits")

Infos = Sequence[Mapping[str, Any]]


class FunctionCallback(ConvertCallback):
    """A function as a callback. ``False`` ends training, and nothing returned does not, as it would in SB3."""

    def _on_step(self) -> bool:
        returned: bool | None = super()._on_step()
        return returned is None or returned


class ProgressCallback(ProgressBarCallback):
    """A progress bar that also shows how well the run is doing. For any algorithm of SB3; needs the extra ``progress``.

    Beside the bar: time left; steps (of texts: tokens) per second; mean reward of the last ``stats_window_size``
    episodes; where there is a KL controller, the KL to the reference policy and, after the slash, the threshold beyond
    which it is penalised, nats per action.

    :raises ImportError: rich or tqdm is not installed.
    """

    def _on_training_start(self) -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
        from tqdm.rich import RateColumn, tqdm  # type: ignore[import-untyped]

        unit = "tokens" if "input_ids" in getattr(self.model.observation_space, "spaces", {}) else "steps"
        columns = (
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            RateColumn(unit=unit),
            TextColumn("{task.description}"),
        )
        # Speed is averaged over ten minutes: rich's 30 seconds may be shorter than an iteration, whose update does not
        # move the bar. Drawn twice a second, since drawing takes time from training.
        self.pbar = tqdm(
            total=self.locals["total_timesteps"] - self.model.num_timesteps,
            desc=self._status(),
            progress=columns,
            options={"speed_estimate_period": 600, "refresh_per_second": 2},
        )
        # A run that is interrupted must give back the terminal too, before the interpreter takes rich apart.
        weakref.finalize(self, self.pbar.close)

    def _on_rollout_start(self) -> None:
        self.pbar.set_description_str(self._status(), refresh=False)

    def _on_training_end(self) -> None:
        self.pbar.set_description_str(self._status(), refresh=False)
        super()._on_training_end()

    def _status(self) -> str:
        parts = []
        if self.model.ep_info_buffer:
            parts.append(f"reward {np.mean([episode['r'] for episode in self.model.ep_info_buffer]):.4g}")
        controller = getattr(self.model, "controller", None)
        if controller is not None and controller.active:
            limit = controller.metrics().get("threshold")
            kl = f"KL {self.model.measured_kl:.3f}"  # type: ignore[attr-defined]
            parts.append(kl if limit is None else f"{kl}/{limit:.3f}")
        return " ".join(parts)


class StabilityCallback(BaseCallback):
    """One row per rollout of what tells a stable run from an unstable one. For any on-policy algorithm of SB3.

    A row is complete when the update on its rollout is over, and is written at once. Its columns, where they apply:

    - ``timesteps`` at the end of the rollout; ``seconds`` of training until the end of its update
    - ``episodes`` that ended in the rollout; mean ``reward`` (return) and sample deviation ``reward_std``; mean
      ``length``
    - ``entropy``: mean of ``-log pi`` over the actions taken, nats per action dimension
    - ``update_kl``, ``clip_fraction``, ``explained_variance``, ``critic_gap``, as logged by the update
    - ``kl`` to the reference policy, nats per action, and all metrics of the KL controller (``threshold``,
      ``kl_short``, ``gate``, ``entropy_floor``, ``phase``, ...)
    - of texts: ``stop_share``, the share that ended by the end token; ``distinct_2``; ``part/<name>``, the mean of each
      part of the reward over the texts that have it
    - what ``extra`` returns

    A value that is missing or not finite is left out of its row. Logged are ``stability/crashes``, ``dispersion``,
    ``dispersion_net``, ``kl_spikes``, ``entropy_floor_hits``: see :mod:`sb3_safe.stability`.

    :param folder: rows go to ``stability.jsonl`` in it. A run that starts at step 0 begins a new file, one that goes on
        continues it from the step it goes on at.
    :param extra: further columns, numbers or ``None``, from the infos of the episodes that ended in a rollout. For
        reports: the algorithm never sees them.
    :param verbose: see SB3.
    :raises ValueError: while training, of an ``extra`` that returns anything else, or a column that is there already.
    """

    def __init__(
        self,
        folder: str | Path | None = None,
        extra: Callable[[Infos], Mapping[str, float]] | None = None,
        verbose: int = 0,
    ) -> None:
        super().__init__(verbose)
        self.path = None if folder is None else Path(folder) / ROWS_FILE
        self.extra = extra
        #: The rows of the run so far.
        self.rows: list[dict[str, float]] = []
        self._finished: list[dict[str, Any]] = []
        self._row: dict[str, float] | None = None
        self._extra: dict[str, float] = {}
        self._start = 0.0
        self._metrics: dict[str, float] = {}

    def _init_callback(self) -> None:
        if getattr(self.model, "rollout_buffer", None) is None:
            raise ValueError(
                f"StabilityCallback reads the rollouts of on-policy algorithms; {type(self.model).__name__} has none"
            )

    def _on_training_start(self) -> None:
        self.rows = continue_file(self.path, self.rows, self.model.num_timesteps)
        known = (row["seconds"] for row in reversed(self.rows) if "seconds" in row)
        self._start = time.monotonic() - next(known, 0.0)
        self._row = None

    def _on_rollout_start(self) -> None:
        self._complete_row()
        self._finished = []

    def _on_step(self) -> bool:
        self._finished += [info for info in self.locals["infos"] if "episode" in info]
        return True

    def _on_rollout_end(self) -> None:
        # The buffer is emptied before the next rollout starts, so what is needed of it is taken now.
        buffer = self.model.rollout_buffer  # type: ignore[attr-defined]
        dimensions = max(1, buffer.action_dim)
        self._row = {
            "timesteps": self.model.num_timesteps,
            "entropy": -float(buffer.log_probs.mean()) / dimensions,
            **episode_columns(self._finished),
        }
        self._extra = extra_columns(self.extra(self._finished)) if self.extra is not None and self._finished else {}

    def _on_training_end(self) -> None:
        self._complete_row()

    def _complete_row(self) -> None:
        """Add what the update logged. Called when it is over: before the next rollout, or after training."""
        if self._row is None:
            return
        # SB3 empties its log after the next rollout only.
        log = self.logger.name_to_value
        row = self._row | {column: log[name] for column, name in TRAINING_LOG.items() if name in log}
        controller = getattr(self.model, "controller", None)
        if controller is not None and controller.active:
            # A controller of one's own may have a name that is taken.
            row = row | controller.metrics() | {"kl": self.model.measured_kl} | row  # type: ignore[attr-defined]
        row["seconds"] = round(time.monotonic() - self._start, 3)
        self._row = None
        taken = sorted(self._extra.keys() & row.keys())
        if taken:
            raise ValueError(f"extra returned columns that a row has already, {taken}: give them other names")
        row |= self._extra
        # NumPy's numbers, of which SB3's log has some, are not JSON.
        plain = {name: value.item() if isinstance(value, np.generic) else value for name, value in row.items()}
        self.rows.append({name: value for name, value in plain.items() if math.isfinite(value)})
        if self.path is not None:
            write_json_lines(self.path, self.rows[-1:], append=True)
        self._log_metrics()

    def _log_metrics(self) -> None:
        # Computed at every row of a short run and ever more rarely in a long one, so that the cost stays in proportion.
        if len(self.rows) % (len(self.rows) // 100 + 1) == 0:
            self._metrics = stability_metrics(self.rows)
        for name in LOGGED:
            if name in self._metrics:
                self.logger.record(f"stability/{name}", self._metrics[name])


def episode_columns(infos: Infos) -> dict[str, float]:
    """What the infos of a rollout's finished episodes say; see :class:`StabilityCallback` for the names.

    :param infos: each with ``episode``; those of texts with ``completion_ids``, ``finish_reason``, ``reward_parts``.
    """
    columns: dict[str, float] = {"episodes": len(infos)}
    if not infos:
        return columns
    returns = np.array([info["episode"]["r"] for info in infos], dtype=np.float64)
    columns["reward"] = float(returns.mean())
    columns["length"] = float(np.mean([info["episode"]["l"] for info in infos]))
    if len(infos) > 1:
        columns["reward_std"] = float(returns.std(ddof=1))
    texts = [info for info in infos if "completion_ids" in info]
    if texts:
        columns["stop_share"] = float(np.mean([text["finish_reason"] == "stop" for text in texts]))
        columns["distinct_2"] = distinct_n([text["completion_ids"] for text in texts])
        parts = [text.get("reward_parts", {}) for text in texts]
        # A reward function need not apply to every text.
        for name in dict.fromkeys(name for of_text in parts for name in of_text):
            columns[f"part/{name}"] = float(np.mean([of_text[name] for of_text in parts if name in of_text]))
    return columns


def extra_columns(returned: Any) -> dict[str, float]:
    """What an ``extra`` of :class:`StabilityCallback` returned, as plain numbers; ``None`` is a missing value.

    :raises ValueError: it is no mapping of names to numbers.
    """
    if not isinstance(returned, Mapping):
        raise ValueError(f"extra must return a mapping of columns to numbers, got {returned!r}")
    columns = {}
    for name, value in returned.items():
        try:
            if not isinstance(name, str) or isinstance(value, str):
                raise TypeError  # float() would take a string for what is in it
            if value is not None:
                columns[name] = float(value)
        except (TypeError, ValueError, RuntimeError) as error:
            raise ValueError(f"extra returned {name!r}: {value!r}, but a column has a name and is a number") from error
    return columns


def write_texts(
    model: BaseAlgorithm,
    env: VecEnv,
    prompts: Sequence[Any] | None = None,
    seed: int = 0,
    deterministic: bool = False,
) -> list[dict[str, Any]]:
    """Let a model write one text per row of a text environment.

    :param model: any SB3 algorithm whose policy writes tokens.
    :param env: not the one it is training in.
    :param prompts: one per row; ``None``: those that the environment draws with ``seed``.
    :param seed: of prompts and sampling; torch's own generators are left as they were.
    :param deterministic: whether each token is the likeliest one instead of a sampled one.
    :return: the infos of the episodes, in the order of rows. ``terminal_observation`` holds the whole text's ids.
    """
    if not all(env.env_is_wrapped(Monitor)):
        env = VecMonitor(env)  # for ``episode`` in the infos
    texts: dict[int, dict[str, Any]] = {}
    device = model.device
    # The CPU's generator is always put back. The seed goes to those of all devices, and is used on the model's alone.
    with th.random.fork_rng([] if device.type == "cpu" else [device], device_type=device.type):
        th.manual_seed(seed)
        env.seed(seed)
        # The first name is read by environments of one text side by side, the other by one of many texts.
        env.set_options({} if prompts is None else [{"prompt": prompt, "prompts": list(prompts)} for prompt in prompts])
        observations: Any = env.reset()
        while len(texts) < env.num_envs:
            actions, _ = model.predict(observations, deterministic=deterministic)
            observations, _, dones, infos = env.step(actions)
            # A row that is done goes on with another text, which is of no interest here.
            texts |= {row: infos[row] for row in np.flatnonzero(dones).tolist() if row not in texts}
    return [texts[row] for row in range(env.num_envs)]


def write_json_lines(path: Path, rows: Iterable[Mapping[str, Any]], append: bool = False) -> None:
    """Write one JSON object a line and close the file, so that nothing is lost if the program dies."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a" if append else "w", encoding="utf-8") as file:
        file.writelines(f"{json.dumps(row)}\n" for row in rows)


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """What :func:`write_json_lines` wrote; see :func:`numbered_json_lines`."""
    return [row for _, row in numbered_json_lines(path)]


def numbered_json_lines(path: Path) -> list[tuple[int, Any]]:
    """What is in each line of a file, and its number, from 1.

    Empty lines are left out, and a last one that was cut off while being written.

    :raises ValueError: the file is no text, or another line is not JSON.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not a text in UTF-8: {error}") from error
    rows = []
    for number, line in enumerate(lines, start=1):
        try:
            if line.strip():
                rows.append((number, json.loads(line)))
        except json.JSONDecodeError as error:
            if number < len(lines):
                raise ValueError(f"{path}: line {number} is not JSON: {error}") from error
    return rows


def continue_file(path: Path | None, rows: list[dict[str, Any]], timesteps: int) -> list[dict[str, Any]]:
    """The rows that a run going on at ``timesteps`` follows upon; the file then holds just these.

    Rows after that step belong to a future that did not happen: the model was restored from before them.

    :raises ValueError: a line of the file does not say at which step it was written.
    """
    if not rows and timesteps > 0 and path is not None and path.exists():
        numbered = numbered_json_lines(path)
        for number, row in numbered:
            if not (isinstance(row, dict) and isinstance(row.get("timesteps"), int | float)):
                raise ValueError(f"{path}: line {number} has no timesteps: mend or move the file, or begin at step 0")
        rows = [row for _, row in numbered]
    # At step 0 nothing has happened yet, but a run that is started anew may have left rows of step 0.
    rows = [row for row in rows if row["timesteps"] <= timesteps] if timesteps > 0 else []
    if path is not None:
        write_json_lines(path, rows)
    return rows
