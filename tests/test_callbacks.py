import json
import math
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from stable_baselines3 import DQN, PPO
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.logger import KVWriter, Logger

from sb3_safe import SAFE, GymVecEnv
from sb3_safe.callbacks import (
    SampleCallback,
    StabilityCallback,
    episode_columns,
    read_json_lines,
    write_json_lines,
    write_texts,
)

ALWAYS = {"timesteps", "seconds", "episodes", "entropy", "update_kl", "explained_variance", "clip_fraction"}
OF_SAFE = {"critic_gap", "kl", "threshold", "kl_short", "gate", "entropy_floor", "phase"}
OF_EPISODES = {"reward", "reward_std", "length"}


def make(algorithm: type[Any], **kwargs: Any) -> Any:
    arguments = {"n_steps": 128, "batch_size": 64, "n_epochs": 2, "seed": 0, "device": "cpu"}
    return algorithm("MlpPolicy", "CartPole-v1", **(arguments | kwargs))


def rows_of(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "stability.jsonl").read_text().splitlines()]


class Witness(BaseCallback):
    """An independent account of the returns and log-probabilities of each rollout."""

    def __init__(self) -> None:
        super().__init__()
        self.returns: list[list[float]] = []
        self.entropies: list[float] = []

    def _on_rollout_start(self) -> None:
        self.returns.append([])

    def _on_step(self) -> bool:
        self.returns[-1] += [info["episode"]["r"] for info in self.locals["infos"] if "episode" in info]
        return True

    def _on_rollout_end(self) -> None:
        self.entropies.append(float(-np.mean(self.locals["rollout_buffer"].log_probs)))


@pytest.mark.parametrize(("algorithm", "columns"), [(SAFE, ALWAYS | OF_SAFE), (PPO, ALWAYS)])
def test_every_rollout_has_a_complete_row_in_the_file(algorithm: type[Any], columns: set[str], tmp_path: Path) -> None:
    witness, callback = Witness(), StabilityCallback(tmp_path)
    make(algorithm).learn(512, callback=[witness, callback])
    rows = rows_of(tmp_path)
    assert rows == callback.rows
    assert [row["timesteps"] for row in rows] == [128, 256, 384, 512]
    for row, returns, entropy in zip(rows, witness.returns, witness.entropies, strict=True):
        assert columns | OF_EPISODES <= set(row)
        assert all(math.isfinite(value) for value in row.values())
        assert row["episodes"] == len(returns)
        assert row["reward"] == pytest.approx(np.mean(returns))
        assert row["reward_std"] == pytest.approx(np.std(returns, ddof=1))
        assert row["entropy"] == pytest.approx(entropy)
    assert [row["seconds"] for row in rows] == sorted(row["seconds"] for row in rows)


class Recorder(KVWriter):
    """Everything that is logged, dump by dump."""

    def __init__(self) -> None:
        self.dumps: list[dict[str, Any]] = []

    def write(self, key_values: dict[str, Any], key_excluded: dict[str, Any], step: int = 0) -> None:
        self.dumps.append(dict(key_values))

    def close(self) -> None:
        pass


@pytest.mark.parametrize("algorithm", [SAFE, PPO])
def test_a_row_holds_the_update_that_was_made_on_its_rollout(algorithm: type[Any]) -> None:
    recorder, callback = Recorder(), StabilityCallback()
    model = make(algorithm)
    model.set_logger(Logger(None, [recorder]))
    model.learn(512, callback=callback)
    # SB3 writes the log of an update after the next rollout.
    for row, dump in zip(callback.rows[:-1], recorder.dumps[1:], strict=True):
        assert row["update_kl"] == pytest.approx(dump["train/approx_kl"])
        assert row["explained_variance"] == pytest.approx(float(dump["train/explained_variance"]))
    assert len({row["update_kl"] for row in callback.rows}) == 4
    assert {"stability/crashes", "stability/kl_spikes", "stability/entropy_floor_hits"} <= set(recorder.dumps[-1])


def test_entropy_is_per_action_dimension(tmp_path: Path) -> None:
    callback = StabilityCallback()
    PPO("MlpPolicy", gym.make("Tiny-vector-box-v0"), n_steps=64, batch_size=64, seed=0).learn(64, callback=callback)
    # The first policy is a normal distribution of deviation 1 in each of two dimensions.
    assert callback.rows[0]["entropy"] == pytest.approx(0.5 * math.log(2 * math.pi * math.e), abs=0.15)


def test_a_run_that_goes_on_continues_its_file_and_a_new_run_begins_one(tmp_path: Path) -> None:
    model = make(PPO)
    model.learn(256, callback=StabilityCallback(tmp_path))
    model.learn(256, callback=StabilityCallback(tmp_path), reset_num_timesteps=False)
    rows = rows_of(tmp_path)
    assert [row["timesteps"] for row in rows] == [128, 256, 384, 512]
    assert rows[2]["seconds"] >= rows[1]["seconds"]
    model.num_timesteps = 256  # as after loading an earlier checkpoint
    model.learn(128, callback=StabilityCallback(tmp_path), reset_num_timesteps=False)
    assert [row["timesteps"] for row in rows_of(tmp_path)] == [128, 256, 384]
    model.learn(128, callback=StabilityCallback(tmp_path))
    assert [row["timesteps"] for row in rows_of(tmp_path)] == [128]


def test_a_rollout_without_a_finished_episode_has_no_reward() -> None:
    assert episode_columns([]) == {"episodes": 0}
    assert "reward_std" not in episode_columns([{"episode": {"r": 1.0, "l": 3}}])


def test_columns_of_texts_are_means_over_the_texts_that_ended() -> None:
    texts = [
        {
            "episode": {"r": 1.0, "l": 3},
            "completion_ids": [1, 2, 1],
            "finish_reason": "stop",
            "reward_parts": {"a": 2.0, "b": -1.0},
        },
        {
            "episode": {"r": 4.0, "l": 2},
            "completion_ids": [1, 2],
            "finish_reason": "length",
            "reward_parts": {"a": 4.0, "b": 0.0},
        },
    ]
    assert episode_columns(texts) == pytest.approx(
        {
            "episodes": 2,
            "reward": 2.5,
            "length": 2.5,
            "reward_std": math.sqrt(4.5),
            "stop_share": 0.5,
            "distinct_2": 2 / 3,
            "part/a": 3.0,
            "part/b": -0.5,
        }
    )


def test_an_algorithm_without_rollouts_is_refused() -> None:
    with pytest.raises(ValueError, match="DQN has none"):
        DQN("MlpPolicy", "CartPole-v1", learning_starts=0).learn(1, callback=StabilityCallback())


def test_a_line_cut_off_by_a_crash_is_left_out_and_any_other_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    write_json_lines(path, [{"a": 1}, {"a": 2}])
    path.write_text(path.read_text() + '{"a": 3, "b"')
    assert read_json_lines(path) == [{"a": 1}, {"a": 2}]
    path.write_text('{"a"\n{"a": 2}\n')
    with pytest.raises(ValueError, match=r"rows\.jsonl: line 1 is not JSON"):
        read_json_lines(path)


# -- texts -------------------------------------------------------------------------------------------------------------


def vowels(prompts: list[str], completions: list[str], **_: Any) -> list[float]:
    return [sum(letter in "aeiou" for letter in text) / (len(text) + 1) for text in completions]


TEXTS = {"reward_model": vowels, "max_new_tokens": 6}
PROMPTS = ["Review of a museum:", "About this book: The"]


def text_env(n_texts: int) -> GymVecEnv:
    return GymVecEnv(gym.make_vec("TextGenEnv-v0", n_texts, vectorization_mode="vector_entry_point", **TEXTS))


def text_model() -> SAFE:
    return SAFE("TextGenEnv-v0", n_envs=4, n_steps=8, batch_size=16, n_epochs=1, env_kwargs=TEXTS, seed=0, device="cpu")


def test_rows_of_a_text_run_tell_of_its_texts_and_of_what_is_asked_for(tmp_path: Path) -> None:
    seen: list[str] = []

    def letters(infos: Any) -> dict[str, float]:
        seen.extend(info["completion"] for info in infos)
        return {"letters": float(np.mean([len(info["completion"]) for info in infos]))}

    callback = StabilityCallback(tmp_path, extra=letters)
    text_model().learn(64, callback=callback)
    rows = rows_of(tmp_path)
    assert [row["timesteps"] for row in rows] == [32, 64]
    for row in rows:
        assert ALWAYS | OF_SAFE | {"stop_share", "distinct_2", "letters", "part/vowels"} <= set(row)
        assert row["part/vowels"] == pytest.approx(row["reward"])
    assert sum(row["letters"] * row["episodes"] for row in rows) == pytest.approx(sum(map(len, seen)))


def test_samples_are_written_on_the_same_prompts_and_do_not_disturb_training(tmp_path: Path) -> None:
    recorder, sampler = Recorder(), SampleCallback(text_env(2), PROMPTS, every=2, folder=tmp_path)
    # One after the other, since both draw from torch's generator.
    alone = text_model().learn(96)
    watched = text_model()
    watched.set_logger(Logger(None, [recorder]))
    watched.learn(96, callback=sampler)
    assert [sample["timesteps"] for sample in sampler.samples] == [0, 0, 64, 64, 96, 96]
    assert [sample["prompt"] for sample in sampler.samples] == PROMPTS * 3
    assert read_json_lines(tmp_path / "samples.jsonl") == sampler.samples
    assert PROMPTS[0] in recorder.dumps[0]["samples/texts"]
    for one, other in zip(alone.policy.parameters(), watched.policy.parameters(), strict=True):
        assert th.equal(one, other)


def test_texts_depend_on_the_seed_alone() -> None:
    model = text_model()
    first, again, other = (write_texts(model, text_env(3), seed=seed) for seed in (5, 5, 6))
    assert [text["completion"] for text in first] == [text["completion"] for text in again]
    assert [text["completion"] for text in first] != [text["completion"] for text in other]


def test_samples_need_a_positive_interval() -> None:
    with pytest.raises(ValueError, match="every must be at least 1, got 0"):
        SampleCallback(text_env(1), every=0)
