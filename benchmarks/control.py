"""SAFE against SB3's PPO, PPO with an early stop, and TRPO on nine control tasks: tuned, under stress, layer by layer.

    python benchmarks/control.py run [--suite tuned|stress|ablation] [--tasks ...] [--algorithms ...] [--seeds 10]
                                     [--workers 2] [--time-limit SECONDS] [--long] [--budget-scale 0.1]
    python benchmarks/control.py report
    python benchmarks/control.py random

Hyperparameters are the RL Zoo's, from sb3_safe/presets.yml, for all algorithms; SAFE's own arguments are its defaults,
the same on every task. A run is a process with one thread and writes
benchmarks/results/control/<setting>/<task>/<algorithm>/<seed>.json when it ends (and a .partial with the curve so far
until then). Finished runs are skipped, so `run` goes on where it was stopped; all algorithms of a seed come before the
next seed, so that it may be stopped at any time. `report` reads what is there: see control_report.py.
"""

import argparse
import itertools
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from control_run import RANDOM_FILE, RESULTS, measure_random_policy
from control_settings import ABLATED, ALGORITHMS, SETTINGS, STRESS, VARIANTS, described
from runs import Run, exit_code, run_missing

from sb3_safe.presets import preset


class Task(NamedTuple):
    """How long and how often a task is trained on; ``good`` is where normalised scores are 1."""

    good: float
    """RL Zoo's published PPO (https://github.com/DLR-RM/rl-baselines3-zoo/blob/master/benchmark.md): one run,
    deterministic actions; LunarLander on v2 and MuJoCo on v3 of the environments, BipedalWalker after 5 M steps."""
    seeds: int
    budget: int | None = None
    """None: the preset's."""
    long_budget: int | None = None


# The quick ones first: what a stopped run has is then spread over most tasks.
TASKS = {
    "CartPole-v1": Task(good=500.0, seeds=10),
    "Pendulum-v1": Task(good=-172.2, seeds=10),
    "Acrobot-v1": Task(good=-73.5, seeds=10),
    "MountainCar-v0": Task(good=-110.4, seeds=10),
    "LunarLander-v3": Task(good=242.1, seeds=5),
    "HalfCheetah-v5": Task(good=5819.1, seeds=5, budget=300_000, long_budget=1_000_000),
    "Hopper-v5": Task(good=2410.4, seeds=5, budget=300_000, long_budget=1_000_000),
    "Walker2d-v5": Task(good=3478.8, seeds=5, budget=300_000, long_budget=1_000_000),
    "BipedalWalker-v3": Task(good=287.9, seeds=5, budget=1_000_000),
}
SMALL = ("CartPole-v1", "Pendulum-v1", "Acrobot-v1", "MountainCar-v0", "LunarLander-v3")
"""Tasks of the stress suite, and those that TRPO is run on."""


class Suite(NamedTuple):
    """What ``--suite`` stands for."""

    settings: tuple[str, ...]
    tasks: tuple[str, ...]
    algorithms: tuple[str, ...]


SUITES = {
    "tuned": Suite(("tuned",), tuple(TASKS), ("ppo", "safe", "ppo-target-kl", "trpo")),
    "stress": Suite(STRESS, SMALL, ("ppo", "safe", "ppo-target-kl")),
    # Its runs of ppo and safe are those of the other suites.
    "ablation": Suite(("tuned", "lr-x5", "lr-x20"), ABLATED, ("ppo", "safe", *VARIANTS)),
}


def plan(options: argparse.Namespace) -> Iterator[Run]:
    """All runs of a suite in the order in which they are wanted: seed by seed."""
    suite = SUITES[options.suite]
    settings = options.settings or (("long",) if options.long else suite.settings)
    tasks = options.tasks or suite.tasks
    for seed in range(options.seeds or max(task.seeds for task in TASKS.values())):
        for setting, task, algorithm in itertools.product(settings, tasks, options.algorithms or suite.algorithms):
            spec = TASKS[task]
            if not options.seeds and seed >= spec.seeds:
                continue
            if algorithm == "trpo" and task not in SMALL:
                continue
            if setting == "long" and spec.long_budget is None:
                continue
            budget = (spec.long_budget if setting == "long" else spec.budget) or preset(task)["n_timesteps"]
            yield Run(setting, task, algorithm, seed, max(1, round(budget * options.budget_scale)))


def run_all(options: argparse.Namespace) -> int:
    """Run what is missing; the number of runs that failed."""
    script = Path(__file__).with_name("control_run.py")
    limits = (options.workers, options.time_limit, options.replace)
    return run_missing(plan(options), options.out, script, described, *limits)


def write_random_scores() -> None:
    """Measure a random policy on every task, once; the file is kept with the results."""
    RANDOM_FILE.parent.mkdir(parents=True, exist_ok=True)
    scores = {task: measure_random_policy(task) for task in TASKS}
    RANDOM_FILE.write_text(json.dumps(scores, indent=1) + "\n", encoding="utf-8")


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    run: Any = commands.add_parser("run", help="train what is missing")
    run.add_argument("--suite", choices=SUITES, default="tuned")
    run.add_argument("--tasks", nargs="+", choices=TASKS, help="default: the suite's")
    run.add_argument("--algorithms", nargs="+", choices=ALGORITHMS, help="default: the suite's")
    run.add_argument("--settings", nargs="+", choices=SETTINGS, help="default: the suite's")
    run.add_argument("--seeds", type=int, help="default: 10 on classic control, 5 on the rest")
    run.add_argument("--workers", type=int, default=2)
    run.add_argument("--time-limit", type=float, help="seconds after which no run is started any more")
    run.add_argument("--long", action="store_true", help="MuJoCo for 1 M steps, as the setting 'long'")
    run.add_argument("--budget-scale", type=float, default=1.0, help="share of every budget; use another --out with it")
    run.add_argument("--replace", action="store_true", help="redo runs that were made with other settings")
    report = commands.add_parser("report", help="tables, plots and summary.json from the results that are there")
    report.add_argument("--no-plots", action="store_true")
    commands.add_parser("random", help="measure the random policy again (random.json)")
    for command in (run, report):
        command.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line's command; an exit code."""
    options = parse(arguments)
    if options.command == "random" or not RANDOM_FILE.exists():
        write_random_scores()
    if options.command == "run":
        return exit_code("control.py", lambda: run_all(options))
    if options.command == "report":
        # matplotlib is needed for this only.
        from control_report import write_report

        good = {name: task.good for name, task in TASKS.items()}
        print(write_report(options.out, good, SMALL, plots=not options.no_plots))
    return 0


if __name__ == "__main__":
    sys.exit(main())
