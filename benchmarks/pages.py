"""Writes the tables of README and docs/evidence.md from the results that the other scripts wrote.

    python benchmarks/pages.py

A table stands between ``<!-- table: name -->`` and ``<!-- end -->``. A test fails where a page has another one than
this would write.
"""

import itertools
import json
import re
import statistics
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import language
from control_settings import STRESS
from reporting import markdown, number, with_interval

ROOT = Path(__file__).parents[1]
PAGES = (ROOT / "README.md", ROOT / "docs" / "evidence.md")
RESULTS = Path(__file__).with_name("results")
PAIR = {"PPO": "ppo", "SAFE": "safe"}
SPEED = {
    "SAFE": ("safe", "speed.json"),
    "SAFE, all layers off": ("safe-off", "speed.json"),
    "SBX PPO (JAX)": ("sbx", "speed.json"),
    "single-file loop": ("loop", "speed.json"),
    "SAFE, two threads": ("safe", "speed-threads-2.json"),
    "SBX, two threads": ("sbx", "speed-threads-2.json"),
}
SPEED_TASKS = {
    "cartpole-1": "CartPole, 1 env",
    "cartpole-8": "CartPole, 8 envs",
    "pendulum-4": "Pendulum, 4 envs",
    "halfcheetah": "HalfCheetah",
    "images": "images",
}
STRESSES = {
    "lr-x5": "rate x 5",
    "lr-x20": "rate x 20",
    "clip-1": "clip range 1",
    "epochs-x4": "epochs x 4",
    "reward-noise": "reward noise",
    "biased-critic": "biased critic",
}
RLHF_TASKS = ("embedded", "length", "sparse")
RATES = {"tuned": "tuned", "lr-x3": "rate x 3", "lr-x10": "rate x 10"}
OWN_RATES = {
    "ppo-kl": "PPO, tuned to the task",
    "safe-price": "SAFE, tuned to the task",
    "ppo-kl-shared": "PPO, one setting for all",
    "safe": "SAFE, one setting for all",
}
OTHERS = {
    "ppo-adaptive": "PPO, adaptive KL in the reward",
    "ppo": "PPO without a KL",
    "ppo-target-kl": "PPO, `target_kl` 0.03",
    "published": "the published rule",
    "grpo": "GRPO (TRL)",
}

LAYERS = {
    "double soft-min critic": ("safe-no-soft-min", "only-soft-min"),
    "Huber loss of the critics": ("safe-no-huber", "only-huber"),
    "KL penalty": ("safe-no-penalty", "only-penalty"),
    "entropy gate (alone: with the penalty)": ("safe-no-gate", "only-penalty-gate"),
    "moving threshold (alone: with the penalty)": ("safe-constant", "only-penalty-threshold"),
    "limit on drift (alone: with the penalty)": ("safe-no-drift", "only-penalty-drift"),
    "bound on updates": ("safe-no-preview", "only-preview"),
}
"""Methods with a layer off alone, and on alone."""
LAYERS_CONTROL = {"CartPole-v1": "CartPole", "Pendulum-v1": "Pendulum", "MountainCar-v0": "MountainCar"}


def beside(what: str) -> list[str]:
    """Heads of a figure's two columns."""
    return [f"{what}, PPO", "SAFE"]


def read(name: str) -> Any:
    """A file of results."""
    return json.loads((RESULTS / name).read_text(encoding="utf-8"))


def span(counts: Sequence[int]) -> str:
    """How many runs tasks have."""
    return "-".join(str(count) for count in sorted({min(counts), max(counts)}))


# -- tables ------------------------------------------------------------------------------------------------------------


def control() -> str:
    """SAFE beside PPO on the small control tasks, tuned and under stress."""
    summary = read("control/summary.json")
    groups = {name: content["aggregate"] for name, content in summary["settings"].items()}
    labelled = [("tuned", groups["tuned"]["small tasks"])]
    labelled += [(STRESSES[name], next(iter(groups[name].values()))) for name in STRESS]
    labelled.append(("all stress", summary["stress"]))
    rows = []
    for label, figures in labelled:
        both = [figures[name] for name in PAIR.values()]
        row = [label, str(len(both[0]["runs"])), span([count for figure in both for count in figure["runs"]])]
        row += [with_interval(figure[what], ".2f") for what in ("final", "average") for figure in both]
        row.append(f"{both[0]['dispersion'] / both[1]['dispersion']:.2f}")
        rows.append(row + [str(figure["crashes"]) for figure in both])
    head = ["", "tasks", "seeds", *beside("final"), *beside("training average"), "dispersion, PPO / SAFE"]
    return markdown([*head, *beside("crashes")], rows)


def larger() -> str:
    """SAFE beside PPO on the control tasks that are too large for the others' budgets."""
    settings = read("control/summary.json")["settings"]["tuned"]
    rows = []
    for task in (name for name in settings["tasks"] if name not in settings["aggregate"]["small tasks"]["tasks"]):
        both = [settings["tasks"][task][name] for name in PAIR.values()]
        row = [task, span([figure["seeds"] for figure in both])]
        for what in ("final", "average"):
            row += [with_interval(figure[what], ".0f") for figure in both]
        row += [f"{figure[what]:.0f}" for what in ("dispersion", "crashes") for figure in both]
        rows.append(row)
    head = [*beside("final"), *beside("training average"), *beside("dispersion"), *beside("crashes")]
    return markdown(["task", "seeds", *head], rows)


def alternatives() -> str:
    """Final returns of what might be used instead, on the tasks that all were run on, tuned."""
    tasks = read("control/summary.json")["settings"]["tuned"]["tasks"]
    columns = PAIR | {"PPO, `target_kl` 0.03": "ppo-target-kl", "TRPO": "trpo"}
    rows = []
    for task, figures in tasks.items():
        if set(columns.values()) <= set(figures):
            row = [figures[name] for name in columns.values()]
            rows.append([task, *(f"{with_interval(found['final'], '.0f')} ({found['seeds']})" for found in row)])
    return markdown(["task", *columns], rows)


def in_language() -> Iterator[tuple[list[str], list[dict[str, Any]]]]:
    """First cells of a row and the figures of PPO with the KL in its reward and of SAFE, by task and learning rate."""
    settings = read("rlhf/summary.json")["settings"]
    for task, (setting, label) in itertools.product(RLHF_TASKS, RATES.items()):
        both = [settings[setting][task][method] for method in ("ppo-kl", "safe")]
        yield [f"{task}, {label}", span([figure["seeds"] for figure in both])], both


def gold() -> str:
    """What matters most of :func:`rlhf`."""
    rows = []
    for row, both in in_language():
        row += [with_interval(figure["final_gold"], ".2f") for figure in both]
        rows.append(row + [str(figure["crashes"]) for figure in both])
    return markdown(["task, learning rate", "seeds", *beside("final gold"), *beside("crashes")], rows)


def rlhf() -> str:
    """SAFE beside PPO with the KL in its reward."""
    rows = []
    for row, both in in_language():
        for what in ("final_gold", "average_gold", "average_reward"):
            row += [with_interval(figure[what], ".2f") for figure in both]
        row += [f"{figure['kl_per_text']:.1f}" for figure in both]
        rows.append(row + [str(figure["crashes"]) for figure in both])
    measured = ("final gold", "average gold", "average proxy", "KL per text", "crashes")
    return markdown(["task, learning rate", "seeds", *(head for what in measured for head in beside(what))], rows)


def own_rates() -> str:
    """PPO and SAFE in language, each at the learning rate that is best for it."""
    rows = []
    for task, figures in read("rlhf/summary.json")["own_rates"].items():
        for name, label in OWN_RATES.items():
            figure = figures[name]
            row = [task, label, RATES.get(figure.get("setting"), ""), str(figure["seeds"])]
            row += [with_interval(figure[what], ".2f") for what in ("final_gold", "average_gold", "average_reward")]
            row += [f"{figure['kl_per_text']:.1f}", str(figure["crashes"])]
            rows.append([*row, number(figure.get("iterations_to_level"), ".0f")])
    head = ["task", "", "rate", "seeds", "final gold", "average gold", "average proxy", "KL per text", "crashes"]
    return markdown([*head, "iterations to PPO's gold"], rows)


def others() -> str:
    """Final gold of PPO's other forms, of the paper's code and of GRPO, on the tasks that they were run on."""
    settings = read("rlhf/summary.json")["settings"]
    rows = []
    for method, label in OTHERS.items():
        for task in RLHF_TASKS:
            figures = [settings[setting][task][method] for setting in RATES if method in settings[setting][task]]
            if len(figures) == len(RATES):
                seeds = span([figure["seeds"] for figure in figures])
                rows.append([label, task, seeds, *(f"{figure['final_gold'][0]:.2f}" for figure in figures)])
    return markdown(["", "task", "seeds", *RATES.values()], rows)


def layers() -> str:
    """Final gold with each layer off alone and on alone, on language."""
    rows = read("rlhf/summary.json")["settings"]["lr-x10"]
    return layer_table({task: rows[task] | {"safe-off": rows[task]["ppo"]} for task in RLHF_TASKS}, "final_gold", 2)


def layers_control() -> str:
    """Final returns with each layer off alone and on alone, at 20 times the rate."""
    rows = read("control/summary.json")["settings"]["lr-x20"]["tasks"]
    tasks = {name: rows[task] | {"safe-off": rows[task]["ppo"]} for task, name in LAYERS_CONTROL.items()}
    return layer_table(tasks, "final", 0)


def layer_table(tasks: dict[str, Any], what: str, digits: int) -> str:
    """A row for each layer, two columns for each task; without layers that no task was run without.

    :param tasks: by the name of the task, estimates of all methods.
    :param what: the estimate that is shown.
    :param digits: after the point.
    """
    lines = []
    for label, names in (LAYERS | {"none off: SAFE; none on: PPO": ("safe", "safe-off")}).items():
        if names[0] in next(iter(tasks.values())):
            lines.append([label, *(f"{rows[name][what][0]:.{digits}f}" for rows in tasks.values() for name in names)])
    return markdown(["layer", *(head for task in tasks for head in (f"{task}, off alone", "on alone"))], lines)


def speed() -> str:
    """Environment steps per second over SB3's PPO: medians over interleaved runs."""
    rows = []
    for label, (algorithm, file) in SPEED.items():
        measured = read(file)["tasks"]
        row = [label]
        for name in SPEED_TASKS:
            pairs = zip(measured[name]["ppo"], measured[name][algorithm], strict=True)
            row.append(f"{statistics.median(ppo['total'] / other['total'] for ppo, other in pairs):.2f}")
        rows.append(row)
    return markdown(["", *SPEED_TASKS.values()], rows)


def text() -> str:
    """Speed on text over its peers."""
    return language.table(read("language-cpu.json"))


TABLES: dict[str, Callable[[], str]] = {
    table.__name__: table
    for table in (control, larger, alternatives, gold, rlhf, own_rates, others, layers_control, layers, speed, text)
}


def updated(page: str) -> str:
    """The page with all its tables made anew.

    :raises KeyError: a table of an unknown name.
    """
    return re.sub(
        r"(<!-- table: (\w+) -->\n).*?(<!-- end -->)",
        lambda found: f"{found[1]}\n{TABLES[found[2]]()}\n\n{found[3]}",
        page,
        flags=re.DOTALL,
    )


if __name__ == "__main__":
    for path in PAGES:
        path.write_text(updated(path.read_text(encoding="utf-8")), encoding="utf-8")
