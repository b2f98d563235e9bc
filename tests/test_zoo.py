"""SAFE in the RL Zoo. What needs ``rl_zoo3`` is skipped without it."""

import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import VecNormalize

from sb3_safe import SAFE, NonFiniteError, presets, zoo


class Trial:
    """Answers with the lower end, or the first choice, and keeps what it was asked for: a finished trial's params."""

    def __init__(self) -> None:
        self.params: dict[str, Any] = {}

    def suggest_float(self, name: str, low: float, high: float, log: bool = False) -> float:
        assert 0 < low < high
        return self.params.setdefault(name, low)  # type: ignore[no-any-return]

    def suggest_int(self, name: str, low: int, high: int) -> int:
        return self.params.setdefault(name, low)  # type: ignore[no-any-return]

    def suggest_categorical(self, name: str, choices: list[Any]) -> Any:
        return self.params.setdefault(name, choices[0])

    def set_user_attr(self, name: str, value: Any) -> None:
        pass


def test_presets_file_is_one_that_the_zoo_reads() -> None:
    """It takes an entry as it is, without the defaults; schedules are numbers or ``lin_x``, expressions are strings."""
    assert "default" in presets.entries()
    for name, entry in presets.entries().items():
        assert isinstance(entry["n_timesteps"], int), name
        for key in ("learning_rate", "clip_range"):
            value = entry.get(key, 0.1)
            assert isinstance(value, float | int) or (value.split("_")[0] == "lin" and float(value.split("_")[1]) > 0)
        assert isinstance(entry.get("policy_kwargs", ""), str)


def test_train_gets_the_algorithm_and_the_presets() -> None:
    options = zoo.with_defaults("train", ["--env", "CartPole-v1", "-n", "10"])
    assert options == ["--env", "CartPole-v1", "-n", "10", "--algo", "safe", "--conf-file", str(presets.PRESETS_FILE)]


@pytest.mark.parametrize("given", [["-conf", "mine.yml"], ["--conf-file", "mine.yml"], ["--conf-file=mine.yml"]])
def test_a_file_of_ones_own_wins(given: list[str]) -> None:
    assert zoo.with_defaults("train", ["--algo", "safe", *given]) == ["--algo", "safe", *given]


def test_a_preset_that_the_zoo_would_not_find_is_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--env", "TextGenEnv-v0", "--env-kwargs", "max_new_tokens:8", "model:'some/model'"]
    assert zoo.main(["train", *options]) == 2
    assert "--env-kwargs model: the Zoo finds the preset of TextGenEnv-v0 without it only" in capsys.readouterr().err
    assert zoo.with_defaults("train", [*options, "-conf", "mine.yml"])[-2:] == ["--algo", "safe"]
    for others in (options[:-1], ["--env", "CartPole-v1", "--env-kwargs", "max_episode_steps:7"]):
        assert str(presets.PRESETS_FILE) in zoo.with_defaults("train", others)


def test_other_algorithms_are_left_alone() -> None:
    assert zoo.with_defaults("train", ["--algo=ppo"]) == ["--algo=ppo"]
    assert zoo.with_defaults("plot_train", ["-a", "safe"]) == ["-a", "safe"]


def test_enjoy_looks_where_train_writes() -> None:
    assert zoo.with_defaults("enjoy", []) == ["--algo", "safe", "--folder", "logs"]
    assert zoo.with_defaults("enjoy", ["-f", "mine", "--algo", "safe"]) == ["-f", "mine", "--algo", "safe"]
    assert zoo.with_defaults("record_video", ["--algo", "safe"])[-2:] == ["--folder", "logs"]
    assert zoo.with_defaults("enjoy", ["--algo", "ppo"])[-2:] == ["--folder", "logs"]


def test_unknown_command_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert zoo.main(["fly"]) == 2
    assert zoo.main([]) == 2
    assert zoo.main(["--help"]) == 0
    assert "train,enjoy" in capsys.readouterr().err


def test_missing_zoo_is_told_with_the_command_that_installs_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "rl_zoo3", None)
    monkeypatch.setattr(sys, "argv", ["zoo"])
    assert zoo.main(["train", "--env", "CartPole-v1"]) == 1
    assert "pip install 'sb3-safe[zoo]'" in capsys.readouterr().err


def test_breakdown_is_a_value_error_which_a_search_survives(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("tempfile.gettempdir", lambda: str(tmp_path))
    model = zoo.ZooSAFE(
        "MlpPolicy", "Poisoned-v0", n_steps=8, batch_size=8, env_kwargs={"reward": float("nan"), "after": 4}
    )
    with pytest.raises(ValueError, match="reward of environment 0") as caught:
        model.learn(8)
    assert isinstance(caught.value.__cause__, NonFiniteError)


# -- with the Zoo ------------------------------------------------------------------------------------------------------


def test_register_adds_safe_to_the_zoo() -> None:
    rl_zoo3 = pytest.importorskip("rl_zoo3")
    zoo.register()
    from rl_zoo3 import exp_manager

    assert issubclass(rl_zoo3.ALGOS["safe"], SAFE)
    assert exp_manager.ALGOS["safe"] is rl_zoo3.ALGOS["safe"]
    assert "safe" in exp_manager.HYPERPARAMS_SAMPLER
    assert "safe" in exp_manager.HYPERPARAMS_CONVERTER


def test_sampled_arguments_build_safe_and_are_found_again_from_the_study() -> None:
    pytest.importorskip("rl_zoo3")
    trial = Trial()
    arguments = zoo.sample_safe_params(trial, 1, 1, {})
    model = SAFE("MlpPolicy", "CartPole-v1", **arguments)
    assert model.controller.tau_base == trial.params["tau_base"]
    assert model.controller.coef == trial.params["coef"]
    assert model.policy.soft_min_alpha == trial.params["soft_min_alpha"]
    assert model.huber_delta == trial.params["huber_delta"]
    assert zoo.convert_safe_params(trial.params) == arguments


def test_enjoy_normalises_by_the_zoos_own_statistics_and_is_not_warned(tmp_path: Path) -> None:
    model = zoo.ZooSAFE("MlpPolicy", VecNormalize(make_vec_env("Pendulum-v1")), n_steps=32, batch_size=32)
    model.save(tmp_path / "model")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        zoo.ZooSAFE.load(tmp_path / "model").predict(np.zeros((1, 3), np.float32))


def test_train_and_enjoy_a_tiny_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("rl_zoo3")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["zoo"])
    common = ["--env", "CartPole-v1", "--seed", "1", "--num-threads", "1"]
    assert zoo.main(["train", *common, "-n", "512", "--eval-freq", "-1", "--verbose", "0"]) == 0
    assert (tmp_path / "logs/safe/CartPole-v1_1/CartPole-v1.zip").exists()
    config = (tmp_path / "logs/safe/CartPole-v1_1/CartPole-v1/config.yml").read_text()
    assert "lin_0.001" in config
    assert zoo.main(["enjoy", *common, "-n", "50", "--no-render"]) == 0


@pytest.mark.parametrize("env_id", ["CartPole-v1", "Acrobot-v1", "CartPole-v0"])  # an entry, a normalised one, none
def test_training_goes_on_from_a_saved_model(env_id: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("rl_zoo3")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["zoo"])
    command = ["train", "--env", env_id, "-n", "64", "--eval-freq", "-1", "--verbose", "0", "--num-threads", "1"]
    command += ["-params", "n_steps:32", "n_envs:2", "n_epochs:1", "batch_size:32"]
    assert zoo.main(command) == 0
    saved = tmp_path / f"logs/safe/{env_id}_1/{env_id}.zip"
    assert zoo.main([*command, "-i", str(saved)]) == 0
    assert (tmp_path / f"logs/safe/{env_id}_2/{env_id}.zip").exists()
