"""Loading a causal language model as the body of a policy."""

from typing import Any

import torch as th
from textgen_env.resolve import resolve
from torch import nn
from transformers import AutoModelForCausalLM


def load_language_model(model: str, **kwargs: Any) -> nn.Module:
    """Load a causal language model.

    :param model: name on the Hugging Face hub, folder, or ``package:folder`` for weights inside an installed package.
    :param kwargs: of ``from_pretrained``; ``dtype`` defaults to float32 (the tiny embedded model is stored in half
        precision and trained in full).
    :raises ValueError: it cannot be loaded, or is not a causal language model.
    """
    try:
        lm: nn.Module = AutoModelForCausalLM.from_pretrained(resolve(model), **({"dtype": th.float32} | kwargs))
    except (OSError, ValueError) as error:
        raise ValueError(f"model={model!r} cannot be loaded as a causal language model: {error}") from error
    # Dropout would make log-probabilities of training and rollout differ for the same weights.
    return lm.eval()
