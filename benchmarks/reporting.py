"""What the reports of several benchmarks share: reading results, estimates with intervals, numbers in tables, plots."""

import json
import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rl_statistics import FloatArray, interval, iqm

from sb3_safe.stability import SMOOTHING

Runs = dict[str, dict[str, dict[str, list[dict[str, Any]]]]]
"""setting -> task -> algorithm -> results of its seeds."""


def read_results(folder: Path, column: str) -> Runs:
    """All finished runs below a folder, by seed.

    :param column: of the curve; runs without a value in it have nothing to judge them by, and are left out.
    """
    runs: Runs = defaultdict(lambda: defaultdict(lambda: defaultdict(list)))
    for path in sorted(folder.glob("*/*/*/*.json"), key=lambda path: (*path.parts[:-1], int(path.stem))):
        result = json.loads(path.read_text(encoding="utf-8"))
        if any(value is not None for value in result["curve"][column]):
            runs[result["setting"]][result["task"]][result["algorithm"]].append(result)
    return runs


def filled_curve(result: Mapping[str, Any], afterwards: Mapping[str, float]) -> dict[str, FloatArray]:
    """Columns of a run's points that have episodes; where it stopped at NaN, made-up ones from there to its budget.

    A column more is ``span``: the steps that a point's values stand for, its own and those of the points without an
    episode after it, which repeat it. Before the first episode there is nothing to repeat: those steps are the first's.
    Made-up points have the median number of episodes of the run's own, to weigh as much as they do.

    :param result: of one run.
    :param afterwards: what columns have from there on; others have NaN.
    """
    columns = {name: np.array(values, dtype=np.float64) for name, values in result["curve"].items()}
    known = columns["episodes"] > 0
    last = columns["timesteps"][-1]
    begins = np.concatenate([[0.0], columns["timesteps"][:-1]])[known]
    begins[0] = 0.0
    columns = {name: column[known] for name, column in columns.items()}
    columns["span"] = np.diff(begins, append=last)
    if result["diverged"] is not None:
        spacing = max(1.0, float(np.median(np.diff(columns["timesteps"], prepend=0.0))))
        # As many as the smoothing of crashes needs to see the fall.
        count = max(SMOOTHING, math.ceil((result["budget"] - last) / spacing))
        made_up = {"episodes": float(np.median(columns["episodes"])), "span": spacing, **afterwards}
        rest = {name: np.full(count, value) for name, value in made_up.items()}
        rest["timesteps"] = last + spacing * np.arange(1, count + 1)
        unknown = np.full(count, math.nan)
        columns = {name: np.concatenate([column, rest.get(name, unknown)]) for name, column in columns.items()}
    return columns


def estimate(scores: Sequence[FloatArray]) -> list[float | None]:
    """IQM with the ends of its interval."""
    low, high = interval(iqm, scores)
    return [digits(float(value)) for value in (iqm(scores), low, high)]


def median(values: FloatArray) -> float | None:
    known = values[np.isfinite(values)]
    return digits(float(np.median(known))) if known.size else None


def digits(value: float) -> float | None:
    return float(f"{value:.5g}") if math.isfinite(value) else None


def with_interval(entry: Sequence[float | None] | None, form: str) -> str:
    if entry is None or entry[0] is None:
        return "-"
    value, low, high = (format(v, form) if v is not None else "?" for v in entry)
    return f"{value} [{low}, {high}]"


def number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table."""
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    return "\n".join(lines + [f"| {' | '.join(row)} |" for row in rows])


def prepare_plots() -> None:
    """Plots that come out alike wherever they are drawn, without a display."""
    import matplotlib as mpl

    mpl.use("Agg")
    mpl.rcParams["svg.hashsalt"] = "sb3-safe"


def save(figure: Any, path: Path) -> None:
    """Write a figure as SVG and PNG, and close it."""
    import matplotlib.pyplot as plt

    for suffix in (".svg", ".png"):
        # No date in the file: a plot that has not changed is no change.
        figure.savefig(path.with_suffix(suffix), dpi=120, metadata={"Date": None} if suffix == ".svg" else None)
    plt.close(figure)
