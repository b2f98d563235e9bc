"""The RLHF laboratory's plots, from filled curves: setting -> task -> method -> one curve per seed."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from reporting import save
from rl_statistics import FloatArray, interval, iqm
from rlhf_settings import SETTINGS, TOKENS

from sb3_safe.stability import smooth

Runs = Sequence[Mapping[str, FloatArray]]
Curves = Mapping[str, Mapping[str, Mapping[str, Runs]]]

COLOURS = {
    "safe": "tab:red", "ppo": "tab:blue", "ppo-kl": "tab:green", "ppo-adaptive": "tab:olive",
    "ppo-target-kl": "tab:purple", "published": "tab:gray", "grpo": "tab:orange",
}  # fmt: skip
NAMES = {"safe": "SAFE", "ppo": "PPO", "ppo-kl": "PPO, tuned KL in the reward"}
HEADLINE = ("lr-x10", "quick-x10", "lr-x3", "quick", "tuned")
"""The setting of the headline figure: the first of these that has runs."""
GRID = 100
REPETITIONS = 500


def draw(curves: Curves, start: Mapping[str, Any], folder: Path) -> None:
    """All plots.

    :param curves: of settings and tasks that have runs.
    :param start: figures of the untrained model, by task.
    :param folder: where they are written.
    """
    for setting, tasks in curves.items():
        _training(tasks, start, folder / f"training-{setting}")
        _frontier(tasks, start, folder / f"frontier-{setting}")
    setting = next((name for name in HEADLINE if name in curves), None)
    if setting is not None:
        _headline(curves[setting], start, SETTINGS[setting].rate, folder / "headline")


def _on_grid(runs: Runs, name: str, start: float) -> tuple[FloatArray, FloatArray]:
    """Iterations from 0 on ``[G]``, and a smoothed column of every run at them ``[G, runs]``.

    :param start: value of the untrained model, at 0.
    """
    grid = np.linspace(0, max(run["timesteps"][-1] for run in runs), GRID + 1)
    lines = [np.interp(grid, [0, *run["timesteps"]], [start, *smooth(run[name])]) for run in runs]
    return grid / TOKENS, np.stack(lines, axis=-1)


def _band(axis: Any, runs: Runs, name: str, start: float, colour: str, label: str) -> None:
    """Draw the IQM over runs with its interval."""
    grid, lines = _on_grid(runs, name, start)
    # The bootstrap resamples whole runs, along the last axis.
    low, high = interval(iqm, [lines], repetitions=REPETITIONS)
    axis.plot(grid, iqm([lines]), color=colour, label=label, lw=1.6)
    axis.fill_between(grid, low, high, color=colour, alpha=0.15, lw=0)


def _training(tasks: Mapping[str, Any], start: Mapping[str, Any], path: Path) -> None:
    """What is optimised above what is meant, a column per task."""
    import matplotlib.pyplot as plt

    shape = {"figsize": (4.2 * len(tasks), 5.4), "squeeze": False, "sharex": "col", "layout": "constrained"}
    figure, axes = plt.subplots(2, len(tasks), **shape)
    for column, (task, methods) in zip(axes.T, tasks.items(), strict=True):
        column[0].set_title(task, fontsize=10)
        for axis, name in zip(column, ("reward", "gold"), strict=True):
            for method, runs in methods.items():
                if method in COLOURS:
                    _band(axis, runs, name, start[task][name], COLOURS[method], f"{method} ({len(runs)})")
            axis.axhline(start[task][name], color="grey", lw=0.8, ls=":")
            axis.grid(alpha=0.3)
    axes[0, 0].set_ylabel("proxy: the reward that is optimised", fontsize=9)
    axes[1, 0].set_ylabel("gold: what is meant", fontsize=9)
    _name_lines(figure, axes[0, 0])
    figure.supxlabel("iteration (dotted: untrained)", fontsize=9)
    save(figure, path)


def _name_lines(figure: Any, axis: Any) -> None:
    """A legend above all panels, where it covers no line.

    :param axis: whose lines are those of all.
    """
    lines, labels = axis.get_legend_handles_labels()
    figure.legend(lines, labels, loc="outside upper center", ncols=len(lines), frameon=False, fontsize=8)


def _frontier(tasks: Mapping[str, Any], start: Mapping[str, Any], path: Path) -> None:
    """Gold against distance from the start, as training goes on; the dot is where it ends. Dashed: without training.

    See Gao et al. 2022, https://arxiv.org/abs/2210.10760, for the axis, the root of the KL, and the best of n.
    """
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(tasks), figsize=(4.2 * len(tasks), 3.2), squeeze=False, layout="constrained")
    for axis, (task, methods) in zip(axes[0], tasks.items(), strict=True):
        axis.set_title(task, fontsize=10)
        for method, runs in methods.items():
            if method not in COLOURS:
                continue
            distance = np.sqrt(np.maximum(0.0, np.nanmean(_on_grid(runs, "kl_per_text", 0.0)[1], axis=-1)))
            gold = _on_grid(runs, "gold", start[task]["gold"])[1].mean(axis=-1)
            axis.plot(distance, gold, color=COLOURS[method], lw=1.3, label=method)
            axis.plot(distance[-1], gold[-1], "o", color=COLOURS[method], ms=5)
        best = start[task]["best_of_n"]
        axis.plot(np.sqrt(best["kl"]), best["gold"], color="black", lw=1.0, ls="--", label="best of n, untrained")
        axis.grid(alpha=0.3)
    axes[0, 0].set_ylabel("gold", fontsize=9)
    _name_lines(figure, axes[0, 0])
    figure.supxlabel("root of the KL to the start (nats per text)", fontsize=9)
    save(figure, path)


def _headline(tasks: Mapping[str, Any], start: Mapping[str, Any], rate: float, path: Path) -> None:
    """Gold over training, a panel per task, the lines named once."""
    import matplotlib.pyplot as plt

    shape = {"figsize": (3.2 * len(tasks) + 1, 3.2), "squeeze": False, "sharey": True, "layout": "constrained"}
    figure, axes = plt.subplots(1, len(tasks), **shape)
    for axis, (task, methods) in zip(axes[0], tasks.items(), strict=True):
        axis.set_title(task, fontsize=10)
        axis.axhline(start[task]["gold"], color="grey", lw=0.8, ls=":")
        for method in (name for name in NAMES if name in methods):
            _band(axis, methods[method], "gold", start[task]["gold"], COLOURS[method], NAMES[method])
        axis.set(xlabel="iteration", ylim=(0, 1))
        axis.spines[["top", "right"]].set_visible(False)
    axes[0, 0].set_ylabel("true quality (gold score)")
    lines = {label: line for axis in axes[0] for line, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    title = f"{rate:g} times the learning rate at which PPO was tuned (dotted: untrained)"
    figure.legend(lines.values(), lines, loc="outside upper center", ncols=len(lines), frameon=False, title=title)
    save(figure, path)
