"""Low-rank adapters: a large model trained through a few percent of its size.

The adapters are PEFT's. What is here is how reinforcement learning uses them: the model with its adapters switched off
is the KL penalty's reference, so that there is no second copy; and while texts are written the adapters are merged into
the weights, which makes a token 1.3 to 1.5 times as fast.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal

import torch as th
from torch import Tensor, nn

from sb3_safe.language.loading import model_size

# The paper's, for Qwen2.5-3B; of its layers "all-linear" are the usual seven projections.
DEFAULTS: dict[str, Any] = {"r": 128, "lora_alpha": 128, "lora_dropout": 0.0, "target_modules": "all-linear"}


# Models from this size on get adapters unless the user says otherwise: weights, gradients, optimizer and reference of
# full finetuning in single precision take 20 bytes a parameter.
LORA_FROM = 300_000_000


class Adapters:
    """Low-rank adapters on a causal language model, in single precision whatever the model is in.

    :param lm: the model; its own weights are frozen, and its layers get adapters in place.
    :param arguments: of ``peft.LoraConfig``, over :data:`DEFAULTS`.
    :raises ImportError: PEFT is not installed.
    :raises ValueError: arguments that do not fit the model, or dropout, which would make the probabilities of training
        differ from those of writing.
    """

    def __init__(self, lm: Any, arguments: Mapping[str, Any]) -> None:
        try:
            from peft import LoraConfig
            from peft.tuners.lora import LoraLayer
        except ImportError as error:
            raise ImportError("lora needs the `peft` package: pip install 'sb3-safe[lora]', or lora=False") from error
        settings = DEFAULTS | dict(arguments)
        if settings["lora_dropout"]:
            raise ValueError(
                f"lora: lora_dropout must be 0, got {settings['lora_dropout']}: with dropout the probabilities of "
                "training are not those of writing"
            )
        output_layer = lm.get_output_embeddings()
        try:
            lm.add_adapter(LoraConfig(task_type="CAUSAL_LM", **settings))
        except (TypeError, ValueError) as error:
            raise ValueError(f"lora={dict(arguments)} does not fit the model: {error}") from error
        if lm.get_output_embeddings() is not output_layer:
            raise ValueError("lora: leave the output layer out of target_modules; the reference shares it")
        self._lm = lm
        self._layers: list[Any] = [module for module in lm.modules() if isinstance(module, LoraLayer)]
        for name, parameter in lm.named_parameters():
            if "lora_" in name:
                parameter.data = parameter.data.float()
        # The weights that are not in use: the merged ones, or while those are, the originals.
        self._spare: list[Tensor] = []
        self._fresh = False
        self.merged = False

    def invalidate(self) -> None:
        """The adapters have changed: what was merged is no longer what it should be."""
        self._fresh = False

    def _weights(self) -> Iterator[tuple[Any, nn.Parameter]]:
        for layer in self._layers:
            yield layer, layer.get_base_layer().weight

    @th.no_grad()
    def merge(self) -> None:
        """Compute with weights that hold the adapters.

        The originals are kept, not restored by subtraction: in low precision that would wear them down.
        """
        if self.merged and self._fresh:
            return
        self.unmerge()
        for number, (layer, weight) in enumerate(self._weights()):
            whole = weight.float() + sum(layer.get_delta_weight(name) for name in layer.active_adapters)
            if len(self._spare) <= number:
                self._spare.append(th.empty_like(weight))
            self._spare[number].copy_(whole)
        self._swap()
        for layer in self._layers:
            layer.merged_adapters = list(layer.active_adapters)
        self.merged = self._fresh = True

    def unmerge(self) -> None:
        """Compute with the original weights and the adapters beside them."""
        if self.merged:
            self._swap()
            for layer in self._layers:
                layer.merged_adapters = []
            self.merged = False

    def _swap(self) -> None:
        for number, (_, weight) in enumerate(self._weights()):
            weight.data, self._spare[number] = self._spare[number], weight.data
            th.autograd.graph.increment_version(weight)  # to PyTorch, other data are no change

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """Within it the model is the one that was loaded."""
        self.unmerge()
        self._lm.disable_adapters()
        try:
            yield
        finally:
            self._lm.enable_adapters()

    def merged_state(self) -> dict[str, Tensor]:
        """Parameters of the plain model with the adapters in its weights, by the names it has without adapters."""
        was_merged = self.merged
        self.merge()
        state = {
            name.replace(".base_layer", ""): value.detach().clone()
            for name, value in self._lm.state_dict().items()
            if ".lora_" not in name
        }
        if not was_merged:
            self.unmerge()
        return state


def lora_arguments(
    lora: bool | Mapping[str, Any] | Literal["auto"], model: str, model_kwargs: Mapping[str, Any]
) -> dict[str, Any] | None:
    """Arguments of the adapters, ``None`` where the model itself is to be trained.

    :raises ValueError: ``lora`` is none of what it may be.
    """
    if lora == "auto":
        lora = model_size(model, **model_kwargs) >= LORA_FROM
    if isinstance(lora, Mapping):
        return dict(lora)
    if not isinstance(lora, bool):
        raise ValueError(f"lora must be True, False, 'auto' or arguments of peft.LoraConfig, got {lora!r}")
    return {} if lora else None
