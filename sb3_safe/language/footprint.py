"""Bytes of a model's weights, and of a pass through it, from its configuration.

Layers repeat: two and three of them are traced, and the rest follows.
"""

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, NamedTuple

import torch as th
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from sb3_safe.language.adapters import Adapters
from sb3_safe.language.body import hidden_states
from sb3_safe.language.loading import checkpoint_layers
from sb3_safe.language.policy import ValueHead
from sb3_safe.language.slots import PREFILL_ROWS, SlotCache
from sb3_safe.language.tokens import TokenDistribution, sample
from sb3_safe.language.tracing import Allocations, fake, saved_bytes


@dataclass(frozen=True)
class Blueprint:
    """A model as its configuration describes it. Traces of equal ones are made once.

    :param config: its configuration.
    :param auto_class: what would load it, such as ``AutoModelForCausalLM``.
    :param dtype: of its weights.
    :param lora: arguments of its adapters; ``None``: it has none, and is trained itself.
    """

    config: Any = field(compare=False)
    auto_class: Any
    dtype: th.dtype
    lora: Mapping[str, Any] | None = field(default=None, compare=False)
    description: str = field(init=False, repr=False)
    """What it is compared by."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "description", f"{self.config.to_json_string()}{self.lora}")

    @property
    def hidden_size(self) -> int:
        """Numbers in a hidden state."""
        return int(self.config.get_text_config().hidden_size)

    def build(self, n_layers: int | None = None, adapted: bool = True) -> Any:
        """The model, with shapes and without contents.

        :param n_layers: the first so many of its layers; ``None``: all.
        :param adapted: whether with the adapters, if it has any.
        :raises ValueError: the class does not load such models, or the adapters do not fit.
        """
        config = copy.deepcopy(self.config)
        text = config.get_text_config()
        if n_layers is not None:
            text.num_hidden_layers = n_layers
            if getattr(text, "layer_types", None):
                text.layer_types = text.layer_types[:n_layers]
        with th.device("meta"):
            try:
                model = self.auto_class.from_config(config, dtype=self.dtype, trust_remote_code=False)
            except ValueError as error:
                loader = self.auto_class.__name__
                raise ValueError(f"{loader} does not load models of type {config.model_type!r}") from error
            if adapted and self.lora is not None:
                Adapters(model, self.lora)
        return model.eval()

    def heads(self, n_critics: int) -> nn.ModuleList:
        """Value heads for it, without contents."""
        with th.device("meta"):
            return nn.ModuleList([ValueHead(self.hidden_size) for _ in range(n_critics)])

    def in_depth(self, trace: Callable[..., tuple[int, ...]], *arguments: Any) -> tuple[int, ...]:
        """What a trace, a function of the model and ``arguments``, gives with all layers."""
        n_layers = int(self.config.get_text_config().num_hidden_layers)
        if n_layers <= 3:
            return trace(self, n_layers, *arguments)
        # Of two layers one is the first and one the last, which may be special. The third is like those between.
        two, three = trace(self, 2, *arguments), trace(self, 3, *arguments)
        return tuple(a + (b - a) * (n_layers - 2) for a, b in zip(two, three, strict=True))


class WeightBytes(NamedTuple):
    """Bytes of parameters."""

    model: int
    adapters: int
    merged: int
    """What the adapters are merged into: weights of the layers that have any."""
    heads: int
    linear: int
    """Of what a rollout may pack: weights in float32 of linear layers, heads included and adapters not."""

    @property
    def trained(self) -> int:
        """Of all parameters that are trained."""
        return (self.adapters or self.model) + self.heads


def parameter_bytes(module: nn.Module) -> int:
    """Bytes of a module's parameters."""
    return sum(parameter.nbytes for parameter in module.parameters())


@lru_cache
def weight_bytes(policy: Blueprint, n_critics: int) -> WeightBytes:
    """Bytes of a policy's parameters."""
    model, heads = policy.build(), policy.heads(n_critics)
    parameters = dict(model.named_parameters())
    layers = [*model.named_modules(), *heads.named_modules()]
    linear = [layer.weight for name, layer in layers if type(layer) is nn.Linear and ".lora_" not in name]
    adapters = sum(value.nbytes for name, value in parameters.items() if ".lora_" in name)
    return WeightBytes(
        model=sum(value.nbytes for value in parameters.values()) - adapters,
        adapters=adapters,
        merged=sum(value.nbytes for name, value in parameters.items() if name.endswith(".base_layer.weight")),
        heads=parameter_bytes(heads),
        linear=sum(weight.nbytes for weight in linear if weight.dtype == th.float32),
    )


def _positions(rows: int, width: int) -> Tensor:
    return th.arange(width).expand(rows, width)


@lru_cache
def prefill_bytes(policy: Blueprint, n_layers: int, rows: int, capacity: int) -> tuple[int, int]:
    """Bytes of the slots of ``rows`` texts of up to ``capacity`` tokens, and of a pass that fills them."""
    model = policy.build(n_layers, adapted=False)  # adapters are merged into the weights
    width = max(capacity - 1, 1)
    memory = Allocations()
    together = min(rows, PREFILL_ROWS)
    with fake(model), memory, th.no_grad():
        slots = SlotCache(model.config.get_text_config(), rows, capacity, th.device("cpu"))
        slots.begin_prefill(th.arange(together))
        hidden_states(model, th.zeros(together, width, dtype=th.long), None, slots)
        kept = sum(layer.keys.nbytes + layer.values.nbytes for layer in slots.layers)
    return kept, memory.peak - kept


@lru_cache
def choice_bytes(policy: Blueprint, rows: int) -> int:
    """Bytes of choosing the next token of ``rows`` texts."""
    model = policy.build(1, adapted=False)
    memory = Allocations()
    with fake(model), memory, th.no_grad():
        hidden = th.zeros(rows, policy.hidden_size, dtype=policy.dtype)
        sample(TokenDistribution().log_probs(model, hidden, th.zeros(rows, dtype=th.long)))
    return memory.peak


@lru_cache
def training_bytes(
    policy: Blueprint, n_layers: int, rows: int, width: int, gradient_checkpointing: bool, n_critics: int
) -> tuple[int, int, int]:
    """Bytes of packed texts ``[rows, width]`` on their way through the model and its value heads.

    :return: what is kept for the backward pass; the peak on the way forwards, and on the way back.
    """
    model, heads = policy.build(n_layers), policy.heads(n_critics)
    if gradient_checkpointing:
        checkpoint_layers(model)
        for layer in model.modules():
            layer.training = isinstance(layer, GradientCheckpointingLayer)
    mixed = policy.lora is not None and policy.dtype != th.float32

    def forward() -> Tensor:
        with th.autocast("cpu", policy.dtype if mixed else None, enabled=mixed):
            hidden: Tensor = model.base_model(
                inputs_embeds=embeddings, position_ids=_positions(rows, width), use_cache=False
            ).last_hidden_state
        values = th.cat([head(hidden.detach().float()) for head in heads])
        return hidden.sum() + values.sum()

    memory = Allocations()
    with fake(model, heads), memory:
        embeddings = th.zeros(rows, width, policy.hidden_size, dtype=policy.dtype, requires_grad=True)
        kept, loss = saved_bytes(forward, model, heads)
        forward_peak, memory.peak = memory.peak, memory.now
        loss.backward()  # type: ignore[no-untyped-call]
    return kept, forward_peak, memory.peak


@lru_cache
def score_bytes(policy: Blueprint, tokens: int) -> int:
    """Bytes of log-probabilities and entropies of ``tokens`` tokens, and of their backward pass."""
    model = policy.build(1)
    memory = Allocations()
    with fake(model), memory:
        hidden = th.zeros(tokens, policy.hidden_size, dtype=policy.dtype, requires_grad=True)
        chosen = th.zeros(tokens, dtype=th.long)
        log_prob, entropy = TokenDistribution().score(model, hidden, chosen, chosen)
        (log_prob + entropy).sum().backward()  # type: ignore[no-untyped-call]
    return memory.peak


@lru_cache
def scoring_bytes(classifier: Blueprint, n_layers: int, rows: int, width: int) -> tuple[int]:
    """Bytes of scoring texts ``[rows, width]`` by a reward model."""
    model = classifier.build(n_layers)
    model.config.get_text_config().pad_token_id = model.config.pad_token_id = 0
    model.config.use_cache = False
    memory = Allocations()
    with fake(model), memory, th.no_grad():
        ids = th.zeros(rows, width, dtype=th.long)
        model(input_ids=ids, attention_mask=th.ones_like(ids))
    return (memory.peak,)
