"""The control benchmark: what it runs, that its stress is what it says, and a tiny run of it from end to end."""

import json
import math
import sys
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3 import PPO
from stable_baselines3.common.buffers import RolloutBuffer
from stable_baselines3.common.monitor import Monitor

from sb3_safe import SAFE
from sb3_safe.buffers import SafeRolloutBuffer
from sb3_safe.controller import rollout_threshold
from sb3_safe.presets import preset
from tests.tiny_envs import TinyEnv

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import control  # noqa: E402
import control_report  # noqa: E402
import control_run  # noqa: E402
import control_settings  # noqa: E402
from control_settings import Run  # noqa: E402


def run_of(algorithm: str, setting: str = "tuned", task: str = "CartPole-v1", budget: int = 512) -> Run:
    return Run(setting, task, algorithm, 0, budget)


# -- settings ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("setting", [name for name in control_settings.SETTINGS])
@pytest.mark.parametrize("task", list(control.TASKS))
def test_ppo_and_safe_share_every_hyperparameter(task: str, setting: str) -> None:
    ppo = control_settings.described(run_of("ppo", setting, task))
    safe = control_settings.described(run_of("safe", setting, task))
    assert {name: safe["arguments"][name] for name in ppo["arguments"]} == ppo["arguments"]
    assert {**safe, "algorithm": "ppo", "arguments": None} == {**ppo, "arguments": None}


def test_safe_has_the_same_arguments_of_its_own_on_every_task() -> None:
    own = []
    for task in control.TASKS:
        arguments = control_settings.described(run_of("safe", task=task))["arguments"]
        own.append({k: v for k, v in arguments.items() if k not in control_settings.SHARED and k != "policy_kwargs"})
        # Its one argument that follows the task does so by a rule.
        threshold = own[-1]["defaults"]["controller"].pop("tau_base")
        assert threshold == rollout_threshold(arguments["n_steps"] * preset(task)["n_envs"])
    assert all(entry == own[0] for entry in own)
    assert own[0]["max_preview_kl"] is not None


def test_stress_scales_what_it_names_and_nothing_else() -> None:
    def arguments(setting: str, task: str = "CartPole-v1") -> dict[str, Any]:
        described: dict[str, Any] = control_settings.described(run_of("ppo", setting, task))["arguments"]
        return described

    tuned = arguments("tuned")
    assert tuned["learning_rate"] == "lin_0.001"
    assert arguments("lr-x5") == tuned | {"learning_rate": "lin_0.005"}
    assert arguments("lr-x20") == tuned | {"learning_rate": "lin_0.02"}
    assert arguments("clip-1") == tuned | {"clip_range": 1.0}
    assert arguments("epochs-x4") == tuned | {"n_epochs": 80}
    # Where the preset is silent it is SB3's default that is scaled.
    assert arguments("lr-x5", "Acrobot-v1")["learning_rate"] == pytest.approx(1.5e-3)


def test_a_stress_on_what_an_algorithm_does_not_have_is_refused() -> None:
    with pytest.raises(ValueError, match="epochs-x4 stresses n_epochs, which trpo does not have"):
        control_settings.arguments_of(run_of("trpo", "epochs-x4"))


def test_each_layer_off_alone_and_all_off_is_ppo() -> None:
    off = {
        name: SAFE("MlpPolicy", "CartPole-v1", **control_settings.VARIANTS[name]) for name in control_settings.VARIANTS
    }
    assert off["safe-no-soft-min"].policy.n_critics == 1
    assert off["safe-no-huber"].huber_delta is None
    assert not off["safe-no-penalty"].controller.active
    assert not off["safe-no-gate"].controller.entropy_gate
    assert off["safe-no-preview"].max_preview_kl is None
    assert off["safe-constant"].controller.threshold_rule == "constant"
    assert off["safe-mean"].policy.soft_min_alpha == math.inf
    assert off["safe-min"].policy.soft_min_alpha == 0
    assert off["safe-paper"].controller.threshold_rule == "paper"
    nothing = off["safe-off"]
    assert (nothing.policy.n_critics, nothing.huber_delta, nothing.max_preview_kl) == (1, None, None)
    assert not nothing.controller.active
    assert nothing.critic_tau == 1


@pytest.mark.parametrize("name", control_settings.ALGORITHMS)
def test_what_describes_a_run_is_the_same_when_read_from_its_file(name: str) -> None:
    described = control_settings.described(run_of(name))
    assert json.loads(json.dumps(described, allow_nan=False)) == described


def test_each_layer_on_alone_leaves_the_others_off() -> None:
    penalty = control_settings.VARIANTS["only-penalty"]
    assert penalty == {
        "policy_kwargs": {"n_critics": 1},
        "huber_delta": None,
        "kl_controller_kwargs": {"entropy_gate": False, "threshold": "constant", "max_drift": None},
        "max_preview_kl": None,
    }
    off = control_settings.VARIANTS["safe-off"]
    for layer, argument in (("soft-min", "policy_kwargs"), ("huber", "huber_delta"), ("preview", "max_preview_kl")):
        alone = control_settings.VARIANTS[f"only-{layer}"]
        assert alone == {name: value for name, value in off.items() if name != argument}


# -- stress ------------------------------------------------------------------------------------------------------------


def filled(buffer: RolloutBuffer) -> RolloutBuffer:
    rng = np.random.default_rng(0)
    for _ in range(buffer.buffer_size):
        values, log_probs = th.as_tensor(rng.normal(size=2)), th.zeros(2)
        buffer.add(np.zeros((2, 3)), np.zeros((2, 1)), rng.normal(size=2), np.zeros(2), values, log_probs)
    buffer.compute_returns_and_advantage(th.zeros(2), np.zeros(2))
    return buffer


@pytest.mark.parametrize(
    ("biased", "plain"),
    [
        (control_run.OptimisticTargets, RolloutBuffer),
        (control_run.OptimisticSafeTargets, SafeRolloutBuffer),
    ],
)
def test_bias_adds_deviations_to_returns_and_leaves_advantages_alone(biased: Any, plain: Any) -> None:
    shape = (16, spaces.Box(-1, 1, (3,)), spaces.Discrete(2))
    with_bias = filled(biased(*shape, device="cpu", n_envs=2, bias=2.0))
    without = filled(plain(*shape, device="cpu", n_envs=2))
    spread = without.returns.std()
    np.testing.assert_allclose(with_bias.returns, without.returns + 2.0 * spread, rtol=1e-5)
    np.testing.assert_array_equal(with_bias.advantages, without.advantages)
    # The next rollout, three times as wide: the spread is a running one.
    with_bias.values *= 3
    with_bias.rewards *= 3
    with_bias.compute_returns_and_advantage(th.zeros(2), np.zeros(2))
    running = spread * (control_run.BIAS_DECAY + (1 - control_run.BIAS_DECAY) * 3)
    np.testing.assert_allclose(with_bias.returns, 3 * without.returns + 2.0 * running, rtol=1e-4)


@pytest.mark.parametrize(("algorithm", "kind"), [("ppo", PPO), ("safe", SAFE)])
def test_both_algorithms_are_fed_biased_targets(algorithm: str, kind: type) -> None:
    model = control_run.make_model(run_of(algorithm, "biased-critic"))
    assert type(model) is kind
    assert isinstance(model.rollout_buffer, control_run.OptimisticTargets)
    assert model.rollout_buffer.bias == control_settings.BIAS


def test_noise_is_on_rewards_and_the_true_return_in_the_info() -> None:
    def episode(std: float, seed: int = 3) -> tuple[list[float], dict[str, Any]]:
        env = control_run.NoisyReward(Monitor(TinyEnv(length=50)), std)
        env.reset(seed=seed)
        rewards, over, info = [], False, {}
        while not over:
            _, reward, terminated, truncated, info = env.step(1)
            rewards.append(reward)
            over = terminated or truncated
        return rewards, info

    (true, quiet), (noisy, info) = episode(0.0), episode(2.0)
    assert info["true_return"] == pytest.approx(sum(true), abs=1e-4)
    assert info["true_return"] == quiet["true_return"]
    assert info["episode"]["r"] == pytest.approx(sum(noisy))
    noise = np.subtract(noisy, true)
    assert 1.4 < noise.std() < 2.6
    assert abs(noise.mean()) < 3 * 2.0 / np.sqrt(50)
    assert episode(2.0)[0] == noisy
    assert episode(2.0, seed=4)[0] != noisy


def test_a_noisy_run_has_a_wrapper_of_the_measured_size_and_a_true_curve(tmp_path: Path) -> None:
    run = run_of("safe", "reward-noise", budget=256)
    model = control_run.make_model(run)
    scale = json.loads(control_run.RANDOM_FILE.read_text())["CartPole-v1"]["step_reward_rms"]
    assert model.env.get_attr("std") == [control_settings.NOISE * scale] * 8
    result = control_run.train(run, tmp_path / "0.json")
    # Lengths of whole episodes: the reward of a step is 1, so a true mean return times its episodes is an integer.
    total = result["curve"]["return"][0] * result["curve"]["episodes"][0]
    assert total == pytest.approx(round(total), abs=1e-2)


# -- recording ---------------------------------------------------------------------------------------------------------


def test_curve_joins_rollouts_and_loses_no_episode() -> None:
    rng = np.random.default_rng(0)
    rollouts = [
        {"timesteps": 10 * (i + 1), "returns": list(rng.normal(size=i % 3)), "kl": 0.01 * i, "kept": 1.0}
        for i in range(25)
    ]
    curve = control_run.curve(rollouts, max_points=10)
    assert curve["timesteps"] == [30, 60, 90, 120, 150, 180, 210, 240, 250]
    assert sum(n for n in curve["episodes"] if n) == sum(len(rollout["returns"]) for rollout in rollouts)
    returns = rollouts[0]["returns"] + rollouts[1]["returns"] + rollouts[2]["returns"]
    assert curve["return"][0] == pytest.approx(np.mean(returns), rel=1e-5)
    assert curve["std"][0] == pytest.approx(np.std(returns, ddof=1), rel=1e-5)
    assert (curve["kl"][0], curve["kl_max"][0]) == (pytest.approx(0.01), pytest.approx(0.02))


def test_the_kl_of_an_update_is_measured_alike_for_all() -> None:
    """With every layer off SAFE is PPO, so its measured KL must be PPO's."""
    kls = []
    for algorithm in ("ppo", "safe-off"):
        model, recorder = control_run.make_model(run_of(algorithm)), control_run.Recorder()
        model.learn(512, callback=recorder)
        kls.append([rollout["kl"] for rollout in recorder.rollouts])
    assert len(kls[0]) == 2
    assert kls[0][0] > 0
    np.testing.assert_allclose(kls[0], kls[1], rtol=0.02, atol=1e-9)


def test_a_run_that_stops_at_nan_is_recorded_and_counts_as_the_random_policy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = control_run.make_model(run_of("ppo", budget=2560))
    train = model.train

    def poisoned() -> None:
        train()
        if model.num_timesteps >= 1024:
            with th.no_grad():
                model.policy.action_net.bias.fill_(th.nan)

    monkeypatch.setattr(model, "train", poisoned)
    monkeypatch.setattr(control_run, "make_model", lambda run: model)
    result = control_run.train(run_of("ppo", budget=2560), tmp_path / "0.json")
    assert "invalid values" in result["diverged"]
    assert result["timesteps"] < 2560
    curve = control_report.filled_curve(result, control_report.after_nan(-7.0))
    assert curve["timesteps"][-1] >= 2560
    assert list(curve["return"][-5:]) == [-7.0] * 5
    assert control_report.measures(result, -7.0)["final"] == -7.0


# -- measures ----------------------------------------------------------------------------------------------------------


def result_with(returns: list[float | None], steps: list[int] | None = None) -> dict[str, Any]:
    points = len(returns)
    curve = {
        "timesteps": steps or [100 * (i + 1) for i in range(points)],
        "return": returns,
        "std": [None] * points,
        "episodes": [0 if value is None else 2 for value in returns],
        "kl_max": [0.1] * points,
    }
    return {"curve": curve, "diverged": None, "budget": 100 * points, "cpu_seconds": 1.0, "peak_mb": 10.0}


def test_average_weighs_by_time_and_final_is_the_last_tenth() -> None:
    figures = control_report.measures(result_with([0.0, 10.0, 20.0], steps=[100, 200, 1000]), 0.0)
    assert figures["average"] == pytest.approx((0 * 100 + 10 * 100 + 20 * 800) / 1000)
    assert control_report.measures(result_with([float(i) for i in range(20)]), 0.0)["final"] == pytest.approx(18.5)


def test_a_point_without_an_episode_repeats_the_one_before() -> None:
    figures = control_report.measures(result_with([0.0, None, 10.0]), 0.0)
    assert figures["average"] == pytest.approx((0 * 200 + 10 * 100) / 300)
    figures = control_report.measures(result_with([None, 4.0, None, 10.0, None, None]), 0.0)
    assert figures["average"] == pytest.approx((4 * 300 + 10 * 300) / 600)


def test_what_a_run_stands_for_adds_up_to_its_steps() -> None:
    result = result_with([None, 4.0, None, 10.0, None])
    assert control_report.filled_curve(result, {})["span"].tolist() == [300, 200]
    stopped = result | {"diverged": "not finite", "budget": 1500}
    curve = control_report.filled_curve(stopped, control_report.after_nan(-7.0))
    assert curve["timesteps"][2] > 500
    assert curve["span"].sum() == curve["timesteps"][-1] >= 1500


def test_points_made_up_after_nan_weigh_as_much_as_the_others() -> None:
    result = result_with([100.0] * 95) | {"diverged": "not finite", "budget": 10_000}
    assert control_report.measures(result, 0.0)["final"] == pytest.approx(50.0)


def test_a_collapse_counts_as_a_crash_whatever_the_sign_of_the_returns() -> None:
    risen = list(np.linspace(0, 100, 20))
    assert control_report.measures(result_with([*risen, *[5.0] * 10]), 0.0)["crashes"] == 1
    assert control_report.measures(result_with([v - 500 for v in [*risen, *[5.0] * 10]]), 0.0)["crashes"] == 1
    assert control_report.measures(result_with([*risen, *[90.0] * 10]), 0.0)["crashes"] == 0


# -- from end to end ---------------------------------------------------------------------------------------------------


def test_plan_puts_all_algorithms_of_a_seed_before_the_next_seed() -> None:
    runs = list(control.plan(control.parse(["run", "--tasks", "CartPole-v1", "Hopper-v5"])))
    assert [run.seed for run in runs] == sorted(run.seed for run in runs)
    assert {run.seed for run in runs if run.task == "CartPole-v1"} == set(range(10))
    assert {run.seed for run in runs if run.task == "Hopper-v5"} == set(range(5))
    assert {run.budget for run in runs} == {100_000, 300_000}
    assert {run.algorithm for run in runs if run.task == "Hopper-v5"} == {"ppo", "safe", "ppo-target-kl"}
    assert "trpo" in {run.algorithm for run in runs if run.task == "CartPole-v1"}
    long = list(control.plan(control.parse(["run", "--long"])))
    assert {(run.setting, run.budget) for run in long} == {("long", 1_000_000)}


def test_random_scores_are_there_for_every_task_and_below_the_good_ones() -> None:
    scores = json.loads(control_run.RANDOM_FILE.read_text())
    assert set(scores) == set(control.TASKS)
    assert all(
        scores[name]["return"] < task.good and scores[name]["episodes"] == 20 for name, task in control.TASKS.items()
    )
    again = control_run.measure_random_policy("CartPole-v1")
    assert again == pytest.approx(scores["CartPole-v1"])


def test_runs_are_written_skipped_and_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["run", "--tasks", "CartPole-v1", "--algorithms", "ppo", "safe", "--seeds", "1",
                 "--budget-scale", "0.00512", "--out", str(tmp_path)]  # fmt: skip
    assert control.main(arguments) == 0
    files = sorted(tmp_path.rglob("*.json"))
    assert [file.relative_to(tmp_path).as_posix() for file in files] == [
        "tuned/CartPole-v1/ppo/0.json",
        "tuned/CartPole-v1/safe/0.json",
    ]
    assert not list(tmp_path.rglob("*.partial"))
    for file in files:
        result = json.loads(file.read_text())
        assert file.stat().st_size < 60_000
        assert (result["timesteps"], result["diverged"]) == (512, None)
        assert result["curve"]["timesteps"] == [256, 512]
        # The preset's rate falls to 0, so that the last update moves nothing.
        assert result["curve"]["kl"][0] > 0
        assert result["curve"]["kl"][1] == pytest.approx(0, abs=1e-6)
        assert result["peak_mb"] > 50
        assert 0 < result["cpu_seconds"] < 60
    capsys.readouterr()

    assert control.main(arguments) == 0
    assert "2 runs are done, 0 to do" in capsys.readouterr().out

    # Another budget is another run: its result must not be taken for the one that is there.
    assert control.main([*arguments, "--budget-scale", "0.01"]) == 2
    assert "was made with other budget" in capsys.readouterr().err

    assert control.main([*arguments[:-2], "--seeds", "3", "--out", str(tmp_path), "--time-limit", "0"]) == 0
    assert "4 runs not started" in capsys.readouterr().out

    assert control.main(["report", "--out", str(tmp_path)]) == 0
    assert "2 runs" in capsys.readouterr().out
    summary = json.loads((tmp_path / "summary.json").read_text())["settings"]["tuned"]
    aggregate = summary["aggregate"]["all tasks"]
    assert aggregate["tasks"] == ["CartPole-v1"]
    assert len(aggregate["safe"]["improvement_final"]) == 3
    row = summary["tasks"]["CartPole-v1"]["ppo"]
    random, good = json.loads(control_run.RANDOM_FILE.read_text())["CartPole-v1"]["return"], 500.0
    assert aggregate["ppo"]["final"][0] == pytest.approx((row["final"][0] - random) / (good - random), rel=1e-3)
    text = (tmp_path / "tables.md").read_text()
    assert "| CartPole-v1 | safe | 1 |" in text
    for name in ("curves-tuned", "profile-tuned", "settings"):
        assert (tmp_path / f"{name}.png").stat().st_size > 1000
        assert (tmp_path / f"{name}.svg").stat().st_size > 1000


def test_a_run_that_fails_is_told_and_leaves_no_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(control, "described", lambda run: {})
    arguments = [
        "run",
        "--suite",
        "stress",
        "--settings",
        "epochs-x4",
        "--tasks",
        "CartPole-v1",
        "--algorithms",
        "trpo",
    ]
    assert control.main([*arguments, "--seeds", "1", "--out", str(tmp_path)]) == 1
    assert not list(tmp_path.rglob("*.json"))


def test_every_task_of_the_benchmark_is_registered() -> None:
    assert set(control.TASKS) <= set(gym.registry)
