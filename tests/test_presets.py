from pathlib import Path
from typing import Any

import gymnasium as gym
import pytest
import yaml
from stable_baselines3.common.vec_env import VecNormalize

from sb3_safe import SAFE, presets

FILE = Path(presets.__file__).with_name("presets.yml")
ENTRIES: dict[str, dict[str, Any]] = yaml.safe_load(FILE.read_text(encoding="utf-8"))
NOT_ARGUMENTS = {"n_timesteps", "normalize"}


@pytest.fixture
def cheap(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[str, Any]:
    """A presets file of one's own."""
    entries = {
        "default": {"n_timesteps": 50, "n_envs": 1},
        "CartPole-v1": {
            "n_timesteps": 64, "n_envs": 2, "n_steps": 16, "batch_size": 8, "n_epochs": 2,
            "learning_rate": "lin_0.01", "clip_range": 0.3, "huber_delta": 0.5,
        },
        "Pendulum-v1": {"normalize": True, "gamma": 0.8, "n_steps": 16, "batch_size": 8},
    }  # fmt: skip
    file = tmp_path / "presets.yml"
    file.write_text(yaml.safe_dump(entries), encoding="utf-8")
    monkeypatch.setattr(presets, "PRESETS_FILE", file)
    return entries


def test_an_id_alone_takes_its_preset(cheap: dict[str, Any]):
    model = SAFE("CartPole-v1")
    assert (model.n_envs, model.n_steps, model.batch_size, model.n_epochs) == (2, 16, 8, 2)
    assert model.huber_delta == 0.5
    assert model.clip_range(1.0) == 0.3
    assert [model.lr_schedule(progress) for progress in (1.0, 0.5, 0.0)] == pytest.approx([0.01, 0.005, 0.0])


def test_what_an_entry_leaves_out_is_the_default_of_the_constructor(cheap: dict[str, Any]):
    model, plain = SAFE("CartPole-v1"), SAFE("MlpPolicy", "CartPole-v1")
    for name in ("gamma", "gae_lambda", "ent_coef", "vf_coef", "max_grad_norm", "max_preview_kl", "critic_tau"):
        assert getattr(model, name) == getattr(plain, name)


def test_an_argument_wins_over_the_preset(cheap: dict[str, Any]):
    model = SAFE("CartPole-v1", n_steps=24, learning_rate=5e-4, n_envs=1)
    assert (model.n_steps, model.n_envs, model.batch_size) == (24, 1, 8)
    assert model.lr_schedule(0.3) == 5e-4


def test_an_argument_equal_to_the_default_wins_over_the_preset(cheap: dict[str, Any]):
    model = SAFE("CartPole-v1", n_epochs=10, huber_delta=1.0)
    assert (model.n_epochs, model.huber_delta) == (10, 1.0)


def test_the_usual_form_takes_no_preset(cheap: dict[str, Any]):
    model = SAFE("MlpPolicy", "CartPole-v1")
    assert (model.n_envs, model.n_steps, model.n_epochs) == (1, 2048, 10)


def test_a_verbose_model_says_what_the_preset_set(cheap: dict[str, Any], capsys: pytest.CaptureFixture[str]):
    SAFE("CartPole-v1", verbose=1, n_steps=24)
    printed = capsys.readouterr().out
    (line,) = [line for line in printed.splitlines() if "Preset of CartPole-v1" in line]
    assert "64" in line
    assert "'batch_size': 8" in line
    assert "n_steps" not in line


def test_of_arguments_in_a_dict_it_says_those_that_the_preset_set(
    cheap: dict[str, Any], capsys: pytest.CaptureFixture[str]
):
    cheap["Tiny-vector-discrete-v0"] = {"policy_kwargs": "dict(n_critics=3, soft_min_alpha=0.5)"}
    presets.PRESETS_FILE.write_text(yaml.safe_dump(cheap), encoding="utf-8")
    model = SAFE("Tiny-vector-discrete-v0", verbose=1, policy_kwargs={"n_critics": 4})
    assert model.policy_kwargs == {"n_critics": 4, "soft_min_alpha": 0.5}
    assert "'policy_kwargs': {'soft_min_alpha': 0.5}" in capsys.readouterr().out


@pytest.mark.parametrize("written", ["dict(tau_base=0.5, coef=3.0)", {"tau_base": 0.5, "coef": 3.0}])
def test_a_preset_may_have_arguments_of_the_controller_of_which_some_are_given(cheap: dict[str, Any], written: Any):
    cheap["Tiny-vector-discrete-v0"] = {"kl_controller_kwargs": written}
    presets.PRESETS_FILE.write_text(yaml.safe_dump(cheap), encoding="utf-8")
    controller = SAFE("Tiny-vector-discrete-v0", kl_controller_kwargs={"coef": 4.0}).controller
    assert (controller.tau_base, controller.coef) == (0.5, 4.0)


def test_a_silent_model_says_nothing(cheap: dict[str, Any], capsys: pytest.CaptureFixture[str]):
    SAFE("CartPole-v1")
    assert capsys.readouterr().out == ""


def test_learning_without_a_budget_takes_that_of_the_preset(cheap: dict[str, Any]):
    assert SAFE("CartPole-v1").learn().num_timesteps == 64
    assert SAFE("MlpPolicy", "CartPole-v1", n_steps=16, batch_size=8).learn().num_timesteps == 64
    # Unknown environments take the default, rounded up to whole rollouts.
    assert SAFE("Tiny-vector-box-v0", n_steps=16, batch_size=8).learn().num_timesteps == 64


def test_a_budget_may_depend_on_arguments_of_the_environment(cheap: dict[str, Any]):
    cheap["Tiny-vector-discrete-v0/length"] = {"n_timesteps": 96}
    presets.PRESETS_FILE.write_text(yaml.safe_dump(cheap), encoding="utf-8")
    sizes = {"n_steps": 16, "batch_size": 8, "env_kwargs": {"length": 7}}
    assert SAFE("Tiny-vector-discrete-v0", **sizes).learn().num_timesteps == 96
    assert SAFE("auto", "Tiny-vector-discrete-v0", **sizes).learn().num_timesteps == 96


def test_a_model_in_another_environment_takes_the_budget_of_that_one(cheap: dict[str, Any], tmp_path: Path):
    cheap["Tiny-vector-discrete-v0"] = {"n_timesteps": 32, "n_steps": 16, "batch_size": 8}
    cheap["Poisoned-v0"] = {"n_timesteps": 96}
    presets.PRESETS_FILE.write_text(yaml.safe_dump(cheap), encoding="utf-8")
    SAFE("Tiny-vector-discrete-v0").save(tmp_path / "model")
    for env_id, budget in (("Poisoned-v0", 96), ("Tiny-vector-discrete-v0", 32)):
        assert SAFE.load(tmp_path / "model", env=gym.make(env_id)).learn().num_timesteps == budget


def test_normalisation_of_a_preset_wraps_the_environment(cheap: dict[str, Any]):
    model = SAFE("Pendulum-v1")
    assert isinstance(model.env, VecNormalize)
    assert model.env.gamma == 0.8
    assert SAFE("Pendulum-v1", gamma=0.5).env.gamma == 0.5
    assert not isinstance(SAFE("CartPole-v1").env, VecNormalize)


def test_an_id_with_its_module_takes_the_preset_of_the_id(cheap: dict[str, Any]):
    assert SAFE("gymnasium.envs.classic_control:CartPole-v1").n_steps == 16


def test_a_malformed_schedule_is_named(cheap: dict[str, Any]):
    cheap["CartPole-v1"]["learning_rate"] = "1e-5"
    presets.PRESETS_FILE.write_text(yaml.safe_dump(cheap), encoding="utf-8")
    with pytest.raises(ValueError, match="1e-5"):
        SAFE("CartPole-v1")


@pytest.mark.parametrize("env_id", ENTRIES)
def test_every_entry_of_the_file_is_made_of_arguments_and_numbers(env_id: str):
    import inspect

    entry = ENTRIES[env_id]
    arguments = set(inspect.signature(SAFE.__init__).parameters)
    assert set(entry) <= arguments | NOT_ARGUMENTS
    for name, value in entry.items():
        assert not isinstance(value, str) or name in ("policy", *presets.KEYWORDS, *presets.SCHEDULED), (
            f"{name} is a text: {value!r}"
        )
    settings = presets.preset(env_id)
    assert settings["n_timesteps"] >= 1
    assert settings["n_envs"] >= 1


@pytest.mark.parametrize("env_id", ["CartPole-v1", "Pendulum-v1", "Acrobot-v1", "MountainCar-v0"])
def test_every_control_preset_builds_a_model_and_its_rollout_divides_into_minibatches(env_id: str):
    model = SAFE(env_id)
    entry = ENTRIES[env_id]
    assert model.n_envs == entry["n_envs"]
    assert model._recommended_timesteps() == entry["n_timesteps"]
    assert isinstance(model.env, VecNormalize) == entry.get("normalize", False)
    assert (model.n_steps * model.n_envs) % model.batch_size == 0
    assert env_id in gym.registry


def test_an_entry_for_an_argument_of_the_environment_overrides_that_of_the_id(cheap: dict[str, Any]):
    cheap["Tiny-vector-discrete-v0/length"] = {"n_steps": 24, "env_kwargs": "dict(length=5)"}
    presets.PRESETS_FILE.write_text(
        yaml.safe_dump(cheap | {"Tiny-vector-discrete-v0": {"n_steps": 16}}), encoding="utf-8"
    )
    assert SAFE("Tiny-vector-discrete-v0").n_steps == 16
    model = SAFE("Tiny-vector-discrete-v0", env_kwargs={"length": 7})
    assert model.n_steps == 24
    assert model.env.get_attr("length") == [7]
