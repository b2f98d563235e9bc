"""Language models of any size for the speed benchmark: random weights, written to disk, with a chance of ending set."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch as th
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

PAD, EOS = 0, 1


class Shape(NamedTuple):
    """What makes the size of a Qwen2 model; heads are 64 wide, input and output embeddings are separate."""

    hidden: int
    layers: int
    kv_heads: int
    intermediate: int
    vocabulary: int

    def config(self) -> Qwen2Config:
        return Qwen2Config(
            vocab_size=self.vocabulary, hidden_size=self.hidden, intermediate_size=self.intermediate,
            num_hidden_layers=self.layers, num_attention_heads=self.hidden // 64, num_key_value_heads=self.kv_heads,
            max_position_embeddings=1024, tie_word_embeddings=False, bos_token_id=None, eos_token_id=EOS,
            pad_token_id=PAD,
        )  # fmt: skip


SHAPES = {
    "tiny": Shape(64, 2, 1, 128, 256),
    "5M": Shape(256, 4, 2, 704, 4096),
    "25M": Shape(512, 6, 2, 1408, 8192),
    "100M": Shape(768, 12, 4, 2048, 16384),
}


def write_model(folder: Path, shape: Shape, eos_probability: float) -> str:
    """Write a random Qwen2 model and its tokenizer, whose tokens are the words ``w2``, ``w3``, ...

    :param folder: where; created.
    :param eos_probability: chance of every new token of being the last one, the same after every text (but for
        rounding) and for everything that samples from this model. 0: it never is.
    :return: the folder, as ``from_pretrained`` takes it.
    """
    th.manual_seed(0)
    model = Qwen2ForCausalLM(shape.config())
    _set_eos_probability(model, eos_probability)
    model.save_pretrained(folder)
    tokenizer(shape.vocabulary).save_pretrained(folder)
    return str(folder)


@th.no_grad()
def _set_eos_probability(model: Qwen2ForCausalLM, probability: float) -> None:
    """Keep one dimension of the residual stream constant, and let the end token's logit read that one alone."""
    model.model.embed_tokens.weight[:, 0] = 1.0
    for layer in model.model.layers:
        layer.self_attn.o_proj.weight[0] = 0.0
        layer.mlp.down_proj.weight[0] = 0.0
    head = model.lm_head.weight
    head[EOS] = 0.0
    head[:, 0] = 0.0
    hidden = model.model(input_ids=th.randint(2, len(head), (16, 32))).last_hidden_state.flatten(0, 1)
    others = (hidden @ head.T)[:, [i for i in range(len(head)) if i != EOS]].logsumexp(dim=1)
    logit = others.mean() + th.logit(th.tensor(probability, dtype=th.float64), eps=1e-15).float()
    head[EOS, 0] = logit / hidden[:, 0].mean()


def tokenizer(vocabulary: int) -> PreTrainedTokenizerFast:
    """One token a word."""
    words = {"<pad>": PAD, "<eos>": EOS} | {f"w{i}": i for i in range(2, vocabulary)}
    backend = Tokenizer(WordLevel(words, unk_token="<pad>"))
    backend.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>")


def random_prompts(count: int, length: int, vocabulary: int) -> list[str]:
    """Texts of ``length`` tokens each."""
    ids = np.random.default_rng(0).integers(2, vocabulary, (count, length))
    return [" ".join(f"w{token}" for token in row) for row in ids]


def no_reward_model(completion_ids: Sequence[Sequence[int]], **_: Any) -> list[float]:
    """A reward that costs nothing and differs from text to text."""
    return [sum(ids) % 10 / 10 for ids in completion_ids]
