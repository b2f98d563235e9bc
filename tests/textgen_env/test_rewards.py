from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from textgen_env import RewardModel, TextGenVectorEnv
from textgen_env.gold import gold_reward
from textgen_env.rewards import RewardSum, make_reward
from transformers import Qwen2Config, Qwen2ForSequenceClassification
from transformers.modeling_outputs import ModelOutput

PROMPTS = ["Hotel review:", "About this film: The", "Phone review: The", "Review of a book:"]
TEXTS = [" The room was great.", " plot was dull, but the cast was superb. I hated the script.", " case", ""]
CHAT = [{"role": "user", "content": "Hotel review:"}]


def tiny_classifier(**config: Any) -> Qwen2ForSequenceClassification:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1}
    settings = {"vocab_size": 1024, "intermediate_size": 16, "num_labels": 1, "max_position_embeddings": 64}
    return Qwen2ForSequenceClassification(Qwen2Config(**{**sizes, **settings, **config}))


def total(reward: RewardSum, prompts: list[Any], texts: list[str], **columns: list[Any]) -> tuple[Any, Any]:
    return reward(prompts, texts, [[1]] * len(texts), columns)


@pytest.fixture(scope="module")
def embedded() -> RewardModel:
    return RewardModel("textgen_env:assets/reward_model", batch_size=3)


def test_a_score_does_not_depend_on_the_batch(embedded: RewardModel) -> None:
    together = embedded(PROMPTS, TEXTS)
    alone = [embedded([prompt], [text])[0] for prompt, text in zip(PROMPTS, TEXTS, strict=True)]
    backwards = embedded(PROMPTS[::-1], TEXTS[::-1])[::-1]
    assert np.allclose(together, alone, atol=1e-5)
    assert np.allclose(together, backwards, atol=1e-5)
    assert len({round(score, 3) for score in together}) == 4


def test_a_score_is_the_classifiers_logit_of_prompt_and_completion_as_one_string(embedded: RewardModel) -> None:
    ids = embedded.tokenizer(PROMPTS[0] + TEXTS[0], return_tensors="pt")
    with torch.no_grad():
        expected = embedded.model(**ids).logits.item()
    assert embedded(PROMPTS[:1], TEXTS[:1])[0] == pytest.approx(expected, abs=1e-6)


def test_the_reward_of_an_episode_is_the_score_of_its_finished_text_alone(embedded: RewardModel) -> None:
    envs = TextGenVectorEnv(8, reward_model=embedded, max_new_tokens=6)
    envs.reset(seed=0)
    rng = np.random.default_rng(0)
    checked = 0
    for _ in range(12):
        actions = np.where(rng.random(8) < 0.3, 1, rng.integers(2, 1024, 8))
        _, rewards, terminations, _, infos = envs.step(actions)
        for row in np.flatnonzero(terminations):
            final = infos["final_info"]
            (alone,) = embedded([final["prompt"][row]], [final["completion"][row]])
            assert rewards[row] == pytest.approx(alone, abs=1e-5)
            checked += 1
    assert checked > 10


def test_chats_are_scored_through_the_reward_models_own_template(tokenizer: Any) -> None:
    tokenizer.chat_template = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    model = RewardModel(tiny_classifier(pad_token_id=0), tokenizer)
    (chat,) = model([CHAT], [[{"role": "assistant", "content": "Good."}]])
    (plain,) = model(["user: Hotel review:\nassistant: "], ["Good.\n"])
    assert chat == pytest.approx(plain, abs=1e-6)
    tokenizer.chat_template = None
    with pytest.raises(ValueError, match=r"has no chat template.*reward_tokenizer"):
        model([CHAT], [[{"role": "assistant", "content": "Good."}]])


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


def test_parts_are_weighted_in_the_sum_and_reported_unweighted_under_unique_names() -> None:
    def quality(completions: list[str], **_: Any) -> list[float]:
        return [1.0] * len(completions)

    first = make_reward([quality, quality, "textgen_env:assets/reward_model"], [2.0, 0.5, 0.0])
    totals, parts = total(first, ["Hotel review:"], [" The room was great."])
    assert totals.tolist() == [2.5]
    assert list(parts[0]) == ["quality", "quality_2", "reward_model"]
    assert parts[0]["quality"] == parts[0]["quality_2"] == 1.0


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
    ],
)
def test_bad_values_name_the_function_and_the_completion(values: list[float], message: str) -> None:
    def broken(**_: Any) -> list[float]:
        return values

    with pytest.raises(ValueError, match=message):
        total(RewardSum([broken]), ["", ""], ["first", "second"])


def test_functions_are_not_run_at_construction() -> None:
    def explosive(**_: Any) -> list[float]:
        raise AssertionError

    TextGenVectorEnv(1, reward_model=explosive).reset(seed=0)


def test_a_reward_model_that_fails_to_load_raises(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises((OSError, ValueError)):
        TextGenVectorEnv(1, reward_model=str(tmp_path))


def test_a_classifier_with_several_labels_is_refused_unless_it_has_a_score(tokenizer: Any) -> None:
    class Scored(Qwen2ForSequenceClassification):
        def forward(self, *arguments: Any, **named: Any) -> ModelOutput:
            logits = super().forward(*arguments, **named).logits
            return ModelOutput(logits=logits, score=logits.sum(dim=1))

    model = tiny_classifier(num_labels=3, pad_token_id=0)
    with pytest.raises(ValueError, match=r"gives \(3,\) values per text.*num_labels=1"):
        RewardModel(model, tokenizer)
    model.__class__ = Scored
    assert len(RewardModel(model, tokenizer)(PROMPTS, TEXTS)) == 4


def test_a_reward_model_without_pad_token_is_refused_and_its_tokenizers_pad_is_used(tokenizer: Any) -> None:
    assert RewardModel(tiny_classifier(), tokenizer).model.config.pad_token_id == 0
    tokenizer.pad_token = None
    with pytest.raises(ValueError, match=r"no pad token .*reward_tokenizer"):
        RewardModel(tiny_classifier(), tokenizer)


def test_a_loaded_reward_model_of_unknown_origin_needs_a_tokenizer() -> None:
    with pytest.raises(ValueError, match=r"does not say where its tokenizer is: pass reward_tokenizer"):
        RewardModel(tiny_classifier(pad_token_id=0))


def test_a_text_longer_than_the_reward_models_context_is_refused(tokenizer: Any) -> None:
    model = RewardModel(tiny_classifier(max_position_embeddings=8), tokenizer)
    with pytest.raises(ValueError, match=r"takes 8 tokens but a text has \d+: lower max_prompt_tokens"):
        model(["Hotel review:" * 5], [""])


def test_the_gold_scorer_is_a_reward_function() -> None:
    totals, parts = total(make_reward(gold_reward), ["Hotel review: The room", CHAT], [" was perfect."] * 2)
    assert totals.tolist() == [1.0, 0.0]
    assert list(parts[0]) == ["gold_reward"]
