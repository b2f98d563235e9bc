"""Small checkpoints on disk, made once a session: real architectures, random weights, a real tokenizer."""

from pathlib import Path
from typing import Any

import pytest
import torch as th
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    Gemma2Config,
    GemmaConfig,
    GPT2Config,
    GraniteConfig,
    LlamaConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
)

th.set_num_threads(1)

ARCHITECTURES = ("qwen2", "llama", "gpt2", "gemma", "gemma2", "granite", "cohere")
WORDS = "the cat sat on a mat and then it ran away from dogs into some house of red bricks near water".split()
VOCAB_SIZE = 300


def make_tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE - 4,
        special_tokens=["<pad>", "<eos>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([" ".join(WORDS[i:] + WORDS[:i]) for i in range(len(WORDS))], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>")


def make_config(architecture: str, **overrides: Any) -> Any:
    sizes: dict[str, Any] = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 64,
        "pad_token_id": 0,
        "eos_token_id": 1,
        "bos_token_id": None,
        "initializer_range": 0.2,
    } | overrides
    if architecture == "gpt2":
        return GPT2Config(
            vocab_size=sizes["vocab_size"], n_embd=32, n_layer=2, n_head=4, n_positions=64, pad_token_id=0,
            eos_token_id=1, bos_token_id=None, initializer_range=0.2,
        )  # fmt: skip
    configs = {
        "qwen2": Qwen2Config, "llama": LlamaConfig, "gemma": GemmaConfig, "gemma2": Gemma2Config,
        "granite": GraniteConfig, "cohere": CohereConfig,
    }  # fmt: skip
    if architecture in ("qwen2", "granite", "cohere"):
        sizes.pop("head_dim")
    if architecture == "granite":
        sizes["logits_scaling"] = 3.0  # 1 by default, but not of the models that there are
    return configs[architecture](**sizes)


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Folder of a causal language model and tokenizer, by architecture."""
    folders: dict[str, str] = {}
    tokenizer = make_tokenizer()
    for architecture in ARCHITECTURES:
        folder: Path = tmp_path_factory.mktemp(architecture)
        th.manual_seed(0)
        AutoModelForCausalLM.from_config(make_config(architecture)).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        folders[architecture] = str(folder)
    return folders


def favours_low_ids(
    prompts: list[str], completions: list[str], completion_ids: list[list[int]], **_: Any
) -> list[float]:
    """A reward that random weights can learn: the share of tokens in the first half of the vocabulary."""
    return [sum(token < VOCAB_SIZE // 2 for token in ids) / len(ids) for ids in completion_ids]


@pytest.fixture
def env_kwargs(checkpoints: dict[str, str]) -> dict[str, Any]:
    """Arguments of a text environment around the Qwen2 checkpoint."""
    return {
        "model": checkpoints["qwen2"],
        "reward_model": favours_low_ids,
        "prompts": ["the cat", "a mat and then", "it ran away from dogs into", "water"],
        "max_prompt_tokens": 12,
        "max_new_tokens": 8,
        "min_new_tokens": 0,
    }
