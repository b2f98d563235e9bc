"""What the environment must know of a language model without loading it: tokenizer, vocabulary, context."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from transformers import AutoConfig, AutoTokenizer

from textgen_env.resolve import resolve

#: The loading arguments that say WHICH files are meant; the others (dtype, device_map, ...) concern weights only.
FILE_ARGUMENTS = ("revision", "trust_remote_code", "token", "cache_dir", "local_files_only", "subfolder")


class Vocabulary(NamedTuple):
    """A language model's tokens.

    :param tokenizer: the tokenizer; it may know fewer tokens than `size`, since embeddings are often padded.
    :param size: number of rows of the model's embedding, hence of actions.
    :param eos_id: the token that ends a text.
    :param pad_id: the token that fills observations.
    :param context: the most positions that the model takes, None where its configuration does not say.
    """

    tokenizer: Any
    size: int
    eos_id: int
    pad_id: int
    context: int | None


def file_arguments(model_kwargs: Mapping[str, Any] | None) -> dict[str, Any]:
    """The part of `from_pretrained` arguments that configurations and tokenizers take too."""
    return {key: value for key, value in (model_kwargs or {}).items() if key in FILE_ARGUMENTS}


def load_vocabulary(
    model: str, tokenizer: Any = None, pad_token: str | None = None, model_kwargs: Mapping[str, Any] | None = None
) -> Vocabulary:
    """Read a model's configuration and tokenizer; its weights are not touched.

    :param model: hub name, path, or `package:path`.
    :param tokenizer: a tokenizer, its name, or None for the model's own.
    :param pad_token: a token of the vocabulary to pad with, where the tokenizer has none.
    :param model_kwargs: arguments of the model's `from_pretrained`.
    :raises ValueError: no eos token, no pad token, or a tokenizer with more tokens than the model has embeddings.
    """
    arguments = file_arguments(model_kwargs)
    config = AutoConfig.from_pretrained(resolve(model), **arguments).get_text_config()
    if tokenizer is None or isinstance(tokenizer, str):
        tokenizer = AutoTokenizer.from_pretrained(resolve(tokenizer or model), **arguments)
    if tokenizer.eos_token_id is None:
        raise ValueError(
            f"tokenizer of {model!r} has no eos token, so a text could never end: set one, as in "
            "tokenizer.eos_token = '...', and pass it as tokenizer=..."
        )
    if pad_token is not None:
        if pad_token not in tokenizer.get_vocab():
            raise ValueError(f"pad_token={pad_token!r} is not in the vocabulary of the tokenizer: name a token that is")
        tokenizer.pad_token = pad_token
    if tokenizer.pad_token_id is None:
        raise ValueError(
            f"tokenizer of {model!r} has no pad token: pass pad_token=..., for instance pad_token="
            f"{tokenizer.eos_token!r} (padding is told by its position, never by its id, so the eos token is safe)"
        )
    if len(tokenizer) > config.vocab_size:
        raise ValueError(
            f"vocabulary mismatch: tokenizer knows {len(tokenizer)} tokens but model={model!r} has embeddings "
            f"for {config.vocab_size}; pass the model's own tokenizer"
        )
    return Vocabulary(
        tokenizer=tokenizer,
        size=int(config.vocab_size),
        eos_id=int(tokenizer.eos_token_id),
        pad_id=int(tokenizer.pad_token_id),
        context=getattr(config, "max_position_embeddings", None),
    )


def decode_completions(tokenizer: Any, prompts: Sequence[list[int]], completions: Sequence[list[int]]) -> list[str]:
    """The texts of completions without special tokens, such that prompt text + completion text reads as one.

    Decoded as the rest of the whole: tokenizers that mark spaces at the start of words (SentencePiece) drop the
    space of a completion that is decoded alone.

    :param prompts: token ids of each prompt.
    :param completions: token ids of each completion.
    """
    whole = [prompt + completion for prompt, completion in zip(prompts, completions, strict=True)]
    plain = {"skip_special_tokens": True, "clean_up_tokenization_spaces": False}
    starts = tokenizer.batch_decode(list(prompts), **plain)
    texts = tokenizer.batch_decode(whole, **plain)
    return [
        text[len(start) :] if text.startswith(start) else tokenizer.decode(completion, **plain)
        for text, start, completion in zip(texts, starts, completions, strict=True)
    ]
