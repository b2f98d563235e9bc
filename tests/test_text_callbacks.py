import io
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from stable_baselines3 import PPO
from stable_baselines3.common.callbacks import EvalCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.logger import KVWriter, Logger
from stable_baselines3.common.vec_env import DummyVecEnv

from sb3_safe import SAFE, GymVecEnv, ProgressCallback, SampleCallback, StabilityCallback, demo, environments
from sb3_safe.callbacks import read_json_lines, write_texts
from sb3_safe.language import LanguagePolicy, SegmentBuffer
from sb3_safe.text_callbacks import saved_reward


def vowels(prompts: list[str], completions: list[str], **_: Any) -> list[float]:
    return [sum(letter in "aeiou" for letter in text) / (len(text) + 1) for text in completions]


TEXTS = {"reward_model": vowels, "max_new_tokens": 6}
PROMPTS = ["Review of a museum:", "About this book: The"]
COLUMNS = {"entropy", "update_kl", "explained_variance", "critic_gap", "kl", "threshold", "stop_share", "distinct_2"}


class Recorder(KVWriter):
    """Everything that is logged, with its step."""

    def __init__(self) -> None:
        self.dumps: list[tuple[int, dict[str, Any]]] = []

    def write(self, key_values: dict[str, Any], key_excluded: dict[str, Any], step: int = 0) -> None:
        self.dumps.append((step, dict(key_values)))

    def close(self) -> None:
        pass

    def of(self, key: str) -> list[tuple[int, Any]]:
        return [(step, values[key]) for step, values in self.dumps if key in values]


def text_env(n_texts: int, **kwargs: Any) -> GymVecEnv:
    return GymVecEnv(
        gym.make_vec("TextGenEnv-v0", n_texts, vectorization_mode="vector_entry_point", **(TEXTS | kwargs))
    )


def text_model(**kwargs: Any) -> SAFE:
    arguments = {"n_envs": 4, "n_steps": 8, "batch_size": 16, "n_epochs": 1, "env_kwargs": TEXTS, "seed": 0}
    return SAFE("TextGenEnv-v0", device="cpu", **(arguments | kwargs))


def stock_ppo() -> PPO:
    env = environments.make("TextGenEnv-v0", 4, TEXTS)
    policy_kwargs = environments.advertised_policy_kwargs(env, "LanguagePolicy")
    return PPO(
        LanguagePolicy, env, n_steps=8, batch_size=16, n_epochs=1, rollout_buffer_class=SegmentBuffer,
        policy_kwargs=policy_kwargs, seed=0, device="cpu",
    )  # fmt: skip


def env_that_scores(model: Any, scores: dict[int, float]) -> GymVecEnv:
    """An environment whose every text gets the score that stands beside the step at which training is."""
    return text_env(2, reward_model=lambda completions, **_: [scores[model.num_timesteps]] * len(completions))


# -- what is written and logged ----------------------------------------------------------------------------------------


def test_rows_of_a_text_run_tell_of_its_texts_and_of_what_is_asked_for(tmp_path: Path) -> None:
    seen: list[str] = []

    def letters(infos: Any) -> dict[str, float]:
        seen.extend(info["completion"] for info in infos)
        return {"letters": float(np.mean([len(info["completion"]) for info in infos]))}

    text_model().learn(64, callback=StabilityCallback(tmp_path, extra=letters))
    rows = read_json_lines(tmp_path / "stability.jsonl")
    assert [row["timesteps"] for row in rows] == [32, 64]
    for row in rows:
        assert COLUMNS | {"letters", "part/vowels"} <= set(row)
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
    for one, other in zip(alone.policy.parameters(), watched.policy.parameters(), strict=True):
        assert th.equal(one, other)

    logged = recorder.of("samples/texts")
    assert [step for step, _ in logged] == [0, 64, 96]
    for (_, text), first, second in zip(logged, sampler.samples[::2], sampler.samples[1::2], strict=True):
        for sample in (first, second):
            assert f"{sample['reward']:+.2f} | {sample['prompt']} >>>{sample['completion']}" in text


def test_the_mean_reward_and_length_of_all_texts_are_logged_at_their_step_and_few_are_shown() -> None:
    recorder, sampler = Recorder(), SampleCallback(text_env(5), every=2, seed=7, n_shown=3)
    model = text_model()
    model.set_logger(Logger(None, [recorder]))
    start = write_texts(model, text_env(5), seed=7)
    model.learn(64, callback=sampler)
    end = write_texts(model, text_env(5), seed=7)
    for key, field in (("eval/mean_reward", "r"), ("eval/mean_ep_length", "l")):
        expected = [
            (step, np.mean([text["episode"][field] for text in texts])) for step, texts in ((0, start), (64, end))
        ]
        assert recorder.of(key) == [(step, pytest.approx(value)) for step, value in expected]
    assert sampler.last_mean_reward == recorder.of("eval/mean_reward")[-1][1]
    assert [sample["completion"] for sample in sampler.samples] == [text["completion"] for text in start[:3] + end[:3]]


def test_texts_are_printed_also_where_the_output_has_no_code_for_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """On Windows a pipe takes the characters of one language."""
    sampler, model, output = SampleCallback(text_env(1), verbose=1), text_model(), io.BytesIO()
    model.set_logger(Logger(None, []))
    sampler.init_callback(model)
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(output, encoding="cp1252", write_through=True))
    text = {"prompt": "caf\xe9 \u2192", "completion": " \u732b", "episode": {"r": 1.0, "l": 2}, "finish_reason": "stop"}
    sampler._show([text])
    monkeypatch.setattr(demo, "N_SHOWN", 1)
    demo.show_texts(2 * sampler.samples)
    printed = output.getvalue().decode("cp1252")
    assert "caf\xe9 ? >>> ?" in printed
    assert "before (+1.00): ?" in printed


@pytest.mark.parametrize("first", [SampleCallback, StabilityCallback])
def test_rows_are_complete_whichever_callback_comes_first(first: type[Any]) -> None:
    stability, sampler = StabilityCallback(), SampleCallback(text_env(1), every=1)
    text_model().learn(64, callback=sorted([stability, sampler], key=lambda callback: not isinstance(callback, first)))
    assert all(set(row) >= COLUMNS for row in stability.rows)


def test_a_run_that_goes_on_samples_every_step_once(tmp_path: Path) -> None:
    model = text_model()
    for callback in (SampleCallback(text_env(1), folder=tmp_path), SampleCallback(text_env(1), folder=tmp_path)):
        model.learn(32, callback=callback, reset_num_timesteps=False)
    assert [sample["timesteps"] for sample in read_json_lines(tmp_path / "samples.jsonl")] == [0, 32, 64]
    model.learn(32, callback=callback)
    assert [sample["timesteps"] for sample in read_json_lines(tmp_path / "samples.jsonl")] == [0, 32]


@pytest.mark.parametrize(
    ("device", "kept"), [("cpu", []), ("cuda:1", ["cuda:1"]), ("mps", ["mps"]), ("xpu:0", ["xpu:0"])]
)
def test_random_numbers_of_any_device_are_left_as_they_were(
    device: str, kept: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, model = [], text_model()

    def fork_rng(devices: list[th.device], device_type: str) -> Any:
        asked.append((devices, device_type))
        return fork(devices=[])

    fork = th.random.fork_rng
    monkeypatch.setattr(th.random, "fork_rng", fork_rng)
    write_texts(SimpleNamespace(device=th.device(device), predict=model.predict), text_env(1))  # type: ignore[arg-type]
    assert asked == [([th.device(name) for name in kept], th.device(device).type)]


def test_sampled_texts_depend_on_the_seed_alone_and_likeliest_ones_not_on_it() -> None:
    model = text_model()

    def completions(seed: int, deterministic: bool) -> list[str]:
        texts = write_texts(model, text_env(2), PROMPTS, seed, deterministic)
        return [text["completion"] for text in texts]

    assert completions(5, False) == completions(5, False) != completions(6, False)
    assert completions(5, True) == completions(6, True)


@pytest.mark.parametrize("monitored", [True, False])
def test_single_text_environments_side_by_side_give_the_same_samples(monitored: bool, tmp_path: Path) -> None:
    def make() -> gym.Env[Any, Any]:
        return gym.make("TextGenEnv-v0", **TEXTS)

    envs = [text_env(2), make_vec_env(make, 2) if monitored else DummyVecEnv([make, make])]
    for name, env in zip("ab", envs, strict=True):
        model = text_model()
        model.learn(16, callback=SampleCallback(env, PROMPTS, folder=tmp_path / name))
    native, single = (read_json_lines(tmp_path / name / "samples.jsonl") for name in "ab")
    assert [sample["prompt"] for sample in single] == PROMPTS * 2
    for one, other in zip(native, single, strict=True):
        assert one == other | {"reward": pytest.approx(other["reward"], abs=1e-6)}


# -- the best model ----------------------------------------------------------------------------------------------------


def test_the_best_model_is_replaced_by_a_better_one_only(tmp_path: Path) -> None:
    model = text_model()
    env = env_that_scores(model, {0: 1.0, 32: 3.0, 64: 3.0, 96: 2.0})
    sampler = SampleCallback(env, every=1, best_model_save_path=tmp_path)
    model.learn(96, callback=sampler)
    assert sampler.best_mean_reward == saved_reward(tmp_path / "best_model.zip") == 3.0
    best = SAFE.load(tmp_path / "best_model.zip", env=model.get_env())
    assert best.num_timesteps == 32
    assert [path.name for path in tmp_path.iterdir()] == ["best_model.zip"]
    best.learn(32, reset_num_timesteps=False)


def test_a_run_that_goes_on_knows_the_best_model(tmp_path: Path) -> None:
    def learn(scores: dict[int, float]) -> int:
        sampler = SampleCallback(env_that_scores(model, scores), every=1, best_model_save_path=tmp_path)
        model.learn(32, callback=sampler, reset_num_timesteps=False)
        return SAFE.load(tmp_path / "best_model.zip").num_timesteps

    model = text_model()
    assert learn({0: 1.0, 32: 3.0}) == 32
    model.save(tmp_path / "checkpoint")
    model = SAFE.load(tmp_path / "checkpoint", env=model.get_env())
    assert learn({32: 2.0, 64: 2.5}) == 32
    assert learn({64: 2.5, 96: 4.0}) == 96


def test_a_new_run_keeps_the_best_models_of_earlier_ones(tmp_path: Path) -> None:
    for score in (3.0, 2.0, 1.0):
        model = text_model()
        env = env_that_scores(model, {0: score, 32: 0.0})
        model.learn(32, callback=SampleCallback(env, best_model_save_path=tmp_path))
    rewards = {path.name: saved_reward(path) for path in tmp_path.iterdir()}
    assert rewards == {"best_model_1.zip": 3.0, "best_model_2.zip": 2.0, "best_model.zip": 1.0}


def test_a_model_of_unknown_reward_is_not_written_over(tmp_path: Path) -> None:
    model = text_model().learn(32)
    model.save(tmp_path / "best_model.zip")
    env = env_that_scores(model, {32: 1.0, 64: 0.0})
    model.learn(32, callback=SampleCallback(env, best_model_save_path=tmp_path), reset_num_timesteps=False)
    assert saved_reward(tmp_path / "best_model_1.zip") is None
    assert SAFE.load(tmp_path / "best_model_1.zip").num_timesteps == 32
    assert saved_reward(tmp_path / "best_model.zip") == 1.0


def test_the_best_model_survives_a_failure_while_a_better_one_is_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = text_model()
    env = env_that_scores(model, {0: 1.0, 32: 2.0})
    save = SAFE.save

    def fail_later(self: SAFE, file: Any) -> None:
        if self.num_timesteps > 0:
            if not isinstance(file, Path):  # the rescue's
                file.write(b"half a model")
            raise OSError("no space left on device")
        save(self, file)

    monkeypatch.setattr(SAFE, "save", fail_later)
    with pytest.raises(OSError, match="no space left"):
        model.learn(32, callback=SampleCallback(env, every=1, best_model_save_path=tmp_path))
    assert SAFE.load(tmp_path / "best_model.zip").num_timesteps == 0
    assert [path.name for path in tmp_path.iterdir()] == ["best_model.zip"]


# -- other algorithms, SB3's own callbacks -----------------------------------------------------------------------------


def test_a_stock_ppo_is_evaluated_and_its_best_model_loads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    sampler = SampleCallback(text_env(2), PROMPTS, deterministic=True, best_model_save_path=tmp_path)
    model = stock_ppo().learn(64, callback=[sampler, ProgressCallback()])
    assert [sample["timesteps"] for sample in sampler.samples] == [0, 0, 64, 64]
    assert " tokens/s reward " in capsys.readouterr().out
    best = PPO.load(tmp_path / "best_model.zip", env=model.get_env())
    texts = write_texts(best, text_env(2), PROMPTS, deterministic=True)
    assert np.mean([text["episode"]["r"] for text in texts]) == pytest.approx(sampler.best_mean_reward)


def test_the_eval_callback_of_sb3_works_on_texts(tmp_path: Path) -> None:
    evaluation = EvalCallback(
        text_env(4), eval_freq=8, n_eval_episodes=8, best_model_save_path=str(tmp_path), verbose=0
    )
    model = text_model().learn(64, callback=evaluation)
    assert np.isfinite(evaluation.last_mean_reward)
    assert SAFE.load(tmp_path / "best_model.zip", env=model.get_env()).num_timesteps in (32, 64)


# -- bad input ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"every": 0}, "every must be at least 1, got 0"),
        ({"n_shown": 0}, "n_shown must be at least 1, got 0"),
        ({"prompts": PROMPTS[:1]}, "prompts must have one entry per row of env, 2, got 1"),
    ],
)
def test_arguments_that_cannot_work_are_refused(kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SampleCallback(text_env(2), **kwargs)


def test_an_environment_of_one_text_is_refused_and_gymnasiums_vector_form_is_not() -> None:
    with pytest.raises(ValueError, match="env must be a vector environment"):
        SampleCallback(gym.make("TextGenEnv-v0", **TEXTS))
    sampler = SampleCallback(gym.make_vec("TextGenEnv-v0", 2, vectorization_mode="vector_entry_point", **TEXTS))
    assert sampler.env.num_envs == 2


def test_an_environment_with_other_observations_is_refused_before_training() -> None:
    model = text_model()
    with pytest.raises(ValueError, match="max_prompt_tokens and max_new_tokens"):
        model.learn(32, callback=SampleCallback(text_env(2, max_new_tokens=7)))
    assert model.num_timesteps == 0
