"""What the environment must know of a language model without loading it: tokenizer, vocabulary, context."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import transformers
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, GenerationConfig

from textgen_env.loading import blaming, file_arguments, load_tokenizer
from textgen_env.resolve import find_folder, resolve


class Vocabulary(NamedTuple):
    """A language model's tokens.

    :param tokenizer: the tokenizer; it may know fewer tokens than `size`, since embeddings are often padded.
    :param size: number of rows of the model's embedding, hence of actions.
    :param end_ids: tokens that end a text: the tokenizer's end token, and those at which the model's `generate` stops.
    :param pad_id: the token that fills observations.
    :param context: the most positions that the model takes, None where its configuration does not say.
    """

    tokenizer: Any
    size: int
    end_ids: tuple[int, ...]
    pad_id: int
    context: int | None


def load_vocabulary(
    model: str, tokenizer: Any = None, pad_token: str | None = None, model_kwargs: Mapping[str, Any] | None = None
) -> Vocabulary:
    """Read a model's configuration and tokenizer; its weights are not touched.

    :param model: hub name, path, or `package:path`.
    :param tokenizer: a tokenizer, its name, or None for the model's own.
    :param pad_token: a token of the vocabulary to pad with, where the tokenizer has none.
    :param model_kwargs: arguments of the model's `from_pretrained`.
    :raises ValueError: files that are missing or broken, code of the model's own that is not allowed, no causal
        language model, no eos token, no pad token, or a tokenizer with more tokens than the model has embeddings.
    """
    whole_config = _load_config(model, model_kwargs)
    config = whole_config.get_text_config()
    if tokenizer is None or isinstance(tokenizer, str):
        tokenizer = load_tokenizer(tokenizer, "tokenizer", model, "model", model_kwargs)
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
        end_ids=tuple(sorted({int(tokenizer.eos_token_id)} | _generation_ends(model, whole_config, model_kwargs))),
        pad_id=int(tokenizer.pad_token_id),
        context=getattr(config, "max_position_embeddings", None),
    )


def decode_completions(
    tokenizer: Any, prompts: Sequence[list[int]], completions: Sequence[list[int]], skip_special_tokens: bool = True
) -> list[str]:
    """The texts of completions, such that prompt text + completion text reads as one.

    Decoded as the rest of the whole: tokenizers that mark spaces at the start of words (SentencePiece) drop the
    space of a completion that is decoded alone.

    :param prompts: token ids of each prompt, or of its end.
    :param completions: token ids of each completion.
    :param skip_special_tokens: leave them out of the text.
    """
    whole = [prompt + completion for prompt, completion in zip(prompts, completions, strict=True)]
    arguments = {"skip_special_tokens": skip_special_tokens, "clean_up_tokenization_spaces": False}
    starts = tokenizer.batch_decode(list(prompts), **arguments)
    texts = tokenizer.batch_decode(whole, **arguments)
    return [
        text[len(start) :] if text.startswith(start) else tokenizer.decode(completion, **arguments)
        for text, start, completion in zip(texts, starts, completions, strict=True)
    ]


def _load_config(model: str, model_kwargs: Mapping[str, Any] | None) -> Any:
    """The configuration of a causal language model."""
    with blaming("model", model, "model_kwargs"):
        arguments = file_arguments(model_kwargs)
        folder = Path(find_folder(model))
        if (folder / "adapter_config.json").exists() and not (folder / "config.json").exists():
            raise ValueError(
                "it is an adapter, without its model: merge the two first, as policy.export(path, merged=True) does"
            )
        config = AutoConfig.from_pretrained(resolve(model), **arguments)
        if "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {}):
            # Not allowed to run that code, transformers would put a class of its own in its place, weights or not.
            own = [name for name in config.architectures or [] if not hasattr(transformers, name)]
            if own and not arguments["trust_remote_code"]:
                raise ValueError(f"{own[0]} is code of its own, which needs trust_remote_code")
        elif type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING or config.is_encoder_decoder:
            raise ValueError(f"it is no causal language model: its configuration is a {type(config).__name__}")
        return config


def _generation_ends(model: str, config: Any, model_kwargs: Mapping[str, Any] | None) -> set[int]:
    """The tokens at which `generate` ends a text: chat models often have one for a turn beside the eos token."""
    try:
        generation = GenerationConfig.from_pretrained(resolve(model), **file_arguments(model_kwargs))
    except OSError:  # without that file `generate` goes by the model's configuration
        generation = GenerationConfig.from_model_config(config)
    ends = generation.eos_token_id
    return set() if ends is None else {ends} if isinstance(ends, int) else set(ends)
