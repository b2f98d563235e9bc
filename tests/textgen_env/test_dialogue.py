from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from textgen_env import RewardModel, TextGenEnv, TextGenVectorEnv

from tests.textgen_env import checkpoints
from tests.textgen_env.checkpoints import HH_MESSAGES, HH_PROMPT

EOS, WORD = 1, 300
ROOM = "Hotel review: The room"


def zero(completions: list[Any], **_: Any) -> list[float]:
    return [0.0] * len(completions)


def and_then(prompts: list[Any], **_: Any) -> list[str]:
    return [" And then?"] * len(prompts)


def dialogue_env(num_envs: int = 1, **arguments: Any) -> TextGenVectorEnv:
    defaults = {"reward_model": zero, "reply": and_then, "max_turns": 2, "prompts": [ROOM]}
    defaults |= {"max_new_tokens": 4, "max_reply_tokens": 16}
    return TextGenVectorEnv(num_envs, **(defaults | arguments))


def text_of(envs: Any, observation: dict[str, Any], row: int = 0) -> list[int]:
    return observation["input_ids"][row, : observation["length"][row, 0]].tolist()  # type: ignore[no-any-return]


def say(envs: TextGenVectorEnv, ids: list[int]) -> Any:
    """Let the only row write tokens; what the last step returns."""
    for token in ids:
        result = envs.step(np.array([token]))
    return result


# -- what is appended --------------------------------------------------------------------------------------------------


def test_a_reply_follows_the_token_that_ends_a_turn_and_begins_the_next_one(tokenizer: Any) -> None:
    envs = dialogue_env()
    start, _ = envs.reset(seed=0)
    observation, rewards, terminations, _, infos = say(envs, [WORD, EOS])
    reply = tokenizer(" And then?")["input_ids"]
    assert text_of(envs, observation) == [*text_of(envs, start), WORD, EOS, *reply]
    assert observation["prompt_length"].tolist() == observation["length"].tolist()
    assert (rewards.tolist(), terminations.tolist(), infos) == ([0.0], [False], {})
    assert observation in envs.observation_space


def test_the_score_comes_after_the_last_turn_for_the_whole_conversation(tokenizer: Any) -> None:
    seen: dict[str, Any] = {}

    def spy(**arguments: Any) -> list[float]:
        seen.update(arguments)
        return [2.5]

    envs = dialogue_env(reward_model=spy, prompts=[{"prompt": ROOM, "topic": "hotel"}])
    envs.reset(seed=0)
    good, bad = tokenizer(" was good.")["input_ids"], tokenizer(" It was bad.")["input_ids"]
    say(envs, [*good, EOS])
    assert seen == {}
    assert len(bad) == 4  # ends by its length
    _, rewards, terminations, _, infos = say(envs, bad)
    assert (rewards.tolist(), terminations.tolist()) == ([2.5], [True])
    after = [*good, EOS, *tokenizer(" And then?")["input_ids"], *bad]
    assert seen == {
        "prompts": [ROOM],
        "completions": [" was good. And then? It was bad."],
        "completion_ids": [after],
        "turns": [[" was good.", " And then?", " It was bad."]],
        "topic": ["hotel"],
    }
    final = {key: value[0] for key, value in infos["final_info"].items() if not isinstance(value, dict)}
    assert final["turns"] == [" was good.", " And then?", " It was bad."]
    assert final["completion"] == seen["completions"][0]
    assert final["completion_ids"] == after
    assert final["finish_reason"] == "length"
    assert infos["final_info"]["episode"]["l"].tolist() == [len(good) + 1 + len(bad)]
    assert infos["final_obs"][0]["length"][0] == len(tokenizer(ROOM)["input_ids"]) + len(after)


def test_only_the_ending_of_the_last_turn_costs_the_penalty() -> None:
    envs = dialogue_env(missing_eos_penalty=1.0)
    envs.reset(seed=0)
    say(envs, [WORD] * 4)
    assert say(envs, [EOS])[1].tolist() == [0.0]
    say(envs, [EOS])
    assert say(envs, [WORD] * 4)[1].tolist() == [-1.0]


@pytest.mark.parametrize("architecture", ["qwen2", "llama", "gemma"])
def test_a_chat_goes_on_exactly_as_its_template_would_render_it(architecture: str, tmp_path: Path) -> None:
    folder = checkpoints.language_model(tmp_path, architecture)
    tokenizer = checkpoints.TOKENIZERS[architecture]()
    stops = ["<end_of_turn>"] if architecture == "gemma" else []
    end = tokenizer.convert_tokens_to_ids(stops[0]) if stops else tokenizer.eos_token_id
    envs = dialogue_env(
        model=folder, prompts=[HH_MESSAGES], reply=lambda prompts, **_: ["and why"], max_turns=3, max_reply_tokens=60,
        max_new_tokens=8, stop_strings=stops,
    )  # fmt: skip
    envs.reset(seed=0)
    chat = [*HH_MESSAGES]
    for _ in range(2):
        observation, *_ = say(envs, [*tokenizer("a cat", add_special_tokens=False)["input_ids"], end])
        chat += [{"role": "assistant", "content": "a cat"}, {"role": "user", "content": "and why"}]
        rendered = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        assert text_of(envs, observation) == tokenizer(rendered, add_special_tokens=False)["input_ids"]


def test_what_a_reply_changes_of_its_arguments_changes_no_conversation(tmp_path: Path) -> None:
    def vandal(prompts: Any, completions: Any, turns: Any, answers: Any, **_: Any) -> list[str]:
        assert (len(prompts[0]), len(completions[0]), len(turns[0]), answers) == (3, 1, 1, [["a"]])
        prompts[0].extend(completions[0])
        turns[0].append("x")
        answers[0].append("x")
        return ["and why"]

    folder = checkpoints.language_model(tmp_path)
    prompts = [{"prompt": copy.deepcopy(HH_MESSAGES), "answers": ["a"]}]
    envs = dialogue_env(model=folder, prompts=prompts, reply=vandal, max_reply_tokens=60)
    envs.reset(seed=0)
    for _ in range(2):
        assert say(envs, [envs.tokenizer.eos_token_id] * 2)[2].tolist() == [True]


def test_a_turn_that_was_too_long_gets_its_end_from_the_template(tmp_path: Path) -> None:
    folder = checkpoints.language_model(tmp_path)
    tokenizer = checkpoints.chatml_tokenizer()
    envs = dialogue_env(model=folder, prompts=[HH_MESSAGES], max_reply_tokens=60)
    start, _ = envs.reset(seed=0)
    ids = tokenizer("zebra", add_special_tokens=False)["input_ids"][:4]
    assert len(ids) == 4
    observation, *_ = say(envs, ids)
    added = tokenizer.decode(text_of(envs, observation)[len(text_of(envs, start)) + 4 :])
    assert added == "<|im_end|>\n<|im_start|>user\n And then?<|im_end|>\n<|im_start|>assistant\n"


def test_a_chats_conversation_reaches_functions_as_messages(tmp_path: Path) -> None:
    seen: list[dict[str, Any]] = []

    def spy(**arguments: Any) -> list[Any]:
        seen.append(arguments)
        return ["and why"] if "completion_ids" not in arguments else [0.0]

    folder = checkpoints.language_model(tmp_path)
    envs = dialogue_env(
        model=folder, prompts=[{"prompt": HH_MESSAGES, "n": 7}], reply=spy, reward_model=spy, max_reply_tokens=60
    )
    envs.reset(seed=0)
    cat, dog = (envs.tokenizer(text, add_special_tokens=False)["input_ids"][:2] for text in ("a cat", "dog"))
    eos = envs.tokenizer.eos_token_id
    say(envs, [*cat, eos])
    *_, infos = say(envs, [*dog, eos])
    first, second = envs.tokenizer.decode(cat), envs.tokenizer.decode(dog)
    answer = {"role": "assistant", "content": first}
    assert seen[0] == {"prompts": [HH_MESSAGES], "completions": [[answer]], "turns": [[first]], "n": [7]}
    rest = [answer, {"role": "user", "content": "and why"}, {"role": "assistant", "content": second}]
    assert seen[1]["completions"] == [rest]
    assert seen[1]["turns"] == [[first, "and why", second]]
    assert infos["final_info"]["completion"][0] == f"{first}\n\nand why\n\n{second}"


def test_a_stop_string_that_the_reply_begins_with_is_not_written_twice(tokenizer: Any) -> None:
    envs = dialogue_env(stop_strings=["."], reply=lambda prompts, **_: [". The lobby"])
    start, _ = envs.reset(seed=0)
    ids = tokenizer(" was good.")["input_ids"]
    observation, *_ = say(envs, ids)
    assert text_of(envs, observation) == [*text_of(envs, start), *ids, *tokenizer(" The lobby")["input_ids"]]
    *_, infos = say(envs, tokenizer(" was bad.")["input_ids"])
    assert infos["final_info"]["completion"][0] == " was good. The lobby was bad"
    assert infos["final_info"]["turns"][0] == [" was good", ". The lobby", " was bad"]


def test_a_reward_model_reads_a_long_transcript_as_a_conversation(tmp_path: Path) -> None:
    lm, rm = checkpoints.language_model(tmp_path / "lm"), checkpoints.reward_model(tmp_path / "rm")
    reply = "\n\nHuman: why\n\nAssistant:"
    envs = dialogue_env(
        model=lm, reward_model=rm, prompts=[HH_PROMPT], reply=lambda prompts, **_: [reply], stop_strings=["\n\nHuman:"],
        max_new_tokens=30, max_reply_tokens=30,
    )  # fmt: skip
    envs.reset(seed=0)
    say(envs, envs.tokenizer(" a cat\n\nHuman:")["input_ids"])
    _, rewards, *_, infos = say(envs, envs.tokenizer(" a dog\n\nHuman:")["input_ids"])
    assert infos["final_info"]["completion"][0] == f" a cat{reply} a dog"
    chat = [{"role": "assistant", "content": "a cat"}, {"role": "user", "content": "why"}]
    (expected,) = RewardModel(rm)([HH_MESSAGES], [[*chat, {"role": "assistant", "content": "a dog"}]])
    assert rewards[0] == pytest.approx(expected, abs=1e-5)


# -- who is asked, and when --------------------------------------------------------------------------------------------


def test_none_ends_a_conversation_and_turns_that_end_together_are_asked_of_in_one_call() -> None:
    asked: list[list[list[str]]] = []

    def reply(turns: list[list[str]], prompts: list[str], **_: Any) -> list[str | None]:
        asked.append([list(texts) for texts in turns])
        return [None if "bed" in prompt else " Why?" for prompt in prompts]

    envs = dialogue_env(4, reply=reply, max_turns=3)
    envs.reset(seed=0, options={"prompts": [ROOM, "Hotel review: The bed", ROOM, ROOM]})
    assert asked == []
    _, _, terminations, _, infos = envs.step(np.array([EOS, EOS, WORD, EOS]))
    assert asked == [[[""], [""], [""]]]
    assert terminations.tolist() == [False, True, False, False]
    assert infos["final_info"]["turns"][1] == [""]
    envs.step(np.array([EOS, WORD, WORD, WORD]))
    assert asked[1] == [["", " Why?", ""]]
    *_, terminations, _, _ = envs.step(np.array([EOS, WORD, EOS, WORD]))
    assert len(asked) == 3  # the first row has no turn left, the third has written one
    assert terminations.tolist() == [True, False, False, False]


def test_every_turn_has_the_same_room_and_the_longest_conversation_fills_the_observation(tokenizer: Any) -> None:
    reply = " And then? And then?"
    envs = dialogue_env(max_turns=3, max_reply_tokens=len(tokenizer(reply)["input_ids"]), reply=lambda **_: [reply])
    envs.reset(seed=0)
    *_, terminations, _, infos = say(envs, [WORD] * 12)
    assert terminations.tolist() == [True]
    assert infos["final_obs"][0]["length"][0] == envs.single_observation_space["input_ids"].shape[0]
    assert infos["final_info"]["episode"]["l"].tolist() == [12]


def test_a_row_that_starts_anew_has_forgotten_its_conversation() -> None:
    envs = dialogue_env()
    first, _ = envs.reset(seed=0)
    say(envs, [WORD, EOS])
    observation, *_ = say(envs, [EOS])
    assert text_of(envs, observation) == text_of(envs, first)
    assert (observation["input_ids"][0, observation["length"][0, 0] :] == 0).all()
    say(envs, [EOS])
    *_, infos = say(envs, [WORD, EOS])
    assert len(infos["final_info"]["turns"][0]) == 3
    say(envs, [WORD, EOS])
    envs.reset(seed=0)
    say(envs, [EOS])
    *_, infos = say(envs, [EOS])
    assert infos["final_info"]["turns"][0] == ["", " And then?", ""]


def test_rows_side_by_side_write_what_single_environments_write() -> None:
    prompts = [ROOM, "Phone review:", "About this film: The plot"]

    def reply(turns: list[list[str]], **_: Any) -> list[str | None]:
        return [None if len(texts[-1]) > 15 else f" {len(texts)}?" for texts in turns]

    def score(completion_ids: list[list[int]], **_: Any) -> list[float]:
        return [float(sum(ids)) for ids in completion_ids]

    arguments = {"reply": reply, "max_turns": 3, "reward_model": score, "max_new_tokens": 4, "stop_strings": ["."]}
    arguments["max_reply_tokens"] = 8
    envs = TextGenVectorEnv(3, prompts=prompts, **arguments)
    singles = [TextGenEnv(prompts=prompts, **arguments) for _ in prompts]
    observations, _ = envs.reset(options={"prompts": prompts})
    for env, prompt in zip(singles, prompts, strict=True):
        env.reset(options={"prompt": prompt})
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
            seen = infos["final_obs"][row] if terminated else {key: values[row] for key, values in observations.items()}
            assert all((observation[key] == seen[key]).all() for key in observation)
            if terminated:
                assert infos["final_info"]["turns"][row] == info["turns"]


# -- what is refused ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"reply": None}, r"max_turns=2 needs reply"),
        ({"max_turns": 1}, r"max_turns=1 leaves no turn after a reply"),
        ({"reply": lambda prompts: [None]}, r"reply cannot .*: got an unexpected keyword argument 'completions'"),
        ({"max_reply_tokens": 0}, r"max_reply_tokens=0 must be an integer, at least 1"),
        ({"max_new_tokens": 60}, r"max_new_tokens=60 \(x 2\) \+ max_reply_tokens=16 \(x 1\) exceed the 128"),
    ],
)
def test_arguments_that_cannot_work_are_named(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dialogue_env(**arguments)


@pytest.mark.parametrize(
    ("replies", "message"),
    [
        (None, r"reply returned None: a list is needed"),
        ("of one", r"reply returned 'of one': a list is needed"),
        ([], r"reply returned 0 values for 1 conversations"),
        ([3], r"reply returned 3: a string is needed, or None"),
        ([""], r"reply returned '', which is written as 0 tokens"),
        ([" And then?" * 9], r"written as \d+ tokens; .* max_reply_tokens=8: raise that, or shorten the reply"),
    ],
)
def test_replies_that_cannot_be_written_are_named(replies: list[Any], message: str) -> None:
    envs = dialogue_env(reply=lambda **_: replies, max_reply_tokens=8)
    envs.reset(seed=0)
    with pytest.raises(ValueError, match=message):
        say(envs, [EOS])


def test_a_template_for_one_turn_alone_is_refused_before_the_first_step(tokenizer: Any) -> None:
    chat = [{"role": "user", "content": ROOM}]
    tokenizer.chat_template = "{{ messages[0]['content'] }}"
    with pytest.raises(ValueError, match=r"reply: the tokenizer's chat template leaves the assistant's text out"):
        dialogue_env(tokenizer=tokenizer, prompts=[chat])
    tokenizer.chat_template = "{% if messages|length > 1 %}{{ raise_exception('one turn') }}{% endif %}hello"
    with pytest.raises(ValueError, match=r"reply: the tokenizer's chat template refuses a second turn: one turn"):
        dialogue_env(tokenizer=tokenizer, prompts=[chat])
