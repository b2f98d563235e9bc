"""Loading what others have made: whatever goes wrong becomes a ValueError that names the argument to blame."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from transformers import AutoTokenizer

from textgen_env.resolve import find_folder

#: Loading arguments that say WHERE files are and whether their code may run; others (dtype, ...) concern weights only.
ACCESS_ARGUMENTS = ("trust_remote_code", "token", "cache_dir", "local_files_only")
#: Loading arguments that say WHICH files of one repository are meant.
VERSION_ARGUMENTS = ("revision", "code_revision", "subfolder")


def file_arguments(model_kwargs: Mapping[str, Any] | None) -> dict[str, Any]:
    """The part of `from_pretrained` arguments that configurations and tokenizers take too.

    `trust_remote_code` is False unless given: transformers would ask on the terminal.

    :raises ValueError: a `torch_dtype`, beside which our own default for `dtype` would win without a word.
    """
    if "torch_dtype" in (model_kwargs or {}):
        raise ValueError("torch_dtype is called dtype in transformers 5: rename it in the arguments of from_pretrained")
    return {"trust_remote_code": False} | _chosen(model_kwargs, ACCESS_ARGUMENTS + VERSION_ARGUMENTS)


@contextmanager
def blaming(argument: str, name: str, kwargs_argument: str | None = None) -> Iterator[None]:
    """Turn any error inside into a ValueError that names an argument of the environment.

    :param argument: what names the thing that is loaded, such as `reward_model`.
    :param name: its value.
    :param kwargs_argument: the argument in which `trust_remote_code` would allow code that comes with the thing.
    """
    try:
        yield
    except Exception as error:
        message = f"{argument}={name!r} cannot be loaded: {error}"
        if kwargs_argument is not None and "trust_remote_code" in str(error):
            message = (
                f"{message.rstrip('.')}. If you trust its code, pass {kwargs_argument}={{'trust_remote_code': True}}"
            )
        raise ValueError(message) from error


def load_tokenizer(
    tokenizer: str | None, argument: str, model: str, model_argument: str, model_kwargs: Mapping[str, Any] | None
) -> Any:
    """Load a tokenizer.

    :param tokenizer: its name, None for that of the model.
    :param argument: the argument that `tokenizer` comes from.
    :param model: the model's name.
    :param model_argument: the argument that `model` comes from; `<model_argument>_kwargs` is where its own go.
    :param model_kwargs: arguments of the model's `from_pretrained`; a revision in them is the model's alone.
    :raises ValueError: it cannot be loaded.
    """
    kwargs_argument = f"{model_argument}_kwargs"
    if tokenizer is None:
        with blaming(model_argument, model, kwargs_argument):
            return _tokenizer_of(model, argument, file_arguments(model_kwargs))
    with blaming(argument, tokenizer, kwargs_argument):
        return _tokenizer_of(
            tokenizer, argument, {"trust_remote_code": False} | _chosen(model_kwargs, ACCESS_ARGUMENTS)
        )


def _tokenizer_of(name: str, argument: str, arguments: Mapping[str, Any]) -> Any:
    tokenizer = AutoTokenizer.from_pretrained(find_folder(name), **arguments)
    # Where the files are missing, transformers makes an empty one after the model's kind.
    if len(tokenizer) <= len(tokenizer.all_special_tokens):
        raise ValueError(f"there is no tokenizer; name another one by {argument}=...")
    return tokenizer


def _chosen(model_kwargs: Mapping[str, Any] | None, names: tuple[str, ...]) -> dict[str, Any]:
    return {key: value for key, value in (model_kwargs or {}).items() if key in names}
