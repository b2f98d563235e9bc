"""Running a causal language model: hidden states, logits, and whether its architecture can be run so."""

import functools
import inspect
from typing import Any

import torch as th
from torch import Tensor, nn

from sb3_safe.language.slots import SlotCache, additive

# Masks are given as tensors, which no other implementation of attention takes.
ATTENTION = ("sdpa", "eager")
# Tokens of a text of the check.
PROBE_TOKENS = 4


def hidden_states(
    lm: Any, ids: Tensor, mask: Any = None, slots: SlotCache | None = None, positions: Tensor | None = None
) -> Tensor:
    """Last hidden states ``[b, q, h]``, in the precision of the output layer.

    Without a mask rows are causal, which right-padding does not disturb, and where positions begin anew within a row,
    so does attention.

    :param lm: the language model.
    :param ids: ``[b, q]``
    :param mask: what :meth:`SlotCache.begin_decode` gives.
    :param slots: where keys and values go.
    :param positions: ``[b, q]``, of each token in its text; ``None``: each row is one text.
    """
    if positions is None:
        positions = th.arange(ids.shape[1], device=ids.device).expand_as(ids)
    if mask is not None and lm.config._attn_implementation == "eager":  # adds its mask to the scores
        mask = additive(mask, lm.dtype)
    output = lm.base_model(
        input_ids=ids,
        attention_mask=mask,
        position_ids=positions,
        use_cache=slots is not None,
        **{_cache_name(lm.base_model.__class__): slots},
    )
    # On a GPU autocast makes the last norm's output float32 where that is an nn.LayerNorm, as of GPT-2 and NeoX.
    return output.last_hidden_state.to(lm.get_output_embeddings().weight.dtype)  # type: ignore[no-any-return]


@functools.cache  # asked for at every token
def _cache_name(architecture: type[nn.Module]) -> str:
    """What a forward pass calls the keys and values it is given: transformers 5.24 has renamed them in its models."""
    accepted = inspect.signature(architecture.forward).parameters
    return "past_key_values" if "past_key_values" in accepted else "cache"


def next_logits(lm: Any, hidden: Tensor) -> Tensor:
    """Logits of the next token ``[..., V]`` in float32, as the model's own forward pass gives them.

    :param lm: the language model.
    :param hidden: ``[..., h]``
    """
    config = lm.config.get_text_config()
    logits = lm.get_output_embeddings()(hidden).float()
    if (factor := getattr(config, "logit_scale", None)) is not None:  # Cohere
        logits = logits * factor
    if (divisor := getattr(config, "logits_scaling", None)) is not None:  # Granite
        logits = logits / divisor
    if (cap := getattr(config, "final_logit_softcapping", None)) is not None:  # Gemma 2
        logits = cap * th.tanh(logits / cap)
    return logits  # type: ignore[no-any-return]


@th.no_grad()
def check_architecture(lm: Any, model: str) -> None:
    """Refuse a model that would not compute here what it computes on its own.

    Its layers are run without the code around them, on texts packed into one row, and token by token with slots of
    keys and values. An architecture that ignores where positions begin anew, or does something to its logits that is
    not known here, would do so without an error, and learn from wrong probabilities. So two short texts go through it
    both ways.

    :param lm: the language model.
    :param model: its name, for the message.
    :raises ValueError: probabilities differ, or the architecture does not take what it is given.
    """
    config = lm.config.get_text_config()
    kind = f"model={model!r} ({type(lm).__name__}) is not supported"
    advice = "choose a transformer such as Qwen, Llama, Gemma, Mistral or GPT-2"
    accepted = inspect.signature(lm.base_model.forward).parameters
    missing = {_cache_name(lm.base_model.__class__), "position_ids", "use_cache"} - accepted.keys()
    layers = set(getattr(config, "layer_types", None) or getattr(config, "attention_layers", None) or ())
    if getattr(lm, "_is_stateful", False) or missing or layers - {"full_attention", "sliding_attention", "global"}:
        raise ValueError(
            f"{kind}: texts are written with a cache of keys and values and positions of their own, which this "
            f"architecture does not take; {advice}"
        )
    if lm.config._attn_implementation not in ATTENTION:
        raise ValueError(
            f"model_kwargs: attn_implementation={lm.config._attn_implementation!r} does not take the masks that texts "
            f"are written with; use one of {', '.join(map(repr, ATTENTION))}"
        )
    first = config.vocab_size // 2
    ids = (first + th.arange(2 * PROBE_TOKENS, device=lm.device)).view(2, -1) % config.vocab_size
    positions = th.arange(PROBE_TOKENS, device=lm.device).expand_as(ids)
    alone = lm(input_ids=ids, use_cache=False).logits.float()
    packed = hidden_states(lm, ids.view(1, -1), positions=positions.reshape(1, -1)).view(*ids.shape, -1)
    rows = th.arange(2, device=lm.device)
    last = PROBE_TOKENS - 1 - rows  # one text is longer than the other
    slots = SlotCache(config, 2, PROBE_TOKENS, lm.device)
    slots.begin_prefill(rows)
    hidden_states(lm, ids[:, :-1], None, slots)
    mask = slots.begin_decode(last, PROBE_TOKENS)
    written = hidden_states(lm, ids[rows, last, None], mask, slots, last[:, None])[:, 0]
    expected = alone[rows, last]
    # In low precision rounding may also route a token to other experts.
    tolerance = 0.003 if lm.dtype == th.float32 else 0.3
    spread = (expected - expected.mean(dim=-1, keepdim=True)).norm()
    for how, hidden in (("packed into one row", packed[rows, last]), ("written token by token", written)):
        if (next_logits(lm, hidden) - expected).norm() > tolerance * spread:
            raise ValueError(
                f"{kind}: texts that are {how} get other probabilities than from the model's own forward pass; {advice}"
            )


def check_length(lm: Any, length: int, model: str) -> None:
    """Refuse texts that would change how a model sees the positions of the others beside them.

    LongRoPE and dynamic scaling choose their frequencies by the longest text of a batch, so that beyond the length
    that a model was first trained on, a text would get other probabilities in training than when it was written.

    :param lm: the language model.
    :param length: of the longest text, in tokens.
    :param model: its name, for the message.
    :raises ValueError: the text is longer than that.
    """
    config = lm.config.get_text_config()
    scaling = getattr(config, "rope_parameters", None) or {}
    # Models with several kinds of layers have one scaling for each.
    for part in [scaling, *(part for part in scaling.values() if isinstance(part, dict))]:
        if part.get("rope_type") in ("longrope", "dynamic"):
            limit = part.get("original_max_position_embeddings") or config.max_position_embeddings
            if length > limit:
                raise ValueError(
                    f"model={model!r} scales positions ({part['rope_type']}) by the longest text of a batch when that "
                    f"has more than {limit} tokens, and here texts have up to {length}: lower max_prompt_tokens or "
                    "max_new_tokens"
                )
