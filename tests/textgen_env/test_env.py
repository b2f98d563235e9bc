from __future__ import annotations

import inspect
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
from gymnasium.error import ResetNeeded
from gymnasium.utils.env_checker import check_env
from gymnasium.vector import AutoresetMode
from gymnasium.wrappers import RecordEpisodeStatistics
from stable_baselines3.common.env_checker import check_env as sb3_check_env
from stable_baselines3.common.monitor import Monitor
from textgen_env import TextGenEnv, TextGenVectorEnv

EOS, WORD = 1, 300


def length_reward(prompts: list[Any], completions: list[str], completion_ids: list[list[int]], **_: Any) -> list[float]:
    """A cheap reward that tells texts apart."""
    return [float(sum(ids) + len(ids)) for ids in completion_ids]


ASSETS = Path(inspect.getfile(TextGenVectorEnv)).with_name("assets")


def vector_env(num_envs: int = 3, **arguments: Any) -> TextGenVectorEnv:
    return TextGenVectorEnv(num_envs, **{"reward_model": length_reward, "max_new_tokens": 5, **arguments})


def single_env(**arguments: Any) -> TextGenEnv:
    return TextGenEnv(**{"reward_model": length_reward, "max_new_tokens": 5, **arguments})


def real_ids(observation: dict[str, Any]) -> list[list[int]]:
    """The ids of each row without padding."""
    lengths = observation["length"][:, 0]
    return [row[:length].tolist() for row, length in zip(observation["input_ids"], lengths, strict=True)]


def test_single_env_passes_gymnasium_and_sb3_checks() -> None:
    env = gymnasium.make("TextGenEnv-v0", render_mode="ansi").unwrapped
    check_env(env)
    sb3_check_env(env)


def test_registered_vector_env_steps_all_rows_natively() -> None:
    envs = gymnasium.make_vec("TextGenEnv-v0", num_envs=4, max_new_tokens=3, reward_model=length_reward)
    assert isinstance(envs, TextGenVectorEnv)
    assert envs.metadata["autoreset_mode"] is AutoresetMode.SAME_STEP
    observation, _ = envs.reset(seed=0)
    for _ in range(7):
        assert observation in envs.observation_space
        observation, rewards, terminations, truncations, _ = envs.step(envs.action_space.sample())
        assert rewards.shape == terminations.shape == truncations.shape == (4,)


def test_importing_the_package_does_not_import_torch_or_transformers() -> None:
    code = (
        "import sys, textgen_env, textgen_env.gold\n"
        "heavy = {'torch', 'transformers', 'stable_baselines3', 'datasets', 'sb3_safe'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_metadata_tells_an_algorithm_which_model_writes_and_leaves_the_class_alone() -> None:
    envs = vector_env(1, min_new_tokens=2, model_kwargs={"dtype": "float32"})
    assert envs.metadata["policy"] == "LanguagePolicy"
    assert envs.metadata["policy_kwargs"] == {
        "model": "textgen_env:assets/lm",
        "eos_token_id": [EOS],
        "min_new_tokens": 2,
        "model_kwargs": {"dtype": "float32"},
    }
    assert "policy" not in TextGenVectorEnv.metadata
    assert single_env().metadata["policy"] == "LanguagePolicy"
    assert "reports_episodes" not in single_env().metadata


@pytest.mark.parametrize("tokens", [1, 5])
def test_score_lands_on_the_last_real_token(tokens: int) -> None:
    env = single_env()
    start, _ = env.reset(seed=0)
    actions = [WORD] * (tokens - 1) + [EOS]
    steps = [env.step(np.int64(action)) for action in actions]
    assert [step[1] for step in steps] == [0.0] * (tokens - 1) + [float(sum(actions) + tokens)]
    assert [step[2] for step in steps] == [False] * (tokens - 1) + [True]
    assert not any(step[3] for step in steps)
    observation, info = steps[-1][0], steps[-1][4]
    assert observation["length"][0] == start["length"][0] + tokens
    assert observation["prompt_length"] == start["length"]
    assert info["completion_ids"] == actions


@pytest.mark.parametrize("wrapper", [RecordEpisodeStatistics, Monitor])
def test_episode_statistics_of_a_single_env_are_those_of_its_wrapper(wrapper: Any) -> None:
    env = wrapper(gymnasium.make("TextGenEnv-v0", reward_model=length_reward, max_new_tokens=5))
    env.reset(seed=0)
    env.step(np.int64(WORD))
    _, reward, _, _, info = env.step(np.int64(EOS))
    assert (info["episode"]["r"], info["episode"]["l"]) == (reward, 2)
    assert info["finish_reason"] == "stop"


def test_text_ends_after_max_new_tokens_and_a_missing_eos_costs_the_penalty() -> None:
    env = single_env(missing_eos_penalty=0.25, max_new_tokens=2)
    env.reset(seed=0)
    env.step(np.int64(WORD))
    _, reward, terminated, truncated, info = env.step(np.int64(WORD))
    assert (terminated, truncated) == (True, False)
    assert reward == 2 * WORD + 2 - 0.25
    assert info["finish_reason"] == "length"
    assert info["reward_parts"] == {"length_reward": 2 * WORD + 2}
    env.reset()
    _, reward, _, _, info = env.step(np.int64(EOS))
    assert reward == EOS + 1
    assert info["finish_reason"] == "stop"


def test_episode_info_holds_prompt_and_completion_without_special_tokens(tokenizer: Any) -> None:
    env = single_env()
    env.reset(options={"prompt": "Review of a hotel: The room"})
    for token in tokenizer(" was great.")["input_ids"]:
        env.step(np.int64(token))
    *_, info = env.step(np.int64(EOS))
    assert (info["prompt"], info["completion"]) == ("Review of a hotel: The room", " was great.")
    assert set(info) == {"prompt", "completion", "reward_parts", "finish_reason", "completion_ids"}


def test_vector_env_equals_single_envs_given_the_same_prompts_and_actions() -> None:
    prompts = ["Hotel review:", "About this film: The plot", "Phone review: The"]
    envs, singles = vector_env(3), [single_env(max_prompt_tokens=12) for _ in prompts]
    room = envs.single_observation_space["input_ids"].shape[0]
    observations, _ = envs.reset(options={"prompts": prompts})
    for row, (env, prompt) in enumerate(zip(singles, prompts, strict=True)):
        observation, _ = env.reset(options={"prompt": prompt})
        assert real_ids(observations)[row] == observation["input_ids"][: observation["length"][0]].tolist()
    rng = np.random.default_rng(0)
    alive = [True] * 3
    while any(alive):
        actions = np.where(rng.random(3) < 0.2, EOS, rng.integers(2, 1000, 3))
        observations, rewards, terminations, _, infos = envs.step(actions)
        for row, env in enumerate(singles):
            if not alive[row]:
                continue
            observation, reward, terminated, _, info = env.step(actions[row])
            alive[row] = not terminated
            assert (reward, terminated) == (rewards[row], terminations[row])
            seen = infos["final_obs"][row] if terminated else {k: v[row] for k, v in observations.items()}
            length = observation["length"][0]
            assert seen["input_ids"][:length].tolist() == observation["input_ids"][:length].tolist()
            assert (seen["input_ids"][length:room] == 0).all()
            if terminated:
                final = infos["final_info"]
                assert final["completion"][row] == info["completion"]
                assert final["completion_ids"][row] == info["completion_ids"]
                assert final["episode"]["r"][row] == reward
                assert final["episode"]["l"][row] == len(info["completion_ids"])


def test_a_row_that_ends_starts_its_next_prompt_in_the_same_step() -> None:
    envs = vector_env(3)
    before, _ = envs.reset(seed=0)
    observation, rewards, terminations, _, infos = envs.step(np.array([WORD, EOS, WORD]))
    assert terminations.tolist() == [False, True, False]
    assert infos["_final_obs"].tolist() == infos["_final_info"].tolist() == [False, True, False]
    assert infos["final_info"]["_completion"].tolist() == [False, True, False]
    assert rewards.tolist() == [0.0, 2.0, 0.0]
    final = infos["final_obs"][1]
    assert final["input_ids"][: final["length"][0]].tolist() == [*real_ids(before)[1], EOS]
    assert observation["length"][1] == observation["prompt_length"][1]
    assert (observation["input_ids"][1, observation["length"][1, 0] :] == 0).all()
    assert real_ids(observation)[0] == [*real_ids(before)[0], WORD]
    *_, infos = envs.step(np.array([WORD, WORD, WORD]))
    assert infos == {}


def test_all_texts_that_end_at_one_step_are_scored_in_one_call() -> None:
    calls: list[int] = []

    def counting(completions: list[str], **_: Any) -> list[float]:
        calls.append(len(completions))
        return [0.0] * len(completions)

    envs = vector_env(4, reward_model=counting, max_new_tokens=3)
    envs.reset(seed=0)
    assert calls == []
    for actions in ([WORD] * 4, [EOS, WORD, EOS, WORD], [WORD] * 4):
        envs.step(np.array(actions))
    assert calls == [2, 2]


def test_observations_are_copies() -> None:
    envs = vector_env(2)
    first, _ = envs.reset(seed=0)
    kept = {key: value.copy() for key, value in first.items()}
    second, *_ = envs.step(np.array([WORD, EOS]))
    for key, value in first.items():
        assert (value == kept[key]).all()
        value[:] = 0
    third, *_ = envs.step(np.array([WORD, WORD]))
    assert real_ids(third)[0] == [*real_ids(second)[0], WORD]


def test_the_same_seed_gives_the_same_prompts() -> None:
    def prompts_of(seed: int | None, envs: TextGenVectorEnv) -> list[str]:
        envs.reset(seed=seed)
        drawn = []
        for _ in range(4):
            *_, infos = envs.step(np.full(3, EOS))
            drawn += infos["final_info"]["prompt"].tolist()
        return drawn

    envs = vector_env(3)
    first = prompts_of(7, envs)
    assert prompts_of(7, envs) == first
    assert prompts_of(7, vector_env(3)) == first
    assert prompts_of(8, envs) != first
    assert prompts_of(None, envs) != prompts_of(None, envs)


def test_every_prompt_comes_once_before_any_comes_again() -> None:
    prompts = [f"Hotel review: The {word}" for word in ("room", "bed", "pool", "view", "lobby")]
    env = single_env(prompts=prompts)
    seen = []
    for episode in range(10):
        env.reset(seed=0 if episode == 0 else None)
        seen.append(env.step(np.int64(EOS))[4]["prompt"])
    assert sorted(seen[:5]) == sorted(seen[5:]) == sorted(prompts)


def test_each_prompt_is_given_to_several_texts_one_after_the_other() -> None:
    prompts = [f"Hotel review: The {word}" for word in ("room", "bed", "pool", "view", "lobby")]
    envs = vector_env(3, prompts=prompts, n_samples=4)
    observation, _ = envs.reset(seed=0)
    begun = [row[: row.index(0)] if 0 in row else row for row in observation["input_ids"].tolist()]
    rng = np.random.default_rng(0)
    while len(begun) < 80:
        observation, _, terminations, _, _ = envs.step(np.where(rng.random(3) < 0.3, EOS, WORD))
        begun += [row[: row.index(0)] for row in observation["input_ids"][terminations].tolist()]
    groups = np.array([envs.tokenizer.decode(ids) for ids in begun[:80]]).reshape(20, 4)
    assert (groups == groups[:, :1]).all()
    for epoch in groups[:, 0].reshape(4, 5):
        assert sorted(epoch) == sorted(prompts)


def test_each_prompt_is_given_to_several_texts_of_a_single_environment_too() -> None:
    env = single_env(prompts=["Hotel review:", "Phone review:"], n_samples=2)
    seen = []
    for episode in range(8):
        env.reset(seed=0 if episode == 0 else None)
        seen.append(env.step(np.int64(EOS))[4]["prompt"])
    assert seen[::2] == seen[1::2]
    assert set(seen[:4]) == set(seen[4:]) == {"Hotel review:", "Phone review:"}


def test_both_forms_count_the_prompts_that_were_cut_or_left_out() -> None:
    prompts = ["Hotel review:", "Review of a hotel: The room", "Review of a hotel: The bed"]
    for env in (vector_env, single_env):
        cut = env(prompts=prompts, max_prompt_tokens=4, long_prompts="truncate")
        assert (cut.prompts_truncated, cut.prompts_skipped) == (2, 0)
        left_out = env(prompts=prompts, max_prompt_tokens=4, long_prompts="skip")
        assert (left_out.prompts_truncated, left_out.prompts_skipped) == (0, 2)


def test_reset_options_force_the_prompts_and_count_them() -> None:
    envs = vector_env(2)
    observation, _ = envs.reset(options={"prompts": ["Hotel review:", {"prompt": "Phone review:", "extra": 1}]})
    texts = envs.tokenizer.batch_decode(real_ids(observation))
    assert texts == ["Hotel review:", "Phone review:"]
    with pytest.raises(ValueError, match=r"options\['prompts'\] has 1 prompts for 2 rows"):
        envs.reset(options={"prompts": ["Hotel review:"]})
    with pytest.raises(ValueError, match="max_prompt_tokens"):
        envs.reset(options={"prompts": ["Hotel review: " * 20] * 2})


def test_reset_options_by_another_name_are_refused_instead_of_passed_over() -> None:
    with pytest.raises(ValueError, match=r"options=\{'prompt': 'a'\} must be \{'prompts': \[\.\.\.\]\}"):
        vector_env(2).reset(options={"prompt": "a"})
    with pytest.raises(ValueError, match=r"options=\{'prompts': \['a'\]\} must be \{'prompt': \.\.\.\}"):
        single_env().reset(options={"prompts": ["a"]})
    vector_env(2).reset(options={})
    single_env().reset(options={})


@pytest.mark.parametrize("prompts", ["Hotel review:", ASSETS / "prompts.jsonl", None])
def test_the_prompts_of_a_reset_are_never_looked_up_elsewhere(prompts: Any) -> None:
    with pytest.raises(ValueError, match=r"options\['prompts'\]=.* must be a list, one prompt per row"):
        vector_env(1).reset(options={"prompts": prompts})


def test_rendering_shows_prompt_and_text_so_far(tokenizer: Any) -> None:
    (token,) = tokenizer(" was")["input_ids"]
    env = single_env(render_mode="ansi")
    env.reset(options={"prompt": "Hotel review: The room"})
    env.step(np.int64(token))
    assert env.render() == "Hotel review: The room was"
    envs = vector_env(2, render_mode="ansi")
    envs.reset(options={"prompts": ["Hotel review:", "Phone review:"]})
    assert envs.render() == ("Hotel review:", "Phone review:")
    assert vector_env(1).render() is None


def test_stepping_without_a_text_in_progress_is_refused() -> None:
    env = single_env()
    with pytest.raises(ResetNeeded):
        env.step(np.int64(WORD))
    env.reset(seed=0)
    env.step(np.int64(EOS))
    with pytest.raises(ResetNeeded):
        env.step(np.int64(WORD))


@pytest.mark.parametrize("actions", [[WORD], [WORD, 1024], [-1, WORD]])
def test_actions_of_wrong_shape_or_outside_the_vocabulary_are_refused(actions: list[int]) -> None:
    envs = vector_env(2)
    envs.reset(seed=0)
    with pytest.raises(ValueError, match="actions must"):
        envs.step(np.array(actions))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_envs": 0}, "num_envs=0"),
        ({"n_samples": 0}, "n_samples=0"),
        ({"n_samples": 2.5}, "n_samples=2.5 must be an integer, at least 1"),
        ({"reward_batch_size": 0}, "reward_batch_size=0"),
        ({"reward_batch_size": -1}, "reward_batch_size=-1"),
        ({"max_prompt_tokens": 0}, "max_prompt_tokens=0"),
        ({"max_new_tokens": 0, "min_new_tokens": 0}, "max_new_tokens=0"),
        ({"max_new_tokens": "8"}, "max_new_tokens='8'"),
        ({"min_new_tokens": 9}, "min_new_tokens=9 must be at most max_new_tokens=5"),
        ({"min_new_tokens": -1}, "min_new_tokens=-1 must be an integer, at least 0"),
        ({"max_new_tokens": 120}, "max_prompt_tokens=.* max_new_tokens=120 exceed the 128 positions"),
        ({"long_prompts": "cut"}, "long_prompts='cut'"),
        ({"max_prompt_tokens": 2}, "more than max_prompt_tokens=2"),
        ({"reward_weights": [1.0, 2.0]}, "reward_weights has 2 entries for 1"),
        ({"reward_weights": 0.5}, "reward_weights=0.5 must be a list of finite numbers"),
        ({"reward_weights": [float("nan")]}, r"reward_weights=\[nan\] must be a list of finite numbers"),
        ({"reward_weights": ["1"]}, r"reward_weights=\['1'\] must be a list of finite numbers"),
        ({"missing_eos_penalty": float("nan")}, "missing_eos_penalty=nan must be a finite number"),
        ({"missing_eos_penalty": "1"}, "missing_eos_penalty='1' must be a finite number"),
        ({"missing_eos_penalty": None}, "missing_eos_penalty=None must be a finite number, 0 for none"),
        ({"render_mode": "human"}, r"render_mode='human' must be None or one of \['ansi'\]"),
        ({"reward_model": []}, "reward_model is empty"),
        ({"reward_model": 3}, "reward_model must be"),
        ({"pad_token": "<nothing>"}, "pad_token='<nothing>' is not in the vocabulary"),
    ],
)
def test_arguments_that_cannot_work_are_named(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        vector_env(**arguments)


def test_tokenizer_without_eos_is_refused(tokenizer: Any) -> None:
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match=r"tokenizer .* has no eos token"):
        vector_env(tokenizer=tokenizer)


def test_tokenizer_without_pad_needs_the_pad_token_argument(tokenizer: Any) -> None:
    tokenizer.pad_token = None
    with pytest.raises(ValueError, match=r"no pad token: pass pad_token=.*'<eos>'.*eos token is safe"):
        vector_env(tokenizer=tokenizer)
    envs = vector_env(2, tokenizer=tokenizer, pad_token="<eos>")
    observation, _ = envs.reset(seed=0)
    assert (observation["input_ids"][:, -1] == EOS).all()
    *_, terminations, _, _ = envs.step(np.array([WORD, EOS]))
    assert terminations.tolist() == [False, True]


def test_tokenizer_larger_than_the_models_vocabulary_is_refused(tokenizer: Any) -> None:
    tokenizer.add_tokens(["<one-too-many>"])
    with pytest.raises(ValueError, match="vocabulary mismatch: tokenizer knows 1025 tokens"):
        vector_env(tokenizer=tokenizer)


def test_embeddings_larger_than_the_tokenizer_widen_the_action_space(tmp_path: Any, tokenizer: Any) -> None:
    from transformers import Qwen2Config

    Qwen2Config(vocab_size=1100, max_position_embeddings=64).save_pretrained(tmp_path)
    envs = vector_env(2, model=str(tmp_path), tokenizer=tokenizer, max_new_tokens=2)
    assert envs.single_action_space.n == 1100
    envs.reset(seed=0)
    envs.step(np.array([1099, 1050]))
    *_, infos = envs.step(np.array([1099, EOS]))
    assert infos["final_info"]["completion"].tolist() == ["", ""]


def test_every_argument_is_explained_in_the_docs() -> None:
    docs = Path(__file__).parents[2] / "docs"
    text = "".join((docs / page).read_text(encoding="utf-8") for page in ("text-environment.md", "multi-turn.md"))
    arguments = set(inspect.signature(TextGenVectorEnv.__init__).parameters) - {"self", "num_envs"}
    assert {name for name in arguments if not re.search(rf"[`\"]{name}\b", text)} == set()


def test_models_may_be_named_by_paths() -> None:
    env = TextGenVectorEnv(model=ASSETS / "lm", tokenizer=ASSETS / "lm", reward_model=[ASSETS / "reward_model"])
    assert env.metadata["policy_kwargs"]["model"] == str(ASSETS / "lm")
    assert env.reset()[0]["length"].shape == (1, 1)
