"""What is wrong is said before training, by the name of the argument; what goes wrong later leaves a good model."""

import errno
import itertools
import math
import re
import tempfile
import threading
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium.vector import SyncVectorEnv
from stable_baselines3.common.buffers import RolloutBuffer
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.logger import configure
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize

from sb3_safe import SAFE, FixedKL, NonFiniteError, TwinCriticPolicy, environments
from sb3_safe.policies import PessimisticCritics
from sb3_safe.trust_bound import trained_parameters
from tests.tiny_envs import ACTIONS, PoisonedEnv, TinyEnv

SMALL: dict[str, Any] = {"n_steps": 32, "batch_size": 16, "n_epochs": 2, "seed": 0}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"policy": "CartPol-v1", "env": None}, ["policy", "CartPol-v1", "MlpPolicy", "environment id"]),
        ({"env": "CartPol-v1"}, ["env", "CartPol-v1", "Did you mean: `CartPole`"]),
        ({"env": "no_such_module:CartPole-v1"}, ["env", "no_such_module"]),
        ({"policy": "MlpPolcy"}, ["policy", "MlpPolcy", "MlpPolicy"]),
        ({"policy": "CartPole-v1", "env": TinyEnv()}, ["policy", "CartPole-v1", "not a policy", "MlpPolicy"]),
        ({"policy": TinyEnv(), "env": None}, ["policy is an environment", "TinyEnv", "second", "SAFE('auto', env)"]),
        ({"policy": DummyVecEnv([TinyEnv]), "env": "MlpPolicy"}, ["policy is an environment", "DummyVecEnv", "second"]),
        ({"policy": SyncVectorEnv([TinyEnv]), "env": None}, ["policy is an environment", "SyncVectorEnv", "second"]),
        ({"policy": "CartPole-v1", "env": "MlpPolicy"}, ["policy='CartPole-v1'", "env='MlpPolicy'", "swapped"]),
        ({"policy": "CartPole-v1", "env": "auto"}, ["policy='CartPole-v1'", "env='auto'", "swapped"]),
        ({"policy": "CartPole-v1", "env": TwinCriticPolicy}, ["policy='CartPole-v1'", "TwinCriticPolicy", "swapped"]),
        ({"policy": "MlpPolcy", "env": TinyEnv}, ["policy", "MlpPolcy", "not a policy"]),
        ({"policy": 3}, ["policy", "MlpPolicy", "environment id"]),
        ({"env": None}, ["env", "missing"]),
        ({"env": "Tiny-dict-discrete-v0"}, ["MultiInputPolicy"]),
        ({"policy": "CnnPolicy"}, ["CnnPolicy"]),
        ({"policy": "MultiInputPolicy"}, ["MultiInputPolicy"]),
        ({"policy": ActorCriticPolicy}, ["policy", "ActorCriticPolicy", "TwinCriticPolicy"]),
        ({"n_envs": 0}, ["n_envs"]),
        ({"n_steps": 1, "n_envs": 1}, ["n_steps", "n_envs"]),
        ({"n_steps": 0}, ["n_steps"]),
        ({"batch_size": 1}, ["batch_size"]),
        ({"batch_size": 0, "normalize_advantage": False}, ["batch_size"]),
        ({"n_epochs": 0}, ["n_epochs"]),
        ({"policy_kwargs": {"soft_min_alpha": -1.0}}, ["soft_min_alpha"]),
        ({"policy_kwargs": {"n_critics": 0}}, ["n_critics"]),
        ({"kl_reference": "start"}, ["kl_reference", "start", "initial"]),
        ({"kl_reference": "start", "kl_estimator": "k2"}, ["kl_reference", "start", "initial"]),
        ({"kl_estimator": "k4"}, ["kl_estimator", "k4", "k3"]),
        ({"kl_estimator": "k2", "kl_reference": "rollout"}, ["kl_estimator", "k2", "rollout", "k3"]),
        ({"kl_controller": "pid"}, ["kl_controller", "pid", "adaptive"]),
        ({"kl_controller": FixedKL(0.1)}, ["kl_controller", "kl_controller_kwargs"]),
        ({"kl_controller_kwargs": {"strength": 1}}, ["kl_controller_kwargs", "strength"]),
        ({"kl_controller_kwargs": {"coef": -1}}, ["coef"]),
        ({"kl_controller_kwargs": "dict(coef=1)"}, ["kl_controller_kwargs", "dict(coef=1)", "mapping"]),
        ({"kl_controller_kwargs": {"warmup": "long"}}, ["kl_controller_kwargs"]),
        ({"huber_delta": 0.0}, ["huber_delta", "None"]),
        ({"huber_delta": "1e-1"}, ["huber_delta", "'1e-1'"]),
        ({"critic_tau": 0.0}, ["critic_tau"]),
        ({"critic_tau": 1.5}, ["critic_tau"]),
        ({"max_preview_kl": -0.5}, ["max_preview_kl", "None"]),
        ({"max_preview_kl": math.nan}, ["max_preview_kl"]),
        ({"clip_range_vf": 0.0}, ["clip_range_vf", "None"]),
        ({"env": TinyEnv(), "env_kwargs": {"length": 3}}, ["env_kwargs", "id"]),
        ({"env": TinyEnv(), "n_envs": 4}, ["n_envs", "id"]),
        ({"env": SyncVectorEnv([TinyEnv])}, ["env", "SAME_STEP"]),
        ({"use_sde": True}, ["State-Dependent Exploration", "continuous"]),
    ],
    ids=str,
)  # fmt: skip
def test_a_wrong_argument_is_named_with_the_fix_before_training(arguments: dict[str, Any], said: list[str]):
    with pytest.raises(ValueError) as caught:
        SAFE(**({"policy": "MlpPolicy", "env": "CartPole-v1"} | SMALL | arguments))
    assert all(word in str(caught.value) for word in said), str(caught.value)


UNFIT: dict[str, list[Any]] = {
    "learning_rate": [-1e-3, math.nan, math.inf, None, True],
    "n_steps": [0, 32.0, None],
    "batch_size": [-1, 64.0, None],
    "n_epochs": [0, 1.5, None],
    "gamma": [-1, 1.5, math.nan, None],
    "gae_lambda": [-0.1, 2, None],
    "clip_range": [-0.2, 0, math.nan, None],
    "clip_range_vf": [-0.2, 0],
    "normalize_advantage": ["no", None, 2],
    "ent_coef": [math.nan, math.inf, "auto", None],
    "vf_coef": [-1, math.nan, math.inf, None],
    "use_sde": ["no"],
    "sde_sample_freq": [0, -2, 1.5, None],
    "target_kl": [-1, 0, math.nan],
    "huber_delta": [-1, lambda progress: progress],
    "critic_tau": [None],
    "max_preview_kl": ["automatic"],
    "critic_warmup": [-1, 1.5, None],
    "n_envs": [2.0, None],
    "stats_window_size": [0, 10.0, None],
    "seed": [-1, 0.5, 2**32],
}


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in UNFIT.items() for value in values])
def test_a_number_that_does_not_fit_is_named_before_an_environment_is_made(
    name: str, value: Any, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(environments, "make", None)
    for by_id in ({"policy": "MlpPolicy", "env": "CartPole-v1"}, {"policy": "CartPole-v1"}):
        with pytest.raises(ValueError, match=f"{name} must be .*, got"):
            SAFE(**(by_id | {name: value}))


@pytest.mark.parametrize("name", ["learning_rate", "clip_range", "n_steps", "n_envs", "gamma", "seed"])
def test_a_number_that_is_a_string_is_told_from_one_that_yaml_reads(name: str):
    with pytest.raises(ValueError, match=rf"{name} must be .*, got '1e-5', a string: .*quotes.*YAML.*1\.0e-5"):
        SAFE("MlpPolicy", "CartPole-v1", **{name: "1e-5"})


@pytest.mark.parametrize("name", ["policy_kwargs", "env_kwargs", "rollout_buffer_kwargs", "kl_controller_kwargs"])
@pytest.mark.parametrize("by_id", [("MlpPolicy", "CartPole-v1"), ("Pendulum-v1",), ("TextGenEnv-v0",)])
def test_arguments_of_a_part_are_a_dict(name: str, by_id: tuple[str, ...]):
    for value in (3, "dict(a=1)"):
        with pytest.raises(ValueError, match=rf"{name} must be a dict .*yaml.*got .*{re.escape(str(value))}"):
            SAFE(*by_id, **{name: value})


@pytest.mark.parametrize("kwargs", [{"n_critics": 2.0}, {"n_critics": None}, {"soft_min_alpha": "x"}], ids=str)
def test_a_number_for_the_critics_that_does_not_fit_is_named(kwargs: dict[str, Any]):
    with pytest.raises(ValueError, match=f"{next(iter(kwargs))} must be a"):
        SAFE("MlpPolicy", "CartPole-v1", policy_kwargs=kwargs, **SMALL)


def test_no_clipping_of_the_gradient_is_said_to_be_infinity_and_is():
    with pytest.raises(ValueError, match=r"max_grad_norm must be .*float\('inf'\) for no clipping, got None"):
        SAFE("MlpPolicy", "CartPole-v1", max_grad_norm=None)
    for value in (0, -1, math.nan):
        with pytest.raises(ValueError, match="max_grad_norm"):
            SAFE("MlpPolicy", "CartPole-v1", max_grad_norm=value)
    unclipped, huge = (
        SAFE("MlpPolicy", "CartPole-v1", max_grad_norm=limit, **SMALL).learn(32) for limit in (math.inf, 1e9)
    )
    assert all(map(th.equal, trained_parameters(unclipped.policy), trained_parameters(huge.policy)))


@pytest.mark.parametrize(
    "arguments",
    [
        {"clip_range_vf": None, "huber_delta": None, "max_preview_kl": None, "target_kl": None, "seed": None},
        {"ent_coef": 0, "vf_coef": 0, "gamma": 1, "gae_lambda": 0},
        {"gamma": 0, "gae_lambda": 1, "ent_coef": -0.01, "learning_rate": 0, "normalize_advantage": 0},
        {"learning_rate": lambda progress: 1e-3 * progress, "clip_range": lambda _: 0.1, "clip_range_vf": lambda _: 1},
        {"n_steps": np.int64(32), "batch_size": np.int32(16), "n_epochs": np.int64(1), "seed": np.int64(3)},
        {"n_envs": np.int64(2), "stats_window_size": np.int64(5), "critic_warmup": np.int64(1)},
        {"learning_rate": np.float32(1e-3), "clip_range": np.float32(0.2), "clip_range_vf": np.float32(0.2)},
        {"gamma": np.float32(0.9), "huber_delta": np.float32(1), "max_preview_kl": np.float64(0.1)},
        {"normalize_advantage": np.bool_(True), "target_kl": np.float32(0.1), "max_grad_norm": np.float32(0.5)},
        {"policy_kwargs": {"n_critics": np.int64(3), "soft_min_alpha": np.float32(0.3)}},
        {"policy_kwargs": types.MappingProxyType({"n_critics": 1}), "rollout_buffer_kwargs": None},
        {"policy_kwargs": {"soft_min_alpha": math.inf}, "vf_coef": 1, "critic_tau": 1, "max_grad_norm": 1},
    ],
    ids=str,
)
def test_what_fits_is_taken_in_any_form_of_number(arguments: dict[str, Any], tmp_path: Path):
    model = SAFE(**({"policy": "MlpPolicy", "env": "CartPole-v1"} | SMALL | arguments)).learn(64)
    model.save(tmp_path / "model")
    SAFE.load(tmp_path / "model", env=model.env).learn(64)


def test_numpy_numbers_are_taken_on_loading_too(tmp_path: Path):
    after_two_rollouts()[0].save(tmp_path / "model")
    model = SAFE.load(tmp_path / "model", clip_range=np.float32(0.25), seed=np.int64(1), env=DummyVecEnv([TinyEnv]))
    assert model.clip_range(1.0) == 0.25
    model.learn(32)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("total_timesteps", value) for value in (math.nan, -1, "64", "1e5", [64])),
        *(("log_interval", value) for value in (0, -1, 1.5, "1")),
    ],
)
def test_an_argument_of_learn_that_does_not_fit_is_named_before_a_step(name: str, value: Any):
    model = SAFE("MlpPolicy", "CartPole-v1", **SMALL)
    with pytest.raises(ValueError, match=f"{name} must be .*, got"):
        model.learn(**({"total_timesteps": 64} | {name: value}))
    assert model.num_timesteps == 0 and model._last_obs is None


@pytest.mark.parametrize("arguments", [{"total_timesteps": 0}, {"total_timesteps": 6.4e1}, {"log_interval": None}, {}])
def test_what_ppo_learns_by_is_taken(arguments: dict[str, Any]):
    model = SAFE("MlpPolicy", "CartPole-v1", **SMALL).learn(**({"total_timesteps": np.int64(64)} | arguments))
    assert model.num_timesteps == arguments.get("total_timesteps", 64)


def test_a_misspelt_argument_is_a_type_error_as_everywhere_in_python():
    with pytest.raises(TypeError, match="learning_rat"):
        SAFE("CartPole-v1", learning_rat=1e-3)


def test_an_argument_in_the_wrong_place_is_told_where_it_goes():
    with pytest.raises(TypeError, match=r"SAFE: .* 'reward_model'; .* Arguments of the environment go into env_kwargs"):
        SAFE("TextGenEnv-v0", reward_model=len)
    with pytest.raises(
        TypeError, match=r"SAFE: .* 'policy'; it takes a policy and an environment, or an environment's"
    ):
        SAFE("CartPole-v1", policy="CnnPolicy")


@pytest.mark.parametrize(("name", "meant"), [("CartPole-v2", "CartPole-v1"), ("MlpPolic", "MlpPolicy")])
def test_a_misspelt_id_or_policy_is_told_what_is_like_it(name: str, meant: str):
    with pytest.raises(ValueError, match=f"policy='{name}' is neither .*; did you mean '{meant}'. Policies are MlpPol"):
        SAFE(name)


def test_an_id_alone_that_needs_other_arguments_says_so():
    with pytest.raises(ValueError, match="n_steps"):
        SAFE("CartPole-v1", n_steps=1, n_envs=1)


def test_actions_that_cannot_be_drawn_are_refused():
    class Strange(TinyEnv):
        def __init__(self) -> None:
            super().__init__()
            self.action_space = gym.spaces.Dict({"a": gym.spaces.Discrete(2)})

    with pytest.raises((ValueError, AssertionError), match="action"):
        SAFE("MlpPolicy", Strange(), **SMALL)


@pytest.mark.parametrize("start", [1, -1])
@pytest.mark.parametrize("of_many", [False, True])
@pytest.mark.parametrize("name", ["action_space", "observation_space", "observation_space['sign']"])
def test_a_space_that_does_not_start_at_0_is_named_with_the_wrapper_that_helps(name: str, of_many: bool, start: int):
    space: gym.Space[Any] = gym.spaces.Discrete(3, start=start)
    if of_many:
        space = gym.spaces.MultiDiscrete([3, 3], start=[0, start])
    env = TinyEnv()
    if name == "action_space":
        env.action_space = space
    else:
        env.observation_space = space if name == "observation_space" else gym.spaces.Dict({"sign": space})
    with pytest.raises(ValueError, match=re.escape(f"{name}={space}")) as caught:
        SAFE("auto", env, **SMALL)
    assert ("TransformAction" if name == "action_space" else "TransformObservation") in str(caught.value)


def test_the_wrapper_that_is_named_helps():
    env = TinyEnv()
    env.action_space = gym.spaces.Discrete(3, start=1)
    wrapped: gym.Env[Any, Any] = gym.wrappers.TransformAction(env, lambda action: action + 1, gym.spaces.Discrete(3))
    SAFE("auto", wrapped, **SMALL).learn(32)


# -- values that are not finite, in the middle of training ----------------------------------------------------------


@pytest.fixture(autouse=True)
def _temporary(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(tempfile, "gettempdir", lambda: str(tmp_path))


def poisoned(critic_tau: float = 1.0, **kwargs: Any) -> SAFE:
    """Two environments, of which the second fails at its step 70: step 6 of the third rollout."""
    actions = kwargs.get("actions", "discrete")
    env = DummyVecEnv([lambda: TinyEnv(actions=actions), lambda: PoisonedEnv(after=70, **kwargs)])
    return SAFE("MlpPolicy", env, critic_tau=critic_tau, **SMALL)


def state(model: SAFE) -> dict[str, th.Tensor]:
    return {name: tensor.clone() for name, tensor in model.policy.state_dict().items()}


def after_two_rollouts(**kwargs: Any) -> tuple[SAFE, dict[str, th.Tensor]]:
    model = poisoned(**kwargs).learn(128)
    return model, state(model)


def assert_unchanged_and_rescued(model: SAFE, before: dict[str, th.Tensor], error: Any, folder: Path) -> None:
    for name, tensor in model.policy.state_dict().items():
        assert th.equal(tensor, before[name]), name
    (rescue,) = folder.rglob("*.zip")
    assert any(str(rescue) in note for note in error.__notes__)
    loaded = SAFE.load(rescue)
    for name, tensor in loaded.policy.state_dict().items():
        assert th.equal(tensor, before[name]), name


@pytest.mark.filterwarnings("ignore:invalid value encountered")
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_reward_that_is_not_finite_is_traced_and_leaves_the_last_good_model(tmp_path: Path, value: float):
    model, before = after_two_rollouts(reward=value)
    controller = model.controller.metrics()
    with pytest.raises(NonFiniteError, match=r"reward of environment 1 at step 6 ") as caught:
        model.learn(128, reset_num_timesteps=False)
    assert_unchanged_and_rescued(model, before, caught.value, tmp_path)
    assert model.controller.metrics() == controller


class RawReturn(gym.Wrapper[Any, Any, Any, Any]):
    """Trained on rewards as they should be, while a Monitor has seen what they were before: one is not finite."""

    def __init__(self, env: gym.Env[Any, Any], value: float, episode: int) -> None:
        super().__init__(env)
        self.value, self.episode, self.count = value, episode, 0

    def step(self, action: Any) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        observation, reward, terminated, truncated, info = super().step(action)
        if "episode" in info:
            self.count += 1
            if self.count == self.episode:
                info["episode"] = info["episode"] | {"r": self.value}
        return observation, reward, terminated, truncated, info


@pytest.mark.parametrize("episode", [1, 20])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 1e200])
def test_a_raw_return_that_is_not_finite_does_not_stay_in_the_controller(value: float, episode: int):
    env = make_vec_env(TinyEnv, 2, wrapper_class=RawReturn, wrapper_kwargs={"value": value, "episode": episode})
    model = SAFE("MlpPolicy", env, kl_controller_kwargs={"warmup": 2, "window": 2}, **SMALL).learn(512)
    assert model.controller.n_updates == 8
    assert all(map(math.isfinite, model.controller.metrics().values()))


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("actions", ACTIONS)
def test_an_observation_that_is_not_finite_is_traced_and_leaves_the_last_good_model(
    tmp_path: Path, actions: str, value: float
):
    model, before = after_two_rollouts(observation=value, actions=actions)
    controller = model.controller.metrics()
    with pytest.raises(NonFiniteError, match=r"environment 1 .*observation|observation.*environment 1") as caught:
        model.learn(128, reset_num_timesteps=False)
    assert_unchanged_and_rescued(model, before, caught.value, tmp_path)
    assert model.controller.metrics() == controller


class PoisonedNumbers(TinyEnv):
    def step(self, action: Any) -> Any:
        observation, *rest = super().step(action)
        self.total = getattr(self, "total", 0) + 1
        return observation | {"numbers": np.full(2, math.nan if self.total > 40 else 0.5, np.float32)}, *rest


def test_of_observations_by_key_the_one_that_is_not_finite_is_named_and_leaves_the_last_good_statistics():
    env = VecNormalize(DummyVecEnv([lambda: PoisonedNumbers("dict")]), norm_obs_keys=["numbers"])
    model = SAFE("auto", env, **SMALL)
    with pytest.raises(NonFiniteError, match="observation numbers of environment 0 is nan"):
        model.learn(64)
    assert np.isfinite(env.obs_rms["numbers"].mean).all()


def poison(model: SAFE, which: Callable[[int], bool]) -> None:
    """Make the loss of some minibatches, told by their number, NaN."""
    gradient, calls = model._gradient, itertools.count()

    def poisoned_gradient(pieces: Any) -> Any:
        means = gradient(pieces)
        return means | {"loss": math.nan} if which(next(calls)) else means

    model._gradient = poisoned_gradient  # type: ignore[method-assign]


def poison_gradient(model: SAFE, which: Callable[[int], bool]) -> None:
    """Make the gradient of some minibatches infinite, their loss being finite."""
    gradient, calls = model._gradient, itertools.count()

    def poisoned_gradient(pieces: Any) -> Any:
        means = gradient(pieces)
        if which(next(calls)):
            trained_parameters(model.policy)[0].grad.fill_(math.inf)
        return means

    model._gradient = poisoned_gradient  # type: ignore[method-assign]


@pytest.mark.parametrize("what", [poison, poison_gradient])
def test_single_minibatches_that_are_not_finite_are_skipped_and_counted(what: Any):
    model, _ = after_two_rollouts()
    what(model, lambda number: number == 3)
    model.learn(64, reset_num_timesteps=False)
    assert model.n_skipped_steps == 1
    logged = model.logger.name_to_value
    assert logged["safe/skipped_steps"] == 1
    assert all(np.isfinite(logged[name]) for name in ("train/loss", "train/approx_kl", "train/value_loss"))
    assert all(np.isfinite(parameter.detach().numpy()).all() for parameter in trained_parameters(model.policy))
    assert model.learn(64, reset_num_timesteps=False).n_skipped_steps == 1  # since the beginning


@pytest.mark.parametrize("critic_tau", [1.0, 0.5])
@pytest.mark.parametrize(("what", "named"), [(poison, "the loss"), (poison_gradient, "the gradient")])
def test_an_update_most_of_which_is_not_finite_is_undone(what: Any, named: str, critic_tau: float):
    model, before = after_two_rollouts(critic_tau=critic_tau)
    rewards = list(model.controller.rewards)
    intact = model._gradient
    what(model, lambda number: number >= 3)
    with pytest.raises(
        NonFiniteError, match=rf"minibatches of the update.*first {named} of minibatch 3.*learning_rate"
    ) as caught:
        model.learn(64, reset_num_timesteps=False)
    for name, tensor in model.policy.state_dict().items():
        assert th.equal(tensor, before[name]), name
    assert any("saved to" in note for note in caught.value.__notes__)
    assert list(model.controller.rewards) == rewards
    model._gradient = intact  # type: ignore[method-assign]
    model.learn(64, reset_num_timesteps=False)


def test_a_minibatch_of_one_is_allowed_where_nothing_is_standardised() -> None:
    model = SAFE("MlpPolicy", "CartPole-v1", n_steps=8, batch_size=1, n_epochs=1, normalize_advantage=False, seed=0)
    model.learn(8)
    assert model._n_updates == 1


@pytest.mark.filterwarnings("ignore:invalid value encountered", "ignore:overflow encountered")
@pytest.mark.parametrize(
    ("poison", "normalize"),
    [
        *itertools.product([{"reward": math.nan}, {"reward": math.inf}, {"observation": math.nan}], [False, True]),
        ({"reward": 1e25}, False),  # finite, and its square is not
    ],
    ids=str,
)
def test_training_goes_on_from_the_rescue_file(tmp_path: Path, poison: dict[str, float], normalize: bool):
    """Also with what is not a parameter: statistics, target critics, the controller's averages."""
    env: Any = DummyVecEnv([lambda: TinyEnv(), lambda: PoisonedEnv(after=70, **poison)])
    env = VecNormalize(env, clip_reward=np.inf) if normalize else env
    model = SAFE("MlpPolicy", env, critic_tau=0.1, kl_reference="initial", **SMALL)
    with pytest.raises(NonFiniteError) as caught:
        model.learn(512)
    assert all(th.isfinite(tensor).all() for tensor in model.policy.state_dict().values())
    rescue = caught.value.__notes__[0].split(" saved to ")[1]
    for again in (SAFE.load(rescue, env=make_vec_env("Tiny-vector-discrete-v0", 2)), model):
        if again is model:
            again.set_env(make_vec_env("Tiny-vector-discrete-v0", 2))
        else:
            assert (again.get_vec_normalize_env() is not None) == normalize
        again.learn(128, reset_num_timesteps=False)
        assert all(math.isfinite(value) for value in again.controller.metrics().values())
        assert all(th.isfinite(tensor).all() for tensor in again.policy.state_dict().values())
        assert float(again.policy.return_scale) < 1e3


class Breaking(TinyEnv):
    """Raises an error in its hundredth step, once."""

    def step(self, action: Any) -> Any:
        self.calls = getattr(self, "calls", 0) + 1
        if self.calls == 100:
            raise ConnectionError("the simulator is down")
        return super().step(action)


def test_whatever_an_environment_raises_what_was_learned_is_saved_and_training_can_go_on(tmp_path: Path):
    model = SAFE("MlpPolicy", DummyVecEnv([Breaking]), **SMALL)
    with pytest.raises(ConnectionError, match="simulator") as caught:
        model.learn(512)
    assert SAFE.load(caught.value.__notes__[0].split(" saved to ")[1]).num_timesteps == model.num_timesteps
    model.learn(64, reset_num_timesteps=False)  # from a reset on


def test_a_run_that_is_interrupted_by_hand_leaves_no_file(tmp_path: Path):
    model = SAFE("MlpPolicy", "Tiny-vector-discrete-v0", **SMALL)

    def interrupt(*_: Any) -> None:
        if model.num_timesteps == 100:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt) as caught:
        model.learn(512, callback=interrupt)
    assert model._n_updates > 0
    assert not hasattr(caught.value, "__notes__") and not list(tmp_path.rglob("*.zip"))


def test_a_model_that_cannot_be_saved_does_not_hide_the_error(tmp_path: Path):
    model = SAFE("MlpPolicy", DummyVecEnv([Breaking]), **SMALL)
    model.lock = threading.Lock()  # type: ignore[attr-defined]
    with pytest.raises(ConnectionError, match="simulator") as caught:
        model.learn(512)
    assert "could not be saved" in caught.value.__notes__[0]


def test_what_the_folder_of_the_log_does_not_take_is_saved_in_a_temporary_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    model = SAFE("MlpPolicy", DummyVecEnv([Breaking]), **SMALL)
    model.set_logger(configure(str(tmp_path / "log"), ["csv"]))
    save = SAFE.save

    def full(self: SAFE, path: Path) -> None:
        if path.parent.name == "log":
            raise OSError(errno.ENOSPC, "No space left on device")
        save(self, path)

    monkeypatch.setattr(SAFE, "save", full)
    with pytest.raises(ConnectionError, match="simulator") as caught:
        model.learn(512)
    failure, success = caught.value.__notes__
    assert "could not be saved" in failure and str(tmp_path / "log") in failure
    assert SAFE.load(success.split(" saved to ")[1]).num_timesteps == model.num_timesteps


def test_an_error_before_anything_is_learned_is_left_alone(tmp_path: Path):
    after_two_rollouts()[0].save(tmp_path / "model")
    model = SAFE.load(tmp_path / "model", env=DummyVecEnv([TinyEnv]))
    model.env.reset = lambda: (_ for _ in ()).throw(ConnectionError("the simulator is down"))  # type: ignore
    with pytest.raises(ConnectionError, match="simulator") as caught:
        model.learn(64)
    assert not hasattr(caught.value, "__notes__")


class OwnEvaluation(TwinCriticPolicy):
    def evaluate_actions(self, obs: Any, actions: th.Tensor) -> Any:
        return super().evaluate_actions(obs, actions)


class NoEvaluation(PessimisticCritics, ActorCriticPolicy):
    def freeze_reference(self) -> None: ...

    def make_target_critics(self) -> None: ...


@pytest.mark.parametrize(
    ("policy", "kwargs", "named"),
    [
        ("MlpPolicy", {"rollout_buffer_class": RolloutBuffer}, "rollout_buffer_class=RolloutBuffer"),
        ("MlpPolicy", {"rollout_buffer_class": "x"}, "rollout_buffer_class='x' is not"),
        (OwnEvaluation, {}, "OwnEvaluation overrides evaluate_actions"),
        (NoEvaluation, {}, "policy=NoEvaluation lacks .* override evaluate$"),
        (PessimisticCritics, {}, "policy=PessimisticCritics lacks .* evaluate, freeze_reference"),
        (ActorCriticPolicy, {}, "policy=ActorCriticPolicy has no twin critics"),
        ("LanguagePolicy", {}, "policy='LanguagePolicy' needs observations"),
    ],
    ids=["buffer", "no class", "evaluate_actions", "no evaluate", "nothing", "critics", "language"],
)
def test_a_class_that_does_not_fit_is_refused_at_once(policy: Any, kwargs: dict[str, Any], named: str):
    with pytest.raises(ValueError, match=named):
        SAFE(policy, "CartPole-v1", **kwargs)
