from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from stable_baselines3.common.monitor import Monitor
from textgen_env import TextGenEnv, TextGenVectorEnv

from tests.textgen_env import checkpoints

STOP = "\n\nHuman:"


def zero(completions: list[Any], **_: Any) -> list[float]:
    return [0.0] * len(completions)


def write(env: Any, ids: list[int]) -> tuple[int, dict[str, Any]]:
    """Write tokens until the text ends: how many there were, and its info."""
    for number, token in enumerate(ids, 1):
        _, _, terminated, _, info = env.step(np.int64(token))
        if terminated:
            return number, info
    raise AssertionError("the text has not ended")


def test_a_text_ends_with_the_token_that_completes_the_string_which_stays_in_the_ids_alone(tokenizer: Any) -> None:
    env = Monitor(TextGenEnv(stop_strings=[STOP], missing_eos_penalty=1.0, reward_model=zero))
    env.reset(options={"prompt": "Hotel review: The room"})
    ids = tokenizer(" was good" + STOP)["input_ids"]
    assert len(ids) > 5
    number, info = write(env, ids)
    assert number == len(ids)
    assert info["completion"] == " was good"
    assert info["completion_ids"] == ids
    assert info["finish_reason"] == "stop"
    assert info["episode"]["r"] == 0.0


def test_what_follows_the_string_within_its_last_token_is_cut_too(tokenizer: Any) -> None:
    env = TextGenEnv(stop_strings=["oo"], reward_model=zero)
    env.reset(options={"prompt": "Hotel review: The"})
    (room,) = tokenizer(" room")["input_ids"]
    assert write(env, [room])[1]["completion"] == " r"


def test_the_prompt_does_not_count(tokenizer: Any) -> None:
    env = TextGenEnv(stop_strings=["room was", "review:"], reward_model=zero, max_new_tokens=2)
    env.reset(options={"prompt": "Hotel review: The room"})
    number, info = write(env, tokenizer(" was good")["input_ids"])
    assert (number, info["completion"], info["finish_reason"]) == (2, " was good", "length")


def test_the_first_of_several_strings_ends_the_text(tokenizer: Any) -> None:
    env = TextGenEnv(stop_strings=["was good", ".", "The"], reward_model=zero)
    env.reset(options={"prompt": "Hotel review: The room"})
    assert write(env, tokenizer(" was bad. The bed was good")["input_ids"])[1]["completion"] == " was bad"


@pytest.mark.parametrize("strings", [["!", "was good"], ["od", "was good"]])
def test_the_longest_of_several_strings_is_found_and_the_one_that_begins_first_is_cut_off(
    strings: list[str], tokenizer: Any
) -> None:
    """Though the last token alone contains a shorter one, or no token contains it."""
    env = TextGenEnv(stop_strings=strings, reward_model=zero)
    env.reset(options={"prompt": "Hotel review: The room"})
    ids = tokenizer(" was good")["input_ids"]
    number, info = write(env, ids)
    assert (number, info["completion"], info["finish_reason"]) == (len(ids), " ", "stop")


def test_rows_stop_each_for_itself(tokenizer: Any) -> None:
    envs = TextGenVectorEnv(3, stop_strings=["."], reward_model=zero)
    envs.reset(seed=0)
    (dot,), (word,) = tokenizer(".")["input_ids"], tokenizer(" good")["input_ids"]
    assert envs.step(np.array([word, dot, word]))[2].tolist() == [False, True, False]
    assert envs.step(np.array([dot, word, word]))[2].tolist() == [True, False, False]


def test_a_special_token_may_be_a_stop_string(tmp_path: Any) -> None:
    folder = checkpoints.language_model(tmp_path, "gemma")
    env = TextGenEnv(model=folder, stop_strings=["<end_of_turn>"], reward_model=zero, prompts=["what is a cat"])
    env.reset(seed=0)
    ids = env.tokenizer("a cat<end_of_turn>", add_special_tokens=False)["input_ids"]
    number, info = write(env, ids)
    assert (number, info["completion"], info["finish_reason"]) == (len(ids), "a cat", "stop")


def test_a_string_whose_pieces_a_special_token_separates_neither_ends_nor_cuts_a_text(tokenizer: Any) -> None:
    env = TextGenEnv(stop_strings=["it ran"], reward_model=zero, max_new_tokens=12)
    env.reset(options={"prompt": "Hotel review: The"})
    (pad,) = tokenizer("<pad>")["input_ids"]
    ids = [*tokenizer(" dog, it")["input_ids"], pad, *tokenizer(" ran away")["input_ids"], tokenizer.eos_token_id]
    assert len(ids) <= 12
    number, info = write(env, ids)
    assert (number, info["completion"], info["finish_reason"]) == (len(ids), " dog, it ran away", "stop")


@given(text=st.text(max_size=12), string=st.text(min_size=1, max_size=4))
def test_a_text_in_any_script_ends_as_soon_as_it_contains_the_string(text: str, string: str) -> None:
    env = TextGenEnv(stop_strings=[string], reward_model=zero, max_new_tokens=110, prompts=["Hotel review:"])
    env.reset(seed=0)
    ids = [token for token in env.tokenizer(text + string)["input_ids"] if token > 1]
    assume(string in env.tokenizer.decode(ids))  # unless half a character is left
    number, info = write(env, ids)
    assert string not in env.tokenizer.decode(ids[: number - 1])
    assert string in env.tokenizer.decode(ids[:number])
    assert info["completion"] == env.tokenizer.decode(ids[:number]).partition(string)[0]


@pytest.mark.parametrize("strings", ["Human:", [""], [3], 3, None, iter(["a"])])
def test_anything_but_a_list_of_strings_is_refused(strings: Any) -> None:
    with pytest.raises(ValueError, match=r"stop_strings=.* must be a list of strings"):
        TextGenVectorEnv(1, stop_strings=strings, reward_model=zero)
