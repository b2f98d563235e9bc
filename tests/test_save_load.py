import io
import math
import warnings
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.save_util import load_from_zip_file
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnv, VecFrameStack, VecNormalize
from textgen_env.gold import gold_reward

from sb3_safe import SAFE, FixedKL, KLController
from sb3_safe.controller import rollout_threshold
from sb3_safe.presets import preset
from sb3_safe.trust_bound import trained_parameters
from tests.textgen_env import checkpoints

SETTINGS: dict[str, Any] = {"n_steps": 32, "batch_size": 16, "n_epochs": 2, "seed": 0}
KINDS = {
    "default": {},
    "initial": {"kl_reference": "initial"},
    "initial_exact": {"kl_reference": "initial", "kl_estimator": "exact", "kl_controller": "fixed"},
    "initial_k1": {"kl_reference": "initial", "kl_estimator": "k1", "kl_controller": "adaptive"},
    "targets": {"critic_tau": 0.1, "policy_kwargs": {"n_critics": 3}},
    "everything": {"critic_tau": 0.1, "kl_reference": "initial", "clip_range_vf": 0.2},
    "ppo": {"policy_kwargs": {"n_critics": 1}, "huber_delta": None, "kl_controller": "none", "max_preview_kl": None},
}


def trained(env_id: str = "CartPole-v1", policy: str = "MlpPolicy", n_envs: int = 1, **kwargs: Any) -> SAFE:
    model = SAFE(policy, make_vec_env(env_id, n_envs, seed=0), **(SETTINGS | kwargs))
    return model.learn(3 * 32 * n_envs)


def assert_same_state(a: dict[str, Any], b: dict[str, Any]) -> None:
    assert a.keys() == b.keys()
    for name, value in a.items():
        if isinstance(value, dict):
            assert_same_state(value, b[name])
        elif isinstance(value, th.Tensor):
            assert th.equal(value, b[name]), name
        else:
            assert value == b[name], name


def assert_same_metrics(a: KLController, b: KLController) -> None:
    assert a.metrics().keys() == b.metrics().keys()
    np.testing.assert_array_equal(list(a.metrics().values()), list(b.metrics().values()))


def observations(model: SAFE) -> Any:
    return model.rollout_buffer.observations[:, 0]


def test_a_run_that_is_resumed_again_and_again_never_sees_the_same_random_numbers_twice(tmp_path: Path):
    """Whoever resumes it from the same file sees the same ones."""

    def drawn() -> tuple[float, ...]:
        return (*model.get_env().reset().ravel().tolist(), float(th.rand(())), float(np.random.rand()))

    model = SAFE("MlpPolicy", make_vec_env("CartPole-v1", 2), **SETTINGS)
    seen = [drawn()]
    for _ in range(3):
        model.learn(64, reset_num_timesteps=False).save(tmp_path / "model")
        twice = []
        for _ in range(2):
            model = SAFE.load(tmp_path / "model", env=make_vec_env("CartPole-v1", 2))
            twice.append(drawn())
        assert twice[0] == twice[1]
        seen.append(twice[0])
    assert len({value for values in seen for value in values}) == sum(map(len, seen))


@pytest.mark.parametrize("seed", [2**32 - 1, None])
def test_any_seed_can_be_resumed(tmp_path: Path, seed: int | None):
    trained(seed=seed).save(tmp_path / "model")
    SAFE.load(tmp_path / "model", env=make_vec_env("CartPole-v1", 1)).learn(32, reset_num_timesteps=False)


@pytest.mark.parametrize("kind", KINDS)
def test_everything_that_was_learned_survives(tmp_path: Path, kind: str):
    model = trained(**KINDS[kind])
    model.save(tmp_path / "model")
    loaded = SAFE.load(tmp_path / "model")
    assert_same_state(model.policy.state_dict(), loaded.policy.state_dict())
    assert_same_state(model.policy.optimizer.state_dict(), loaded.policy.optimizer.state_dict())
    assert type(loaded.controller) is type(model.controller)
    assert_same_metrics(model.controller, loaded.controller)
    assert vars(model.controller).keys() == vars(loaded.controller).keys()
    for name in (
        "num_timesteps",
        "_n_updates",
        "measured_kl",
        "n_skipped_steps",
        "kl_reference",
        "kl_estimator",
        "critic_tau",
    ):
        assert getattr(loaded, name) == getattr(model, name)
    assert float(loaded.policy.return_scale) == float(model.policy.return_scale) != 1.0
    for deterministic in (True, False):
        th.manual_seed(0)
        expected = model.predict(observations(model), deterministic=deterministic)[0]
        th.manual_seed(0)
        np.testing.assert_array_equal(loaded.predict(observations(model), deterministic=deterministic)[0], expected)


@pytest.mark.parametrize(
    ("env_id", "policy", "kwargs"),
    [
        ("Pendulum-v1", "MlpPolicy", {"use_sde": True, "kl_reference": "initial"}),
        ("Tiny-dict-multi_discrete-v0", "MultiInputPolicy", {"kl_reference": "initial"}),
        ("Tiny-image-multi_binary-v0", "CnnPolicy", {"kl_reference": "initial", "critic_tau": 0.5}),
    ],
)
def test_every_kind_of_policy_survives(tmp_path: Path, env_id: str, policy: str, kwargs: dict[str, Any]):
    model = trained(env_id, policy, **kwargs)
    model.save(tmp_path / "model")
    loaded = SAFE.load(tmp_path / "model", env=make_vec_env(env_id, 1))
    assert_same_state(model.policy.state_dict(), loaded.policy.state_dict())
    loaded.learn(32, reset_num_timesteps=False)


@pytest.mark.parametrize("kind", KINDS)
def test_training_goes_on_after_loading_with_other_environments(tmp_path: Path, kind: str):
    model = trained(**KINDS[kind])
    model.save(tmp_path / "model")
    loaded = SAFE.load(tmp_path / "model", env=make_vec_env("CartPole-v1", 3))
    assert loaded.n_envs == 3
    before = [parameter.clone() for parameter in trained_parameters(loaded.policy)]
    reached = loaded.num_timesteps
    loaded.learn(96, reset_num_timesteps=False)
    assert loaded.num_timesteps == reached + 96
    assert loaded.rollout_buffer.rewards.shape == (32, 3)
    assert any(not th.equal(old, new) for old, new in zip(before, trained_parameters(loaded.policy), strict=True))


def test_a_threshold_that_follows_the_size_of_rollouts_follows_to_another_one_on_loading(tmp_path: Path):
    model = trained()
    model.controller.threshold *= 1.25
    model.save(tmp_path / "model")
    for kwargs, n_actions in (({}, 3 * 32), ({"n_steps": 48}, 3 * 48)):
        loaded = SAFE.load(tmp_path / "model", env=make_vec_env("CartPole-v1", 3), **kwargs)
        assert loaded.controller.tau_base == rollout_threshold(n_actions)
        assert loaded.controller.threshold == pytest.approx(1.25 * rollout_threshold(n_actions))
        before, after = vars(model.controller), vars(loaded.controller)
        assert {name for name in before if before[name] != after[name]} == {"tau_base", "threshold"}
        loaded.save(tmp_path / "again")
        assert_same_metrics(SAFE.load(tmp_path / "again").controller, loaded.controller)


@pytest.mark.parametrize("kwargs", [{"kl_controller_kwargs": {"tau_base": 0.5}}, {"kl_reference": "initial"}])
def test_a_threshold_of_its_own_stays_whatever_size_a_model_is_loaded_for(tmp_path: Path, kwargs: dict[str, Any]):
    model = trained(**kwargs)
    model.save(tmp_path / "model")
    loaded = SAFE.load(tmp_path / "model", env=make_vec_env("CartPole-v1", 3))
    assert_same_metrics(loaded.controller, model.controller)
    assert loaded.controller.tau_base == model.controller.tau_base


def test_a_threshold_that_was_changed_in_between_survives_where_the_size_is_the_same(tmp_path: Path):
    model = trained()
    model.controller.tau_base = 0.7
    model.save(tmp_path / "model")
    assert SAFE.load(tmp_path / "model", env=model.env).controller.tau_base == 0.7


def test_training_after_loading_is_training_without_the_detour(tmp_path: Path):
    model = trained(critic_tau=0.5, kl_reference="initial", kl_controller_kwargs={"tau_base": 1e-4})
    model.save(tmp_path / "model")
    results = []
    for one in (model, SAFE.load(tmp_path / "model", env=model.env)):
        one.set_random_seed(5)
        one.env.seed(5)
        one._last_obs = None
        one.learn(64, reset_num_timesteps=False)
        results.append(one)
    assert_same_state(results[0].policy.state_dict(), results[1].policy.state_dict())
    assert_same_metrics(results[0].controller, results[1].controller)


def moves_the_policy(model: SAFE) -> bool:
    """Whether one more update does."""
    before = model.policy.action_net.weight.detach().clone()
    model.learn(32, reset_num_timesteps=False)
    return not th.equal(model.policy.action_net.weight, before)


def test_critics_that_have_warmed_up_do_not_again_whatever_the_number_of_epochs(tmp_path: Path):
    trained(critic_warmup=2).save(tmp_path / "model")
    trained(critic_warmup=2).save(tmp_path / "uncounted", exclude=["n_trained_rollouts"])  # as files were before
    for name in ("model", "uncounted"):
        assert moves_the_policy(SAFE.load(tmp_path / name, env=make_vec_env("CartPole-v1"), n_epochs=10))


def test_the_warm_up_of_critics_goes_on_after_loading(tmp_path: Path):
    trained(critic_warmup=4).save(tmp_path / "model")
    loaded = SAFE.load(tmp_path / "model", env=make_vec_env("CartPole-v1"), n_epochs=1)
    assert [moves_the_policy(loaded) for _ in range(2)] == [False, True]


def test_an_update_that_ends_early_warms_critics_up_as_a_whole_one_does():
    model = SAFE("MlpPolicy", "CartPole-v1", critic_warmup=1, target_kl=0.1, **SETTINGS | {"n_epochs": 4})
    model._gradient = lambda pieces, whole=model._gradient: whole(pieces) | {"approx_kl": 1.0}  # type: ignore
    assert not moves_the_policy(model)
    assert model._n_updates == 1
    assert model._make_objective().trains_policy


def test_the_initial_reference_survives_and_is_not_the_loaded_policy(tmp_path: Path):
    model = SAFE("MlpPolicy", "CartPole-v1", kl_reference="initial", learning_rate=1e-2, **SETTINGS)
    obs = th.randn(6, 4)
    actions = th.zeros(6)
    start = model.policy.evaluate(obs, actions).log_prob.detach()
    model.learn(128)
    model.save(tmp_path / "model")
    loaded = SAFE.load(tmp_path / "model", env=model.env)
    np.testing.assert_allclose(loaded.policy.reference_log_prob(obs, actions), start, atol=1e-6)
    np.testing.assert_allclose(loaded.policy.exact_kl(obs).detach(), model.policy.exact_kl(obs).detach(), atol=1e-6)
    assert loaded.policy.exact_kl(obs).max() > 1e-4
    loaded.learn(64)
    np.testing.assert_allclose(loaded.policy.reference_log_prob(obs, actions), start, atol=1e-6)


def test_arguments_can_be_replaced_on_loading(tmp_path: Path):
    model = trained()
    model.save(tmp_path / "model")
    loaded = SAFE.load(
        tmp_path / "model", env=model.env, learning_rate=1e-9, n_steps=48, clip_range=0.05, max_preview_kl=0.3
    )
    assert (loaded.n_steps, loaded.clip_range(1.0), loaded.max_preview_kl) == (48, 0.05, 0.3)
    before = [parameter.clone() for parameter in trained_parameters(loaded.policy)]
    loaded.learn(48)
    assert loaded.rollout_buffer.buffer_size == 48
    for old, new in zip(before, trained_parameters(loaded.policy), strict=True):
        np.testing.assert_allclose(old.detach(), new.detach(), atol=1e-6)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("n_epochs", 0),
        ("huber_delta", -1.0),
        ("critic_tau", 0.0),
        ("max_preview_kl", 0.0),
        ("kl_estimator", "k1"),
        ("target_kl", -1.0),
        ("max_grad_norm", None),
        ("gamma", 1.5),
        ("ent_coef", math.nan),
        ("learning_rate", "3e-4"),
        ("n_steps", 16.0),
        ("rollout_buffer_class", "x"),
        ("rollout_buffer_kwargs", 3),
        ("kl_controller_kwargs", "dict(coef=1)"),
    ],
)
def test_a_wrong_argument_on_loading_is_refused(tmp_path: Path, name: str, value: Any):
    trained().save(tmp_path / "model")
    with pytest.raises(ValueError, match=name):
        SAFE.load(tmp_path / "model", **{name: value})


def test_another_controller_on_loading_is_used_or_refused(tmp_path: Path):
    """It must not be accepted and then ignored."""
    trained().save(tmp_path / "model")
    try:
        loaded = SAFE.load(tmp_path / "model", kl_controller="fixed", kl_controller_kwargs={"coef": 0.7})
    except ValueError as error:
        assert "kl_controller" in str(error)
    else:
        assert isinstance(loaded.controller, FixedKL)
        assert loaded.controller.coef == 0.7


def test_a_loaded_controller_has_the_threshold_of_the_rollouts_it_was_made_for(tmp_path: Path):
    trained(n_envs=2).save(tmp_path / "model")
    for changed in ({}, {"kl_controller_kwargs": {"coef": 0.7}}):  # kept, and made anew
        loaded = SAFE.load(tmp_path / "model", **changed)
        assert loaded.controller.tau_base == rollout_threshold(2 * SETTINGS["n_steps"])


def test_a_schedule_survives(tmp_path: Path):
    model = trained(learning_rate=lambda progress: 1e-3 * progress, clip_range=lambda progress: 0.1 + 0.1 * progress)
    model.save(tmp_path / "model")
    loaded = SAFE.load(tmp_path / "model")
    assert loaded.lr_schedule(0.5) == pytest.approx(5e-4)
    assert loaded.clip_range(0.5) == pytest.approx(0.15)


def test_a_model_made_from_an_id_alone_survives(tmp_path: Path):
    model = SAFE("CartPole-v1", n_envs=2, seed=0).learn(64)
    model.save(tmp_path / "model")
    loaded = SAFE.load(tmp_path / "model", env=make_vec_env("CartPole-v1", 2))
    assert (loaded.n_steps, loaded.batch_size) == (model.n_steps, model.batch_size)
    assert loaded.learn(64, reset_num_timesteps=False).num_timesteps == 128


@pytest.mark.parametrize("n_envs", [1, 3])
def test_statistics_of_normalisation_survive_with_the_model(tmp_path: Path, n_envs: int):
    env = VecNormalize(make_vec_env("Pendulum-v1", 2, seed=0), gamma=0.9)
    model = SAFE("MlpPolicy", env, **SETTINGS).learn(128)
    model.save(tmp_path / "model")
    loaded = SAFE.load(tmp_path / "model", env=make_vec_env("Pendulum-v1", n_envs))
    restored = loaded.get_vec_normalize_env()
    assert restored is not None
    raw = np.array([[0.5, -0.5, 3.0]], np.float32)
    np.testing.assert_allclose(restored.normalize_obs(raw), env.normalize_obs(raw))
    assert np.abs(restored.normalize_obs(raw) - raw).max() > 0.1
    loaded.learn(32 * n_envs, reset_num_timesteps=False)
    assert restored.obs_rms.count > env.obs_rms.count


def test_raw_observations_that_a_loaded_model_cannot_know_how_to_take_are_warned_of(tmp_path: Path):
    trained = SAFE("MlpPolicy", VecNormalize(make_vec_env("Pendulum-v1", 1)), **SETTINGS)
    trained.save(tmp_path / "model")
    raw = np.zeros((1, 3), np.float32)
    with pytest.warns(UserWarning, match=r"VecNormalize.*give load\(\) an env"):
        SAFE.load(tmp_path / "model").predict(raw)
    plain = SAFE("MlpPolicy", VecNormalize(make_vec_env("Pendulum-v1", 1), norm_obs=False), **SETTINGS)
    plain.save(tmp_path / "plain")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        SAFE.load(tmp_path / "model", env=make_vec_env("Pendulum-v1", 1)).predict(raw)
        SAFE.load(tmp_path / "plain").predict(raw)
        trained.predict(raw)


def test_statistics_that_are_given_win_over_those_that_were_saved(tmp_path: Path):
    SAFE("MlpPolicy", VecNormalize(make_vec_env("Pendulum-v1", 1)), **SETTINGS).learn(64).save(tmp_path / "model")
    mine = VecNormalize(make_vec_env("Pendulum-v1", 1))
    assert SAFE.load(tmp_path / "model", env=mine).get_vec_normalize_env() is mine


def test_a_controller_of_ones_own_survives(tmp_path: Path):
    model = trained(kl_controller=Counting)
    model.save(tmp_path / "model")
    loaded = SAFE.load(tmp_path / "model", env=model.env)
    assert loaded.controller.rollouts == 3
    loaded.learn(32)
    assert loaded.controller.rollouts == 4


class Counting(KLController):
    def __init__(self) -> None:
        self.rollouts = 0

    def update(self, returns: Any, kl: float, entropy: float) -> None:
        self.rollouts += 1
        assert math.isfinite(kl)


@pytest.mark.parametrize("steps", [64, None])
def test_a_model_without_environment_says_how_to_give_it_one(tmp_path: Path, steps: int | None):
    trained().save(tmp_path / "model")
    model = SAFE.load(tmp_path / "model")
    with pytest.raises(ValueError, match=r"no environment.*load\(path, env=\.\.\.\).*set_env"):
        model.learn(steps)
    model.set_env(make_vec_env("CartPole-v1"))
    model.learn(32)


@pytest.mark.parametrize("kind", [str, Path])
def test_a_file_is_loaded_beside_a_folder_of_its_name(tmp_path: Path, kind: Any):
    """Such as an exported model's."""
    path = kind(tmp_path / "tuned")
    model = trained()
    model.save(path)
    Path(path).mkdir()
    assert_same_state(model.policy.state_dict(), SAFE.load(path).policy.state_dict())


def test_a_stream_will_do_for_a_file():
    model, stream = trained(), io.BytesIO()
    model.save(stream)
    stream.seek(0)
    assert_same_state(model.policy.state_dict(), SAFE.load(stream).policy.state_dict())


def test_a_file_has_what_is_asked_for_and_nothing_of_the_rollout(tmp_path: Path):
    model = trained()
    model.save(tmp_path / "usual")
    model.save(tmp_path / "asked", exclude=["ep_info_buffer"], include=["_finished_returns"])
    usual, asked = (set(load_from_zip_file(tmp_path / name)[0]) for name in ("usual", "asked"))
    assert asked ^ usual == {"ep_info_buffer", "_finished_returns"}
    assert usual.isdisjoint({"_finished_returns", "_last_good", "rollout_buffer"})


@pytest.mark.parametrize("kind", ["default", "everything"])
def test_parameters_can_be_set_in_place(kind: str):
    source, target = trained(**KINDS[kind]), trained(**(KINDS[kind] | {"seed": 9}))
    target.set_parameters(source.get_parameters())
    assert_same_state(source.policy.state_dict(), target.policy.state_dict())


def test_parameters_that_are_left_out_stay_as_they_are():
    model = trained(**KINDS["everything"])
    before = {name: tensor.clone() for name, tensor in model.policy.state_dict().items()}
    part = {name: before[name] + 1.0 for name in ("action_net.weight", "value_weight")}
    model.set_parameters({"policy": part}, exact_match=False)
    assert_same_state(model.policy.state_dict(), before | part)


def test_without_critic_tau_target_critics_of_a_file_are_not_used(tmp_path: Path):
    """They would never move again, and supply all values."""
    model = trained(critic_tau=0.05)
    model.save(tmp_path / "model")
    for loaded in (SAFE.load(tmp_path / "model", env=model.env, critic_tau=1.0), trained()):
        loaded.set_parameters(tmp_path / "model")
        assert not any(name.startswith("target_") for name in loaded.policy.state_dict())
        obs = th.zeros(1, 4)
        value = loaded.policy.predict_values(obs)
        loaded.learning_rate = 1e-2
        loaded._setup_lr_schedule()
        loaded.learn(64)
        assert loaded.policy.predict_values(obs) != value


@pytest.mark.parametrize(
    "changes",
    [
        {"critic_tau": 0.05},
        {"kl_reference": "initial", "kl_estimator": "auto", "max_preview_kl": "auto"},
        {"kl_reference": "auto", "kl_controller_kwargs": None},
        {"kl_controller": "none"},
    ],
    ids=str,
)
@pytest.mark.parametrize("saved", ["default", "everything", "ppo"])
def test_what_the_constructor_takes_can_be_replaced_on_loading(tmp_path: Path, saved: str, changes: dict[str, Any]):
    """A reference or target critics that the file does not have are those of the policy as it was loaded."""
    model = trained(**KINDS[saved])
    model.save(tmp_path / "model")
    if changes.get("kl_reference") == "auto" and saved == "everything":
        changes = changes | {"kl_estimator": "auto"}
    loaded = SAFE.load(tmp_path / "model", env=model.env, **changes)
    obs, actions = th.randn(6, 4), th.zeros(6)
    if changes.get("kl_reference") == "initial" and saved == "default":
        expected = model.policy.evaluate(obs, actions).log_prob.detach()
        np.testing.assert_allclose(loaded.policy.reference_log_prob(obs, actions), expected, atol=1e-6)
        assert (loaded.kl_estimator, loaded.max_preview_kl) == ("k1", 0.02)
    if "critic_tau" in changes and saved == "default":
        with th.no_grad():
            np.testing.assert_array_equal(loaded.policy.predict_values(obs), model.policy.predict_values(obs))
    loaded.learn(32)


def test_a_controller_keeps_its_state_whatever_a_file_makes_of_its_arguments(tmp_path: Path):
    model = trained(kl_controller=Limited, kl_controller_kwargs={"limits": (0.1, 0.2)})
    model.save(tmp_path / "model")
    assert SAFE.load(tmp_path / "model").controller.rollouts == 3


class Limited(Counting):
    def __init__(self, limits: tuple[float, float]) -> None:
        super().__init__()
        self.limits = limits


def images() -> VecEnv:
    return make_vec_env("Tiny-image-discrete-v0", 2)


@pytest.mark.parametrize(
    ("wrapped", "plain"),
    [
        (lambda: VecNormalize(images(), norm_obs=False), images),
        (lambda: VecFrameStack(VecNormalize(make_vec_env("Pendulum-v1", 2)), 2), lambda: VecFrameStack(pendulum(), 2)),
    ],
    ids=["transposed", "stacked"],
)
def test_statistics_find_their_place_below_other_wrappers(tmp_path: Path, wrapped: Any, plain: Any):
    policy = "CnnPolicy" if plain is images else "MlpPolicy"
    model = SAFE(policy, wrapped(), **SETTINGS).learn(64)
    model.save(tmp_path / "model")
    loaded = SAFE.load(tmp_path / "model", env=plain())
    restored, original = loaded.get_vec_normalize_env(), model.get_vec_normalize_env()
    assert restored is not None and original is not None
    assert restored.observation_space.shape == original.observation_space.shape
    assert restored.ret_rms.var == original.ret_rms.var
    assert loaded.env.observation_space == model.env.observation_space
    loaded.learn(64)


def pendulum() -> VecEnv:
    return make_vec_env("Pendulum-v1", 2)


def test_statistics_that_fit_nowhere_are_left_out_with_a_warning(tmp_path: Path):
    model = SAFE("MlpPolicy", VecFrameStack(VecNormalize(pendulum()), 2), **SETTINGS)
    model.save(tmp_path / "model")

    class Six(gym.Env[Any, Any]):  # what two frames look like, without the wrapper that puts them together
        observation_space, action_space = model.observation_space, model.action_space

    with pytest.warns(UserWarning, match="VecNormalize"):
        loaded = SAFE.load(tmp_path / "model", env=DummyVecEnv([Six]))
    assert loaded.get_vec_normalize_env() is None


def test_statistics_survive_a_model_without_environment_and_come_with_the_next(tmp_path: Path):
    model = SAFE("MlpPolicy", VecNormalize(pendulum()), **SETTINGS).learn(64)
    model.save(tmp_path / "model")
    SAFE.load(tmp_path / "model").save(tmp_path / "again")
    late = SAFE.load(tmp_path / "again")
    late.n_envs = 2
    late.set_env(pendulum())
    for loaded in (SAFE.load(tmp_path / "again", env=pendulum()), late):
        restored = loaded.get_vec_normalize_env()
        np.testing.assert_array_equal(restored.obs_rms.mean, model.get_vec_normalize_env().obs_rms.mean)
        assert loaded.env is restored
    assert model._normalizer is None


def test_episodes_go_on_after_set_env_where_they_are_not_to_be_reset():
    model = trained()
    model.set_env(model.env, force_reset=False)
    assert model._last_obs is not None
    model.set_env(model.env)
    assert model._last_obs is None


def test_statistics_go_along_to_the_next_environment():
    first = VecNormalize(pendulum())
    model = SAFE("MlpPolicy", first, **SETTINGS).learn(64)
    model.set_env(pendulum())
    second = model.get_vec_normalize_env()
    assert second is not None
    assert second is not first
    np.testing.assert_array_equal(second.obs_rms.mean, first.obs_rms.mean)
    mean = first.obs_rms.mean.copy()
    model.learn(64, reset_num_timesteps=False)
    assert not np.array_equal(second.obs_rms.mean, mean)
    np.testing.assert_array_equal(first.obs_rms.mean, mean)
    mine = VecNormalize(pendulum())
    model.set_env(mine)
    assert model.env is mine


def test_an_id_will_do_for_an_environment(tmp_path: Path):
    SAFE("MlpPolicy", "CartPole-v1", n_envs=3, **SETTINGS).save(tmp_path / "model")
    model = SAFE.load(tmp_path / "model", env="CartPole-v1", env_kwargs={"max_episode_steps": 7})
    assert model.n_envs == 3
    assert model.learn(3 * 32).ep_info_buffer[0]["l"] <= 7
    stream = io.BytesIO()
    model.save(stream)
    assert SAFE.load(stream, env="CartPole-v1", n_envs=2).n_envs == 2


def test_an_id_with_a_preset_brings_the_normaliser_of_the_file(tmp_path: Path):
    model = SAFE("MountainCar-v0", seed=0).learn(256)
    model.save(tmp_path / "model")
    loaded = SAFE.load(tmp_path / "model.zip", env="MountainCar-v0")
    assert loaded.n_envs == model.n_envs
    np.testing.assert_array_equal(
        loaded.get_vec_normalize_env().obs_rms.mean, model.get_vec_normalize_env().obs_rms.mean
    )


def test_an_id_of_text_brings_its_preset_of_the_environment(tmp_path: Path):
    folder = checkpoints.language_model(tmp_path / "lm")
    env_kwargs = {"model": folder, "max_prompt_tokens": 16, "reward_model": gold_reward}
    model = SAFE("TextGenEnv-v0", env_kwargs=env_kwargs, n_envs=2)
    model.save(tmp_path / "model")
    loaded = SAFE.load(tmp_path / "model", env="TextGenEnv-v0", env_kwargs=env_kwargs)
    assert (loaded.n_envs, loaded.observation_space) == (2, model.observation_space)
    assert loaded.observation_space["input_ids"].shape == (
        16 + preset("TextGenEnv-v0", env_kwargs)["env_kwargs"]["max_new_tokens"],
    )


def test_arguments_of_an_environment_without_an_id_are_refused_on_loading(tmp_path: Path):
    model = trained()
    model.save(tmp_path / "model")
    for env, arguments in [(None, {"n_envs": 2}), (model.get_env(), {"env_kwargs": {}})]:
        with pytest.raises(ValueError, match="n_envs and env_kwargs only apply when env is an id"):
            SAFE.load(tmp_path / "model", env=env, **arguments)
    with pytest.raises(ValueError, match="env='CartPole-v7' is not a registered environment"):
        SAFE.load(tmp_path / "model", env="CartPole-v7")


@pytest.mark.parametrize("given_by", ["load", "set_env"])
def test_a_normaliser_that_has_seen_nothing_takes_the_statistics_of_the_file(tmp_path: Path, given_by: str):
    """As the RL Zoo's does, where a run was stopped before it wrote them."""
    model = SAFE("MlpPolicy", VecNormalize(make_vec_env("CartPole-v1", 2, seed=0)), **SETTINGS).learn(64)
    model.save(tmp_path / "model")
    envs = VecNormalize(make_vec_env("CartPole-v1", 2), clip_obs=5.0)
    loaded = SAFE.load(tmp_path / "model", env=envs if given_by == "load" else None)
    if given_by == "set_env":
        loaded.set_env(envs)
    trained_in = model.get_vec_normalize_env()
    assert loaded.get_vec_normalize_env() is envs
    assert (envs.clip_obs, envs.obs_rms.count) == (5.0, trained_in.obs_rms.count)
    np.testing.assert_array_equal(envs.obs_rms.var, trained_in.obs_rms.var)
    assert envs.ret_rms.var == trained_in.ret_rms.var


class TwoKeys(gym.ObservationWrapper[Any, Any, Any]):
    def __init__(self) -> None:
        super().__init__(gym.make("CartPole-v1"))
        box = self.env.observation_space
        self.observation_space = gym.spaces.Dict({"here": box, "doubled": box})

    def observation(self, observation: Any) -> dict[str, Any]:
        return {"here": observation, "doubled": 2 * observation}


def test_a_normaliser_that_has_seen_nothing_takes_the_keys_that_were_normalised(tmp_path: Path):
    """Otherwise it would look for statistics that nobody took, or leave raw what the policy knows normalised."""
    first = VecNormalize(DummyVecEnv([TwoKeys]), norm_obs_keys=["here"])
    SAFE("MultiInputPolicy", first, **SETTINGS).learn(64).save(tmp_path / "model")
    envs = VecNormalize(DummyVecEnv([TwoKeys]), norm_obs_keys=["doubled"])
    SAFE.load(tmp_path / "model", env=envs).learn(32, reset_num_timesteps=False)
    assert envs.norm_obs_keys == ["here"]
    assert envs.obs_rms["here"].count > first.obs_rms["here"].count


def test_a_normaliser_with_statistics_of_its_own_keeps_them(tmp_path: Path):
    SAFE("MlpPolicy", VecNormalize(make_vec_env("CartPole-v1", seed=0)), **SETTINGS).learn(64).save(tmp_path / "model")
    envs = VecNormalize(make_vec_env("CartPole-v1", seed=1))
    envs.reset()
    for _ in range(8):
        envs.step(np.zeros(1, dtype=np.int64))
    before = envs.obs_rms.mean.copy()
    SAFE.load(tmp_path / "model", env=envs)
    np.testing.assert_array_equal(envs.obs_rms.mean, before)
