from __future__ import annotations

import copy
import functools
import threading
from typing import Any

import numpy as np
import pytest
import torch
from textgen_env import RewardModel, TextGenEnv, TextGenVectorEnv
from textgen_env.gold import gold_reward
from textgen_env.rewards import RewardSum, make_reward

PROMPTS = ["Hotel review:", "About this film: The", "Phone review: The", "Review of a book:"]
TEXTS = [" The room was great.", " plot was dull, but the cast was superb. I hated the script.", " case", ""]
CHAT = [{"role": "user", "content": "Hotel review:"}]


def total(reward: RewardSum, prompts: list[Any], texts: list[Any], **columns: list[Any]) -> tuple[Any, Any]:
    return reward(prompts, texts, [[1]] * len(texts), columns)


def test_functions_get_columns_and_chats_as_messages() -> None:
    seen: dict[str, Any] = {}

    def spy(**arguments: Any) -> list[float]:
        seen.update(arguments)
        return [0.0] * len(arguments["completions"])

    prompts = [{"prompt": CHAT, "answer": 42}]
    envs = TextGenVectorEnv(1, prompts=prompts, reward_model=spy)
    envs.reset(seed=0)
    envs.step(np.array([1]))
    assert seen == {
        "prompts": [CHAT],
        "completions": [[{"role": "assistant", "content": ""}]],
        "completion_ids": [[1]],
        "answer": [42],
    }


def test_what_a_function_changes_of_its_arguments_is_neither_the_next_ones_nor_the_next_texts() -> None:
    seen: list[Any] = []

    def vandal(prompts: Any, completions: Any, completion_ids: Any, answers: Any, table: Any, **_: Any) -> list[float]:
        seen.append(copy.deepcopy([prompts, completions, completion_ids, answers, [list(value) for value in table]]))
        prompts[0].extend(completions[0])
        prompts[0][0]["content"] = ""
        completions[0][0]["content"] = "mine"
        completion_ids[0].clear()
        answers[0]["right"].append("x")
        answers.clear()
        table[0] += 1
        return [0.0]

    row = {"prompt": copy.deepcopy(CHAT), "answers": {"right": ["a"]}, "table": np.zeros(2)}
    envs = TextGenVectorEnv(1, prompts=[row], reward_model=[vandal, vandal])
    envs.reset(seed=0)
    infos = [envs.step(np.array([1]))[-1]["final_info"] for _ in range(2)]
    assert seen == [[[CHAT], [[{"role": "assistant", "content": ""}]], [[1]], [{"right": ["a"]}], [[0.0, 0.0]]]] * 4
    for info in infos:
        assert (info["prompt"][0], info["completion_ids"][0]) == (CHAT, [1])
        info["prompt"][0].clear()
    assert envs.step(np.array([1]))[-1]["final_info"]["prompt"][0] == CHAT


def test_a_column_may_hold_what_cannot_be_copied() -> None:
    held = threading.Lock()

    def is_held(lock: Any, **_: Any) -> list[float]:
        return [float(lock[0][0] is held)]

    envs = TextGenVectorEnv(1, prompts=[{"prompt": "a", "lock": [held]}], reward_model=is_held)
    envs.reset(seed=0)
    assert envs.step(np.array([1]))[1].tolist() == [1.0]


def test_parts_are_weighted_in_the_sum_and_reported_unweighted_under_unique_names() -> None:
    def quality(completions: list[str], **_: Any) -> list[float]:
        return [1.0] * len(completions)

    first = make_reward([quality, quality, "textgen_env:assets/reward_model"], [2.0, 0.5, 0.0])
    totals, parts = total(first, ["Hotel review:"], [" The room was great."])
    assert totals.tolist() == [2.5]
    assert list(parts[0]) == ["quality", "quality_2", "reward_model"]
    assert parts[0]["quality"] == parts[0]["quality_2"] == 1.0


def test_a_function_with_an_underscore_for_its_name_to_begin_with_is_reported_like_others() -> None:
    def _length(completions: list[str], **_: Any) -> list[float]:
        return [0.5] * len(completions)

    def length(completions: list[str], **_: Any) -> list[float]:
        return [2.0] * len(completions)

    def _(completions: list[str], **_: Any) -> list[float]:
        return [3.0] * len(completions)

    functions = [_length, length, _, lambda completions, **_: [4.0] * len(completions)]
    envs = TextGenVectorEnv(2, reward_model=functions)
    envs.reset(seed=0)
    infos = envs.step(np.array([1, 300]))[-1]
    parts = {name: values for name, values in infos["final_info"]["reward_parts"].items() if name[0] != "_"}
    assert {name: values[0] for name, values in parts.items()} == {
        "length": 0.5,
        "length_2": 2.0,
        "reward": 3.0,
        "<lambda>": 4.0,
    }


def test_none_means_not_applicable_but_every_text_needs_one_score() -> None:
    def short(completions: list[str], **_: Any) -> list[float | None]:
        return [1.0 if len(text) < 3 else None for text in completions]

    def long(completions: list[str], **_: Any) -> list[float | None]:
        return [2.0 if len(text) > 5 else None for text in completions]

    totals, parts = total(RewardSum([short, long]), ["", ""], ["a", "aaaaaa"])
    assert totals.tolist() == [1.0, 2.0]
    assert parts == [{"short": 1.0}, {"long": 2.0}]
    with pytest.raises(ValueError, match=r"no reward function scores completion 1 \('aaaa'\)"):
        total(RewardSum([short, long]), ["", ""], ["a", "aaaa"])


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([1.0], "'broken' returned 1 values for 2 completions"),
        ([1.0, float("nan")], r"'broken' returned nan for completion 1 \('second'\)"),
        ([float("inf"), 1.0], r"'broken' returned inf for completion 0 \('first'\)"),
        ([1.0, "2.0"], r"'broken' returned '2.0' for completion 1 \('second'\); return a finite number"),
        ([1.0, torch.ones(2)], r"'broken' returned tensor\(.*\) for completion 1"),
        (np.ones((2, 3)), "'broken' returned 6 values for 2 completions"),
        (None, "'broken' returned None; return a list with one number per completion"),
        (1.0, "'broken' returned 1.0; return a list"),
        ("ab", "'broken' returned 'ab'; return a list"),
        ({0: 1.0, 1: 1.0}, "'broken' returned {0: 1.0, 1: 1.0}; return a list"),
    ],
)
def test_bad_values_name_the_function_and_the_completion(values: Any, message: str) -> None:
    def broken(**_: Any) -> Any:
        return values

    with pytest.raises(ValueError, match=message):
        total(RewardSum([broken]), ["", ""], ["first", "second"])


@pytest.mark.filterwarnings("ignore:coroutine .* was never awaited")
def test_an_async_function_is_refused() -> None:
    async def late(**_: Any) -> list[float]:
        return [1.0]

    with pytest.raises(ValueError, match=r"'late' returned <coroutine object .*; return a list"):
        total(RewardSum([late]), [""], ["a"])


@pytest.mark.parametrize(
    "values",
    [np.array([1, 2]), np.array([[1.0], [2.0]]), torch.tensor([[1.0], [2.0]], requires_grad=True), (np.bool_(True), 2)],
)
def test_arrays_tensors_and_tuples_are_values_too(values: Any) -> None:
    totals, _ = total(RewardSum([lambda **_: values]), ["", ""], ["a", "b"])
    assert totals.tolist() == [1.0, 2.0]


def test_functions_are_not_run_at_construction() -> None:
    def explosive(**_: Any) -> list[float]:
        raise AssertionError

    TextGenVectorEnv(1, reward_model=explosive).reset(seed=0)


def test_a_module_with_the_arguments_of_a_reward_function_is_one() -> None:
    class Length(torch.nn.Linear):
        def forward(self, completions: list[str], **_: Any) -> torch.Tensor:
            return super().forward(torch.tensor([[float(len(text))] for text in completions]))

    torch.manual_seed(0)
    module = Length(1, 1)
    totals, parts = total(make_reward(module), ["", ""], ["a", "abc"])
    assert totals.tolist() == module(["a", "abc"]).flatten().tolist()
    assert list(parts[0]) == ["Length"]
    with pytest.raises(ValueError, match=r"reward_model: Linear is neither .* nor a reward function: .* completions"):
        TextGenVectorEnv(1, reward_model=torch.nn.Linear(1, 1))


def with_answers(prompts: list[str], completions: list[str], completion_ids: list[list[int]], answer: list[Any]) -> Any:
    return [float(text == wanted) for text, wanted in zip(completions, answer, strict=True)]


@pytest.mark.parametrize(
    ("function", "prompts", "message"),
    [
        (lambda texts: [0.0] * len(texts), ["a"], r"'<lambda>' cannot .*completion_ids=\.\.\.\): missing .* 'texts'"),
        (lambda prompts, completions: [0.0], ["a"], r"unexpected keyword argument 'completion_ids'.* \*\*columns"),
        (with_answers, ["a"], r"'with_answers' cannot be called .*: missing a required argument: 'answer'"),
        (with_answers, [{"prompt": "a", "answer": 1, "level": 2}], "unexpected keyword argument 'level'"),
    ],
)
def test_functions_that_take_other_arguments_are_refused_before_they_are_called(
    function: Any, prompts: Any, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        TextGenVectorEnv(1, prompts=prompts, reward_model=function)


def test_functions_are_called_that_take_what_there_is_or_do_not_tell() -> None:
    class Untold:
        __signature__ = "not a signature"

        def __call__(self, completions: list[str], **_: Any) -> list[float]:
            return [0.0] * len(completions)

    prompts = [{"prompt": "a", "answer": 1}]
    for function in (with_answers, functools.partial(with_answers, answer=None), Untold()):
        TextGenVectorEnv(1, prompts=prompts, reward_model=function)
    TextGenVectorEnv(1, prompts=["a"], reward_model=functools.partial(with_answers, answer=["b"]))


def test_a_column_that_a_prompt_lacks_is_none_even_where_no_other_prompt_is_scored() -> None:
    seen: list[Any] = []

    def reward(completions: list[str], answer: list[Any], **_: Any) -> list[float]:
        seen.extend(answer)
        return [0.0] * len(completions)

    env = TextGenEnv(
        prompts=[{"prompt": "a", "answer": "b"}, "c"], reward_model=reward, max_new_tokens=1, max_prompt_tokens=8
    )
    for prompt in ("c", "other", {"prompt": "a", "answer": "d"}):
        env.reset(options={"prompt": prompt})
        env.step(5)
    assert seen == [None, None, "d"]


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("reward_tokenizer", "some/tokenizer"),
        ("reward_batch_size", 8),
        ("reward_device", "cuda"),
        ("reward_model_kwargs", {"dtype": "bfloat16"}),
        ("reward_column", 0),
    ],
)
def test_arguments_of_reward_models_are_refused_where_there_are_only_functions(argument: str, value: Any) -> None:
    def zero(completions: list[str], **_: Any) -> list[float]:
        return [0.0] * len(completions)

    scorer = RewardModel("textgen_env:assets/reward_model")
    for functions in (zero, [zero, scorer]):
        with pytest.raises(ValueError, match=rf"^{argument}=.* reward_model names none: leave it out"):
            TextGenVectorEnv(1, reward_model=functions, **{argument: value})
    TextGenVectorEnv(1, reward_model=[zero, scorer.model], reward_batch_size=8)


def test_the_gold_scorer_is_a_reward_function() -> None:
    answer = [{"role": "assistant", "content": " was perfect."}]
    totals, parts = total(make_reward(gold_reward), ["Hotel review: The room", CHAT], [" was perfect.", answer])
    assert totals.tolist() == [1.0, 0.0]
    assert list(parts[0]) == ["gold_reward"]
