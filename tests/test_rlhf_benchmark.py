"""The RLHF laboratory: what it compares, what it records, what its report says, and tiny runs from end to end."""

import json
import re
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch as th

from sb3_safe.functional import soft_min

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import rlhf  # noqa: E402
import rlhf_report  # noqa: E402
import rlhf_run  # noqa: E402
import rlhf_settings  # noqa: E402
import rlhf_tasks  # noqa: E402
import runs  # noqa: E402
from rlhf_settings import FAMILIES, HYPERPARAMETERS, METHODS, SETTINGS, run_of  # noqa: E402

SHARED = {*HYPERPARAMETERS, "n_epochs", "gamma", "gae_lambda", "max_grad_norm"}

# -- settings ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("setting", list(SETTINGS))
def test_all_methods_have_the_same_budget_and_hyperparameters(setting: str) -> None:
    safe = rlhf_settings.arguments_of(run_of(setting, "embedded", "safe", 0))
    for method in METHODS:
        assert run_of(setting, "embedded", method, 0).budget == run_of(setting, "embedded", "safe", 0).budget
        arguments = rlhf_settings.arguments_of(run_of(setting, "embedded", method, 0))
        if method in FAMILIES["grpo"]:
            texts = arguments["per_device_train_batch_size"] * arguments["steps_per_generation"]
            assert (texts, arguments["num_iterations"]) == (safe["n_envs"], safe["n_epochs"])
            assert arguments["steps_per_generation"] == rlhf_settings.TOKENS / safe["batch_size"]
            assert all(arguments[name] == safe[name] for name in ("learning_rate", "max_grad_norm"))
            continue
        assert {name: arguments[name] for name in SHARED} == {name: safe[name] for name in SHARED}
        assert arguments["policy_kwargs"]["critic_rate"] == safe["policy_kwargs"]["critic_rate"]


def test_a_setting_multiplies_the_rate_and_changes_nothing_else() -> None:
    def arguments(setting: str) -> dict[str, Any]:
        return rlhf_settings.arguments_of(run_of(setting, "length", "ppo-kl-0.1", 3))

    tuned = arguments("tuned")
    assert arguments("lr-x3") == tuned | {"learning_rate": pytest.approx(3 * tuned["learning_rate"])}
    assert arguments("lr-x10") == tuned | {"learning_rate": pytest.approx(10 * tuned["learning_rate"])}
    assert arguments("tuning") == tuned


def test_safe_is_the_same_on_every_task() -> None:
    described = [rlhf_settings.described(run_of("tuned", task, "safe", 0)) for task in rlhf_tasks.TASKS]
    assert all(entry | {"task": ""} == described[0] | {"task": ""} for entry in described)


def test_ppo_is_safe_with_every_layer_off_and_its_kl_is_in_the_reward() -> None:
    ppo = rlhf_run.make_model(run_of("tuned", "sparse", "ppo", 0))
    with_kl = rlhf_run.make_model(run_of("tuned", "sparse", "ppo-kl-0.02", 0))
    adaptive = rlhf_run.make_model(run_of("tuned", "sparse", "ppo-adaptive-0.2", 0))
    for model in (ppo, with_kl, adaptive):
        assert (model.policy.n_critics, model.huber_delta, model.max_preview_kl) == (1, None, None)
        assert model.critic_tau == 1
    assert not ppo.controller.active
    assert (with_kl.kl_estimator, with_kl.controller.coefficient()) == ("k1", 0.02)  # type: ignore[attr-defined]
    assert (adaptive.kl_estimator, adaptive.controller.target) == ("k1", 0.2)  # type: ignore[attr-defined]


def test_the_published_rule_regresses_both_heads_through_their_soft_min() -> None:
    model = rlhf_run.make_model(run_of("tuned", "sparse", "published", 0))
    model.learn(rlhf_settings.TOKENS)
    assert not model.controller.active
    batch = next(model.rollout_buffer.in_order(64))
    values = model.policy.evaluate(batch.observations, batch.actions).values
    heads = super(type(model.policy), model.policy).evaluate(batch.observations, batch.actions).values
    scale, alpha = model.policy.return_scale, model.policy.soft_min_alpha
    assert values.shape == (len(batch.actions), 1)
    assert heads.shape == (len(batch.actions), 2)
    th.testing.assert_close(values[:, 0], soft_min(heads / scale, alpha) * scale)
    values.sum().backward()
    assert all(parameter.grad is not None for head in model.policy.heads for parameter in head.parameters())


def test_a_familys_name_stands_for_the_member_tuned_to_the_task() -> None:
    tuned = {"length": {"ppo-kl": "ppo-kl-0.2"}}
    assert rlhf_settings.resolved("ppo-kl", "length", tuned) == "ppo-kl-0.2"
    assert rlhf_settings.resolved("ppo-kl", "sparse", tuned) == rlhf_settings.UNTUNED["ppo-kl"]
    assert rlhf_settings.resolved("safe", "length", tuned) == "safe"
    assert all(rlhf_settings.UNTUNED[family] in members for family, members in FAMILIES.items())


# -- tasks -------------------------------------------------------------------------------------------------------------


def test_the_sparse_task_pays_for_all_words_and_its_gold_for_sentences_too() -> None:
    prompts = ["Hotel review:"] * 4
    texts = [
        " What a lovely room! My friend did not like the pool.",
        " What a lovely room! My friend liked the pool.",
        " not my not my",
        "",
    ]
    assert rlhf_tasks.required_words(prompts, texts) == [1, 0, 1, 0]
    assert rlhf_tasks.required_words_in_sentences(prompts, texts) == [1, 0, 0, 0]


def test_the_length_task_pays_for_every_token() -> None:
    bonus = rlhf_tasks.length_bonus([[5, 6, 7], []])
    assert bonus == [pytest.approx(3 * rlhf_tasks.LENGTH_BONUS), 0.0]


def test_every_task_starts_with_gold_between_its_ends() -> None:
    start = json.loads(rlhf_run.START_FILE.read_text(encoding="utf-8"))
    assert set(start) == set(rlhf_tasks.TASKS)
    for entry in start.values():
        assert 0 <= entry["gold"] < 0.6
        assert entry["gold_std"] > 0
        assert [sample["prompt"] for sample in entry["samples"]] == list(rlhf_tasks.PROMPTS)
        best = entry["best_of_n"]
        assert best["n"][0] == 1
        # Other prompts than the thousand texts have.
        assert best["gold"][0] == pytest.approx(entry["gold"], abs=0.05)
        assert best["reward"] == sorted(best["reward"])


def test_best_of_n_is_chosen_by_reward_among_the_texts_on_a_prompt(monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = rlhf_tasks.PROMPTS[:2]
    texts = [(first, 1.0, 0.25), (second, 5.0, 0.0), (first, 2.0, 0.75), (second, 4.0, 1.0)]
    infos = [{"prompt": p, "completion": "", "completion_ids": [], "episode": {"r": r}, "g": g} for p, r, g in texts]
    monkeypatch.setattr(rlhf_run, "PROMPTS", (first, second))
    monkeypatch.setattr(rlhf_run, "text_env", lambda *_: None)
    monkeypatch.setattr(rlhf_run, "write_texts", lambda *_, **__: infos)
    monkeypatch.setattr(rlhf_run, "gold_scores", lambda _, texts: np.array([text["g"] for text in texts]))
    columns = rlhf_run.measure_best_of_n(None, "embedded", max_n=2, batches=1)  # type: ignore[arg-type]
    assert columns == {"n": [1, 2], "kl": [0.0, 0.193147], "reward": [3.0, 3.5], "gold": [0.5, 0.375]}


# -- recording ---------------------------------------------------------------------------------------------------------


def test_a_curve_weighs_texts_alike_and_keeps_the_largest_update() -> None:
    rows = [
        {"timesteps": 10.0, "episodes": 1, "gold": 0.0, "reward": 1.0, "entropy": 1.0, "update_kl": 0.1},
        {
            "timesteps": 20.0,
            "episodes": 3,
            "gold": 0.8,
            "gold_std": 0.2,
            "reward": 2.0,
            "entropy": 3.0,
            "update_kl": 0.3,
        },
        {"timesteps": 30.0, "episodes": 0, "entropy": 5.0},
    ]
    curve = rlhf_run.curve(rows, max_points=2)
    assert curve["timesteps"] == [20, 30]
    assert curve["episodes"] == [4, 0]
    assert curve["gold"] == [pytest.approx(0.6), None]
    assert curve["gold_std"][0] == pytest.approx(0.2)
    assert curve["entropy"] == [2.0, 5.0]
    assert curve["update_kl_max"] == [0.3, None]


@pytest.mark.parametrize("method", ["ppo", "safe"])
def test_the_kl_to_the_start_is_zero_before_the_first_update_and_not_after_it(method: str) -> None:
    run = run_of("lr-x10", "sparse", method, 0, iterations=3)
    recorder, model = rlhf_run.Recorder(run.task), rlhf_run.make_model(run)
    model.learn(run.budget, callback=recorder)
    kls = [row["kl_per_text"] for row in recorder.rows]
    assert kls[0] == pytest.approx(0, abs=1e-3)
    assert abs(kls[-1]) > 0.01
    assert 0 < recorder.seconds_measuring


# -- measures ----------------------------------------------------------------------------------------------------------

START = {"gold": 0.5, "gold_std": 0.25, "reward": 0.0, "length": 15.0}


def result_with(gold: list[float], diverged: str | None = None, budget: int | None = None) -> dict[str, Any]:
    points = len(gold)
    steps = [100 * (i + 1) for i in range(points)]
    names = [*rlhf_report.LAST, "update_kl_max"]
    curve = {"timesteps": steps, "episodes": [60] * points, "gold": gold, "gold_std": [0.1] * points,
             "reward": gold, "reward_std": [0.1] * points, **{name: [0.1] * points for name in names}}  # fmt: skip
    return {"curve": curve, "diverged": diverged, "budget": budget or steps[-1], "cpu_seconds": 1.0}


def test_losing_half_of_the_gain_over_the_untrained_model_is_a_crash() -> None:
    risen = list(np.linspace(0.5, 0.9, 20))
    assert rlhf_report.measures(result_with([*risen, *[0.5] * 10]), START)["crashes"] == 1
    assert rlhf_report.measures(result_with([*risen, *[0.8] * 10]), START)["crashes"] == 0
    # A gain that sampling explains is none.
    assert rlhf_report.measures(result_with([0.5, 0.51, 0.53, 0.51, *[0.4] * 10]), START)["crashes"] == 0


def test_a_run_that_ends_below_the_untrained_model_is_ruined_whether_it_rose_before_or_not() -> None:
    assert rlhf_report.measures(result_with(list(np.linspace(0.5, 0.0, 20))), START)["ruined"] == 1
    assert rlhf_report.measures(result_with([*[0.8] * 10, *[0.1] * 10]), START)["ruined"] == 1
    assert rlhf_report.measures(result_with([0.5] * 20), START)["ruined"] == 0


def test_final_is_the_last_tenth_and_best_is_smoothed() -> None:
    figures = rlhf_report.measures(result_with([i / 20 for i in range(20)]), START)
    assert figures["final_gold"] == pytest.approx(18.5 / 20)
    assert figures["best_gold"] == pytest.approx(17 / 20)


def test_a_point_without_a_text_repeats_the_one_before() -> None:
    result = result_with([0.2, 0.9, 0.5])
    result["curve"] |= {"episodes": [60, 0, 60], "gold": [0.2, None, 0.5], "reward": [0.2, None, 0.5]}
    figures = rlhf_report.measures(result, START)
    assert figures["average_gold"] == figures["average_reward"] == pytest.approx((0.2 * 200 + 0.5 * 100) / 300)


def test_a_run_that_stops_at_nan_is_worth_nothing_from_there_on() -> None:
    result = result_with([0.7] * 10, diverged="not finite", budget=2000)
    figures = rlhf_report.measures(result, START)
    assert (figures["final_gold"], figures["crashes"], figures["diverged"]) == (0, 1, 1)
    assert rlhf_report.filled_curve(result, rlhf_report.after_nan(START))["timesteps"][-1] == 2000


def test_points_made_up_after_nan_weigh_as_much_as_the_others() -> None:
    result = result_with([0.8] * 95, diverged="not finite", budget=10_000)
    assert rlhf_report.measures(result, START)["final_gold"] == pytest.approx(0.4)


def test_the_best_member_of_a_family_is_chosen_once_all_have_been_tried() -> None:
    tried = {method: [result_with([0.5 + 0.1 * i] * 10)] for i, method in enumerate(FAMILIES["ppo-kl"])}
    best, table = rlhf_report.tuned_methods({"tuning": {"length": tried}}, {"length": START})
    assert best == {"length": {"ppo-kl": "ppo-kl-0.2"}}
    assert table["tuning"]["length"]["ppo-kl-0.01"] == {"final_gold": 0.5, "seeds": 1}
    del tried["ppo-kl-0.01"]
    assert rlhf_report.tuned_methods({"tuning": {"length": tried}}, {"length": START})[0] == {"length": {}}


def tuning_of(gold: dict[tuple[str, str, str], float]) -> dict[str, dict[str, dict[str, Any]]]:
    """Everything tried at every rate, at 0.5 but for what is given."""
    methods = ["safe", *rlhf_settings.PRICED, *FAMILIES["ppo-kl"]]
    return {
        setting: {
            task: {m: {"final_gold": gold.get((setting, task, m), 0.5), "seeds": 1} for m in methods}
            for task in rlhf_tasks.TASKS
        }
        for setting in rlhf_settings.TUNING
    }


def test_ppo_and_safe_have_a_best_pair_on_each_task_and_one_for_all_where_safe_has_its_defaults() -> None:
    gold = {
        ("tuning-x10", "sparse", "safe"): 0.9,
        ("tuning-x3", "sparse", "safe"): 0.8,
        ("tuning-x3", "length", "safe"): 0.8,
        ("tuning-x3", "length", "ppo-kl-0.2"): 0.7,
        ("tuning", "sparse", "ppo-kl-0.01"): 0.7,
        ("tuning", "sparse", "ppo-kl-0.05"): 0.65,
        ("tuning", "length", "ppo-kl-0.05"): 0.65,
        ("tuning-x10", "length", "safe-price-0.1"): 0.9,
    }
    tuning = tuning_of(gold)
    chosen = rlhf_report.own_rates(tuning)
    assert {task: choice["safe"] for task, choice in chosen.items()} == dict.fromkeys(chosen, ("lr-x3", "safe"))
    assert chosen["length"]["ppo-kl"] == ("lr-x3", "ppo-kl-0.2")
    assert chosen["sparse"]["ppo-kl"] == ("tuned", "ppo-kl-0.01")
    assert chosen["length"]["safe-price"] == ("lr-x10", "safe-price-0.1")
    assert chosen["sparse"]["safe-price"] == ("lr-x10", "safe")
    assert {choice["ppo-kl-shared"] for choice in chosen.values()} == {("tuned", "ppo-kl-0.05")}
    del tuning["tuning-x3"]["length"]["safe-price-0.1"]
    assert rlhf_report.own_rates(tuning) == {}


def test_at_their_own_rates_methods_of_different_settings_are_compared() -> None:
    results: dict[str, Any] = {
        "tuned": {
            "length": {
                "ppo-kl-0.05": [result_with(list(np.linspace(0.5, 0.9, 20)))],
                "ppo-kl-0.2": [result_with([0.5] * 20)],
            }
        },
        "lr-x3": {
            "length": {
                "safe": [result_with([*np.linspace(0.5, 0.9, 5), *[0.9] * 15])],
                "safe-price-0.1": [result_with([0.7] * 20)],
            }
        },
    }
    report = rlhf_report.Report(results, {"length": START}, {"length": {"ppo-kl": "ppo-kl-0.05"}})
    chosen = {
        "length": {
            "ppo-kl": ("tuned", "ppo-kl-0.05"),
            "ppo-kl-shared": ("tuned", "ppo-kl-0.2"),
            "safe-price": ("lr-x3", "safe-price-0.1"),
            "safe": ("lr-x3", "safe"),
        }
    }
    chosen["sparse"] = chosen["length"]  # has no runs
    rows = report.at_own_rates(chosen)
    assert list(rows) == ["length"]
    ppo, shared, safe = (rows["length"][name] for name in ("ppo-kl", "ppo-kl-shared", "safe"))
    assert (shared["method"], shared["final_gold"][0], shared["iterations_to_level"]) == ("ppo-kl-0.2", 0.5, None)
    assert (ppo["setting"], ppo["method"], safe["setting"]) == ("tuned", "ppo-kl-0.05", "lr-x3")
    assert (ppo["safe_is_better"][0], ppo["safe-price_is_better"][0]) == (1, 0)
    assert "safe_is_better" not in rows["length"]["safe-price"]
    # Means of five points: PPO's last and SAFE's eighth are the first within 5 % of what PPO ends at.
    assert [round(row["iterations_to_level"] * rlhf_settings.TOKENS) for row in (ppo, safe)] == [2000, 800]


# -- from end to end ---------------------------------------------------------------------------------------------------


def test_tuning_has_seeds_of_its_own_and_the_other_suites_take_what_it_found(tmp_path: Path) -> None:
    tuning = list(rlhf.plan(rlhf.parse(["run", "--suite", "tuning", "--out", str(tmp_path)])))
    assert {run.algorithm for run in tuning} == {member for members in FAMILIES.values() for member in members}
    runs.write_json(tmp_path / rlhf_settings.TUNED_FILE, {"length": {"ppo-kl": "ppo-kl-0.2"}})
    main = list(rlhf.plan(rlhf.parse(["run", "--out", str(tmp_path)])))
    assert not {run.seed for run in main} & {run.seed for run in tuning}
    assert [run.seed for run in main] == sorted(run.seed for run in main)
    assert "ppo-kl-0.2" in {run.algorithm for run in main if run.task == "length"}
    assert "ppo-kl-0.2" not in {run.algorithm for run in main if run.task == "sparse"}
    quick = list(rlhf.plan(rlhf.parse(["run", "--quick", "--out", str(tmp_path)])))
    assert {run.setting for run in quick} == {"quick", "quick-x10"}


def test_the_quick_target_runs_and_reports_in_a_folder_that_git_ignores() -> None:
    makefile = (BENCHMARKS.parent / "Makefile").read_text(encoding="utf-8")
    (out,) = re.findall(r"^bench-rlhf-quick: OUT = --out (\S+)$", makefile, re.MULTILINE)
    commands = re.findall(r"benchmarks/rlhf\.py ((?:run|report) .*)$", makefile, re.MULTILINE)
    assert all("$(OUT)" in command for command in commands)
    assert any("--quick" in command for command in commands)
    folder = BENCHMARKS.parent / out
    assert not folder.is_relative_to(rlhf.RESULTS)
    assert f"/{folder.relative_to(BENCHMARKS.parent).parts[0]}/" in (BENCHMARKS.parent / ".gitignore").read_text()


def test_runs_at_own_rates_are_those_that_tuning_chose(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ppo = ("tuned", "ppo-kl-0.2")
    chosen = {"length": {"ppo-kl": ppo, "ppo-kl-shared": ppo, "safe": ("lr-x3", "safe")}}
    runs.write_json(tmp_path / rlhf_settings.OWN_RATES_FILE, chosen)
    arguments = ["run", "--suite", "own-rates", "--out", str(tmp_path)]
    found = list(rlhf.plan(rlhf.parse([*arguments, "--seeds", "2"])))
    cells = [(run.setting, run.task, run.algorithm, run.seed) for run in found]
    assert cells[:2] == [("tuned", "length", "ppo-kl-0.2", 0), ("lr-x3", "length", "safe", 0)]
    assert [seed for *_, seed in cells] == [0, 0, 1, 1]
    assert not list(rlhf.plan(rlhf.parse([*arguments, "--tasks", "sparse"])))
    with pytest.raises(SystemExit):
        rlhf.parse([*arguments, "--methods", "safe"])
    assert "own_rates.json; leave them out" in capsys.readouterr().err


def test_runs_are_written_skipped_and_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["run", "--settings", "lr-x3", "--tasks", "sparse", "--methods", "safe", "ppo", "--seeds", "1",
                 "--iterations", "6", "--out", str(tmp_path)]  # fmt: skip
    for run in rlhf.plan(rlhf.parse(arguments)):
        result = rlhf_run.train(run, runs.result_file(tmp_path, run))
        assert (result["timesteps"], result["diverged"]) == (6 * rlhf_settings.TOKENS, None)
        assert [sample["prompt"] for sample in result["samples"]] == list(rlhf_tasks.PROMPTS)
        assert len(result["curve"]["gold"]) == 6
    files = sorted(file.relative_to(tmp_path).as_posix() for file in tmp_path.rglob("*") if file.is_file())
    assert files == ["lr-x3/sparse/ppo/0.json", "lr-x3/sparse/safe/0.json"]

    assert rlhf.main(arguments) == 0
    assert "2 runs are done, 0 to do" in capsys.readouterr().out
    # Another budget is another run: its result must not be taken for the one that is there.
    assert rlhf.main([*arguments[:-4], "--iterations", "7", "--out", str(tmp_path)]) == 2
    assert "was made with other budget" in capsys.readouterr().err

    assert rlhf.main(["report", "--out", str(tmp_path)]) == 0
    assert "2 runs" in capsys.readouterr().out
    rows = json.loads((tmp_path / "summary.json").read_text())["settings"]["lr-x3"]["sparse"]
    assert list(rows) == ["safe", "ppo"]
    assert rows["ppo"]["safe_is_better"][0] in (0, 0.5, 1)
    assert "| safe | 1 |" in (tmp_path / "tables.md").read_text()
    assert "| Hotel review: |" in (tmp_path / "samples.md").read_text()
    for name in ("headline", "training-lr-x3", "frontier-lr-x3"):
        assert (tmp_path / f"{name}.png").stat().st_size > 1000
        assert (tmp_path / f"{name}.svg").stat().st_size > 1000


def test_a_process_makes_a_run_and_leaves_nothing_else(tmp_path: Path) -> None:
    arguments = ["run", "--settings", "tuned", "--tasks", "sparse", "--methods", "ppo-kl", "--seeds", "1"]
    assert rlhf.main([*arguments, "--iterations", "1", "--workers", "1", "--out", str(tmp_path)]) == 0
    (file,) = (file for file in tmp_path.rglob("*") if file.is_file())
    result = json.loads(file.read_text())
    assert result["algorithm"].startswith("ppo-kl-")
    assert result["timesteps"] == rlhf_settings.TOKENS


def test_a_run_under_way_has_its_curve_in_a_file_beside_its_result(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    partial = runs.PartialResult(tmp_path / "0.json")
    partial.update(lambda: pytest.fail("too early"))
    monkeypatch.setattr(runs.PartialResult, "SECONDS", -1.0)
    partial.update(lambda: {"gold": [0.5]})
    assert json.loads((tmp_path / "0.partial").read_text()) == {"curve": {"gold": [0.5]}}
    partial.remove()
    assert not list(tmp_path.iterdir())
    runs.PartialResult(None).update(lambda: pytest.fail("nowhere to write it"))


def test_the_digest_of_the_source_is_of_every_module_of_the_packages(tmp_path: Path) -> None:
    package: Any = SimpleNamespace(__path__=[str(tmp_path)])
    digests = {runs.versions((), package)["sb3_safe_source"]}
    for name in ("module.py", "inner/module.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("a = 1\n")
        digests.add(runs.versions((), package)["sb3_safe_source"])
        (tmp_path / name).write_text("a = 2\n")
        digests.add(runs.versions((), package)["sb3_safe_source"])
    assert len(digests) == 5


# -- GRPO --------------------------------------------------------------------------------------------------------------


def make_grpo(task: str) -> Any:
    pytest.importorskip("trl")
    import rlhf_grpo

    return rlhf_grpo.Grpo(run_of("tuned", task, "grpo-0.1", 0))


@pytest.mark.parametrize("task", list(rlhf_tasks.TASKS))
def test_grpo_is_paid_and_measured_as_the_others_are_for_the_same_texts(task: str) -> None:
    grpo, env = make_grpo(task), rlhf_run.text_env(task, 8)
    texts = rlhf_run.write_texts(rlhf_run.make_model(run_of("tuned", task, "ppo", 0)), env, seed=3)
    columns = {f"{name}s": [text[name] for text in texts] for name in ("prompt", "completion")}
    rewards = grpo.score(**columns, completion_ids=[list(text["completion_ids"]) for text in texts])
    assert rewards == pytest.approx([text["episode"]["r"] for text in texts], abs=1e-4)
    (row,) = grpo.rows
    expected = rlhf_run.episode_columns(texts) | rlhf_run.gold_columns(rlhf_tasks.TASKS[task].gold, texts)
    shared = ("episodes", "reward", "reward_std", "gold", "gold_std", "length", "stop_share", "distinct_2")
    assert {name: row[name] for name in shared} == pytest.approx({name: expected[name] for name in shared}, abs=1e-4)
    assert row["timesteps"] == grpo.num_timesteps == sum(len(text["completion_ids"]) for text in texts)
    assert row["kl_per_text"] == pytest.approx(0, abs=1e-3)


@th.no_grad()
def test_the_drift_of_grpos_texts_is_that_of_each_by_itself() -> None:
    grpo = make_grpo("length")
    for parameter in grpo.lm.parameters():
        parameter += 0.3 * th.randn(parameter.shape, generator=th.Generator().manual_seed(0))
    prompts, written = ["Hotel review:", "About this film: What"], [[7, 300, 1], [20, 21, 22, 23, 24, 25]]
    together = grpo._kl_and_entropy(prompts, written)
    alone = [grpo._kl_and_entropy([prompt], [ids]) for prompt, ids in zip(prompts, written, strict=True)]
    assert together["kl_per_text"] == pytest.approx(np.mean([row["kl_per_text"] for row in alone]), rel=1e-3)
    assert together["entropy"] == pytest.approx((3 * alone[0]["entropy"] + 6 * alone[1]["entropy"]) / 9, rel=1e-3)

    ids = th.tensor([[*grpo._tokenizer(prompts[0])["input_ids"], *written[0]]])
    logs, start = (th.log_softmax(lm(ids).logits[0], -1) for lm in (grpo.lm, grpo._start))
    ends = range(ids.shape[1] - 4, ids.shape[1] - 1)
    expected = sum((logs - start)[place, ids[0, place + 1]].item() for place in ends)
    assert abs(expected) > 0.1
    assert alone[0]["kl_per_text"] == pytest.approx(expected, rel=1e-3)


def test_a_run_of_grpo_trains_the_model_and_is_reported_like_the_others(tmp_path: Path) -> None:
    pytest.importorskip("trl")
    run = run_of("lr-x10", "embedded", "grpo-0.1", 0, iterations=3)
    result = rlhf_run.train(run, runs.result_file(tmp_path, run))
    curve = result["curve"]
    assert (result["class"], result["diverged"]) == ("GRPOTrainer", None)
    assert curve["timesteps"][-2] < run.budget <= curve["timesteps"][-1] == result["timesteps"]
    assert curve["episodes"] == [16] * len(curve["episodes"])
    assert abs(curve["kl_per_text"][-1]) > 0.05
    start = json.loads(rlhf_run.START_FILE.read_text(encoding="utf-8"))["embedded"]
    # Of the trained model, on the same prompts with the same random numbers as the untrained one's.
    assert [sample["prompt"] for sample in result["samples"]] == list(rlhf_tasks.PROMPTS)
    assert result["samples"] != start["samples"]
    assert 0 < rlhf_report.measures(result, start)["final_gold"] < 1
    assert [file.name for file in tmp_path.rglob("*") if file.is_file()] == ["0.json"]
