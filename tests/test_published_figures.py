"""Figures in README are those in the results that the benchmarks wrote."""

import json
import re
import statistics
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
CONTROL = json.loads((ROOT / "benchmarks/results/control/summary.json").read_text())["settings"]
LANGUAGE = json.loads((ROOT / "benchmarks/results/rlhf/summary.json").read_text())
ROWS = {
    "SAFE": ("safe", "speed.json"),
    "SAFE, all layers off": ("safe-off", "speed.json"),
    "SBX PPO (JAX)": ("sbx", "speed.json"),
    "single-file loop": ("loop", "speed.json"),
    "SAFE, two threads": ("safe", "speed-threads-2.json"),
    "SBX, two threads": ("sbx", "speed-threads-2.json"),
}
COLUMNS = ["cartpole-1", "cartpole-8", "pendulum-4", "halfcheetah", "images"]


@pytest.mark.parametrize("row", ROWS)
def test_ratios_of_speed_are_medians_over_interleaved_runs(row: str) -> None:
    algorithm, file = ROWS[row]
    tasks = json.loads((ROOT / "benchmarks/results" / file).read_text())["tasks"]
    published = re.search(rf"^\| {re.escape(row)} \| (.*) \|$", README, re.MULTILINE)
    assert published is not None
    figures = [float(cell) for cell in published.group(1).split(" | ")]
    for name, figure in zip(COLUMNS, figures, strict=True):
        pairs = zip(tasks[name]["ppo"], tasks[name][algorithm], strict=True)
        assert figure == round(statistics.median(ppo["total"] / other["total"] for ppo, other in pairs), 2)


def test_what_the_layers_cost_is_what_was_measured() -> None:
    tasks = json.loads((ROOT / "benchmarks/results/speed.json").read_text())["tasks"]
    seconds = {
        (name, algorithm): statistics.median(row["total"] for row in tasks[name][algorithm])
        for name in COLUMNS
        for algorithm in ("safe", "safe-off")
    }
    shares = [100 * (1 - seconds[name, "safe-off"] / seconds[name, "safe"]) for name in COLUMNS[:4]]
    assert (
        f"is {min(shares[:3]):.0f} to {max(shares[:3]):.0f} % of an iteration with small networks, and a fifth"
        in README
    )
    assert 15 < shares[3] < 25


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
    groups = CONTROL[setting]["aggregate"]
    figures = groups.get("small tasks", groups["all tasks"])
    cells = [
        "{:.2f} [{:.2f}, {:.2f}]".format(*figures[algorithm][what])
        for what in ("final", "average")
        for algorithm in ("ppo", "safe")
    ]
    crashes = [str(figures[algorithm]["crashes"]) for algorithm in ("ppo", "safe")]
    assert f"| {' | '.join([label, *cells, *crashes])} |" in README


@pytest.mark.parametrize("task", ["HalfCheetah-v5", "Hopper-v5", "Walker2d-v5", "BipedalWalker-v3"])
def test_returns_on_larger_tasks_are_those_of_the_report(task: str) -> None:
    both = [CONTROL["tuned"]["tasks"][task][algorithm] for algorithm in ("ppo", "safe")]
    assert [row["seeds"] for row in both] == [1, 1]
    cells = [f"{row[what][0]:.0f}" for what in ("final", "average") for row in both]
    cells += [f"{row[what]:.0f}" for what in ("dispersion", "crashes", "cpu_seconds") for row in both]
    assert f"| {' | '.join([task, *cells])} |" in README


def test_final_returns_layer_by_layer_are_those_of_the_report() -> None:
    rows = next(group for group in CONTROL["lr-x5"]["aggregate"].values() if "safe-off" in group)
    final = {name: f"{row['final'][0]:.2f}" for name, row in rows.items() if name != "tasks"}
    text = " ".join(README.split())
    assert f"with all layers off the final return is {final['safe-off']};" in text
    assert (
        f"with the soft-min alone {final['only-soft-min']}, the bound alone {final['only-preview']}, the Huber loss "
        f"alone {final['only-huber']}, the penalty alone {final['only-penalty']}. Without the penalty it is "
        f"{final['safe-no-penalty']}, without any other layer 0.99 or 1.00"
    ) in text
    others = ("safe-no-soft-min", "safe-no-huber", "safe-no-gate", "safe-no-preview", "safe-constant")
    assert {final[name] for name in others} == {"0.99", "1.00"}


def test_what_is_said_of_pendulum_the_threshold_and_crashes_is_in_the_results() -> None:
    pendulum = {name: f"{row['average'][0]:.0f}" for name, row in CONTROL["tuned"]["tasks"]["Pendulum-v1"].items()}
    assert f"its training average is {pendulum['safe']} there, PPO's {pendulum['ppo']}," in README
    assert f"at the tuned rate the average is {pendulum['safe-no-penalty']} without it" in README
    for file in (ROOT / "benchmarks/results/control").glob("*/*/safe-constant/*.json"):
        same = json.loads((file.parent.parent / "safe" / file.name).read_text())
        assert json.loads(file.read_text())["curve"] == same["curve"]
    small = ("CartPole-v1", "Pendulum-v1", "Acrobot-v1", "MountainCar-v0", "LunarLander-v3")
    crashes = {
        task: sum(rows["tasks"][task]["safe"]["crashes"] for rows in CONTROL.values() if task in rows["tasks"])
        for task in small
    }
    assert f"all of its\n{crashes.pop('CartPole-v1')} crashes in this table are on CartPole" in README
    assert not any(crashes.values())


@pytest.mark.parametrize("task", ["embedded", "length", "sparse"])
@pytest.mark.parametrize(("setting", "label"), [("tuned", "tuned"), ("lr-x3", "rate x 3"), ("lr-x10", "rate x 10")])
def test_gold_and_proxy_are_those_of_the_report(setting: str, label: str, task: str) -> None:
    both = [LANGUAGE["settings"][setting][task][method] for method in ("ppo-kl", "safe")]
    cells = [
        "{:.2f} [{:.2f}, {:.2f}]".format(*figures[what])
        for what in ("final_gold", "average_reward")
        for figures in both
    ]
    cells += [f"{figures['kl_per_text']:.1f}" for figures in both] + [str(figures["crashes"]) for figures in both]
    (seeds,) = {figures["seeds"] for figures in both}
    assert f"| {' | '.join([f'{task}, {label}', str(seeds), *cells])} |" in README


@pytest.mark.parametrize(
    ("method", "label"),
    [
        ("ppo", "PPO without a KL"),
        ("ppo-target-kl", "PPO, `target_kl` 0.03"),
        ("published", "the published rule"),
    ],
)
def test_gold_without_a_price_on_distance_is_that_of_the_report(method: str, label: str) -> None:
    figures = [LANGUAGE["settings"][setting]["embedded"][method] for setting in ("tuned", "lr-x3", "lr-x10")]
    assert {row["seeds"] for row in figures} == {1}
    assert f"| {label} | {' | '.join('{:.2f}'.format(row['final_gold'][0]) for row in figures)} |" in README


def test_gold_scores_over_a_range_of_the_coefficient_are_those_of_the_report() -> None:
    low, high = (LANGUAGE["settings"]["lr-x3"]["embedded"][f"safe-coef-{c}"]["final_gold"][0] for c in ("0.02", "0.4"))
    assert f"0.02 and 0.4 instead of 0.1 end at {low:.2f} and {high:.2f}." in README


def test_gold_scores_of_tuning_at_ten_times_the_rate_are_those_of_the_report() -> None:
    tuning = LANGUAGE["tuning"]["tuning-x10: embedded"]
    ppo = max(figures["final_gold"] for name, figures in tuning.items() if name.startswith("ppo-kl"))
    safe = min(figures["final_gold"] for name, figures in tuning.items() if name.startswith("safe"))
    assert f"at {ppo:.2f}, SAFE at any of its three prices at {safe:.2f} or more" in README
