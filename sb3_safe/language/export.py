"""Writing what was trained so that plain transformers, and PEFT, can read it."""

from pathlib import Path
from typing import Any

from textgen_env.loading import file_arguments
from textgen_env.resolve import resolve
from transformers import AutoTokenizer

from sb3_safe.language.adapters import Adapters
from sb3_safe.language.loading import load_language_model


def export(
    lm: Any, adapters: Adapters | None, model: str, model_kwargs: dict[str, Any], directory: str | Path, merged: bool
) -> None:
    """Write a model, or its adapters, and the tokenizer to a folder.

    :param lm: the model that was trained.
    :param adapters: those on it.
    :param model: the name under which it was loaded.
    :param model_kwargs: the arguments with which it was loaded.
    :param directory: is made if it is not there.
    :param merged: write the whole model with the adapters in its weights, not the adapters alone.
    """
    if adapters is None or not merged:
        lm.save_pretrained(directory)
    else:
        whole: Any = load_language_model(model, **({"dtype": lm.dtype} | model_kwargs))
        whole.load_state_dict(adapters.merged_state())
        whole.save_pretrained(directory)
    AutoTokenizer.from_pretrained(resolve(model), **file_arguments(model_kwargs)).save_pretrained(directory)
