from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from textgen_env.assets import preferences
from textgen_env.assets.build import Recipe, build, describe, save, write_prompts
from textgen_env.assets.language import (
    Sample,
    corpus,
    model_config,
    perplexity,
    pretrain,
    sample,
    token_losses,
    train_tokenizer,
)
from textgen_env.assets.preferences import label, pair_accuracy, scores, text_of
from textgen_env.gold import GoldScore, gold_score
from textgen_env.resolve import resolve
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

ASSETS = Path(resolve("textgen_env:assets/report.json")).parent
REPORT: dict[str, Any] = json.loads((ASSETS / "report.json").read_text())
PROMPTS = [json.loads(line)["prompt"] for line in (ASSETS / "prompts.jsonl").read_text().splitlines()]


@cache
def loaded(folder: str) -> tuple[Any, Any]:
    kind = AutoModelForCausalLM if folder == "lm" else AutoModelForSequenceClassification
    return kind.from_pretrained(ASSETS / folder).eval(), AutoTokenizer.from_pretrained(ASSETS / folder)


@cache
def drawn() -> tuple[list[Sample], list[Sample]]:
    """Two samples of the language model for each of 192 prompts."""
    torch.manual_seed(0)
    model, tokenizer = loaded("lm")
    return sample(model, tokenizer, PROMPTS[:192], 32), sample(model, tokenizer, PROMPTS[:192], 32)


def test_assets_are_small_and_load_in_single_precision() -> None:
    size = sum(file.stat().st_size for file in ASSETS.rglob("*") if file.is_file() and "__pycache__" not in file.parts)
    assert size <= 8 * 2**20
    for folder in ("lm", "reward_model"):
        model, tokenizer = loaded(folder)
        assert model.dtype == torch.float32
        assert model.num_parameters() == REPORT["language_model" if folder == "lm" else folder]["parameters"]
        assert len(tokenizer) == model.config.vocab_size
        assert tokenizer.pad_token_id != tokenizer.eos_token_id


def test_prompts_are_distinct_short_and_without_opinion() -> None:
    tokenizer = loaded("lm")[1]
    assert len(set(PROMPTS)) == len(PROMPTS) >= 200
    lengths = [len(ids) for ids in tokenizer(PROMPTS)["input_ids"]]
    assert 3 <= min(lengths)
    assert max(lengths) <= 12
    assert {gold_score(prompt).sentiment for prompt in PROMPTS} == {0.0}


def test_the_language_model_is_as_good_and_as_balanced_as_reported() -> None:
    model, tokenizer = loaded("lm")
    claims = REPORT["language_model"]
    seen = describe(drawn()[0] + drawn()[1], tokenizer)
    assert claims["grammatical_sentences"] >= 0.9
    assert seen["grammatical_sentences"] >= 0.9
    assert seen["ended_by_eos"] >= 0.95
    assert abs(seen["gold_mean"] - claims["gold_mean"]) < 0.05
    assert 0.4 < claims["gold_mean"] < 0.6
    assert abs(seen["sentiment_mean"]) < 0.15
    assert perplexity(model, tokenizer, corpus(256, 12345)) == pytest.approx(claims["held_out_perplexity"], rel=0.03)


def test_the_reward_model_is_good_but_not_gold() -> None:
    model, tokenizer = loaded("reward_model")
    pairs = label(list(zip(*drawn(), strict=True)), rng=Random(0), temperature=0, flip=0)
    assert 0.75 <= REPORT["reward_model"]["pair_accuracy"] < 0.95
    assert abs(pair_accuracy(model, tokenizer, pairs) - REPORT["reward_model"]["pair_accuracy"]) < 0.07
    with torch.no_grad():
        values = scores(model, tokenizer, [text_of(one) for one in drawn()[0]])
    assert abs(float(values.mean())) < 0.25
    assert float(values.std()) == pytest.approx(1.0, abs=0.2)


def test_degenerate_text_beats_every_sample_in_proxy_and_is_worthless_in_gold() -> None:
    model, tokenizer = loaded("reward_model")
    claims = REPORT["reward_model"]
    fooled, best = claims["degenerate_text"]["text"], claims["best_sample"]["text"]
    with torch.no_grad():
        proxy, natural = scores(model, tokenizer, [fooled, best]).tolist()
    assert proxy > natural
    assert gold_score(fooled).score < 0.1
    assert gold_score(best).score > 0.6


def test_training_on_reviews_lowers_the_loss_and_saving_keeps_the_model(tmp_path: Path) -> None:
    torch.manual_seed(0)
    texts = corpus(1600, seed=1)
    tokenizer = train_tokenizer(texts, vocab_size=400)
    assert tokenizer.decode(tokenizer(texts[0])["input_ids"]) == texts[0]
    config = model_config(tokenizer, hidden_size=32, num_hidden_layers=1, intermediate_size=32)
    model = pretrain(tokenizer, texts, config)
    held_out = corpus(32, seed=2)
    assert perplexity(model, tokenizer, held_out) < len(tokenizer) / 2
    save(model, tokenizer, tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert again.dtype == torch.float32
    with torch.no_grad():
        kept = token_losses(again, AutoTokenizer.from_pretrained(tmp_path), held_out)
        assert torch.allclose(kept, token_losses(model.float(), tokenizer, held_out), atol=1e-6)


def test_prompts_depend_on_the_seed_alone() -> None:
    assert write_prompts(20, seed=3) == write_prompts(20, seed=3) != write_prompts(20, seed=4)


def test_a_small_build_is_complete_and_the_same_bytes_every_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A model this small writes gibberish, all of it worth 0: let a stand-in for the gold score tell texts apart.
    monkeypatch.setattr(preferences, "gold_score", lambda text: GoldScore(len(text) / 100, 0.0, 0.0, 0.0))
    sizes = {"hidden_size": 16, "layers": 1, "intermediate_size": 16, "reward_intermediate_size": 16}
    amounts = {"tokenizer_reviews": 200, "reviews": 256, "prompts": 16, "pairs": 32, "held_out": 32}
    recipe = Recipe(seed=1, vocab_size=400, max_new_tokens=8, reward_epochs=1, **sizes, **amounts)
    reports = [build(tmp_path / name, recipe) for name in ("one", "two")]
    assert reports[0] | {"cpu_seconds": 0} == reports[1] | {"cpu_seconds": 0}
    for file in ("lm/model.safetensors", "lm/tokenizer.json", "reward_model/model.safetensors", "prompts.jsonl"):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()
