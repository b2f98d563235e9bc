"""What the control benchmark's results say: tables, plots, summary.json. Called by ``control.py report``.

Everything is computed from the curves in the result files, so a definition that changes needs no new runs. All of
them, for a run with points (steps t_i, mean true return r_i of the n_i episodes that ended since the point before):

- final: mean return of the episodes of the last tenth of training, up to the last point with one
- average: mean of r over training time, sum of r_i (t_i - t_{i-1}) / t_last; a point without an episode repeats the one
  before, and the first one with an episode counts from the start
- dispersion: sb3_safe.stability.dispersion of r_i, the root mean square of its jumps; "net": less what sampling a few
  episodes explains
- crashes: sb3_safe.stability.crashes of the smoothed r_i, from within 10 % of the best gain to under half of it; the
  noise that does not count is the mean deviation of the returns at the first points
- a run that stopped at NaN counts as the random policy from there on, with as many episodes a point as before (median)
- normalised: 0 is a random policy, 1 the RL Zoo's published PPO

Intervals are 95 % stratified bootstrap. Over several tasks (and settings) each counts alike, whatever the number of
its runs.
"""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from control_run import RANDOM_FILE
from control_settings import ABLATED, SETTINGS, STRESS, VARIANTS
from reporting import (
    Runs,
    digits,
    estimate,
    filled_curve,
    markdown,
    median,
    number,
    prepare_plots,
    read_results,
    save,
    with_interval,
)
from rl_statistics import FloatArray, interval, iqm, performance_profile, probability_of_improvement

from sb3_safe.stability import SMOOTHING, crashes, dispersion, smooth

ORDER = ("safe", "ppo", "ppo-target-kl", "trpo", *VARIANTS)
COLOURS = {"safe": "tab:red", "ppo": "tab:blue", "ppo-target-kl": "tab:green", "trpo": "tab:purple"}
SCORES = ("final", "average")
Cell = tuple[str, str]
"""Setting and task."""
THRESHOLDS = np.linspace(0.0, 1.2, 61)
GRID = 100
CURVE_REPETITIONS = 500


def after_nan(random_return: float) -> dict[str, float]:
    """What a run that stopped at NaN counts as from there on: the random policy."""
    return {"return": random_return, "std": 0.0}


def measures(result: Mapping[str, Any], random_return: float) -> dict[str, float]:
    """The figures of one run; see the top of this file."""
    curve = filled_curve(result, after_nan(random_return))
    steps, returns, stds = curve["timesteps"], curve["return"], curve["std"]
    late = steps > 0.9 * steps[-1]
    first = stds[:SMOOTHING][np.isfinite(stds[:SMOOTHING])]
    jumps = dispersion(returns, stds, curve["episodes"])
    kls = [value for value in result["curve"]["kl_max"] if value is not None]
    return {
        "final": float(np.average(returns[late], weights=curve["episodes"][late])),
        "average": float(np.average(returns, weights=curve["span"])),
        "dispersion": jumps.rms,
        "dispersion_net": jumps.net,
        "crashes": crashes(smooth(returns), noise=float(first.mean()) if first.size else 0.0),
        "diverged": float(result["diverged"] is not None),
        "largest_kl": max(kls, default=math.nan),
        "cpu_seconds": result["cpu_seconds"],
        "peak_mb": math.nan if result["peak_mb"] is None else result["peak_mb"],
    }


class Report:
    """Results with what is needed to compare them.

    :param runs: as :func:`reporting.read_results` has them.
    :param good: per task, the return that is normalised to 1.
    :param random: per task, the random policy's return, normalised to 0.
    """

    def __init__(self, runs: Runs, good: Mapping[str, float], random: Mapping[str, float]) -> None:
        self.runs, self.good, self.random = runs, good, random
        self.measures = {
            setting: {
                task: {
                    name: [measures(result, random[task]) for result in algorithms[name]]
                    for name in sorted(algorithms, key=ORDER.index)
                }
                for task, algorithms in ((task, tasks[task]) for task in good if task in tasks)
            }
            for setting, tasks in ((setting, runs[setting]) for setting in SETTINGS if setting in runs)
        }

    def normalised(self, task: str, values: FloatArray) -> FloatArray:
        """Returns of a task on the scale where a random policy has 0 and the published PPO 1."""
        return (values - self.random[task]) / (self.good[task] - self.random[task])

    def column(self, setting: str, task: str, algorithm: str, name: str) -> FloatArray:
        """One figure of all runs."""
        return np.array([run[name] for run in self.measures[setting][task][algorithm]], dtype=np.float64)

    def scores(self, cells: Sequence[Cell], algorithm: str, name: str) -> list[FloatArray]:
        """A figure of several tasks, normalised where it is a score: an array of runs for each."""
        columns = [self.column(setting, task, algorithm, name) for setting, task in cells]
        if name in SCORES:
            return [self.normalised(task, column) for (_, task), column in zip(cells, columns, strict=True)]
        if name.startswith("dispersion"):
            return [c / (self.good[task] - self.random[task]) for (_, task), c in zip(cells, columns, strict=True)]
        return columns

    def task_summary(self, setting: str, task: str, algorithm: str) -> dict[str, Any]:
        """One row of the tables by task."""
        row: dict[str, Any] = {"seeds": len(self.measures[setting][task][algorithm])}
        for name in SCORES:
            row[name] = estimate([self.column(setting, task, algorithm, name)])
        for name in ("dispersion", "dispersion_net", "largest_kl", "cpu_seconds", "peak_mb"):
            row[name] = median(self.column(setting, task, algorithm, name))
        return row | self.counts([(setting, task)], algorithm)

    def counts(self, cells: Sequence[Cell], algorithm: str) -> dict[str, int]:
        """Crashes of all runs, runs that crashed, runs that stopped at NaN."""
        fallen = np.concatenate(self.scores(cells, algorithm, "crashes"))
        stopped = np.concatenate(self.scores(cells, algorithm, "diverged"))
        return {"crashes": int(fallen.sum()), "crashed_runs": int((fallen > 0).sum()), "diverged": int(stopped.sum())}

    def aggregate(self, cells: Sequence[Cell]) -> dict[str, Any]:
        """Figures over several tasks, or settings of them, of every algorithm that has runs on all."""
        by_cell = [self.measures[setting][task] for setting, task in cells]
        rows = {}
        for algorithm in (name for name in by_cell[0] if all(name in algorithms for algorithms in by_cell)):
            row: dict[str, Any] = {"runs": [len(algorithms[algorithm]) for algorithms in by_cell]}
            for name in SCORES:
                ours = self.scores(cells, algorithm, name)
                row[name] = estimate(ours)
                if algorithm != "ppo" and all("ppo" in algorithms for algorithms in by_cell):
                    theirs = self.scores(cells, "ppo", name)
                    low, high = interval(probability_of_improvement, ours, theirs)
                    value = probability_of_improvement(ours, theirs)
                    row[f"improvement_{name}"] = [digits(float(v)) for v in (value, low, high)]
            for name in ("dispersion", "dispersion_net"):
                known = [column[np.isfinite(column)] for column in self.scores(cells, algorithm, name)]
                row[name] = digits(float(iqm(known))) if all(map(len, known)) else None
            rows[algorithm] = row | self.counts(cells, algorithm)
        return rows

    def groups(self, setting: str, small: Sequence[str]) -> dict[str, list[str]]:
        """Sets of tasks that are aggregated: where PPO and SAFE are compared, its small ones, those of the ablation."""
        tasks = self.measures[setting]
        compared = [task for task, algorithms in tasks.items() if {"ppo", "safe"} <= set(algorithms)]
        found = {
            "all tasks": compared,
            "small tasks": [task for task in compared if task in small],
            "ablation": [task for task in compared if task in ABLATED and set(tasks[task]) & set(VARIANTS)],
        }
        # A group that is another one by another name says nothing new.
        names = {tuple(group): name for name, group in reversed(found.items()) if group}
        return {name: group for name, group in found.items() if names.get(tuple(group)) == name}

    def summary(self, small: Sequence[str]) -> dict[str, Any]:
        """Everything the tables show, as JSON."""
        summary: dict[str, Any] = {}
        for setting, tasks in self.measures.items():
            rows = {task: {name: self.task_summary(setting, task, name) for name in tasks[task]} for task in tasks}
            groups = self.groups(setting, small)
            aggregates = {
                name: {"tasks": group} | self.aggregate([(setting, task) for task in group])
                for name, group in groups.items()
            }
            summary[setting] = {"tasks": rows, "aggregate": aggregates}
        return summary

    def stress(self) -> dict[str, Any]:
        """Figures over all that is stressed: every setting of every task that both PPO and SAFE have runs of."""
        cells = [
            (setting, task)
            for setting, tasks in self.measures.items()
            for task, algorithms in tasks.items()
            if setting in STRESS and {"ppo", "safe"} <= set(algorithms)
        ]
        return self.aggregate(cells) if cells else {}


# -- tables ------------------------------------------------------------------------------------------------------------


STABILITY = ("dispersion (net)", "crashes (runs)", "NaN")


def _stability(row: Mapping[str, Any], form: str) -> list[str]:
    """The cells below these heads."""
    return [
        f"{number(row['dispersion'], form)} ({number(row['dispersion_net'], form)})",
        f"{row['crashes']} ({row['crashed_runs']})",
        str(row["diverged"]),
    ]


def tables(summary: Mapping[str, Any]) -> str:
    """The summary as Markdown."""
    lines = ["# Control benchmark", "", "Made by `python benchmarks/control.py report`; definitions in"
             " `benchmarks/README.md`. IQM with 95 % stratified bootstrap intervals."]  # fmt: skip
    for setting, content in summary.items():
        lines += ["", f"## {setting}"]
        for group, rows in content["aggregate"].items():
            cells = []
            for algorithm, row in rows.items():
                if algorithm == "tasks":
                    continue
                runs = sorted(set(row["runs"]))
                estimates = ("final", "average", "improvement_final", "improvement_average")
                cells.append([
                    algorithm,
                    "-".join(str(n) for n in (runs[0], runs[-1])[: len(runs)]),
                    *(with_interval(row.get(name), ".2f") for name in estimates),
                    *_stability(row, ".3f"),
                ])  # fmt: skip
            head = ["algorithm", "runs per task", "final", "training average", "P(better than PPO), final", "average"]
            over = f"Over {group} ({', '.join(rows['tasks'])}), normalised returns:"
            lines += ["", over, "", markdown([*head, *STABILITY], cells)]
        cells = [
            [
                task,
                algorithm,
                str(row["seeds"]),
                *(with_interval(row[name], ".1f") for name in ("final", "average")),
                *_stability(row, ".1f"),
                number(row["largest_kl"], ".2g"),
                *(number(row[name], ".0f") for name in ("cpu_seconds", "peak_mb")),
            ]
            for task, algorithms in content["tasks"].items()
            for algorithm, row in algorithms.items()
        ]
        head = ["task", "algorithm", "seeds", "final return", "training average", *STABILITY]
        lines += ["", markdown([*head, "largest KL", "CPU s", "MiB"], cells)]
    return "\n".join(lines) + "\n"


def stress_table(summary: Mapping[str, Any], stress: Mapping[str, Any]) -> str:
    """SAFE beside PPO, a row per setting, and one for all stress."""
    cells = []
    groups = {name: next(iter(content["aggregate"].values()), {}) for name, content in summary.items()}
    for setting, rows in [*groups.items(), ("all stress", stress)]:
        if not {"ppo", "safe"} <= set(rows):
            continue
        ppo, safe = rows["ppo"], rows["safe"]
        ratio = ppo["dispersion"] / safe["dispersion"] if ppo["dispersion"] and safe["dispersion"] else None
        averages = (ppo["average"], safe["average"], safe["improvement_average"])
        cells.append([
            setting,
            str(len(safe["runs"])),
            *(with_interval(average, ".2f") for average in averages),
            *(str(figures["crashes"]) for figures in (ppo, safe)),
            number(ratio, ".2f"),
        ])  # fmt: skip
    head = ["setting", "tasks", "PPO: average", "SAFE: average", "P(SAFE better)", "PPO: crashes", "SAFE: crashes"]
    return "\n## SAFE and PPO by setting\n\n" + markdown([*head, "dispersion, PPO / SAFE"], cells) + "\n"


# -- plots -------------------------------------------------------------------------------------------------------------


def plot_curves(report: Report, setting: str, path: Path) -> None:
    """Return against steps, a panel per task: IQM over seeds with its interval. Without the ablation's variants."""
    import matplotlib.pyplot as plt

    tasks = list(report.measures[setting])
    columns = min(3, len(tasks))
    rows = math.ceil(len(tasks) / columns)
    figure, axes = plt.subplots(rows, columns, figsize=(4.2 * columns, 3 * rows), squeeze=False, layout="constrained")
    for axis in axes.flat[len(tasks) :]:
        axis.set_axis_off()
    for axis, task in zip(axes.flat, tasks, strict=False):
        axis.set_title(task, fontsize=10)
        for algorithm, results in report.runs[setting][task].items():
            if algorithm not in COLOURS:
                continue
            curves = [filled_curve(result, after_nan(report.random[task])) for result in results]
            grid = np.linspace(0, max(curve["timesteps"][-1] for curve in curves), GRID + 1)[1:]
            # [grid, runs]: the bootstrap resamples whole runs, along the last axis.
            lines = np.stack(
                [np.interp(grid, curve["timesteps"], smooth(curve["return"])) for curve in curves], axis=-1
            )
            low, high = interval(iqm, [lines], repetitions=CURVE_REPETITIONS)
            axis.plot(grid, iqm([lines]), color=COLOURS[algorithm], label=f"{algorithm} ({len(results)})", lw=1.3)
            axis.fill_between(grid, low, high, color=COLOURS[algorithm], alpha=0.15, lw=0)
        axis.axhline(report.good[task], color="grey", lw=0.7, ls=":")
        axis.legend(fontsize=7, loc="lower right")
        axis.grid(alpha=0.3)
    figure.supxlabel("environment steps", fontsize=9)
    figure.supylabel("return", fontsize=9)
    save(figure, path)


def plot_profile(report: Report, setting: str, tasks: Sequence[str], path: Path) -> None:
    """Share of runs above each normalised final return."""
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(5, 3.4), layout="constrained")
    for algorithm, colour in COLOURS.items():
        if not all(algorithm in report.measures[setting][task] for task in tasks):
            continue
        scores = report.scores([(setting, task) for task in tasks], algorithm, "final")
        low, high = interval(lambda resampled: performance_profile(resampled, THRESHOLDS), scores)
        axis.plot(THRESHOLDS, performance_profile(scores, THRESHOLDS), color=colour, label=algorithm)
        axis.fill_between(THRESHOLDS, low, high, color=colour, alpha=0.15, lw=0)
    axis.set(xlabel="normalised final return", ylabel="share of runs above", ylim=(-0.02, 1.02))
    axis.legend(fontsize=8)
    axis.grid(alpha=0.3)
    save(figure, path)


def plot_settings(summary: Mapping[str, Any], path: Path) -> None:
    """Normalised training average by setting, with intervals."""
    import matplotlib.pyplot as plt

    groups: dict[str, dict[str, Any]] = {
        setting: next(iter(content["aggregate"].values()), {}) for setting, content in summary.items()
    }
    groups = {setting: rows for setting, rows in groups.items() if rows}
    names = [name for name in COLOURS if any(name in rows for rows in groups.values())]
    figure, axis = plt.subplots(figsize=(1.5 + 1.1 * len(groups), 3.2), layout="constrained")
    for i, name in enumerate(names):
        bars = {x: rows[name]["average"] for x, rows in enumerate(groups.values()) if name in rows}
        centres = np.array(list(bars)) + (i - (len(names) - 1) / 2) * 0.8 / len(names)
        values, low, high = np.array(list(bars.values()), dtype=np.float64).T
        axis.bar(centres, values, 0.8 / len(names), color=COLOURS[name], label=name)
        errors = np.maximum(0.0, [values - low, high - values])
        axis.errorbar(centres, values, errors, fmt="none", ecolor="black", lw=0.8)
    axis.set_xticks(range(len(groups)), list(groups), rotation=20, fontsize=8)
    axis.set_ylabel("normalised training average", fontsize=9)
    axis.legend(fontsize=7)
    save(figure, path)


def write_report(folder: Path, good: Mapping[str, float], small: Sequence[str], plots: bool = True) -> str:
    """Write summary.json, tables.md and the plots beside the results.

    :param folder: of the results.
    :param good: per task, the return that is normalised to 1.
    :param small: names of the small tasks.
    :param plots: whether to draw (needs matplotlib).
    :return: what was written, in words.
    """
    random = {task: entry["return"] for task, entry in json.loads(RANDOM_FILE.read_text(encoding="utf-8")).items()}
    report = Report(read_results(folder, "return"), good, random)
    summary = report.summary(small)
    # A result of another source than its neighbours is worth knowing of.
    sources = {
        result["versions"]["sb3_safe_source"]
        for tasks in report.runs.values()
        for algorithms in tasks.values()
        for name, results in algorithms.items()
        if name.startswith(("safe", "only"))
        for result in results
    }
    stress = report.stress()
    text = json.dumps({"sources": sorted(sources), "settings": summary, "stress": stress}, indent=1)
    (folder / "summary.json").write_text(text + "\n", encoding="utf-8")
    (folder / "tables.md").write_text(tables(summary) + stress_table(summary, stress), encoding="utf-8")
    if plots:
        prepare_plots()
        for setting in report.measures:
            plot_curves(report, setting, folder / f"curves-{setting}")
            for tasks in list(report.groups(setting, small).values())[:1]:
                plot_profile(report, setting, tasks, folder / f"profile-{setting}")
        if summary:
            plot_settings(summary, folder / "settings")
    count = sum(len(rs) for tasks in report.runs.values() for algos in tasks.values() for rs in algos.values())
    mixed = f"; SAFE's runs are of {len(sources)} versions of its source" if len(sources) > 1 else ""
    return f"{count} runs: {folder / 'tables.md'}, {folder / 'summary.json'}{mixed}"
