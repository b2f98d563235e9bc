"""Figures in README are those in the results that the benchmarks wrote."""

import json
import re
import statistics
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
ROWS = {"SAFE": "safe", "SAFE, all layers off": "safe-off", "SBX PPO (JAX)": "sbx", "single-file loop": "loop"}
COLUMNS = ["cartpole-1", "cartpole-8", "pendulum-4", "halfcheetah", "images"]


@pytest.mark.parametrize("row", ROWS)
def test_ratios_of_speed_are_medians_over_interleaved_runs(row: str) -> None:
    tasks = json.loads((ROOT / "benchmarks/results/speed.json").read_text())["tasks"]
    published = re.search(rf"^\| {re.escape(row)} \| (.*) \|$", README, re.MULTILINE)
    assert published is not None
    figures = [float(cell) for cell in published.group(1).split(" | ")]
    for name, figure in zip(COLUMNS, figures, strict=True):
        pairs = zip(tasks[name]["ppo"], tasks[name][ROWS[row]], strict=True)
        assert figure == round(statistics.median(ppo["total"] / other["total"] for ppo, other in pairs), 2)


def test_ratios_on_text_are_those_measured() -> None:
    sys.path.insert(0, str(ROOT / "benchmarks"))
    import language

    results = json.loads((ROOT / "benchmarks/results/language-cpu.json").read_text())
    assert language.table(results) in README


@pytest.mark.parametrize(
    ("setting", "label"),
    [
        ("tuned", "tuned (5 tasks)"),
        ("lr-x5", "rate x 5"),
        ("lr-x20", "rate x 20"),
        ("clip-1", "clip range 1"),
        ("epochs-x4", "epochs x 4"),
        ("reward-noise", "reward noise"),
        ("biased-critic", "biased critic"),
    ],
)
def test_returns_and_crashes_under_stress_are_those_of_the_report(setting: str, label: str) -> None:
    summary = json.loads((ROOT / "benchmarks/results/control/summary.json").read_text())
    figures = summary["settings"][setting]["aggregate"]["all tasks"]
    cells = [
        "{:.2f} [{:.2f}, {:.2f}]".format(*figures[algorithm][what])
        for what in ("final", "average")
        for algorithm in ("ppo", "safe")
    ]
    crashes = [str(figures[algorithm]["crashes"]) for algorithm in ("ppo", "safe")]
    assert f"| {' | '.join([label, *cells, *crashes])} |" in README


@pytest.mark.parametrize("task", ["embedded", "length", "sparse"])
@pytest.mark.parametrize(("setting", "label"), [("tuned", "tuned"), ("lr-x3", "rate x 3"), ("lr-x10", "rate x 10")])
def test_gold_and_proxy_are_those_of_the_report(setting: str, label: str, task: str) -> None:
    summary = json.loads((ROOT / "benchmarks/results/rlhf/summary.json").read_text())
    both = [summary["settings"][setting][task][method] for method in ("ppo-kl", "safe")]
    cells = [
        "{:.2f} [{:.2f}, {:.2f}]".format(*figures[what])
        for what in ("final_gold", "average_reward")
        for figures in both
    ]
    cells += [f"{figures['kl_per_text']:.1f}" for figures in both] + [str(figures["crashes"]) for figures in both]
    (seeds,) = {figures["seeds"] for figures in both}
    assert f"| {' | '.join([f'{task}, {label}', str(seeds), *cells])} |" in README


def test_gold_scores_of_tuning_at_ten_times_the_rate_are_those_of_the_report() -> None:
    tuning = json.loads((ROOT / "benchmarks/results/rlhf/summary.json").read_text())["tuning"]["tuning-x10: embedded"]
    ppo = max(figures["final_gold"] for name, figures in tuning.items() if name.startswith("ppo-kl"))
    safe = min(figures["final_gold"] for name, figures in tuning.items() if name.startswith("safe"))
    assert f"at {ppo:.2f}, SAFE at any of its three prices at {safe:.2f} or more" in README
