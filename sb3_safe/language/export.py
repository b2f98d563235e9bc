"""Writing what was trained so that plain transformers, and PEFT, can read it."""

from pathlib import Path
from typing import Any

from textgen_env.loading import blaming, load_tokenizer
from textgen_env.resolve import resolve

from sb3_safe.language.adapters import Adapters
from sb3_safe.language.loading import find_model, load_language_model


def export(
    lm: Any,
    adapters: Adapters | None,
    model: str,
    model_kwargs: dict[str, Any],
    directory: str | Path,
    merged: bool,
    tokenizer: Any = None,
) -> None:
    """Write a model, or its adapters, and the tokenizer to a folder.

    :param lm: the model that was trained.
    :param adapters: those on it.
    :param model: the name under which it was loaded.
    :param model_kwargs: the arguments with which it was loaded.
    :param directory: is made if it is not there.
    :param merged: write the whole model with the adapters in its weights, not the adapters alone.
    :param tokenizer: a tokenizer, its name, or ``None`` for the model's own.
    :raises ValueError: there is no tokenizer, or it is another model's, or the model's folder is gone and something of
        it is needed, or adapters would be written into it. Nothing has been written then.
    """
    if adapters is not None and Path(directory).resolve() == Path(resolve(model)).resolve():
        raise ValueError(
            f"directory={str(directory)!r} has the model that the adapters are for, and saved runs must find it as it "
            "was: export to another folder"
        )
    if tokenizer is None or (adapters is not None and merged):
        with blaming("model", model):
            find_model(model)
    if tokenizer is None or isinstance(tokenizer, str):
        tokenizer = load_tokenizer(tokenizer, "tokenizer", model, "model", model_kwargs)
    size = lm.config.get_text_config().vocab_size
    if len(tokenizer) > size:
        raise ValueError(
            f"tokenizer=... knows {len(tokenizer)} tokens, but model={model!r} has {size}: pass that of the environment"
        )
    if adapters is None or not merged:
        lm.save_pretrained(directory)
    else:
        whole: Any = load_language_model(model, **({"dtype": lm.dtype} | model_kwargs))
        whole.load_state_dict(adapters.merged_state())
        whole.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
