"""Figures in SAID and docs/evidence.md are those in the results that the benchmarks wrote."""

import itertools
import json
import re
import statistics
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))

import control_report  # noqa: E402
import pages  # noqa: E402
import rlhf_report  # noqa: E402
from rlhf_settings import PRICED  # noqa: E402

from sb3_safe.stability import crashes, smooth  # noqa: E402

TEXTS = [path.read_text(encoding="utf-8") for path in pages.PAGES]
SAID = " ".join(" ".join(TEXTS).split())
SUMMARY = json.loads((ROOT / "benchmarks/results/control/summary.json").read_text())
CONTROL = SUMMARY["settings"]
LANGUAGE = json.loads((ROOT / "benchmarks/results/rlhf/summary.json").read_text())
COLUMNS = ["cartpole-1", "cartpole-8", "pendulum-4", "halfcheetah"]


def test_tables_are_those_that_the_results_give() -> None:
    assert [pages.updated(text) for text in TEXTS] == TEXTS
    assert set(re.findall(r"<!-- table: (\w+) -->", SAID)) == set(pages.TABLES)


def test_a_table_of_other_figures_is_replaced_and_text_around_it_is_not() -> None:
    page = "before\n<!-- table: others -->\n\n| 1 |\n\n<!-- end -->\nafter\n<!-- end -->"
    made = pages.updated(page)
    assert made == f"before\n<!-- table: others -->\n\n{pages.others()}\n\n<!-- end -->\nafter\n<!-- end -->"
    assert "| PPO without a KL | " in made


def test_ppo_and_safe_have_as_many_seeds_wherever_they_are_compared() -> None:
    pairs = [(task["ppo"], task["safe"]) for setting in CONTROL.values() for task in setting["tasks"].values()]
    rates = [LANGUAGE["settings"][setting] for setting in pages.RATES]
    pairs += [(tasks[task]["ppo-kl"], tasks[task]["safe"]) for tasks in rates for task in pages.RLHF_TASKS]
    assert all(ppo["seeds"] == safe["seeds"] for ppo, safe in pairs)
    assert all(len({row["seeds"] for row in rows.values()}) == 1 for rows in LANGUAGE["own_rates"].values())


def test_what_is_said_of_tuning_is_what_was_chosen() -> None:
    tuned = json.loads((ROOT / "benchmarks/results/rlhf/tuned.json").read_text())
    chosen = [tuned[task]["ppo-kl"].removeprefix("ppo-kl-") for task in pages.RLHF_TASKS]
    assert f"at the tuned rate ({', '.join(chosen)}), chosen on one seed" in SAID
    targets = [tuned[task]["ppo-adaptive"].removeprefix("ppo-adaptive-") for task in pages.RLHF_TASKS]
    assert "best of six targets on each task ({}, {} and {} nats a token)".format(*targets) in SAID


def test_what_is_said_of_ppos_other_forms_is_in_the_results() -> None:
    start = json.loads((ROOT / "benchmarks/results/rlhf/start.json").read_text())
    rates = [LANGUAGE["settings"][setting] for setting in pages.RATES]
    unpriced = {
        task: [[rate[task][name]["final_gold"][0] for name in ("ppo", "ppo-target-kl", "published")] for rate in rates]
        for task in pages.RLHF_TASKS
    }
    _, fast, faster = (max(max(ends[rate]) for ends in unpriced.values()) for rate in range(len(rates)))
    assert f"ends at 0 at 10 times the rate on every task, at {fast:.2f} or less at 3 times it," in SAID
    assert faster < 0.005
    others = ("ppo", "ppo-target-kl", "published", "ppo-adaptive", "grpo")
    assert {rate[task][name]["seeds"] for rate in rates for task in pages.RLHF_TASKS for name in others} == {2}
    assert "Two seeds of each: what falls does so by far." in SAID
    assert all(max(unpriced[task][0]) < start[task]["gold"] for task in ("embedded", "length"))
    assert f"least to hack, at {max(unpriced['sparse'][0]):.2f} or less." in SAID
    for task in pages.RLHF_TASKS:
        adaptive, fixed = (rates[2][task][name]["final_gold"][0] for name in ("ppo-adaptive", "ppo-kl"))
        assert adaptive < fixed + 0.05


def test_what_is_said_of_grpo_is_in_the_results() -> None:
    start = json.loads((ROOT / "benchmarks/results/rlhf/start.json").read_text())
    tuned = json.loads((ROOT / "benchmarks/results/rlhf/tuned.json").read_text())
    betas = [tuned[task]["grpo"].removeprefix("grpo-") for task in pages.RLHF_TASKS]
    assert "coefficient is the best of six on each task ({}, {} and {})".format(*betas) in SAID
    grpo, safe = (
        [[LANGUAGE["settings"][rate][task][name]["final_gold"][0] for task in pages.RLHF_TASKS] for rate in pages.RATES]
        for name in ("grpo", "safe")
    )
    ends = [[f"{gold:.2f}" for gold in golds] for golds in (*grpo[:2], *safe[:2])]
    (_, *tuned_ends), (_, *safe_ends) = ends[0], ends[2]
    assert max(abs(theirs - ours) for theirs, ours in zip(grpo[0][1:], safe[0][1:], strict=True)) < 0.03
    assert "`length` and `sparse` ({} and {}; SAFE {} and {})".format(*tuned_ends, *safe_ends) in SAID
    assert f"lower on `embedded` ({ends[0][0]}; {ends[2][0]})." in SAID
    assert "the rate it ends at {}, {} and {}, SAFE at {}, {} and {},".format(*ends[1], *ends[3]) in SAID
    assert all(gold < start[task]["gold"] for gold, task in zip(grpo[2], pages.RLHF_TASKS, strict=True))


def test_what_the_layers_cost_is_what_was_measured() -> None:
    tasks = json.loads((ROOT / "benchmarks/results/speed.json").read_text())["tasks"]
    seconds = {
        (name, algorithm): statistics.median(row["total"] for row in tasks[name][algorithm])
        for name in COLUMNS
        for algorithm in ("safe", "safe-off")
    }
    shares = [100 * (1 - seconds[name, "safe-off"] / seconds[name, "safe"]) for name in COLUMNS]
    assert (
        f"is {min(shares[:3]):.0f} to {max(shares[:3]):.0f} % of an iteration with small networks, and a fifth" in SAID
    )
    assert 15 < shares[3] < 25


def test_averages_over_all_stress_are_those_of_the_report() -> None:
    safe, ppo = (SUMMARY["stress"][algorithm]["average"][0] for algorithm in ("safe", "ppo"))
    assert f"over all stress together its training average is {safe:.2f}, PPO's {ppo:.2f}." in SAID


def test_what_is_said_of_acrobot_and_mountain_car_under_stress_is_in_the_results() -> None:
    def both(setting: str, task: str, what: str) -> list[str]:
        rows = CONTROL[setting]["tasks"][task]
        return [f"{rows[algorithm][what][0]:.0f}" for algorithm in ("ppo", "safe")]

    ends, averages = both("lr-x20", "MountainCar-v0", "final"), both("lr-x20", "Acrobot-v1", "average")
    assert (
        "PPO ends MountainCar at {}, SAFE at {}, and averages {} on Acrobot (one run {}), SAFE {}.".format(
            *ends, averages[0], f"{CONTROL['lr-x20']['tasks']['Acrobot-v1']['ppo']['average'][1]:.0f}", averages[1]
        )
        in SAID
    )
    ends = both("reward-noise", "MountainCar-v0", "final")
    assert "with reward noise it ends MountainCar a little lower ({1}, PPO {0}).".format(*ends) in SAID
    averages = both("epochs-x4", "Acrobot-v1", "average")
    assert "learns Acrobot more slowly (average {1}, PPO {0}; two seeds)".format(*averages) in SAID
    for setting in set(pages.STRESS) - {"lr-x20"}:
        assert not CONTROL[setting]["tasks"]["MountainCar-v0"]["ppo"]["crashes"]
        finals = [float(final) for task in ("Acrobot-v1", "MountainCar-v0") for final in both(setting, task, "final")]
        assert min(finals) > -140


def test_final_returns_of_early_stopping_under_stress_are_those_of_the_report() -> None:
    tasks = (("lr-x5", "Pendulum-v1"), ("lr-x20", "CartPole-v1"))
    pendulum, cartpole = (CONTROL[setting]["tasks"][task]["ppo-target-kl"]["final"][0] for setting, task in tasks)
    assert f"at 5 times the rate it ends Pendulum at {pendulum:.0f}, at 20 times CartPole at {cartpole:.0f}." in SAID


def test_what_is_said_of_the_layers_in_language_is_in_the_results() -> None:
    gold = [
        {name: row["final_gold"][0] for name, row in LANGUAGE["settings"]["lr-x10"][task].items()}
        for task in pages.RLHF_TASKS
    ]
    constant, paper = ("{:.2f}, {:.2f} and {:.2f}".format(*(rows[f"safe-{rule}"] for rows in gold)) for rule in
                       ("constant", "paper"))  # fmt: skip
    assert f"(with a constant threshold at {constant}, by the paper's rule at {paper})" in SAID
    needless = ("safe-no-soft-min", "safe-no-huber", "safe-no-gate")
    assert max(abs(rows[name] - rows["safe"]) for rows in gold for name in needless) < 0.045
    assert max(abs(rows["safe-paper"] - rows["safe"]) for rows in gold) < 0.075
    assert max(abs(rows["safe-constant"] - rows["safe"]) for rows in gold[:2]) < 0.075
    assert all(rows["only-penalty-drift"] < rows["safe-no-gate"] - 0.2 for rows in gold)
    alone = ("only-penalty", "only-penalty-gate", "only-penalty-threshold", "only-preview")
    needed = ("safe-no-penalty", "safe-no-preview", *alone)
    highest = max(rows[name] for rows in gold for name in needed)
    limited = max(rows["only-penalty-drift"] for rows in gold)
    assert f"with one of them alone, it ends at {highest:.2f} or less (at {limited:.2f} where the" in SAID
    drift, free = (final_golds("embedded", f"only-penalty{limit}") for limit in ("-drift", ""))
    assert f"(on `embedded` {' and '.join(drift)}, without it {' and '.join(free)})" in SAID
    (steady,), ends = set(final_golds("embedded", "safe-constant")), final_golds("embedded", "safe")
    assert f"both runs end `embedded` at {steady}, below all ten of SAFE ({min(ends)} or more)" in SAID
    assert len(ends) == 10
    assert f"one of two ends `sparse` at {min(final_golds('sparse', 'safe-constant'))}." in SAID


def final_golds(task: str, method: str) -> list[str]:
    """Of every run at 10 times the rate."""
    start = json.loads((ROOT / "benchmarks/results/rlhf/start.json").read_text())[task]
    paths = sorted((ROOT / "benchmarks/results/rlhf/lr-x10" / task / method).glob("*.json"))
    return [f"{rlhf_report.measures(json.loads(path.read_text()), start)['final_gold']:.2f}" for path in paths]


def test_what_is_said_of_the_layers_in_control_is_in_the_results() -> None:
    rows = CONTROL["lr-x20"]["tasks"]
    pendulum, car = (
        {name: row["final"] for name, row in rows[task].items()} for task in ("Pendulum-v1", "MountainCar-v0")
    )
    lowest, highest, bound = (*car["safe-no-penalty"][1:], car["only-preview"][0])
    assert f"SAFE ends at {lowest:.0f} and {highest:.0f}, like PPO's runs, the bound alone at {bound:.0f};" in SAID
    assert max(abs(car["ppo"][1] - lowest), abs(car["ppo"][2] - highest)) < 5
    assert min(car["only-penalty"][1], car["only-huber"][1]) > -130
    assert min(pendulum["only-penalty"][0], pendulum["only-preview"][0]) > -350
    assert max(pendulum["only-soft-min"][2], pendulum["only-huber"][2]) < -700
    free = "{:.0f} [{:.0f}, {:.0f}]".format(*pendulum["safe-no-penalty"])
    single = "{:.0f} [{:.0f}, {:.0f}]".format(*pendulum["safe-no-soft-min"])
    safe, unbound = (pendulum[name][0] for name in ("safe", "safe-no-preview"))
    bound, penalty = (pendulum[name][0] for name in ("only-preview", "only-penalty"))
    assert f"SAFE ends at {safe:.0f}, without the penalty at {free}, without the second critic at {single}," in SAID
    alone = f"with the bound alone at {bound:.0f}, with the penalty alone at {penalty:.0f}."
    assert f"without the bound at {unbound:.0f}, {alone}" in SAID
    several = [name for name, row in rows["Pendulum-v1"].items() if row["seeds"] == 10 and name not in ("safe", "ppo")]
    assert set(several) == {"safe-no-penalty", "safe-no-soft-min", "safe-no-preview", "only-preview", "only-penalty"}
    assert all(pendulum["safe"][0] > pendulum[name][0] for name in several)
    for task in (pendulum, car):
        others = [task[name][0] for name in ("safe-no-gate", "safe-constant")]
        assert all(abs(final - task["safe"][0]) < 30 for final in others)
    gentle = next(rows for rows in CONTROL["lr-x5"]["aggregate"].values() if "safe-off" in rows)
    ends = {name: f"{row['final'][0]:.2f}" for name, row in gentle.items() if name != "tasks"}
    count = sum(gentle["ppo"]["runs"])
    assert f"Pendulum at {ends['ppo']} (normalised, {count} runs), SAFE at {ends['safe']}." in SAID
    assert ends["only-huber"] == ends["only-preview"]
    alone = f"at {ends['only-penalty']} (penalty) and {ends['only-huber']} (Huber loss, bound), with none at"
    assert f"Two seeds with one layer alone end {alone} {ends['safe-off']};" in SAID
    lows = [gentle[name]["final"][1] for name in ("only-huber", "only-preview", "safe-off")]
    assert f"but for the penalty's, their intervals begin at {max(lows):.2f} or lower." in SAID
    assert gentle["only-penalty"]["final"][1] > 0.98


def test_what_is_said_of_the_layers_on_cartpole_is_in_the_results() -> None:
    rows = CONTROL["lr-x20"]["tasks"]["CartPole-v1"]
    layers = ("soft-min", "huber", "penalty", "preview")
    off, alone = ([rows[f"{prefix}-{layer}"] for layer in layers] for prefix in ("safe-no", "only"))
    assert {row["seeds"] for row in [*off, *alone, rows["ppo"], rows["safe"]]} == {10}
    averages = {name: f"{row['average'][0]:.0f}" for name, row in rows.items()}
    whole = [
        f"{label} {averages[name]} and {rows[name]['crashes']}" for label, name in (("PPO", "ppo"), ("SAFE", "safe"))
    ]
    assert f"(ten seeds): {', '.join(whole)}." in SAID
    critic = "{:.0f} [{:.0f}, {:.0f}]".format(*rows["only-soft-min"]["average"])
    assert f"nearly all of it, {critic} and {alone[0]['crashes']};" in SAID
    assert (
        f"penalty and bound alone have {averages['only-penalty']} and {averages['only-preview']}, and crash 8" in SAID
    )
    assert [row["crashes"] for row in alone[2:]] == [8, 8]
    assert f"Huber loss alone has {averages['only-huber']} and {alone[1]['crashes']}." in SAID
    assert f"Without the second critic SAFE crashes {off[0]['crashes']} times," in SAID
    assert {row["crashes"] for row in off[1:]} == {3, 4}


def test_what_is_said_of_the_critics_pessimism_is_in_the_results() -> None:
    def interval(setting: str, task: str, name: str, what: str = "average") -> str:
        return "{:.0f} [{:.0f}, {:.0f}]".format(*CONTROL[setting]["tasks"][task][name][what])

    pole, pendulum = (CONTROL["lr-x20"]["tasks"][task] for task in ("CartPole-v1", "Pendulum-v1"))
    crashes = {name: (f"{pole[name]['average'][0]:.0f}", pole[name]["crashes"]) for name in ("safe-mean", "safe-min")}
    mean, least = crashes.values()
    assert f"(`soft_min_alpha=inf`) SAFE averages {mean[0]} and crashes {mean[1]} times," in SAID
    assert f"with the lower of them (`0`) {least[0]} and {least[1]};" in SAID
    lower, whole = (f"{pendulum[name]['average'][0]:.0f}" for name in ("safe-min", "safe"))
    said = f"on Pendulum with the mean {interval('lr-x20', 'Pendulum-v1', 'safe-mean')}, with the lower {lower}"
    assert f"{said} (five seeds; SAFE {whole})." in SAID
    assert {pendulum[name]["seeds"] for name in ("safe-mean", "safe-min")} == {5}
    ends = [interval("reward-noise", "CartPole-v1", name, "final") for name in ("safe-mean", "safe")]
    assert f"ends CartPole at {ends[0]}, the soft-min at {ends[1]}:" in SAID
    folder = ROOT / "benchmarks/results/control/reward-noise/CartPole-v1"
    low = {
        name: sum(
            control_report.measures(json.loads(file.read_text()), random_return=0.0)["final"] < 400
            for file in (folder / name).glob("*.json")
        )
        for name in ("safe-mean", "safe")
    }
    assert low == {"safe-mean": 3, "safe": 0}
    assert "three of ten runs end below 400, with the soft-min none." in SAID
    speeds = [interval("lr-x5", "LunarLander-v3", name) for name in ("safe-mean", "safe", "ppo")]
    assert "is {} with the mean, {} with the soft-min, PPO's {} (three seeds);".format(*speeds) in SAID
    speeds = [interval("lr-x20", "LunarLander-v3", name) for name in ("safe-mean", "safe")]
    worst = CONTROL["lr-x20"]["tasks"]["LunarLander-v3"]["safe-mean"]["final"][1]
    assert f"it is {' and '.join(speeds)}, and one of three runs ends at {worst:.0f} with the mean." in SAID


def test_what_is_said_of_pendulum_the_threshold_and_crashes_is_in_the_results() -> None:
    pendulum = {name: f"{row['average'][0]:.0f}" for name, row in CONTROL["tuned"]["tasks"]["Pendulum-v1"].items()}
    assert f"at the tuned rate its training average is {pendulum['safe']}, PPO's {pendulum['ppo']}." in SAID
    assert f"at the tuned rate the average is {pendulum['safe-no-penalty']} without it" in SAID
    files = [
        file
        for setting in ("tuned", "lr-x5")
        for file in (ROOT / "benchmarks/results/control" / setting).glob("*/safe-constant/*.json")
    ]
    assert len(files) == 8
    for file in files:
        same = json.loads((file.parent.parent / "safe" / file.name).read_text())
        assert json.loads(file.read_text())["curve"] == same["curve"]
    small = ("CartPole-v1", "Pendulum-v1", "Acrobot-v1", "MountainCar-v0", "LunarLander-v3")
    crashes = {
        task: sum(rows["tasks"][task]["safe"]["crashes"] for rows in CONTROL.values() if task in rows["tasks"])
        for task in small
    }
    assert f"all of its {crashes.pop('CartPole-v1')} crashes in this table are on CartPole" in SAID
    assert not any(crashes.values())


def test_where_safe_learns_faster_is_where_it_is_said_to() -> None:
    leads = {
        task: {
            setting: content["tasks"][task]["safe"]["average"][0] - content["tasks"][task]["ppo"]["average"][0]
            for setting, content in CONTROL.items()
        }
        for task in ("Pendulum-v1", "CartPole-v1")
    }
    assert "On Pendulum SAFE learns faster in every row but that of four times the epochs, where it is level" in SAID
    assert abs(leads["Pendulum-v1"].pop("epochs-x4")) < 5 < min(leads["Pendulum-v1"].values())
    assert (
        "CartPole it does at 20 times the rate, without clipping and with reward noise; elsewhere it is level" in SAID
    )
    assert {name for name, lead in leads["CartPole-v1"].items() if lead > 10} == {"lr-x20", "clip-1", "reward-noise"}
    assert {name for name, lead in leads["CartPole-v1"].items() if lead < -10} == {"biased-critic"}
    biased = CONTROL["biased-critic"]["tasks"]["CartPole-v1"]
    assert f"biased critic ({biased['safe']['average'][0]:.0f}, PPO {biased['ppo']['average'][0]:.0f})" in SAID
    breaking, other = ("lr-x5", "lr-x20", "clip-1"), ("epochs-x4", "reward-noise", "biased-critic")
    falls = [
        tuple(sum(pair[index]["crashes"] for pair in pairs_of_stress(settings)) for index in (1, 0))
        for settings in (breaking, other)
    ]
    assert "SAFE crashes {} times where PPO does {} times, at high rates and without".format(*falls[0]) in SAID
    assert "it crashes as often as PPO ({} and {} times)".format(*falls[1]) in SAID
    ratios = [figures[0]["dispersion"] / figures[1]["dispersion"] for figures in pairs_of_stress()]
    assert round(min(ratios)) == 1
    assert f"between the same and {max(ratios):.1f} times smaller" in SAID


def test_the_fall_on_hopper_is_the_one_that_is_told() -> None:
    runs = (ROOT / "benchmarks/results/control/tuned/Hopper-v5/safe").glob("*.json")
    ends = [json.loads(file.read_text())["curve"]["return"][-10:] for file in runs]
    fallen = [end for end in ends if min(end) < 100]
    assert len(fallen) == 1
    before, lowest, after = (round(value) for value in (max(fallen[0][:3]), min(fallen[0]), fallen[0][-1]))
    assert before == after
    assert f"one run of SAFE falls from {before} to {lowest} shortly before its end, and is back at the last" in SAID


def test_what_readme_sums_up_is_in_the_results() -> None:
    safe = CONTROL["tuned"]["aggregate"]["all tasks"]["safe"]
    final, average = ("{:.2f} [{:.2f}, {:.2f}]".format(*safe[f"improvement_{what}"]) for what in ("final", "average"))
    assert f"return is the better one is {final}, and that its training average is, {average}." in SAID
    assert f"ends above one of PPO is {final}, and that its training average is the higher one {average}." in SAID
    ratios = [figures[0]["dispersion"] / figures[1]["dispersion"] for figures in pairs_of_stress()]
    assert f"({min(ratios):.1f} to {max(ratios):.1f} times in control)" in SAID
    start = json.loads((ROOT / "benchmarks/results/rlhf/start.json").read_text())
    fallen = [LANGUAGE["settings"]["lr-x10"][task]["ppo-kl"]["final_gold"][0] for task in pages.RLHF_TASKS]
    assert all(gold < start[task]["gold"] for gold, task in zip(fallen, pages.RLHF_TASKS, strict=True))


def test_what_is_said_of_lunarlander_is_in_the_results() -> None:
    rows = CONTROL["tuned"]["tasks"]["LunarLander-v3"]
    assert "LunarLander (SAFE {:.0f} [{:.0f}, {:.0f}],".format(*rows["safe"]["final"]) in SAID
    assert "PPO {:.0f} [{:.0f}, {:.0f}])".format(*rows["ppo"]["final"]) in SAID
    rows = {setting: content["tasks"]["LunarLander-v3"] for setting, content in CONTROL.items()}
    averages = {
        setting: [f"{row[algorithm]['average'][0]:.0f}" for algorithm in ("ppo", "safe")]
        for setting, row in rows.items()
    }
    learned = ("tuned", "lr-x5", "lr-x20", "clip-1", "epochs-x4")
    assert {rows[setting]["ppo"]["seeds"] for setting in set(pages.STRESS) - {"lr-x5", "lr-x20"}} == {2}
    assert (
        "at the tuned rate PPO averages {} and SAFE {}, at 5 times it {} and {}, at 20 times {} and {}, without "
        "clipping {} and {}, with four times the epochs {} and {}."
    ).format(*(value for setting in learned for value in averages[setting])) in SAID
    ratios = {setting: rows[setting]["safe"]["average"][0] / rows[setting]["ppo"]["average"][0] for setting in learned}
    assert {setting for setting, ratio in ratios.items() if ratio < 0.9} == {"lr-x5"}
    assert {setting for setting, ratio in ratios.items() if 0.9 < ratio < 1} == {"clip-1"}
    assert "LunarLander at 5 times the rate and, by a little, without clipping, and Acrobot with four times" in SAID
    slow = zip(averages["reward-noise"], averages["biased-critic"], strict=True)
    assert "alike: PPO averages {} and {}, SAFE {} and {}.".format(*(value for pair in slow for value in pair)) in SAID
    low = {}
    for file in (ROOT / "benchmarks/results/control").glob("*/LunarLander-v3/*/*.json"):
        if file.parts[-4] not in learned or file.parts[-2] not in ("ppo", "safe"):
            continue
        curve = [value for value in json.loads(file.read_text())["curve"]["return"] if value is not None]
        end = sum(curve[-6:]) / 6
        if end < 230:
            low[file.parts[-4], file.parts[-2], file.stem] = end
    assert [key[:2] for key in sorted(low)] == [("lr-x20", "ppo"), *4 * [("tuned", "ppo")], ("tuned", "safe")]
    assert f"({min(low.values()):.0f} to {max(low.values()):.0f})" in SAID


def pairs_of_stress(settings: Iterable[str] = pages.STRESS) -> list[list[dict[str, Any]]]:
    groups = [next(iter(CONTROL[setting]["aggregate"].values())) for setting in settings]
    return [[group["ppo"], group["safe"]] for group in groups]


def test_what_is_said_of_own_rates_is_in_the_results() -> None:
    rows = LANGUAGE["own_rates"]
    ppo, safe = (rows["all tasks"][name] for name in ("ppo-kl", "safe"))
    means = f"{ppo['average_gold'][0]:.2f} and {safe['average_gold'][0]:.2f}"
    ends = f"{ppo['final_gold'][0]:.2f} (PPO) and {safe['final_gold'][0]:.2f} (SAFE)"
    assert f"gold ends at {ends}, averaged over training it is {means};" in SAID
    better = "{:.2f} [{:.2f}, {:.2f}]".format(*ppo["safe_is_better"])
    ends = f"{ppo['final_gold'][0]:.2f} and {safe['final_gold'][0]:.2f}"
    assert f"PPO ends a little higher ({ends}; the probability for SAFE is {better})" in SAID
    rewards = [[rows[task][name]["average_reward"][0] for name in ("ppo-kl", "safe")] for task in pages.RLHF_TASKS]
    gains = [f"{100 * (ours / theirs - 1):.0f}" for theirs, ours in rewards]
    assert SAID.count(f"is {gains[0]}, {gains[1]} and {gains[2]} % higher on the three") == 2
    averages = {task: [rows[task][name]["average_gold"][0] for name in ("safe", "ppo-kl")] for task in pages.RLHF_TASKS}
    for task, said in (("embedded", "higher on"), ("length", "lower on"), ("sparse", "higher on")):
        assert "{} `{}` ({:.2f} and {:.2f})".format(said, task, *averages[task]) in SAID
    assert min(averages[task][0] - averages[task][1] for task in ("embedded", "sparse")) > 0
    assert averages["length"][0] < averages["length"][1]
    over_all = ["{:.2f} [{:.2f}, {:.2f}]".format(*row["average_gold"]) for row in (safe, ppo)]
    assert "over all three {} and {}.".format(*over_all) in SAID
    assert f"({safe['kl_per_text']:.1f} nats over all, PPO {ppo['kl_per_text']:.1f})" in SAID
    chosen = [rows[task]["ppo-kl"] for task in pages.RLHF_TASKS]
    coefficients = [row["method"].removeprefix("ppo-kl-") for row in chosen]
    assert "the best pair on each task (PPO's coefficients {}, {} and {}, SAFE's".format(*coefficients) in SAID
    assert [row["setting"] for row in chosen] == ["tuned", "lr-x3", "tuned"]
    assert {rows[task]["safe"]["setting"] for task in pages.RLHF_TASKS} == {"lr-x3"}
    ratios = [rows[task]["safe"]["iterations_to_level"] / rows[task]["ppo-kl"]["iterations_to_level"] for task in
              pages.RLHF_TASKS]  # fmt: skip
    assert 0.4 < min(ratios[0], ratios[2]) <= max(ratios[0], ratios[2]) < 0.55 < 1 < ratios[1]


def test_what_is_said_of_safe_tuned_to_the_task_is_in_the_results() -> None:
    rows = LANGUAGE["own_rates"]
    tuned = {task: rows[task]["safe-price"] for task in pages.RLHF_TASKS}
    assert [row["setting"] for row in tuned.values()] == ["lr-x3", "lr-x3", "tuned"]
    prices = [row["method"].removeprefix("safe-price-").replace("safe", "0.05") for row in tuned.values()]
    assert "SAFE's prices {}, {} and {})".format(*prices) in SAID
    ends = "{:.2f} [{:.2f}, {:.2f}]".format(*rows["all tasks"]["safe-price"]["final_gold"])
    better = "{:.2f} [{:.2f}, {:.2f}]".format(*rows["all tasks"]["ppo-kl"]["safe-price_is_better"])
    assert f"it ends at {ends}, and the probability that a run of it ends above one of PPO is {better}." in SAID
    assert f"SAFE ends no higher: at {ends[:4]}." in SAID
    sparse = "({:.2f} [{:.2f}, {:.2f}]".format(*tuned["sparse"]["final_gold"])
    assert f"{sparse}, PPO {rows['sparse']['ppo-kl']['final_gold'][0]:.2f})" in SAID
    length, tried = tuned["length"], LANGUAGE["tuning"]["tuning-x3"]["length"]
    best, default = (f"{tried[method]['final_gold']:.2f}" for method in (length["method"], "safe"))
    assert f"best on tuning's seed ({best}; {default} at its default)" in SAID
    assert f"drift to {length['kl_per_text']:.0f} nats a text: they end at {length['final_gold'][0]:.2f}, " in SAID
    assert (
        f"crash {length['crashes']} times, and would have ended at {rows['length']['safe']['final_gold'][0]:.2f}"
        in SAID
    )


def test_what_is_said_of_crashes_in_language_is_in_the_results() -> None:
    cells = [LANGUAGE["settings"][setting][task] for setting in pages.RATES for task in pages.RLHF_TASKS]
    ours, theirs = (sum(rows[name]["crashes"] for rows in cells) for name in ("safe", "ppo-kl"))
    n_runs = sum(rows["safe"]["seeds"] for rows in cells)
    assert f"SAFE crashes {ours} times in these {n_runs} runs, PPO {theirs} times. Those {ours} are of one seed" in SAID
    start = json.loads((ROOT / "benchmarks/results/rlhf/start.json").read_text())
    crashed = []
    for setting, task in itertools.product(pages.RATES, pages.RLHF_TASKS):
        for file in (ROOT / "benchmarks/results/rlhf" / setting / task / "safe").glob("*.json"):
            result = json.loads(file.read_text())
            if rlhf_report.measures(result, start[task])["crashes"]:
                crashed.append(result["seed"])
                curve = rlhf_report.filled_curve(result, rlhf_report.after_nan(start[task]))
                assert not crashes(smooth(curve["gold"]), start=start[task]["gold"], noise=0.07)
    assert len(crashed) == ours
    assert len(set(crashed)) == 1


def test_what_is_said_of_one_setting_for_all_tasks_is_in_the_results() -> None:
    rows = LANGUAGE["own_rates"]
    (pair,) = {(rows[task]["ppo-kl-shared"]["setting"], rows[task]["ppo-kl-shared"]["method"]) for task in
               pages.RLHF_TASKS}  # fmt: skip
    assert pair == ("tuned", "ppo-kl-0.05")
    assert "PPO at the best pair over all tasks (0.05, the tuned rate)" in SAID
    ppo, safe = (rows["all tasks"][name] for name in ("ppo-kl-shared", "safe"))
    ends = ["{:.2f} [{:.2f}, {:.2f}]".format(*row["final_gold"]) for row in (safe, ppo)]
    assert SAID.count("over all three at {} and {}".format(*ends)) == 1
    assert safe["final_gold"][1] > ppo["final_gold"][2]
    better = "{:.2f} [{:.2f}, {:.2f}]".format(*ppo["safe_is_better"])
    assert f"the probability that a run of SAFE ends above one of PPO is {better}." in SAID
    gain = 100 * (safe["average_reward"][0] / ppo["average_reward"][0] - 1)
    golds = f"{safe['average_gold'][0]:.2f} and {ppo['average_gold'][0]:.2f}"
    assert f"Gold averaged over training is {golds}, the proxy {gain:.0f} % higher." in SAID
    assert "With one setting for all tasks, gold ends at {} (SAFE) and {} (PPO)".format(*ends) in SAID


def test_what_is_said_of_the_best_of_n_is_in_the_results() -> None:
    start = json.loads((ROOT / "benchmarks/results/rlhf/start.json").read_text())
    best = {task: {name: column[-1] for name, column in start[task]["best_of_n"].items()} for task in pages.RLHF_TASKS}
    (n, nats), *others = {(row["n"], f"{row['kl']:.1f}") for row in best.values()}
    assert not others
    gold = "{:.2f}, {:.2f} and {:.2f}".format(*(best[task]["gold"] for task in pages.RLHF_TASKS))
    assert f"Of {n} texts of the untrained model" in SAID
    assert f"at most {nats} nats away from it, has gold {gold} on the three tasks" in SAID
    rows = LANGUAGE["own_rates"]
    ends = [(task, rows[task][name]) for task in pages.RLHF_TASKS for name in ("ppo-kl", "safe")]
    assert all(5 <= round(row["kl_per_text"]) <= 9 for _, row in ends)
    for task, row in ends:
        lead = row["final_gold"][0] - best[task]["gold"]
        assert -0.04 < lead < 0 if task == "embedded" else lead > -0.01


def test_what_is_said_of_lost_tokens_is_in_the_results() -> None:
    rows = LANGUAGE["settings"]["lr-x10"]["embedded"]
    largest = {name: f"{rows[name]['largest_kl_per_text']:.0f}" for name in ("ppo-kl", "safe-no-drift", "safe")}
    assert f"up to {largest['ppo-kl']} nats a text on `embedded`" in SAID
    assert f"is {largest['safe']} nats a text ({largest['safe-no-drift']} without" in SAID
    tuning = LANGUAGE["tuning"]["tuning-x3"]["embedded"]
    lost, kept = (f"{tuning[name]['final_gold']:.2f}" for name in ("safe-no-drift", "safe"))
    assert f"3 times the rate: gold {lost} at the end)" in SAID
    assert f"With it that seed ends at {kept}," in SAID


def test_gold_scores_over_a_range_of_the_coefficient_are_those_of_the_report() -> None:
    low, high = (LANGUAGE["settings"]["lr-x3"]["embedded"][f"safe-coef-{c}"]["final_gold"][0] for c in ("0.02", "0.4"))
    assert f"0.02 and 0.4 instead of 0.1 end at {low:.2f} and {high:.2f}." in SAID


def test_what_is_said_of_a_coefficient_beyond_the_edge_is_in_the_results() -> None:
    below, edge = (
        [LANGUAGE["tuning"][setting]["sparse"][f"ppo-kl-{coef}"]["final_gold"] for setting in ("tuning", "tuning-x3")]
        for coef in ("0.005", "0.01")
    )
    assert f"0.005 was tried too, and is worse ({below[0]:.2f}, and {edge[0]:.2f} at 0.01)." in SAID
    listed = "at 1 and 3 times the rate: {:.3f} and {:.3f}, 0.01: {:.3f} and {:.3f}".format(*below, *edge)
    assert listed in (ROOT / "benchmarks/README.md").read_text()


def test_gold_scores_of_tuning_at_ten_times_the_rate_are_those_of_the_report() -> None:
    tuning = [LANGUAGE["tuning"]["tuning-x10"][task] for task in pages.RLHF_TASKS]
    ppo = [max(row["final_gold"] for name, row in tried.items() if name.startswith("ppo-kl")) for tried in tuning]
    safe = [tried["safe"]["final_gold"] for tried in tuning]
    lowest = [min(tried[method]["final_gold"] for method in ("safe", *PRICED)) for tried in tuning]
    assert "ends at {:.2f}, {:.2f} and {:.2f}, SAFE at".format(*ppo) in SAID
    assert "SAFE at {:.2f}, {:.2f} and {:.2f}, at any of five prices".format(*safe) in SAID
    assert "at any of five prices from 0.01 to 0.2 at {:.2f}, {:.2f} and {:.2f} or more".format(*lowest) in SAID
