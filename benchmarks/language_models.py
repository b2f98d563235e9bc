"""Language models of any size for the benchmark of speed: random weights, and a chance of ending that is set."""

import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch as th
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

PAD, EOS = 0, 1


class Shape(NamedTuple):
    """What makes the size of a Qwen2 model."""

    hidden: int
    layers: int
    kv_heads: int
    intermediate: int
    vocabulary: int
    head: int = 64
    tied: bool = False
    """Whether input and output embeddings are the same."""

    def config(self) -> Qwen2Config:
        return Qwen2Config(
            vocab_size=self.vocabulary, hidden_size=self.hidden, intermediate_size=self.intermediate,
            num_hidden_layers=self.layers, num_attention_heads=self.hidden // self.head,
            num_key_value_heads=self.kv_heads, max_position_embeddings=1024, tie_word_embeddings=self.tied,
            bos_token_id=None, eos_token_id=EOS, pad_token_id=PAD,
        )  # fmt: skip


# By number of parameters.
SHAPES = {
    "0.1M": Shape(64, 2, 1, 128, 256),
    "5M": Shape(256, 4, 2, 704, 4096),
    "25M": Shape(512, 6, 2, 1408, 8192),
    "100M": Shape(768, 12, 4, 2048, 16384),
    "3B": Shape(2048, 36, 2, 11008, 151936, head=128, tied=True),  # Qwen2.5-3B
}


class Task(NamedTuple):
    """What is written, by whatever writes it."""

    size: str
    lengths: str
    rows: int = 32
    """Texts written side by side."""
    prompt_tokens: int = 32
    new_tokens: int = 64
    """The most that are written after a prompt."""

    @property
    def name(self) -> str:
        return f"{self.size}/{self.lengths}"

    @property
    def shape(self) -> Shape:
        return SHAPES[self.size]

    @property
    def eos_probability(self) -> float:
        """Chance of each new token of being the last: 0, or such that of 64 at most 22 are written on average."""
        return 0.0 if self.lengths == "equal" else 0.0425

    @property
    def mean_length(self) -> float:
        """New tokens of a text on average."""
        chance, longest = self.eos_probability, self.new_tokens
        return (1 - (1 - chance) ** longest) / chance if chance else float(longest)

    def model(self, folder: Path) -> str:
        """Folder of the task's model, which is written at the first call."""
        path = folder / self.size / self.lengths
        if not path.exists():
            write_model(path, self.shape, self.eos_probability)
        return str(path)

    def prompts(self, count: int = 256) -> list[str]:
        """Texts of ``prompt_tokens`` random tokens each."""
        ids = np.random.default_rng(0).integers(2, self.shape.vocabulary, (count, self.prompt_tokens))
        return [" ".join(f"w{token}" for token in row) for row in ids]

    def batches(self) -> Iterator[list[str]]:
        """Endlessly as many prompts as there are rows."""
        prompts = self.prompts()
        while True:
            for start in range(0, len(prompts) - self.rows + 1, self.rows):
                yield prompts[start : start + self.rows]


def seconds_of(work: Callable[[], Any], device: str = "cpu") -> tuple[float, Any]:
    """What something took, and what it returned: CPU seconds, or wall-clock seconds until a GPU is done with it."""
    if device == "cpu":
        start = time.process_time()
        result = work()
        return time.process_time() - start, result
    th.cuda.synchronize()
    start = time.perf_counter()
    result = work()
    th.cuda.synchronize()
    return time.perf_counter() - start, result


def load_model(folder: str) -> Any:
    """A model with its weights in float32, without dropout."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=th.float32).eval()


def write_model(folder: Path, shape: Shape, eos_probability: float) -> None:
    """Write a random Qwen2 model.

    :param folder: where; created.
    :param eos_probability: chance of every new token of being the last one; the same after every text, but for
        rounding, and for everything that samples from this model.
    """
    th.manual_seed(0)
    model = Qwen2ForCausalLM(shape.config())
    _set_eos_probability(model, eos_probability)
    # generate() would otherwise choose among the 50 likeliest, where nobody says what it should do.
    model.generation_config.update(do_sample=True, top_k=0, top_p=1.0)
    model.save_pretrained(folder)


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
    others = (hidden @ head.T)[:, [token for token in range(len(head)) if token != EOS]].logsumexp(dim=1)
    odds = th.logit(th.tensor(probability, dtype=th.float64), eps=1e-15)
    head[EOS, 0] = (others.mean() + odds) / hidden[:, 0].mean()


def make_tokenizer(vocabulary: int) -> PreTrainedTokenizerFast:
    """One token a word: ``w2``, ``w3``, ..."""
    words = {"<pad>": PAD, "<eos>": EOS} | {f"w{token}": token for token in range(2, vocabulary)}
    backend = Tokenizer(WordLevel(words, unk_token="w2"))
    backend.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>", padding_side="left")


def count_written(tokens: th.Tensor) -> int:
    """How many of the new tokens ``[rows, n]`` count: those up to the end token."""
    ends = (tokens == EOS).long()
    return int(((ends.cumsum(1) - ends) == 0).sum())


def no_reward_model(completion_ids: Sequence[Sequence[int]], **_: Any) -> list[float]:
    """A reward that costs nothing and differs from text to text."""
    return [sum(ids) % 10 / 10 for ids in completion_ids]
