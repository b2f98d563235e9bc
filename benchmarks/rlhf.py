"""RLHF laboratory: does SAFE hold where PPO breaks on language? Three small tasks with a proxy and a gold score.

    python benchmarks/rlhf.py run [--suite tuning|main|rates|own-rates|ablation|strength|quick] [--tasks ...]
                                  [--methods ...] [--settings ...] [--seeds 10] [--workers 2] [--time-limit SECONDS]
    python benchmarks/rlhf.py run --quick --out runs/rlhf-quick
    python benchmarks/rlhf.py report [--out FOLDER]
    python benchmarks/rlhf.py start

All methods but GRPO, which is TRL's, are one class on one code path, with equal budgets (rlhf_settings.py). SAFE has
one default for all tasks; the KL coefficients of PPO and GRPO and the target of PPO's adaptive form are tuned per task,
on seeds of their own: first `--suite tuning` and `report`, which writes tuned.json, then the other suites. The same
with the learning rate as well: `--suite rates` and `report`, which writes own_rates.json, then `--suite own-rates`.

A run is a process with one thread and writes benchmarks/results/rlhf/<setting>/<task>/<method>/<seed>.json when it ends
(and a .partial with the curve so far until then). Finished runs are skipped, so `run` goes on where it was stopped, and
the published ones are made again only in another folder (`--out`); all methods of a seed come before the next seed.
`report` reads what is there: see rlhf_report.py.
"""

import argparse
import itertools
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rlhf_run import RESULTS, START_FILE, measure_start
from rlhf_settings import (
    ABLATION,
    FAMILIES,
    METHODS,
    OWN_RATES_FILE,
    PRICED,
    SETTINGS,
    STRENGTHS,
    TUNED_FILE,
    TUNING,
    TUNING_SEED,
    described,
    resolved,
    run_of,
)
from rlhf_tasks import TASKS
from runs import Run, exit_code, run_missing


class Suite(NamedTuple):
    """What ``--suite`` stands for."""

    settings: tuple[str, ...]
    tasks: tuple[str, ...]
    methods: tuple[str, ...]
    seeds: int


SUITES = {
    "tuning": Suite(("tuning",), tuple(TASKS), tuple(m for members in FAMILIES.values() for m in members), seeds=2),
    # Each method's own rate: with PPO's coefficient, SAFE's price, or SAFE's default for all tasks.
    "rates": Suite(tuple(TUNING), tuple(TASKS), ("safe", *PRICED, *FAMILIES["ppo-kl"]), seeds=1),
    # Rates and methods are what that has shown.
    "own-rates": Suite((), tuple(TASKS), (), seeds=10),
    "main": Suite(("tuned", "lr-x3", "lr-x10"), tuple(TASKS),
                  ("safe", "ppo", "ppo-kl", "ppo-adaptive", "ppo-target-kl", "published", "grpo"), seeds=10),
    # Its runs of ppo and safe are those of the main suite.
    "ablation": Suite(("lr-x10",), tuple(TASKS),
                      ("safe", "ppo", *ABLATION), seeds=5),
    # How much depends on SAFE's one coefficient; its default is among the main suite's.
    "strength": Suite(("lr-x3",), ("embedded",), tuple(STRENGTHS), seeds=5),
    "quick": Suite(("quick", "quick-x10"), tuple(TASKS), ("safe", "ppo", "ppo-kl"), seeds=1),
}  # fmt: skip


def plan(options: argparse.Namespace) -> Iterator[Run]:
    """All runs of a suite in the order in which they are wanted: seed by seed."""
    cells = list(own_rate_cells(options) if options.suite == "own-rates" else suite_cells(options))
    for seed in range(options.seeds or SUITES[options.suite].seeds):
        for setting, task, method in cells:
            first = TUNING_SEED if setting in TUNING else 0
            yield run_of(setting, task, method, first + seed, options.iterations)


def suite_cells(options: argparse.Namespace) -> Iterator[tuple[str, str, str]]:
    """Setting, task and method of a suite's runs, each with each."""
    suite, tuned = SUITES[options.suite], read_tuned(options.out)
    settings, tasks = options.settings or suite.settings, options.tasks or suite.tasks
    for setting, task, method in itertools.product(settings, tasks, options.methods or suite.methods):
        yield setting, task, resolved(method, task, tuned)


def own_rate_cells(options: argparse.Namespace) -> Iterator[tuple[str, str, str]]:
    """Setting, task and method of PPO and SAFE, each at its own learning rate; once, if it is chosen twice."""
    chosen = read_chosen(OWN_RATES_FILE, options.out)
    for task in options.tasks or chosen:
        for setting, method in dict.fromkeys(map(tuple, chosen.get(task, {}).values())):
            yield setting, task, method


def read_tuned(out: Path) -> Mapping[str, Mapping[str, str]]:
    """What tuning found: of the results at hand, else of those that are published."""
    return read_chosen(TUNED_FILE, out)


def read_chosen(name: str, out: Path) -> Any:
    """What a suite that tunes has chosen; nothing if it has not been run."""
    for folder in (out, RESULTS):
        if (folder / name).exists():
            return json.loads((folder / name).read_text(encoding="utf-8"))
    return {}


def run_all(options: argparse.Namespace) -> int:
    """Run what is missing; the number of runs that failed."""
    script = Path(__file__).with_name("rlhf_run.py")
    limits = (options.workers, options.time_limit, options.replace)
    return run_missing(plan(options), options.out, script, described, *limits)


def write_start() -> None:
    """Measure the untrained model on every task, once; the file is kept with the results."""
    START_FILE.parent.mkdir(parents=True, exist_ok=True)
    start = {task: measure_start(task) for task in TASKS}
    START_FILE.write_text(json.dumps(start, indent=1) + "\n", encoding="utf-8")


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    run: Any = commands.add_parser("run", help="train what is missing")
    run.add_argument("--suite", choices=SUITES, default="main")
    run.add_argument("--quick", dest="suite", action="store_const", const="quick", help="15 minutes: --suite quick")
    run.add_argument("--tasks", nargs="+", choices=TASKS, help="default: the suite's")
    run.add_argument("--methods", nargs="+", choices=(*METHODS, *FAMILIES), help="default: the suite's")
    run.add_argument("--settings", nargs="+", choices=SETTINGS, help="default: the suite's")
    run.add_argument("--seeds", type=int, help="default: the suite's")
    run.add_argument("--iterations", type=int, help="of every run; use another --out with it. Default: the setting's")
    run.add_argument("--workers", type=int, default=2)
    run.add_argument("--time-limit", type=float, help="seconds after which no run is started any more")
    run.add_argument("--replace", action="store_true", help="redo runs that were made with other settings")
    report = commands.add_parser("report", help="tables, plots, samples, summary.json from what is there")
    report.add_argument("--no-plots", action="store_true")
    commands.add_parser("start", help="measure the untrained model again (start.json)")
    for command in (run, report):
        command.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    options = parser.parse_args(arguments)
    if options.command == "run" and options.suite == "own-rates" and (options.settings or options.methods):
        parser.error("--suite own-rates has its settings and methods from own_rates.json; leave them out")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line's command; an exit code."""
    options = parse(arguments)
    if options.command == "start" or not START_FILE.exists():
        write_start()
    if options.command == "run":
        return exit_code("rlhf.py", lambda: run_all(options))
    if options.command == "report":
        from rlhf_report import write_report

        print(write_report(options.out, read_tuned(options.out), plots=not options.no_plots))
    return 0


if __name__ == "__main__":
    sys.exit(main())
