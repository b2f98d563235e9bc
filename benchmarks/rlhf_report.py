"""What the RLHF laboratory's results say: tables, samples, summary.json. Called by ``rlhf.py report``.

Everything is computed from the curves in the result files, so a definition that changes needs no new runs. All of
them, for a run with points (steps t_i, mean gold score g_i and mean reward r_i of the n_i texts that ended since the
point before):

- final: mean over the texts of the last tenth of training
- average: mean of r, or g, over training time, sum of r_i (t_i - t_{i-1}) / t_last; a point without a text repeats the
  one before
- best gold: the highest of the smoothed g_i (mean of 5 points)
- crashes: sb3_safe.stability.crashes of the smoothed g_i, from within 10 % of the best gain over the untrained model to
  under half of it; gains within three standard errors of a smoothed point do not count
- ruined: final gold is lower than the untrained model's by more than three standard errors; a run may be ruined without
  a crash, where it falls from the start
- dispersion: sb3_safe.stability.dispersion of r_i, the root mean square of its jumps, less what sampling a few texts
  explains
- largest KL per text: of all points of all runs
- all others: means over the last tenth of training
- a run that stopped at NaN writes nothing from there on: gold 0, reward as the untrained model's, for as many texts a
  point as before (median)

``ppo-kl``, ``ppo-adaptive`` and ``grpo`` are, on each task, the member of the family with the highest mean final gold
in tuning.

"Own rates" compares PPO and SAFE each at the learning rate that is best for it in tuning: chosen with PPO's coefficient
and SAFE's price on each task (``ppo-kl``, ``safe-price``), and once for all with PPO's coefficient (``ppo-kl-shared``)
and SAFE's defaults (``safe``). Iterations to PPO's gold: the first point at which the smoothed g_i is within 5 % of the
final gold of ``ppo-kl`` (IQM over its runs); the median over runs.
"""

import itertools
import json
import math
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
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
    with_interval,
)
from rl_statistics import FloatArray, interval, iqm, probability_of_improvement
from rlhf_figures import draw
from rlhf_run import START_FILE
from rlhf_settings import (
    ABLATION,
    FAMILIES,
    METHODS,
    OWN_RATES_FILE,
    PRICED,
    SETTINGS,
    TOKENS,
    TUNED_FILE,
    TUNING,
    resolved,
)
from rlhf_tasks import TASKS
from runs import write_json

from sb3_safe.stability import SMOOTHING, crashes, dispersion, smooth

Tuned = Mapping[str, Mapping[str, str]]
Tuning = Mapping[str, Mapping[str, Mapping[str, Mapping[str, Any]]]]
"""Setting that tunes -> task -> method -> mean final gold and number of seeds."""
Cell = tuple[str, str, str]
"""Setting, task and method."""

ORDER = ("safe", "ppo", "ppo-kl", "ppo-adaptive", "ppo-target-kl", "published", "grpo", *ABLATION, *METHODS)
SHOWN = ("ppo", "ppo-kl", "ppo-adaptive", "ppo-target-kl", "published", "grpo", "safe")
"""Whose samples are put side by side."""
LAST = ("kl_per_text", "entropy", "distinct_2", "length", "stop_share", "explained_variance", "critic_gap")
SIGNIFICANT = 3.0
"""Standard errors that gains and losses must exceed to count as such."""
SAFE_AT_OWN_RATES = ("safe", "safe-price")
"""With its defaults, and tuned to the task: what PPO's forms are compared with there."""
LEVEL = 0.95
"""Share of PPO's final gold that counts as having reached it."""


def after_nan(start: Mapping[str, Any]) -> dict[str, float]:
    """What a run that stopped at NaN counts as from there on: worthless texts, rewarded as the untrained model's."""
    return {"gold": 0.0, "gold_std": 0.0, "reward": start["reward"], "reward_std": 0.0}


def measures(result: Mapping[str, Any], start: Mapping[str, Any]) -> dict[str, float]:
    """The figures of one run; see the top of this file."""
    curve = filled_curve(result, after_nan(start))
    steps, texts = curve["timesteps"], curve["episodes"]
    late = steps > 0.9 * steps[-1]
    levels = smooth(curve["gold"])
    error = start["gold_std"] / math.sqrt(SMOOTHING * float(np.median(texts)))
    jumps = dispersion(curve["reward"], curve["reward_std"], texts)
    final = float(np.average(curve["gold"][late], weights=texts[late]))
    final_error = start["gold_std"] / math.sqrt(float(texts[late].sum()))
    last = {name: curve[name][late] for name in LAST}
    return {
        "final_gold": final,
        "best_gold": float(levels.max()),
        "final_reward": float(np.average(curve["reward"][late], weights=texts[late])),
        "average_reward": float(np.average(curve["reward"], weights=curve["span"])),
        "average_gold": float(np.average(curve["gold"], weights=curve["span"])),
        "dispersion_net": jumps.net,
        "crashes": crashes(levels, start=start["gold"], noise=SIGNIFICANT * error),
        "ruined": float(final < start["gold"] - SIGNIFICANT * final_error),
        "diverged": float(result["diverged"] is not None),
        **{name: float(np.nanmean(x)) if np.isfinite(x).any() else math.nan for name, x in last.items()},
        "largest_kl_per_text": float(np.nanmax(curve["kl_per_text"], initial=0.0)),
        "largest_update_kl": float(np.nanmax(curve["update_kl_max"], initial=0.0)),
        "cpu_seconds": result["cpu_seconds"],
    }


def tuned_methods(runs: Runs, start: Mapping[str, Any]) -> tuple[dict[str, dict[str, str]], Tuning]:
    """The best member of every family that was tuned completely, and what tuning showed.

    :return: task -> family -> method, and the figures of all that was tried.
    """
    best: dict[str, dict[str, str]] = {}
    table: dict[str, dict[str, dict[str, Any]]] = defaultdict(dict)
    for setting, task, methods in ((s, task, methods) for s in TUNING for task, methods in runs.get(s, {}).items()):
        gold = {m: [measures(result, start[task])["final_gold"] for result in rs] for m, rs in methods.items()}
        means = {m: float(np.mean(values)) for m, values in gold.items()}
        ordered = sorted(gold, key=_order)
        table[setting][task] = {m: {"final_gold": digits(means[m]), "seeds": len(gold[m])} for m in ordered}
        if setting == "tuning":
            complete = {family: members for family, members in FAMILIES.items() if set(members) <= set(means)}
            best[task] = {family: max(members, key=lambda m: means[m]) for family, members in complete.items()}
    return best, table


def own_rates(tuning: Tuning) -> dict[str, dict[str, tuple[str, str]]]:
    """What is best for PPO and SAFE: learning rate and coefficient or price on each task, and one for all.

    :return: task -> "ppo-kl" and "safe-price" (at the best pair on that task), "ppo-kl-shared" (at the best pair over
        all tasks) and "safe" (defaults, at the best rate over all) -> setting to compare them at and method; nothing
        unless all has been tried.
    """
    members, prices = FAMILIES["ppo-kl"], ("safe", *PRICED)
    for setting, task in itertools.product(TUNING, TASKS):
        if not {*prices, *members} <= set(tuning.get(setting, {}).get(task, {})):
            return {}

    def best(methods: Collection[str], tasks: Collection[str]) -> tuple[str, str]:
        """Setting and method of the highest mean final gold."""
        setting, method = max(
            itertools.product(TUNING, methods),
            key=lambda pair: sum(tuning[pair[0]][task][pair[1]]["final_gold"] for task in tasks),
        )
        return TUNING[setting], method

    for_all = {"ppo-kl-shared": best(members, TASKS), "safe": best(["safe"], TASKS)}
    return {task: {"ppo-kl": best(members, [task]), "safe-price": best(prices, [task]), **for_all} for task in TASKS}


def _order(method: str) -> int:
    return ORDER.index(method)


class Report:
    """Results with what is needed to compare them.

    :param runs: as :func:`reporting.read_results` has them.
    :param start: figures of the untrained model, by task.
    :param tuned: task -> family -> method.
    """

    def __init__(self, runs: Runs, start: Mapping[str, Any], tuned: Tuned) -> None:
        self.start, self.tuned = start, tuned
        settings = [name for name in SETTINGS if name in runs and name not in TUNING]
        self.runs: Runs = {
            setting: {
                task: self._labelled(task, runs[setting][task]) for task in TASKS if task in runs[setting]
            }
            for setting in settings
        }  # fmt: skip
        self.measures = {
            setting: {
                task: {name: [measures(result, start[task]) for result in rs] for name, rs in methods.items()}
                for task, methods in tasks.items()
            }
            for setting, tasks in self.runs.items()
        }

    def _labelled(self, task: str, methods: Mapping[str, Any]) -> dict[str, Any]:
        """Results by method, the member of a family that is tuned to the task by the family's name."""
        labelled = {self._label(task, method): results for method, results in methods.items()}
        return {name: labelled[name] for name in sorted(labelled, key=_order)}

    def _label(self, task: str, method: str) -> str:
        """The name of the family whose member is tuned to the task, else the method's own."""
        return {resolved(family, task, self.tuned): family for family in FAMILIES}.get(method, method)

    def column(self, cell: Cell, name: str) -> FloatArray:
        """One figure of all runs."""
        setting, task, method = cell
        return np.array([run[name] for run in self.measures[setting][task][method]], dtype=np.float64)

    def row(self, cells: Sequence[Cell], rivals: Mapping[str, Sequence[Cell]] | None = None) -> dict[str, Any]:
        """Figures of a method on one task, or over several, which count alike; ``seeds``: of the task with fewest.

        :param cells: one for each task.
        :param rivals: cells of what it is compared with, by name.
        """

        def columns(name: str, cells: Sequence[Cell] = cells) -> list[FloatArray]:
            return [self.column(cell, name) for cell in cells]

        row: dict[str, Any] = {"seeds": min(map(len, columns("final_gold")))}
        for name in ("final_gold", "average_gold", "average_reward", "final_reward"):
            row[name] = estimate(columns(name))
        for name, theirs in (rivals or {}).items():
            pair = columns("final_gold", theirs), columns("final_gold")
            ends = interval(probability_of_improvement, *pair)
            row[f"{name}_is_better"] = [digits(float(v)) for v in (probability_of_improvement(*pair), *ends)]
        fallen = np.concatenate(columns("crashes"))
        row |= {"crashes": int(fallen.sum()), "crashed_runs": int((fallen > 0).sum())}
        row |= {name: int(np.concatenate(columns(name)).sum()) for name in ("ruined", "diverged")}
        row["largest_kl_per_text"] = digits(float(np.concatenate(columns("largest_kl_per_text")).max()))
        for name in ("best_gold", "dispersion_net", "largest_update_kl", "cpu_seconds", *LAST):
            known = [column[np.isfinite(column)] for column in columns(name)]
            row[name] = median(np.concatenate(known)) if len(cells) == 1 else None
            if len(cells) > 1 and all(map(len, known)):
                row[name] = digits(float(iqm(known)))
        return row

    def summary(self) -> dict[str, Any]:
        """Everything the tables show, as JSON: setting -> task or "all tasks" -> method -> figures."""
        summary: dict[str, Any] = {}
        for setting, by_task in self.measures.items():
            tasks = {task: {m: self._rated(setting, [task], m) for m in methods} for task, methods in by_task.items()}
            if len(by_task) > 1:
                common = [m for m in next(iter(by_task.values())) if all(m in methods for methods in by_task.values())]
                tasks["all tasks"] = {m: self._rated(setting, list(by_task), m) for m in common}
            summary[setting] = tasks
        return summary

    def _rated(self, setting: str, tasks: Sequence[str], method: str) -> dict[str, Any]:
        """Figures of a method, and how often SAFE beats it in the same setting."""
        rivals = [(setting, task, "safe") for task in tasks if "safe" in self.measures[setting][task]]
        known = method != "safe" and len(rivals) == len(tasks)
        return self.row([(setting, task, method) for task in tasks], {"safe": rivals} if known else {})

    def at_own_rates(self, chosen: Mapping[str, Mapping[str, tuple[str, str]]]) -> dict[str, Any]:
        """Figures of PPO and SAFE, each at its own learning rate: task or "all tasks" -> method -> figures.

        :param chosen: as :func:`own_rates` has it. Tasks on which one of them has no runs are left out.
        """
        cells = {
            task: {name: (setting, task, self._label(task, method)) for name, (setting, method) in methods.items()}
            for task, methods in chosen.items()
        }
        cells = {task: found for task, found in cells.items() if all(map(self._has_runs, found.values()))}
        rows: dict[str, Any] = {}
        for task, found in cells.items():
            rows[task] = self._compared([found])
            level = LEVEL * rows[task]["ppo-kl"]["final_gold"][0]
            for name, cell in found.items():
                reached = self._iterations_to(level, cell)
                rows[task][name] |= {
                    "setting": cell[0],
                    "method": chosen[task][name][1],
                    "iterations_to_level": reached,
                }
        if len(cells) > 1:
            rows["all tasks"] = self._compared(list(cells.values()))
        return rows

    def _compared(self, tasks: Sequence[Mapping[str, Cell]]) -> dict[str, dict[str, Any]]:
        """Figures of all that is compared, and how often SAFE beats PPO: name -> figures over all tasks."""
        of = {name: [cells[name] for cells in tasks] for name in tasks[0]}
        safe = {name: cells for name, cells in of.items() if name in SAFE_AT_OWN_RATES}
        return {name: self.row(cells, {} if name in safe else safe) for name, cells in of.items()}

    def _has_runs(self, cell: Cell) -> bool:
        setting, task, method = cell
        return method in self.measures.get(setting, {}).get(task, {})

    def _iterations_to(self, level: float, cell: Cell) -> float | None:
        """Median over runs of the first point with smoothed gold of at least ``level``; ``None``: never."""
        setting, task, method = cell
        reached = []
        for result in self.runs[setting][task][method]:
            curve = filled_curve(result, after_nan(self.start[task]))
            above = np.flatnonzero(smooth(curve["gold"])[SMOOTHING - 1 :] >= level)
            reached.append(curve["timesteps"][SMOOTHING - 1 :][above[0]] / TOKENS if above.size else math.inf)
        return digits(float(np.median(reached)))


# -- tables ------------------------------------------------------------------------------------------------------------

COLUMNS = (
    ("seeds", "seeds", "d"), ("final gold", "final_gold", ".2f"), ("P(SAFE better)", "safe_is_better", ".2f"),
    ("best gold", "best_gold", ".2f"), ("crashes", "crashes", "d"), ("crashed runs", "crashed_runs", "d"),
    ("average gold", "average_gold", ".2f"), ("ruined runs", "ruined", "d"),
    ("NaN", "diverged", "d"), ("final reward", "final_reward", ".2f"), ("average reward", "average_reward", ".2f"),
    ("dispersion, net", "dispersion_net", ".3f"), ("KL per text", "kl_per_text", ".1f"),
    ("largest KL per text", "largest_kl_per_text", ".1f"), ("entropy", "entropy", ".2f"),
    ("distinct-2", "distinct_2", ".2f"), ("tokens", "length", ".1f"), ("ended", "stop_share", ".2f"),
    ("explained variance", "explained_variance", ".2f"), ("critic gap", "critic_gap", ".3f"),
    ("largest KL of an update", "largest_update_kl", ".2g"), ("CPU s", "cpu_seconds", ".0f"),
)  # fmt: skip


TO_LEVEL = ("iterations to PPO's gold", "iterations_to_level", ".0f")
TUNED_BETTER = ("P(tuned SAFE better)", "safe-price_is_better", ".2f")


def _table(columns: Sequence[tuple[str, str, str]], rows: Mapping[str, Mapping[str, Any]]) -> str:
    """A row for each method."""
    return markdown(
        ["method", *(head for head, _, _ in columns)],
        [[method, *(_shown_value(row.get(name), form) for _, name, form in columns)] for method, row in rows.items()],
    )


def _shown_value(value: Any, form: str) -> str:
    return with_interval(value, form) if isinstance(value, list) or value is None else number(value, form)


def tables(
    summary: Mapping[str, Any], own: Mapping[str, Any], tuning: Tuning, start: Mapping[str, Any], tuned: Tuned
) -> str:
    """The summary as Markdown."""
    lines = ["# RLHF laboratory", "", "Made by `python benchmarks/rlhf.py report`; definitions in"
             " `benchmarks/README.md`. IQM with 95 % stratified bootstrap intervals."]  # fmt: skip
    for setting, tasks in summary.items():
        for task, rows in tasks.items():
            lines += ["", f"## {setting}: {task}", ""]
            if task in start:
                members = ", ".join(resolved(family, task, tuned) for family in FAMILIES)
                lines += [f"Untrained: gold {start[task]['gold']:.2f}, reward {start[task]['reward']:.2f},"
                          f" {start[task]['length']:.1f} tokens. Tuned: {members}.", ""]  # fmt: skip
            lines.append(_table(COLUMNS, rows))
    if own:
        lines += ["", "## Each at its own learning rate"]
        for task, rows in own.items():
            named = {" ".join((name, row.get("method", ""), row.get("setting", ""))): row for name, row in rows.items()}
            lines += ["", f"### {task}", "", _table((TO_LEVEL, TUNED_BETTER, *COLUMNS), named)]
    if tuning:
        columns = {f"{setting}: {task}": rows for setting, tasks in tuning.items() for task, rows in tasks.items()}
        cells = []
        for method in (name for name in METHODS if any(name in rows for rows in columns.values())):
            found = [rows.get(method) for rows in columns.values()]
            shown = ["-" if row is None else f"{row['final_gold']:.3f} ({row['seeds']})" for row in found]
            cells.append([method, *shown])
        lines += ["", "## Tuning: mean final gold (seeds)", "", markdown(["method", *columns], cells)]
    return "\n".join(lines) + "\n"


def sample_tables(report: Report) -> str:
    """Texts on the same prompts side by side: the untrained model's, and those of the first seed of each method."""
    lines = ["# Samples", "", "The last policy of the first seed; after each text (proxy reward, gold score)."]
    for setting, tasks in report.runs.items():
        for task, methods in tasks.items():
            columns = {"untrained": report.start[task]["samples"]}
            columns |= {name: methods[name][0]["samples"] for name in SHOWN if name in methods}
            texts: dict[str, list[str]] = defaultdict(list)
            for samples in columns.values():
                for text in samples or [{"prompt": prompt} for prompt in texts]:
                    texts[text["prompt"]].append(_shown(text))
            rows = [[prompt, *cells] for prompt, cells in texts.items()]
            lines += ["", f"## {setting}: {task}", "", markdown(["prompt", *columns], rows)]
    return "\n".join(lines) + "\n"


def _shown(text: Mapping[str, Any]) -> str:
    if "completion" not in text:
        return "NaN"
    written = " ".join(text["completion"].split()).replace("|", "\\|")
    return f"{written} ({text['reward']:.2f}, {text['gold']:.2f})"


def write_report(folder: Path, tuned: Tuned, plots: bool = True) -> str:
    """Write summary.json, tables.md, samples.md, the plots, and what runs of tuning chose, if there are any.

    :param folder: of the results.
    :param tuned: task -> family -> method, of tasks that have no runs of tuning here.
    :param plots: whether to draw (needs matplotlib).
    :return: what was written, in words.
    """
    start = json.loads(START_FILE.read_text(encoding="utf-8"))
    runs = read_results(folder, "gold")
    best, tuning = tuned_methods(runs, start)
    tuned = {**tuned, **best}
    if best:
        write_json(folder / TUNED_FILE, best)
    report = Report(runs, start, tuned)
    chosen = own_rates(tuning)
    if chosen:
        write_json(folder / OWN_RATES_FILE, chosen)
    summary, own = report.summary(), report.at_own_rates(chosen)
    found = [
        r for tasks in runs.values() for methods in tasks.values() for results in methods.values() for r in results
    ]
    # Results of another source than their neighbours' are worth knowing of.
    sources = sorted({result["versions"]["sb3_safe_source"] for result in found})
    text = json.dumps({"sources": sources, "tuning": tuning, "settings": summary, "own_rates": own}, indent=1)
    (folder / "summary.json").write_text(text + "\n", encoding="utf-8")
    (folder / "tables.md").write_text(tables(summary, own, tuning, start, tuned), encoding="utf-8")
    (folder / "samples.md").write_text(sample_tables(report), encoding="utf-8")
    if plots:
        prepare_plots()
        curves = {
            setting: {
                task: {m: [filled_curve(r, after_nan(start[task])) for r in results] for m, results in methods.items()}
                for task, methods in tasks.items()
            }
            for setting, tasks in report.runs.items()
        }
        draw(curves, start, folder)
    mixed = f"; they are of {len(sources)} versions of the source" if len(sources) > 1 else ""
    return f"{len(found)} runs: {folder / 'tables.md'}, {folder / 'summary.json'}{mixed}"
