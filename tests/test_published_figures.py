"""Figures in README are those in the results that the benchmarks wrote."""

import json
import re
import statistics
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
    results = json.loads((ROOT / "benchmarks/results/language.json").read_text())
    rows = results["tokens_per_second"]
    rollout = statistics.median(row["rollout"] / row["generate"] for row in rows)
    update = statistics.median(row["update"] / row["flat_update"] for row in rows)
    assert f"writes {rollout:.2f} times" in README
    assert f"trains on {update:.0f} times" in README
