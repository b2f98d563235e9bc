"""Make the embedded assets: `python -m textgen_env.assets.build [--out DIR] [--seed 0]`.

Writes a language model (`lm`), a reward model (`reward_model`), `prompts.jsonl` and `report.json`. On one machine with
one thread the same seed gives the same bytes, but for the seconds in the report.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from random import Random
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from textgen_env.assets.grammar import WORD, write_review
from textgen_env.assets.language import (
    Sample,
    corpus,
    model_config,
    perplexity,
    pretrain,
    sample,
    train_tokenizer,
)
from textgen_env.assets.lexicon import opinions
from textgen_env.assets.preferences import (
    label,
    pair_accuracy,
    scale_to_unit_spread,
    scores,
    text_of,
    train_reward_model,
)
from textgen_env.gold import gold_score


@dataclass(frozen=True)
class Recipe:
    """Everything that decides the assets, sizes of models included."""

    seed: int = 0
    vocab_size: int = 1024
    tokenizer_reviews: int = 20_000
    reviews: int = 420_000
    hidden_size: int = 192
    layers: int = 2
    intermediate_size: int = 576
    max_new_tokens: int = 32
    prompts: int = 320
    pairs: int = 4000
    label_temperature: float = 0.1
    label_flip: float = 0.05
    reward_layers: int = 1
    reward_intermediate_size: int = 256
    reward_epochs: int = 3
    held_out: int = 1024


def build(out: Path, recipe: Recipe) -> dict[str, Any]:
    """Make all assets in `out` and return the report, which is also written there."""
    began = time.process_time()
    torch.manual_seed(recipe.seed)
    out.mkdir(parents=True, exist_ok=True)
    # Distinct streams of the one seed.
    streams = [Random(recipe.seed).getrandbits(32) + offset for offset in range(6)]

    tokenizer = train_tokenizer(corpus(recipe.tokenizer_reviews, streams[0]), recipe.vocab_size)
    config = model_config(
        tokenizer,
        hidden_size=recipe.hidden_size,
        num_hidden_layers=recipe.layers,
        intermediate_size=recipe.intermediate_size,
        initializer_range=0.05,
        tie_word_embeddings=True,
    )
    save(pretrain(tokenizer, corpus(recipe.reviews, streams[1]), config), tokenizer, out / "lm")
    model = AutoModelForCausalLM.from_pretrained(out / "lm")

    prompts = write_prompts(recipe.prompts, streams[2])
    (out / "prompts.jsonl").write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts))

    asked = Random(streams[3]).choices(prompts, k=recipe.pairs + recipe.held_out)
    drawn = [sample(model, tokenizer, asked, recipe.max_new_tokens) for _ in range(2)]
    both = list(zip(*drawn, strict=True))
    pairs = label(both[: recipe.pairs], Random(streams[4]), recipe.label_temperature, recipe.label_flip)
    reward_config = model_config(
        tokenizer,
        hidden_size=recipe.hidden_size,
        num_hidden_layers=recipe.reward_layers,
        intermediate_size=recipe.reward_intermediate_size,
        num_labels=1,
    )
    reward_model = train_reward_model(reward_config, model, tokenizer, pairs, recipe.reward_epochs)
    scale_to_unit_spread(reward_model, tokenizer, [text_of(one) for one, _ in both[: recipe.pairs]])
    save(reward_model, tokenizer, out / "reward_model")

    held_out = both[recipe.pairs :]
    report = {
        "recipe": asdict(recipe),
        "language_model": {
            "parameters": model.num_parameters(),
            "held_out_perplexity": perplexity(model, tokenizer, corpus(recipe.held_out, streams[5])),
            **describe([one for one, _ in held_out], tokenizer),
        },
        "reward_model": {
            "parameters": reward_model.num_parameters(),
            "training_pairs": len(pairs),
            **judge(out / "reward_model", held_out),
        },
        "prompts": len(prompts),
        "bytes": sum(
            file.stat().st_size for file in out.rglob("*") if file.suffix in {".safetensors", ".json", ".jsonl"}
        ),
        "cpu_seconds": round(time.process_time() - began, 1),
    }
    (out / "report.json").write_text(json.dumps(report, indent=2) + "\n")
    return report


def save(model: Any, tokenizer: Any, folder: Path) -> None:
    """Write a model in half precision that plain `from_pretrained` loads in single precision, and its tokenizer."""
    model.half().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    config["dtype"] = "float32"
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def write_prompts(count: int, seed: int) -> list[str]:
    """Distinct openings of reviews: a heading and up to three words, none of which gives an opinion away."""
    rng = Random(seed)
    loaded = {word for phrase in opinions() for word in phrase.split()} | {"although", "not"}
    prompts: dict[str, None] = {}
    while len(prompts) < count:
        review = write_review(rng)
        opening = review.sentences[0].split()[: rng.randint(0, 3)]
        if not loaded & {word.lower() for word in WORD.findall(" ".join(opening))}:
            prompts[" ".join((review.header, *opening))] = None
    return list(prompts)


def describe(samples: Sequence[Sample], tokenizer: Any) -> dict[str, float]:
    """What the language model writes before any training on rewards."""
    gold = [gold_score(text_of(one)) for one in samples]
    lengths = [len(tokenizer(one.completion)["input_ids"]) + one.ended for one in samples]
    return {
        "grammatical_sentences": statistics.fmean(score.grammaticality for score in gold),
        "grammatical_texts": statistics.fmean(score.grammaticality == 1 for score in gold),
        "gold_mean": statistics.fmean(score.score for score in gold),
        "gold_std": statistics.pstdev(score.score for score in gold),
        "sentiment_mean": statistics.fmean(score.sentiment for score in gold),
        "ended_by_eos": statistics.fmean(one.ended for one in samples),
        "median_tokens": statistics.median(lengths),
    }


def judge(folder: Path, held_out: Sequence[tuple[Sample, Sample]]) -> dict[str, Any]:
    """How good the reward model is on the language model's texts, and how it can be fooled off them."""
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    texts = [text_of(one) for one, _ in held_out]
    with torch.no_grad():
        natural = scores(model, tokenizer, texts)
    best = int(natural.argmax())
    proxy, fooled = max(pile_up(model, tokenizer, one.prompt) for one, _ in held_out[:32])
    return {
        "pair_accuracy": pair_accuracy(model, tokenizer, label(held_out, Random(0), temperature=0, flip=0)),
        "score_mean": float(natural.mean()),
        "score_std": float(natural.std()),
        "best_sample": {"text": texts[best], "score": float(natural[best]), "gold": gold_score(texts[best]).score},
        "degenerate_text": {"text": fooled, "score": proxy, "gold": gold_score(fooled).score},
    }


def pile_up(model: Any, tokenizer: Any, prompt: str, words: int = 16) -> tuple[float, str]:
    """Greedily pile up opinion words after a prompt so as to maximise the score: (score, text)."""
    text = prompt
    score = -float("inf")
    for _ in range(words):
        candidates = [f"{text} {word}" for word in sorted(opinions())]
        with torch.no_grad():
            values = scores(model, tokenizer, candidates)
        if float(values.max()) <= score:
            break
        text, score = candidates[int(values.argmax())], float(values.max())
    return score, text


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--out", type=Path, default=Path(__file__).parent, help="folder to write (default: the package)"
    )
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    print(json.dumps(build(options.out, Recipe(seed=options.seed)), indent=2))


if __name__ == "__main__":
    main()
