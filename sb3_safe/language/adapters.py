"""Low-rank adapters: a large model trained through a few percent of its size.

The adapters are PEFT's. What is here is how reinforcement learning uses them: the model with its adapters switched off
is the KL penalty's reference, so that there is no second copy; and while texts are written the adapters are merged into
the weights, which makes a token 1.3 to 1.5 times as fast.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal

import torch as th
import transformers
from torch import Tensor, nn

from sb3_safe.language.loading import model_size

# The paper's, for Qwen2.5-3B; of its layers "all-linear" are the usual seven projections. ``lora_alpha`` is the rank.
DEFAULTS: dict[str, Any] = {
    "r": 128, "lora_dropout": 0.0, "target_modules": "all-linear", "task_type": "CAUSAL_LM",
}  # fmt: skip

# Arguments of ``peft.LoraConfig`` that may be chosen freely. With others more would be trained than adapters, or these
# could not be merged into the weights, or would not start at zero, where the model is the one that was loaded.
CHOICES = {
    "r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "fan_in_fan_out",
    "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern",
}  # fmt: skip
STARTS = (True, "gaussian")

# In a mixture of experts PEFT takes layers of these names for the experts, which are not layers but one tensor of all.
EXPERTS = {"gate", "gate_proj", "up_proj", "down_proj", "w1", "w2", "w3"}

# Models from this size on get adapters unless the user says otherwise: weights, gradients, optimizer and reference of
# full finetuning in single precision take 20 bytes a parameter.
LORA_FROM = 300_000_000


class Adapters:
    """Low-rank adapters on a causal language model, in single precision whatever the model is in.

    :param lm: the model; its own weights are frozen, and its layers get adapters in place.
    :param arguments: of ``peft.LoraConfig``, over :data:`DEFAULTS`; ``lora_alpha`` is ``r`` unless it is given.
    :raises ImportError: PEFT is not installed.
    :raises ValueError: arguments that do not fit the model; dropout, which would make the probabilities of training
        differ from those of writing; or others than plain adapters on linear layers and embeddings.
    """

    def __init__(self, lm: Any, arguments: Mapping[str, Any]) -> None:
        try:
            import peft
            from peft import LoraConfig
            from peft.tuners.lora import Embedding, Linear, LoraLayer
        except ImportError as error:
            raise ImportError("lora needs the `peft` package: pip install 'sb3-safe[lora]', or lora=False") from error
        settings = DEFAULTS | dict(arguments)
        settings.setdefault("lora_alpha", settings["r"])
        if settings["lora_dropout"]:
            raise ValueError(
                f"lora: lora_dropout must be 0, got {settings['lora_dropout']}: with dropout the probabilities of "
                "training are not those of writing"
            )
        _check_plain(settings, LoraConfig(task_type="CAUSAL_LM"))
        if settings["target_modules"] == "all-linear":
            settings["target_modules"] = _linear_layers(lm)
        output_weight = lm.get_output_embeddings().weight
        try:
            lm.add_adapter(LoraConfig(**settings))
        except (TypeError, ValueError) as error:
            versions = f"PEFT {peft.__version__}, transformers {transformers.__version__}"  # may not fit each other
            raise ValueError(f"lora={dict(arguments)} does not fit the model ({versions}): {error}") from error
        self._lm = lm
        layers = {name: layer for name, layer in lm.named_modules() if isinstance(layer, LoraLayer)}
        if special := [name for name, layer in layers.items() if type(layer) not in (Linear, Embedding)]:
            raise ValueError(
                f"lora: adapters on {special[0]} cannot be merged into its weights: name only plain linear layers in "
                f"target_modules, and in a mixture of experts none of {', '.join(sorted(EXPERTS))}"
            )
        self._layers: list[Any] = list(layers.values())
        if any(weight is output_weight for _, weight in self._weights()):
            raise ValueError(
                "lora: leave the output layer out of target_modules, and embeddings that share its weights; the "
                "reference shares it"
            )
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


def _check_plain(settings: Mapping[str, Any], plain: Any) -> None:
    """Refuse arguments of ``peft.LoraConfig`` by which adapters are not plain ones.

    :param plain: a ``LoraConfig`` of such.
    """
    for name, value in settings.items():
        allowed = STARTS if name == "init_lora_weights" else (getattr(plain, name, value),)
        if name not in CHOICES and value not in allowed:
            raise ValueError(
                f"lora: leave out {name}={value!r}: all that is trained must be plain adapters, which start at zero, "
                "where the model is its own reference, and which can be merged into the weights"
            )


def _linear_layers(lm: Any) -> Any:
    """What "all-linear" means for a model: in a mixture of experts, without the experts and layers named like them."""
    if not any(parameter.ndim == 3 for parameter in lm.parameters()):  # weights of all experts in one
        return "all-linear"
    return [
        name
        for name, layer in lm.named_modules()
        if getattr(type(layer), "forward", None) is nn.Linear.forward  # which that of a router need not be
        and layer is not lm.get_output_embeddings()
        and name.rpartition(".")[2] not in EXPERTS
    ]


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
