"""SAFE as a user of Stable-Baselines3 meets it."""

import csv
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from stable_baselines3.common.callbacks import CheckpointCallback, EvalCallback, StopTrainingOnMaxEpisodes
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.logger import configure
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import SubprocVecEnv, VecFrameStack, VecNormalize

from sb3_safe import SAFE, TwinCriticPolicy
from sb3_safe.buffers import SafeRolloutBuffer
from sb3_safe.controller import rollout_threshold
from sb3_safe.trust_bound import trained_parameters
from tests.tiny_envs import ACTIONS, TinyEnv

SETTINGS: dict[str, Any] = {"n_steps": 32, "batch_size": 16, "n_epochs": 2, "seed": 0}
SMALL: dict[str, Any] = SETTINGS | {"policy_kwargs": {"net_arch": [8]}}


def parameters(model: SAFE) -> np.ndarray:
    return th.cat([parameter.detach().flatten() for parameter in trained_parameters(model.policy)]).numpy()


def learn(policy: Any = "MlpPolicy", env: Any = "CartPole-v1", steps: int = 96, **kwargs: Any) -> SAFE:
    """Train a little, and make sure that it did something finite."""
    model = SAFE(policy, env, **(SMALL | kwargs))
    before = parameters(model)
    model.learn(steps)
    after = parameters(model)
    assert model.num_timesteps >= steps
    assert np.isfinite(after).all()
    assert np.abs(after - before).max() > 0
    return model


# -- environments and policies -------------------------------------------------------------------------------------


@pytest.mark.parametrize("actions", ACTIONS)
@pytest.mark.parametrize(("observations", "policy"), [("vector", "MlpPolicy"), ("dict", "MultiInputPolicy")])
def test_every_kind_of_action_and_observation_trains(observations: str, policy: str, actions: str):
    model = learn(policy, f"Tiny-{observations}-{actions}-v0", n_envs=2, ent_coef=0.01)
    action, _ = model.predict(model.observation_space.sample())
    assert model.action_space.contains(action)


def test_images_train():
    model = learn("CnnPolicy", "Tiny-image-discrete-v0", steps=32, n_epochs=1)
    assert model.policy.features_extractor.cnn[0].in_channels == 1


def test_stacked_images_train():
    env = VecFrameStack(make_vec_env("Tiny-image-discrete-v0", 2), 3)
    assert learn("CnnPolicy", env, steps=64, n_epochs=1).policy.features_extractor.cnn[0].in_channels == 3


@pytest.mark.parametrize(
    "kwargs", [{}, {"sde_sample_freq": 4}, {"policy_kwargs": {"net_arch": [8], "squash_output": True}}]
)
def test_state_dependent_exploration_trains(kwargs: dict[str, Any]):
    learn(env="Pendulum-v1", use_sde=True, **kwargs)


@pytest.mark.parametrize("policy", ["auto", TwinCriticPolicy])
def test_the_policy_can_be_a_class_or_be_chosen(policy: Any):
    assert isinstance(learn(policy).policy, TwinCriticPolicy)


def test_environments_in_other_processes_train():
    env = make_vec_env("CartPole-v1", 2, vec_env_cls=SubprocVecEnv, seed=0)
    try:
        model = learn(env=env, steps=64)
        assert len(model.ep_info_buffer) > 0
    finally:
        env.close()


def test_a_plain_environment_object_is_monitored():
    assert len(learn(env=TinyEnv()).ep_info_buffer) > 0


def test_arguments_reach_the_environment_made_from_its_id():
    model = SAFE("MlpPolicy", "Tiny-vector-discrete-v0", n_envs=3, env_kwargs={"length": 4}, **SMALL)
    assert model.n_envs == 3
    assert [env.unwrapped.length for env in model.env.envs] == [4, 4, 4]


def test_normalised_environments_train_and_keep_their_statistics():
    env = VecNormalize(make_vec_env("Pendulum-v1", 2), gamma=0.9)
    model = learn(env=env)
    assert model.get_vec_normalize_env() is env
    assert env.obs_rms.count > 90


# -- settings ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3", "exact"])
@pytest.mark.parametrize("env_id", ["CartPole-v1", "Pendulum-v1", "Tiny-vector-multi_discrete-v0"])
def test_every_estimator_trains_against_the_initial_policy(env_id: str, estimator: Any):
    model = learn(
        env=env_id,
        kl_reference="initial",
        kl_estimator=estimator,
        kl_controller_kwargs={"tau_base": 1e-4},
        learning_rate=3e-3,
    )
    assert model.controller.kl_short != 0


@pytest.mark.parametrize("controller", ["safe", "fixed", "adaptive", "none"])
@pytest.mark.parametrize("reference", ["initial", "rollout"])
def test_every_controller_trains_against_every_reference(controller: str, reference: Any):
    model = learn(kl_controller=controller, kl_reference=reference)
    assert (model.policy.reference is not None) == (reference == "initial" and controller != "none")


def test_the_threshold_follows_the_reference_unless_given():
    made = [SAFE("MlpPolicy", "CartPole-v1", kl_reference=reference, **SMALL) for reference in ("initial", "rollout")]
    assert [model.controller.tau_base for model in made] == [0.3, rollout_threshold(SMALL["n_steps"])]
    two = SAFE("MlpPolicy", "CartPole-v1", n_envs=2, **SMALL)
    assert two.controller.tau_base == rollout_threshold(2 * SMALL["n_steps"])
    mine = SAFE("MlpPolicy", "CartPole-v1", kl_controller_kwargs={"tau_base": 0.7, "threshold": "paper"}, **SMALL)
    assert mine.controller.tau_base == 0.7
    assert mine.controller.threshold_rule == "paper"


@pytest.mark.parametrize(
    "kwargs",
    [
        {"clip_range_vf": 0.2},
        {"clip_range_vf": lambda progress: 0.2 * progress + 0.01},
        {"critic_tau": 0.05},
        {"huber_delta": None},
        {"target_kl": 0.001},
        {"normalize_advantage": False},
        {"policy_kwargs": {"n_critics": 3, "soft_min_alpha": 0.0}},
        {"policy_kwargs": {"share_features_extractor": False, "net_arch": {"pi": [4], "vf": [8, 8]}}},
        {"policy_kwargs": {"optimizer_class": th.optim.SGD}},
        {"batch_size": 13},
        {"rollout_buffer_class": SafeRolloutBuffer},
    ],
    ids=lambda kwargs: next(iter(kwargs)),
)
def test_every_setting_trains(kwargs: dict[str, Any]):
    learn(**kwargs)


def test_a_schedule_ends_at_no_progress_though_the_last_rollout_goes_beyond_the_budget():
    seen: list[float] = []

    def falling(progress: float) -> float:
        seen.append(progress)
        return 1e-3 * progress

    model = SAFE("MlpPolicy", "CartPole-v1", learning_rate=falling, clip_range=falling, **SMALL)
    model.learn(40)
    assert model.num_timesteps == 64
    assert min(seen) == 0.0
    assert model.policy.optimizer.param_groups[0]["lr"] == model._objective.clip_range == 0.0


def test_clipping_holds_every_critic_near_its_own_old_value():
    model = learn(clip_range_vf=0.2, policy_kwargs={"soft_min_alpha": float("inf")})
    batch = next(model.rollout_buffer.in_order(8))
    assert batch.old_critic_values.shape == (8, 2)
    np.testing.assert_allclose(batch.old_critic_values.mean(-1), batch.old_values, atol=1e-5)


def test_target_critics_follow_but_lag_behind():
    model = SAFE("MlpPolicy", "CartPole-v1", critic_tau=0.05, **SMALL)
    start = model.policy.target_weight.clone()
    model.learn(96)
    moved = (model.policy.target_weight - start).abs().max()
    assert 0 < moved < (model.policy.value_weight - start).abs().max()


def test_the_scale_of_returns_is_their_running_spread():
    scales = []

    class Recorder(SAFE):
        def train(self) -> None:
            scales.append((float(np.std(self.rollout_buffer.returns)), float(self.policy.return_scale)))
            super().train()

    Recorder("MlpPolicy", "CartPole-v1", **SMALL).learn(96)
    expected = scales[0][0]
    assert scales[0][1] == pytest.approx(expected, rel=1e-5)
    for spread, scale in scales[1:]:
        expected = 0.9 * expected + 0.1 * spread
        assert scale == pytest.approx(expected, rel=1e-5)


def test_the_critics_loss_is_linear_beyond_a_multiple_of_their_error_wherever_the_returns_are():
    class Shifted(SafeRolloutBuffer):
        """Returns that are all 1000 higher than the critic was taught to expect."""

        def compute_returns_and_advantage(self, last_values: th.Tensor, dones: np.ndarray) -> None:
            super().compute_returns_and_advantage(last_values, dones)
            self.returns += 1000.0

    model = learn(steps=32, rollout_buffer_class=Shifted, huber_delta=2.0)
    errors = model.rollout_buffer.returns - model.rollout_buffer.values
    delta = model._objective.huber_delta
    assert delta == pytest.approx(2.0 * np.sqrt(np.mean(errors**2)), rel=1e-5)
    assert np.abs(errors).max() < delta


def test_pessimism_lowers_the_values_that_advantages_are_made_of():
    model = learn(policy_kwargs={"n_critics": 2, "soft_min_alpha": 0.0})
    obs, _ = model.policy.obs_to_tensor(model.rollout_buffer.observations[:, 0])
    values = model.policy.evaluate(obs, th.zeros(len(obs))).values
    np.testing.assert_allclose(model.policy.predict_values(obs)[:, 0].detach(), values.amin(-1).detach(), 1e-5, 1e-7)
    assert (values[:, 0] - values[:, 1]).abs().min() > 0


# -- reproducibility -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("env_id", "kwargs"),
    [
        ("CartPole-v1", {}),
        ("Pendulum-v1", {"use_sde": True, "kl_reference": "initial"}),
        ("Tiny-vector-multi_binary-v0", {"critic_tau": 0.5}),
    ],
)
def test_the_same_seed_gives_the_same_parameters_and_another_does_not(env_id: str, kwargs: dict[str, Any]):
    a, b, c = (parameters(learn(env=env_id, **(kwargs | {"seed": seed}))) for seed in (3, 3, 4))
    np.testing.assert_array_equal(a, b)
    assert np.abs(a - c).max() > 1e-3


# -- callbacks, evaluation, logs -----------------------------------------------------------------------------------


def test_evaluation_and_its_callback_work(tmp_path: Path):
    env = Monitor(gym.make("CartPole-v1"))
    model = SAFE("MlpPolicy", "CartPole-v1", **SMALL)
    model.learn(
        96, callback=EvalCallback(env, n_eval_episodes=2, eval_freq=32, best_model_save_path=str(tmp_path), verbose=0)
    )
    loaded = SAFE.load(tmp_path / "best_model")
    mean, _ = evaluate_policy(loaded, env, n_eval_episodes=2)
    assert 5 < mean <= 500


def test_checkpoints_are_written_and_load(tmp_path: Path):
    SAFE("MlpPolicy", "CartPole-v1", **SMALL).learn(96, callback=CheckpointCallback(40, str(tmp_path), verbose=0))
    files = sorted(tmp_path.glob("*.zip"))
    assert [SAFE.load(file).num_timesteps for file in files] == [40, 80]


@pytest.mark.parametrize("progress_bar", [False, True])
@pytest.mark.filterwarnings("ignore:rich is experimental")
def test_a_function_as_a_callback_stops_training_by_false_and_not_by_returning_nothing(progress_bar: bool):
    for returned, steps in ((None, 64), (True, 64), (False, 1), (np.bool_(False), 1)):
        model = SAFE("MlpPolicy", "CartPole-v1", **SMALL)
        model.learn(64, callback=lambda *_, value=returned: value, progress_bar=progress_bar)
        assert model.num_timesteps == steps


def test_a_callback_can_stop_training():
    model = SAFE("MlpPolicy", "Tiny-vector-discrete-v0", **SMALL)
    model.learn(10_000, callback=StopTrainingOnMaxEpisodes(3))
    assert model.num_timesteps == 21


EXPECTED = {
    "safe/threshold", "safe/kl_short", "safe/kl_long", "safe/gate", "safe/phase", "safe/coefficient", "safe/kl",
    "safe/critic_gap", "safe/update_kept", "train/approx_kl", "train/loss", "rollout/ep_rew_mean",
    "time/total_timesteps",
}  # fmt: skip


def test_tensorboard_gets_the_controller(tmp_path: Path):
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    SAFE("MlpPolicy", "CartPole-v1", tensorboard_log=str(tmp_path), **SMALL).learn(96)
    (folder,) = tmp_path.iterdir()
    assert folder.name == "SAFE_1"
    events = event_accumulator.EventAccumulator(str(folder))
    events.Reload()
    tags = set(events.Tags()["scalars"])
    assert EXPECTED - {"time/total_timesteps"} <= tags
    assert len(events.Scalars("safe/threshold")) == 3
    assert all(np.isfinite(event.value) for tag in EXPECTED & tags for event in events.Scalars(tag))


def test_any_logger_gets_one_finite_line_a_rollout(tmp_path: Path):
    model = SAFE("MlpPolicy", "CartPole-v1", kl_reference="initial", **SMALL)
    model.set_logger(configure(str(tmp_path), ["csv"]))
    model.learn(96)
    with (tmp_path / "progress.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 3
    assert set(rows[0]) >= EXPECTED
    # What an update did is logged with the rollout that follows it, as SB3 does: nothing yet in the first line.
    assert all(np.isfinite(float(row[name])) for row in rows[1:] for name in EXPECTED)


@pytest.mark.filterwarnings("ignore:rich is experimental")
def test_progress_can_be_shown():
    pytest.importorskip("tqdm")
    pytest.importorskip("rich")
    SAFE("MlpPolicy", "CartPole-v1", **SMALL).learn(32, progress_bar=True)


def test_log_means_are_over_the_whole_update():
    seen: list[float] = []

    class Recorder(SAFE):
        def _gradient(self, pieces: Any) -> dict[str, float]:
            means = super()._gradient(pieces)
            seen.append(means["value_loss"])
            return means

    model = Recorder("MlpPolicy", "CartPole-v1", **SMALL)
    model.learn(32)
    assert len(seen) == 4
    assert model.logger.name_to_value["train/value_loss"] == pytest.approx(np.mean(seen), rel=1e-5)
