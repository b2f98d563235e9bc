"""The embedded language model: tokenizer, pretraining and sampling."""

from __future__ import annotations

import math
from collections.abc import Sequence
from random import Random
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from tokenizers import pre_tokenizers, trainers
from torch import Tensor
from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen2Tokenizer

from textgen_env.assets.grammar import write_review

PAD, EOS = "<pad>", "<eos>"
MAX_POSITIONS = 128
#: Messages are joined by spaces: a chat about a hotel reads like a review of one.
CHAT_TEMPLATE = "{% for m in messages %}{{ m['content'] | trim }}{{ '' if loop.last else ' ' }}{% endfor %}"


class Sample(NamedTuple):
    """A completion sampled from a language model."""

    prompt: str
    completion: str
    ended: bool


def corpus(size: int, seed: int) -> list[str]:
    """Reviews of the grammar, headings included."""
    rng = Random(seed)
    return [str(write_review(rng)) for _ in range(size)]


def train_tokenizer(texts: Sequence[str], vocab_size: int) -> Any:
    """A byte-level BPE tokenizer: any string can be encoded, and the words of the corpus are mostly one token each."""
    # The class that AutoTokenizer takes for Qwen2 models, whatever class the files name; its unknown token is never
    # produced, since every byte is in the alphabet.
    tokenizer = Qwen2Tokenizer(vocab={PAD: 0, EOS: 1}, unk_token=EOS, eos_token=EOS, pad_token=PAD)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[PAD, EOS],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.backend_tokenizer.train_from_iterator(texts, trainer)
    tokenizer.model_max_length = MAX_POSITIONS
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def model_config(tokenizer: Any, **settings: Any) -> Any:
    """A Qwen2 configuration with the settings given and the embedded tokenizer's vocabulary."""
    return Qwen2Config(
        vocab_size=len(tokenizer),
        max_position_embeddings=MAX_POSITIONS,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
        num_attention_heads=4,
        num_key_value_heads=2,
        **settings,
    )


def pretrain(tokenizer: Any, texts: Sequence[str], config: Any, batch_size: int = 32, peak_rate: float = 3e-3) -> Any:
    """Train a language model on each text once, by next-token prediction.

    :param texts: each is followed by eos in training.
    :return: the model, in evaluation mode.
    """
    model = Qwen2ForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=peak_rate, betas=(0.9, 0.98), weight_decay=0.01)
    batches = _batches_of_similar_length(texts, batch_size)
    for step, batch in enumerate(batches):
        for group in optimizer.param_groups:
            group["lr"] = peak_rate * warmup_then_cosine(step, len(batches))
        loss = token_losses(model, tokenizer, batch).mean()
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    return model.eval()


def _batches_of_similar_length(texts: Sequence[str], batch_size: int, window: int = 16) -> list[list[str]]:
    """Batches with little padding: texts are sorted by length within windows of `window` batches."""
    batches = []
    for start in range(0, len(texts), window * batch_size):
        nearby = sorted(texts[start : start + window * batch_size], key=len)
        group = [nearby[first : first + batch_size] for first in range(0, len(nearby), batch_size)]
        batches += [group[index] for index in torch.randperm(len(group)).tolist()]
    return batches


def warmup_then_cosine(step: int, steps: int, warmup: float = 0.05) -> float:
    """The factor on the learning rate: up linearly over the first `warmup` of the steps, then down to 0."""
    progress = (step + 1) / steps
    return min(progress / warmup, 0.5 * (1 + math.cos(math.pi * progress)))


def token_losses(model: Any, tokenizer: Any, texts: Sequence[str]) -> Tensor:
    """Next-token losses of every real token after the first, eos included, in nats: [number of tokens]."""
    ids = tokenizer([text + EOS for text in texts], padding=True, return_tensors="pt")
    logits = model(**ids).logits[:, :-1]
    real = ids["attention_mask"][:, 1:].bool()
    return F.cross_entropy(logits[real], ids["input_ids"][:, 1:][real], reduction="none")


def perplexity(model: Any, tokenizer: Any, texts: Sequence[str]) -> float:
    """Perplexity per token of held-out texts."""
    with torch.no_grad():
        return float(token_losses(model, tokenizer, texts).mean().exp())


def sample(
    model: Any, tokenizer: Any, prompts: Sequence[str], max_new_tokens: int, batch_size: int = 256
) -> list[Sample]:
    """One completion for each prompt, from the plain distribution (temperature 1, no truncation of it)."""
    samples = []
    for start in range(0, len(prompts), batch_size):
        batch = list(prompts[start : start + batch_size])
        ids = tokenizer(batch, padding=True, padding_side="left", return_tensors="pt")
        with torch.no_grad():
            texts = model.generate(**ids, do_sample=True, top_k=0, top_p=1.0, max_new_tokens=max_new_tokens)
        new = texts[:, ids["input_ids"].shape[1] :]
        ended = (new == tokenizer.eos_token_id).any(dim=1).tolist()
        completions = tokenizer.batch_decode(new, skip_special_tokens=True)
        samples += [Sample(*row) for row in zip(batch, completions, ended, strict=True)]
    return samples
