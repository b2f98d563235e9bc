"""The RLHF laboratory's plots, from filled curves: setting -> task -> method -> one curve per seed."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from reporting import save
from rl_statistics import FloatArray, interval, iqm
from rlhf_settings import TOKENS

from sb3_safe.stability import smooth

Runs = Sequence[Mapping[str, FloatArray]]
Curves = Mapping[str, Mapping[str, Mapping[str, Runs]]]

COLOURS = {
    "safe": "tab:red", "ppo": "tab:blue", "ppo-kl": "tab:green", "ppo-adaptive": "tab:olive",
    "ppo-target-kl": "tab:purple", "published": "tab:gray",
}  # fmt: skip
NAMES = {"safe": "SAFE", "ppo": "PPO", "ppo-kl": "PPO, tuned KL in the reward"}
HEADLINE = ("lr-x3", "quick", "tuned")
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
        task, methods = next(iter(curves[setting].items()))
        _headline(methods, start[task]["gold"], folder / "headline")


def _on_grid(runs: Runs, name: str, start: float) -> tuple[FloatArray, FloatArray]:
    """Iterations from 0 on ``[G]``, and a smoothed column of every run at them ``[G, runs]``.

    :param start: value of the untrained model, at 0.
    """
    grid = np.linspace(0, max(run["timesteps"][-1] for run in runs), GRID + 1)
    lines = [np.interp(grid, [0, *run["timesteps"]], [start, *smooth(run[name])]) for run in runs]
    return grid / TOKENS, np.stack(lines, axis=-1)


def _band(axis: Any, runs: Runs, name: str, start: float, colour: str, label: str = "") -> tuple[float, float]:
    """Draw the IQM over runs with its interval; where the line ends."""
    grid, lines = _on_grid(runs, name, start)
    # The bootstrap resamples whole runs, along the last axis.
    low, high = interval(iqm, [lines], repetitions=REPETITIONS)
    centre = iqm([lines])
    axis.plot(grid, centre, color=colour, label=label, lw=1.6)
    axis.fill_between(grid, low, high, color=colour, alpha=0.15, lw=0)
    return float(grid[-1]), float(centre[-1])


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
    axes[1, 0].legend(fontsize=7)
    figure.supxlabel("iteration (dotted: untrained)", fontsize=9)
    save(figure, path)


def _frontier(tasks: Mapping[str, Any], start: Mapping[str, Any], path: Path) -> None:
    """Gold against distance from the start, as training goes on; the dot is where it ends.

    See Gao et al. 2022, https://arxiv.org/abs/2210.10760, for the axis: the root of the KL.
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
        axis.grid(alpha=0.3)
    axes[0, 0].set_ylabel("gold", fontsize=9)
    axes[0, 0].legend(fontsize=7)
    figure.supxlabel("root of the KL to the start (nats per text)", fontsize=9)
    save(figure, path)


def _headline(methods: Mapping[str, Any], untrained: float, path: Path) -> None:
    """Gold over training, each line with its name at its end."""
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(6.4, 3.6), layout="constrained")
    axis.axhline(untrained, color="grey", lw=0.8, ls=":")
    right = {"transform": axis.get_yaxis_transform(), "ha": "right", "va": "bottom"}
    axis.text(0.9, untrained, "untrained", fontsize=8, color="grey", **right)
    shown = [method for method in NAMES if method in methods]
    ends = {method: _band(axis, methods[method], "gold", untrained, COLOURS[method]) for method in shown}
    height = -1.0
    for method in sorted(shown, key=lambda method: ends[method][1]):
        last, end = ends[method]
        height = max(end, height + 0.07)  # names do not lie on one another
        place = {"xytext": (last, height), "va": "center", "color": COLOURS[method]}
        axis.annotate(f" {NAMES[method]}", (last, end), annotation_clip=False, **place)
    axis.set(xlabel="iteration", ylabel="true quality (gold score)", ylim=(0, 1))
    axis.spines[["top", "right"]].set_visible(False)
    save(figure, path)
