"""Loading a causal language model as the body of a policy."""

from typing import Any

import torch as th
from textgen_env.loading import blaming, file_arguments
from textgen_env.resolve import find_folder
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from sb3_safe.language.body import check_architecture


def find_model(model: str) -> str:
    """As :func:`textgen_env.resolve.find_folder`, for a model that a saved run may have named.

    :param model: as for :func:`load_language_model`.
    :raises FileNotFoundError: there is no such folder; the message has what to do if it has moved.
    """
    try:
        return find_folder(model)
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"{error}. If the model of a saved run has moved, say where it is: SAFE.load(path, "
            "custom_objects={'policy_kwargs': saved | {'model': '/new/folder'}}) with saved = "
            "load_from_zip_file(path)[0]['policy_kwargs'], of stable_baselines3.common.save_util"
        ) from error


def load_language_model(model: str, **kwargs: Any) -> nn.Module:
    """Load a causal language model.

    :param model: name on the Hugging Face hub, folder, or ``package:folder`` for weights inside an installed package.
    :param kwargs: of ``from_pretrained``; ``dtype`` defaults to float32 (the tiny embedded model is stored in half
        precision and trained in full).
    :raises ValueError: it cannot be loaded, is not a causal language model, or is none that can be run as is done here
        (:func:`~sb3_safe.language.body.check_architecture`).
    """
    with blaming("model", model, "model_kwargs"):
        arguments = {"dtype": th.float32} | file_arguments(kwargs) | kwargs
        lm, found = AutoModelForCausalLM.from_pretrained(find_model(model), output_loading_info=True, **arguments)
        if found["missing_keys"]:
            raise ValueError(f"it is not a causal language model: its checkpoint lacks {sorted(found['missing_keys'])}")
    # Dropout would make log-probabilities of training and rollout differ for the same weights.
    silence_dropout(lm)
    lm.eval()
    check_architecture(lm, model)
    return lm  # type: ignore[no-any-return]


def default_dtype(adapted: bool) -> th.dtype:
    """Of a model whose user has not chosen: float32, but bfloat16 where only adapters are trained and a GPU has it.

    :param adapted: whether it has adapters, which are float32 themselves.
    """
    # Without its argument the answer is yes also where bfloat16 is emulated, and slow.
    has_it = th.cuda.is_available() and th.cuda.is_bf16_supported(including_emulation=False)
    return th.bfloat16 if adapted and has_it else th.float32


def silence_dropout(lm: nn.Module) -> None:
    """Set every dropout of a model to 0, also where layers are put into training mode for gradient checkpointing."""
    for module in lm.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name, value in vars(module).items():
            if "dropout" in name and isinstance(value, float):
                setattr(module, name, 0.0)


def checkpoint_layers(lm: Any) -> None:
    """Let a model's layers keep no activations for the backward pass, whichever name its transformers has for that."""
    arguments = {"use_reentrant": False}
    if hasattr(lm, "activation_checkpointing_enable"):
        lm.activation_checkpointing_enable(activation_checkpointing_kwargs=arguments)
    else:
        lm.gradient_checkpointing_enable(gradient_checkpointing_kwargs=arguments)


def model_size(model: str, **kwargs: Any) -> int:
    """Parameters of a model, counted from its configuration alone.

    :param model: as for :func:`load_language_model`.
    :param kwargs: of ``from_pretrained``.
    :raises ValueError: its configuration cannot be loaded.
    """
    with blaming("model", model, "model_kwargs"):
        files = file_arguments(kwargs)
        config = AutoConfig.from_pretrained(find_model(model), **files)
    with th.device("meta"):
        skeleton = AutoModelForCausalLM.from_config(config, **{k: v for k, v in files.items() if k.startswith("trust")})
    return sum(parameter.numel() for parameter in skeleton.parameters())
