import copy
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from gymnasium import spaces
from gymnasium.vector import AutoresetMode, SyncVectorEnv, VectorEnv
from gymnasium.wrappers.vector import ClipReward, RecordEpisodeStatistics
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import DummyVecEnv, VecMonitor

from sb3_safe import SAFE, GymVecEnv, environments
from tests.tiny_envs import TinyEnv


class CountersVec(VectorEnv[Any, Any, Any]):
    """Two native counters that end after 2 and run out of time after 3 steps; the reward is the action."""

    metadata = {  # noqa: RUF012
        "autoreset_mode": AutoresetMode.SAME_STEP,
        "policy": "MlpPolicy",
        "policy_kwargs": {"net_arch": [4]},
        "reports_episodes": True,
    }

    def __init__(self, num_envs: int = 2, start: float = 0.0) -> None:
        self.num_envs, self.start = num_envs, start
        self.single_observation_space = spaces.Box(-np.inf, np.inf, (1,), np.float32)
        self.single_action_space = spaces.Discrete(3)
        self.observation_space = spaces.Box(-np.inf, np.inf, (num_envs, 1), np.float32)
        self.action_space = spaces.MultiDiscrete([3] * num_envs)
        self.seeds: list[int | None] = []

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        self.seeds.append(seed)
        self.options = options
        self.counts = np.full((self.num_envs, 1), self.start, np.float32)
        return self.counts.copy(), {"level": np.arange(self.num_envs)}

    def step(self, actions: np.ndarray) -> tuple[Any, Any, Any, Any, dict[str, Any]]:
        self.counts += 1
        age = self.counts[:, 0] - self.start
        terminated = (age >= 2) & (np.arange(self.num_envs) % 2 == 0)
        truncated = (age >= 3) & (np.arange(self.num_envs) % 2 == 1)
        done = terminated | truncated
        infos: dict[str, Any] = {}
        if done.any():
            final = np.empty(self.num_envs, dtype=object)
            for index in np.flatnonzero(done):
                final[index] = self.counts[index].copy()
            length = np.where(done, age, 0)
            infos["final_obs"], infos["_final_obs"] = final, done
            infos["final_info"] = {"episode": {"r": length * 10, "_r": done, "l": length, "_l": done}, "_episode": done}
            infos["_final_info"] = done
            infos["level"], infos["_level"] = np.where(done, 7, 0), done
        self.counts[done] = self.start
        return self.counts.copy(), np.asarray(actions, np.float64), terminated, truncated, infos


gym.register("Counters-v0", entry_point="tests.tiny_envs:TinyEnv", vector_entry_point="tests.test_vec_env:CountersVec")
gym.register("CountersAsClass-v0", entry_point=TinyEnv, vector_entry_point=CountersVec)


def sync(kind: str, number: int = 3, **kwargs: Any) -> SyncVectorEnv:
    makers = [lambda: gym.make(kind, **kwargs)] * number
    return SyncVectorEnv(makers, autoreset_mode=AutoresetMode.SAME_STEP)


@pytest.mark.parametrize(
    ("kind", "kwargs"),
    [("CartPole-v1", {"max_episode_steps": 18}), ("Tiny-dict-discrete-v0", {"length": 4}), ("Tiny-vector-box-v0", {})],
)
def test_transitions_are_those_of_environments_side_by_side(kind: str, kwargs: dict[str, Any]):
    ours = GymVecEnv(sync(kind, **kwargs))
    theirs = DummyVecEnv([lambda: gym.make(kind, **kwargs)] * 3)
    ours.seed(5)
    theirs.seed(5)
    np.testing.assert_equal(ours.reset(), theirs.reset())
    ours.action_space.seed(0)
    finished = {"ended": 0, "out of time": 0}
    for _ in range(40):
        actions = np.stack([ours.action_space.sample() for _ in range(3)])
        (obs, rewards, dones, infos), expected = ours.step(actions), theirs.step(actions)
        np.testing.assert_equal(obs, expected[0])
        np.testing.assert_allclose(rewards, expected[1], rtol=1e-6)
        np.testing.assert_array_equal(dones, expected[2])
        for index in np.flatnonzero(dones):
            np.testing.assert_equal(infos[index]["terminal_observation"], expected[3][index]["terminal_observation"])
            assert infos[index]["TimeLimit.truncated"] == expected[3][index]["TimeLimit.truncated"]
            finished["out of time" if infos[index]["TimeLimit.truncated"] else "ended"] += 1
    assert sum(finished.values()) > 0
    if kind == "CartPole-v1":
        assert min(finished.values()) > 0


def test_the_last_observation_of_an_episode_is_handed_over_and_the_next_begins_at_once():
    env = GymVecEnv(CountersVec(start=100.0))
    np.testing.assert_array_equal(env.reset()[:, 0], [100, 100])
    seen = [env.step(np.array([1, 2])) for _ in range(3)]
    np.testing.assert_array_equal([obs[:, 0] for obs, *_ in seen], [[101, 101], [100, 102], [101, 100]])
    np.testing.assert_array_equal([dones for _, _, dones, _ in seen], [[0, 0], [1, 0], [0, 1]])
    np.testing.assert_array_equal(seen[1][3][0]["terminal_observation"], [102])
    np.testing.assert_array_equal(seen[2][3][1]["terminal_observation"], [103])
    assert [seen[1][3][0]["TimeLimit.truncated"], seen[2][3][1]["TimeLimit.truncated"]] == [False, True]
    assert all("terminal_observation" not in info for info in (*seen[0][3], seen[1][3][1], seen[2][3][0]))


def test_infos_of_an_ended_episode_and_of_the_one_that_begins_are_kept_apart():
    env = GymVecEnv(CountersVec())
    env.reset()
    assert env.reset_infos == [{"level": 0}, {"level": 1}]
    assert type(env.reset_infos[1]["level"]) is int  # NumPy's cannot be written as JSON
    env.step(np.zeros(2))
    _, _, _, infos = env.step(np.zeros(2))
    assert infos[0]["episode"] == {"r": 20.0, "l": 2.0}
    assert "episode" not in infos[1]
    assert env.reset_infos == [{"level": 7}, {"level": 1}]


@pytest.mark.skipif(
    tuple(map(int, gym.__version__.split(".")[:2])) < (1, 4),
    reason="gymnasium before 1.4 leaves the first step of an episode out of its statistics where one ended before it",
)
def test_what_gymnasium_records_of_an_episode_reaches_the_log():
    native = SyncVectorEnv(
        [lambda: TinyEnv(length=2), lambda: TinyEnv(length=3)], autoreset_mode=AutoresetMode.SAME_STEP
    )
    env = GymVecEnv(RecordEpisodeStatistics(native))
    env.seed(0)
    env.reset()
    totals, episodes, expected = np.zeros(2), [], []
    for step in range(1, 7):
        _, rewards, dones, infos = env.step(np.array([2, 1]))
        totals += rewards
        expected += [(index, totals[index], (2, 3)[index]) for index in range(2) if step % (2, 3)[index] == 0]
        totals[dones] = 0
        episodes += [
            (index, info["episode"]["r"], info["episode"]["l"]) for index, info in enumerate(infos) if "episode" in info
        ]
    assert episodes == expected
    assert any(total != 0 for _, total, _ in episodes)


def test_seed_and_options_are_used_once():
    native = CountersVec()
    env = GymVecEnv(native)
    env.seed(11)
    env.set_options({"level": 3})
    env.reset()
    assert native.options == {"level": 3}
    env.reset()
    assert native.seeds == [11, None]
    assert native.options is None


@pytest.mark.parametrize("mode", [AutoresetMode.NEXT_STEP, AutoresetMode.DISABLED])
def test_another_way_of_resetting_is_refused_with_the_fix(mode: AutoresetMode):
    with pytest.raises(ValueError, match=r"env: SyncVectorEnv.*SAME_STEP.*make_vec") as refused:
        GymVecEnv(SyncVectorEnv([TinyEnv], autoreset_mode=mode))
    fix = str(refused.value).partition("create it with ")[2]
    names = {"gymnasium": gym, "AutoresetMode": AutoresetMode, "id": "CartPole-v1", "n": 2}
    assert GymVecEnv(eval(fix, names)).num_envs == 2


def test_attributes_and_methods_are_those_of_the_vector_environment():
    env = GymVecEnv(CountersVec())
    assert env.get_attr("start") == [0.0, 0.0]
    env.set_attr("start", 4.0)
    assert env.get_attr("start", indices=[1]) == [4.0]
    np.testing.assert_array_equal(env.env_method("reset", seed=1, indices=0)[0][0][:, 0], [4, 4])
    assert env.env_is_wrapped(gym.Wrapper) == [False, False]


class Grey(TinyEnv):
    def render(self) -> np.ndarray:
        return np.full((4, 4, 3), 100 * self.unwrapped.length, np.uint8)


def test_what_the_environments_render_is_one_picture():
    makers = [lambda: Grey(length=1, render_mode="rgb_array"), lambda: Grey(length=2, render_mode="rgb_array")]
    native = SyncVectorEnv(makers, autoreset_mode=AutoresetMode.SAME_STEP)
    env = GymVecEnv(native)
    assert set(np.unique(env.render())) >= {100, 200}
    env.close()
    assert native.closed
    blind = CountersVec()
    blind.render = lambda: None  # type: ignore[method-assign]
    assert GymVecEnv(blind).get_images() == [None, None]


def test_an_environment_that_does_not_tell_its_attributes_gets_what_fits_its_observations():
    class Silent(DummyVecEnv):
        def get_attr(self, attr_name: str, indices: Any = None) -> list[Any]:
            if attr_name == "metadata":
                raise NotImplementedError
            return super().get_attr(attr_name, indices)

    assert environments.fitting_policy(Silent([TinyEnv])) == "MlpPolicy"


@pytest.mark.parametrize("env_id", ["Counters-v0", "CountersAsClass-v0"])
def test_an_id_with_a_native_same_step_form_is_made_in_that_form(env_id: str):
    env = environments.make(env_id, 3, {"start": 5.0})
    assert isinstance(env, GymVecEnv)
    assert env.num_envs == 3
    np.testing.assert_array_equal(env.reset()[:, 0], [5, 5, 5])


def test_an_id_whose_native_form_resets_otherwise_is_made_side_by_side():
    assert isinstance(environments.make("CartPole-v1", 2), DummyVecEnv)


def test_an_environment_can_advertise_its_policy():
    model = SAFE("Counters-v0", n_steps=8, batch_size=8)
    assert isinstance(model.env, GymVecEnv)
    assert model.policy_kwargs == {"net_arch": [4]}
    assert SAFE("MlpPolicy", "Counters-v0", policy_kwargs={"net_arch": [5]}).policy_kwargs == {"net_arch": [5]}


@pytest.mark.parametrize(
    ("kind", "policy"),
    [("Tiny-vector-box-v0", "MlpPolicy"), ("Tiny-dict-box-v0", "MultiInputPolicy"), ("Tiny-image-box-v0", "CnnPolicy")],
)
def test_the_policy_fits_the_observations(kind: str, policy: str):
    assert environments.fitting_policy(environments.make(kind)) == policy


def test_a_gymnasium_vector_environment_trains_as_environments_side_by_side_do():
    models = []
    for env in (
        VecMonitor(GymVecEnv(sync("CartPole-v1", 2))),
        VecMonitor(DummyVecEnv([lambda: gym.make("CartPole-v1")] * 2)),
    ):
        models.append(SAFE("MlpPolicy", env, n_steps=32, batch_size=16, n_epochs=2, seed=0).learn(192))
    for a, b in zip(*(model.policy.parameters() for model in models), strict=True):
        np.testing.assert_allclose(a.detach(), b.detach(), atol=1e-6)
    assert [episode["r"] for episode in models[0].ep_info_buffer] == [
        episode["r"] for episode in models[1].ep_info_buffer
    ]


def test_a_gymnasium_vector_environment_can_be_passed_as_it_is():
    """Its episodes are recorded once, as those of a single environment are by SB3."""
    models = [
        SAFE("MlpPolicy", env, n_steps=32, batch_size=16, n_epochs=1, seed=0).learn(64)
        for env in (sync("CartPole-v1", 2), VecMonitor(GymVecEnv(sync("CartPole-v1", 2))))
    ]
    assert isinstance(models[0].env, VecMonitor)
    assert isinstance(models[0].env.venv, GymVecEnv)
    assert models[0].n_envs == 2
    episodes, expected = ([(info["r"], info["l"]) for info in model.ep_info_buffer] for model in models)
    assert episodes == expected != []


@pytest.mark.parametrize("kind", ["vector", "dict"])
def test_observations_are_not_overwritten_by_the_step_that_follows(kind: str):
    makers = [lambda: TinyEnv(kind)] * 2
    env = GymVecEnv(SyncVectorEnv(makers, copy=False, autoreset_mode=AutoresetMode.SAME_STEP))
    env.seed(0)
    first = env.reset()
    kept = copy.deepcopy(first)
    second = env.step(np.zeros(2, int))[0]
    kept_second = copy.deepcopy(second)
    env.step(np.zeros(2, int))
    for given, expected in ((first, kept), (second, kept_second)):
        for key in given if isinstance(given, dict) else [...]:
            np.testing.assert_array_equal(given[key], expected[key])


def test_an_environment_that_records_its_episodes_is_not_monitored_again():
    for env in (CountersVec(), ClipReward(RecordEpisodeStatistics(sync("CartPole-v1", 2)), 0.0, 0.5)):
        model = SAFE("MlpPolicy", env, n_steps=32, batch_size=16)
        assert isinstance(model.env, GymVecEnv)
        assert model.env.env_is_wrapped(Monitor) == [True, True]
