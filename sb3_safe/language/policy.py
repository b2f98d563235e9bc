"""A causal language model as an SB3 actor-critic policy over tokens."""

import copy
import functools
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.policies import BasePolicy
from stable_baselines3.common.type_aliases import PyTorchObs, Schedule
from stable_baselines3.common.utils import polyak_update
from textgen_env.resolve import as_name
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from sb3_safe.language.adapters import LORA_FROM, Adapters, lora_arguments
from sb3_safe.language.body import check_length, hidden_states
from sb3_safe.language.buffer import SegmentBuffer
from sb3_safe.language.decoding import DecodeStep
from sb3_safe.language.export import export
from sb3_safe.language.loading import checkpoint_layers, default_dtype, load_language_model, model_size
from sb3_safe.language.onednn import accelerate, packing
from sb3_safe.language.slots import PREFILL_ROWS, SlotCache
from sb3_safe.language.tokens import TokenDistribution, sample
from sb3_safe.policies import Evaluation, PessimisticCritics


class ValueHead(nn.Sequential):
    """``LayerNorm - Linear(h, h/4) - GELU - Linear(h/4, 1)``, in float32 (paper, section on the critic)."""

    def __init__(self, hidden_size: int) -> None:
        inner = max(hidden_size // 4, 1)
        super().__init__(nn.LayerNorm(hidden_size), nn.Linear(hidden_size, inner), nn.GELU(), nn.Linear(inner, 1))


class LanguagePolicy(PessimisticCritics, BasePolicy):
    """Next-token distribution of a causal language model, and ``n_critics`` value heads on its hidden states.

    Observations are ``Dict(input_ids [L], length [1], prompt_length [1])``, right-padded; an action is a token. While
    texts are written each row keeps its keys and values in a slot, so that a step costs one token. Training sees whole
    texts (:class:`~sb3_safe.language.buffer.SegmentBuffer`). Both use the same :class:`TokenDistribution`, so that a
    probability ratio is 1 as long as the weights have not changed.

    The heads read the hidden state of each position BEFORE its action. Their gradient stops there by default.

    :param model: name, folder or ``package:folder`` of the model. A folder is kept by its absolute path.
    :param eos_token_id: the end token, or several; only needed with ``min_new_tokens``.
    :param min_new_tokens: end tokens have probability 0 before so many tokens were written.
    :param temperature: divides all logits, in rollout, training and reference alike.
    :param top_k: only so many tokens may be chosen; 0: all. See :class:`TokenDistribution`.
    :param top_p: only the most probable tokens that together have this probability may be chosen; 1: all.
    :param n_critics: number of value heads.
    :param soft_min_alpha: temperature of the soft-min, in running standard deviations of the return.
    :param critic_gradient: share of the critics' gradient that reaches the language model, 0 to 1.
    :param critic_rate: learning rate of the heads, in multiples of the policy's.
    :param critic_max_grad_norm: the heads' gradient is clipped to this norm, on its own.
    :param lora: train low-rank adapters, not the model: ``True`` for rank 128, or arguments of ``peft.LoraConfig``;
        ``"auto"``: for models of 300 million parameters or more. The model without its adapters is the reference.
    :param gradient_checkpointing: keep no activations within a layer for the backward pass, but compute them again:
        less memory, a third more time.
    :param cuda_graphs: on a GPU, record the step that writes a token and replay it; off for models that cannot be.
    :param model_kwargs: arguments of ``from_pretrained``. ``dtype`` is float32 by default; with adapters and a GPU
        that has it, bfloat16.
    :param optimizer_class: the optimizer.
    :param optimizer_kwargs: its arguments, but for the rate; ``None``: Adam's ``eps`` is 1e-5, as in SB3.
    :raises ValueError: the model cannot be loaded, its vocabulary is not the action space, an argument out of range.
    :raises ImportError: adapters are wanted and PEFT is not installed.
    """

    kl_reference: ClassVar[str] = "initial"
    copies: ClassVar[Mapping[str, str]] = {"reference.": "lm.", "target_heads.": "heads."}
    rollout_buffer_class: ClassVar[type[SegmentBuffer]] = SegmentBuffer
    optimizer: th.optim.Optimizer
    lm: Any

    def __init__(
        self,
        observation_space: spaces.Dict,
        action_space: spaces.Discrete,
        lr_schedule: Schedule,
        model: str | None = None,
        eos_token_id: int | Sequence[int] | None = None,
        min_new_tokens: int = 0,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        n_critics: int = 2,
        soft_min_alpha: float = 0.3,
        critic_gradient: float = 0.0,
        critic_rate: float = 1.0,
        critic_max_grad_norm: float = 0.5,
        lora: bool | Mapping[str, Any] | Literal["auto"] = "auto",
        gradient_checkpointing: bool = False,
        cuda_graphs: bool = True,
        model_kwargs: dict[str, Any] | None = None,
        use_sde: bool = False,
        optimizer_class: type[th.optim.Optimizer] = th.optim.Adam,
        optimizer_kwargs: dict[str, Any] | None = None,
    ) -> None:
        if optimizer_kwargs is None:
            optimizer_kwargs = {"eps": 1e-5} if optimizer_class is th.optim.Adam else {}  # as SB3 does
        super().__init__(
            observation_space, action_space, optimizer_class=optimizer_class, optimizer_kwargs=optimizer_kwargs
        )
        _check_observations(observation_space)
        _check(model, critic_gradient, critic_rate, critic_max_grad_norm, use_sde)
        model = as_name(model)
        assert model is not None
        self._arguments: dict[str, Any] = {
            "model": model,
            "eos_token_id": eos_token_id,
            "min_new_tokens": min_new_tokens,
            "temperature": temperature,
            "top_k": top_k,
            "top_p": top_p,
            "n_critics": n_critics,
            "soft_min_alpha": soft_min_alpha,
            "critic_gradient": critic_gradient,
            "critic_rate": critic_rate,
            "critic_max_grad_norm": critic_max_grad_norm,
            "lora": lora,
            "gradient_checkpointing": gradient_checkpointing,
            "cuda_graphs": cuda_graphs,
            "model_kwargs": model_kwargs or {},
        }
        self.distribution = TokenDistribution(temperature, top_k, top_p, min_new_tokens, eos_token_id)
        self.critic_gradient = critic_gradient
        loading = dict(model_kwargs or {})
        adapted = lora_arguments(lora, model, loading)
        loading.setdefault("dtype", default_dtype(adapted is not None))
        lm: Any = load_language_model(model, **loading)
        self.lm = lm
        config = lm.config.get_text_config()
        if config.vocab_size != action_space.n:
            raise ValueError(
                f"model={model!r} has a vocabulary of {config.vocab_size}, the environment's actions are "
                f"{action_space.n}: both must come from the same model"
            )
        check_length(lm, observation_space["input_ids"].shape[0], model)  # type: ignore[index]
        self.adapters = None if adapted is None else Adapters(lm, adapted)
        if adapted is None and lm.dtype != th.float32:
            warnings.warn(
                f"model_kwargs: dtype={lm.dtype} without adapters rounds away small steps of the optimizer; use "
                "float32, or lora=True",
                stacklevel=2,
            )
        if gradient_checkpointing:
            checkpoint_layers(lm)
        # In low precision, one token at a time rounds otherwise than whole texts do.
        self.rollout_is_approximate = lm.dtype != th.float32
        self._init_critics(n_critics, soft_min_alpha)
        self.heads = nn.ModuleList([ValueHead(config.hidden_size) for _ in range(n_critics)])
        accelerate(self)
        self.target_heads: nn.ModuleList | None = None
        self.reference: Any = None
        self._slots: SlotCache | None = None
        self._decode: DecodeStep | None = None
        self._ended: Callable[[], np.ndarray | None] | None = None
        rate = lr_schedule(1)
        groups = [
            {"params": [parameter for parameter in self.lm.parameters() if parameter.requires_grad], "lr": rate},
            {
                "params": list(self.heads.parameters()),
                "lr": rate * critic_rate,
                "rate_factor": critic_rate,
                "max_grad_norm": critic_max_grad_norm,
            },
        ]
        self.optimizer = optimizer_class(groups, **self.optimizer_kwargs)

    @classmethod
    def check_algorithm(cls, algorithm: Any) -> None:
        """Refuse other observations than texts as they are, and a model that a run with it would not fit in memory.

        :param algorithm: what will build the policy; a folder in its arguments becomes absolute, since they are saved.
        :raises ValueError: the message names the arguments to change; see :mod:`sb3_safe.language.plan`.
        """
        _check_observations(algorithm.observation_space)
        normalizer = algorithm.get_vec_normalize_env()
        if normalizer is not None and normalizer.norm_obs:
            raise ValueError("env: VecNormalize would normalise token ids; make it with norm_obs=False")
        if "model" in algorithm.policy_kwargs:
            algorithm.policy_kwargs = algorithm.policy_kwargs | {"model": as_name(algorithm.policy_kwargs["model"])}
        model, kwargs = algorithm.policy_kwargs.get("model"), algorithm.policy_kwargs.get("model_kwargs") or {}
        # A small model fits, and one with a device map is not on one device.
        if model is not None and "device_map" not in kwargs and model_size(model, **kwargs) >= LORA_FROM:
            from sb3_safe.language import plan  # imports this module

            plan.check_run(algorithm)

    def _get_constructor_parameters(self) -> dict[str, Any]:
        parameters = {"observation_space": self.observation_space, "action_space": self.action_space}
        optimizer = {"optimizer_class": self.optimizer_class, "optimizer_kwargs": self.optimizer_kwargs}
        return parameters | optimizer | self._arguments | {"lr_schedule": self._dummy_schedule}

    def set_training_mode(self, mode: bool) -> None:
        """Entering and leaving training, weights change: no slot is trusted any more. Dropout stays off."""
        if mode or self.training:  # not on every predict(), which asks for evaluation mode each time
            self._invalidate()
        self.training = mode
        if self._arguments["gradient_checkpointing"]:
            for layer in self.lm.modules():
                if isinstance(layer, GradientCheckpointingLayer):  # checkpoints in training mode only
                    layer.training = mode

    def _invalidate(self) -> None:
        if self._slots is not None:
            self._slots.invalidate()
        if self.adapters is not None:
            self.adapters.invalidate()

    # -- parameters on disk ----------------------------------------------------------------------------------------

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """As ``nn.Module.state_dict``; with adapters, without the model's own weights, which never change."""
        state = super().state_dict(*args, **kwargs)
        for name in self._frozen():
            del state[name]
        return state

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """As ``nn.Module.load_state_dict``, for what :meth:`state_dict` gives; see :meth:`fitting_state`."""
        self._invalidate()
        fitting = self.fitting_state(state_dict, strict)
        result = super().load_state_dict(fitting, strict=strict and self.adapters is None, assign=assign)
        frozen = self._frozen()
        missing = [name for name in result.missing_keys if name not in frozen]
        if strict and (missing or result.unexpected_keys):
            raise RuntimeError(
                f"saved parameters do not fit this policy: missing {missing}, unexpected {result.unexpected_keys}"
            )
        return result

    def _frozen(self) -> set[str]:
        """Names of what adapters leave as it was loaded."""
        if self.adapters is None:
            return set()
        trained = {f"lm.{name}" for name, parameter in self.lm.named_parameters() if parameter.requires_grad}
        return {f"lm.{name}" for name in self.lm.state_dict()} - trained

    def export(self, directory: str | Path, merged: bool = False, tokenizer: Any = None) -> None:
        """Write what was trained for others: transformers and PEFT can load it.

        :param directory: gets the adapters, or without adapters the model, and the tokenizer.
        :param merged: write the whole model with the adapters in its weights.
        :param tokenizer: the one that the environment was given, or its name; ``None``: the model's own.
        :raises ValueError: there is no tokenizer, or it is another model's, or adapters would be written into the
            folder that the model was loaded from.
        """
        model, model_kwargs = self._arguments["model"], dict(self._arguments["model_kwargs"])
        export(self.lm, self.adapters, model, model_kwargs, directory, merged, tokenizer)

    # -- writing ---------------------------------------------------------------------------------------------------

    @contextmanager
    def collecting(self, ended: Callable[[], np.ndarray | None]) -> Iterator[None]:
        """Within it weights are packed where that makes writing faster, and no value is computed to be thrown away."""
        self._ended = ended
        try:
            with packing(self):
                yield
        finally:
            self._ended = None

    def forward(self, obs: PyTorchObs, deterministic: bool = False) -> tuple[Tensor, Tensor, Tensor]:
        """Choose the next token of every row: ``(tokens [B], soft-min values [B, 1], log-probabilities [B])``."""
        assert isinstance(obs, dict)
        hidden = self._continue(obs["input_ids"].long(), obs["length"].long().view(-1))
        new_tokens = (obs["length"] - obs["prompt_length"]).view(-1)
        log_probs = self.distribution.log_probs(self.lm, hidden, new_tokens)
        tokens = log_probs.argmax(dim=-1) if deterministic else sample(log_probs)
        log_prob = log_probs.gather(-1, tokens.unsqueeze(-1)).squeeze(-1)
        return tokens, self._used_value(hidden), log_prob

    def _predict(self, observation: PyTorchObs, deterministic: bool = False) -> Tensor:
        with th.no_grad():
            return self.forward(observation, deterministic)[0]

    def _continue(self, ids: Tensor, lengths: Tensor) -> Tensor:
        """Hidden state ``[B, h]`` at the last token of every row, by prefilling new texts and decoding one token.

        :param ids: ``[B, L]``
        :param lengths: ``[B]``
        """
        if self.adapters is not None:
            self.adapters.merge()
        if self._slots is None or self._slots.n_rows != len(ids) or self._slots.ids.device != ids.device:
            self._slots = SlotCache(self.lm.config.get_text_config(), len(ids), ids.shape[1], ids.device)
            self._decode = DecodeStep(
                functools.partial(self._body, self.lm), self._slots, self._arguments["cuda_graphs"]
            )
        assert self._decode is not None
        slots, last = self._slots, lengths - 1
        stale = slots.stale_rows(ids, last)
        # All but the last token: that one is decoded together with everybody else's. What a shorter text leaves in its
        # slot beyond its own end is overwritten before anything attends to it.
        for rows in th.split(stale[last[stale].argsort()], PREFILL_ROWS):
            width = int(last[rows].max()) if len(rows) > 0 else 0
            if width > 0:
                slots.begin_prefill(rows)
                self._body(self.lm, ids[rows, :width], None, slots)
        hidden = self._decode(ids.gather(1, last.unsqueeze(1)).squeeze(1), last, int(lengths.max()))
        slots.remember(ids, lengths)
        return hidden

    def _body(
        self,
        lm: Any,
        ids: Tensor,
        mask: Any = None,
        slots: SlotCache | None = None,
        positions: Tensor | None = None,
    ) -> Tensor:
        """As :func:`~sb3_safe.language.body.hidden_states`, with the adapters if they are not merged."""
        # Adapters are in single precision; beside a model of lower precision they compute in that.
        mixed = self.adapters is not None and not self.adapters.merged and lm.dtype != th.float32
        with th.autocast(ids.device.type, lm.dtype if mixed else None, enabled=mixed):
            return hidden_states(lm, ids, mask, slots, positions)

    # -- scoring ---------------------------------------------------------------------------------------------------

    def evaluate(self, obs: PyTorchObs, actions: Tensor) -> Evaluation:
        """Values of every critic ``[B, K]``, log-probability and entropy ``[B]`` of the B tokens of a minibatch.

        :param obs: packed texts ``input_ids``, ``position_ids`` ``[R, W]``, and for each action ``[B]`` where the
            token before it stands (``rows``, ``cols``) and how many tokens had been written (``new_tokens``), as
            :class:`~sb3_safe.language.buffer.SegmentBuffer` yields them.
        :param actions: ``[B]``
        """
        hidden = self._hidden(self.lm, obs)
        log_prob, entropy = self._score(self.lm, hidden, obs, actions)
        return Evaluation(self._values(self.heads, hidden), log_prob, entropy, hidden)

    def evaluate_actions(self, obs: PyTorchObs, actions: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """SB3's interface: ``(soft-min values [B, 1], log-probabilities [B], entropies [B])``."""
        values, log_prob, entropy, _ = self.evaluate(obs, actions)
        return self.aggregate(values), log_prob, entropy

    def predict_values(self, obs: PyTorchObs) -> Tensor:
        """Soft-min values ``[B, 1]``, of the target critics where there are any."""
        assert isinstance(obs, dict)
        ids, lengths = obs["input_ids"].long(), obs["length"].long().view(-1)
        if self._slots is not None and self._slots.n_rows == len(ids):  # most likely the texts that are being written
            ended = None if self._ended is None else self._ended()
            if ended is not None:  # another text has begun, and of its first token a value is had without prefill
                lengths = lengths.masked_fill(th.as_tensor(ended, dtype=th.bool, device=lengths.device), 1)
            return self._used_value(self._continue(ids, lengths))
        hidden = self._body(self.lm, ids[:, : int(lengths.max())])
        return self._used_value(hidden[th.arange(len(ids), device=ids.device), lengths - 1])

    def _hidden(self, lm: Any, obs: PyTorchObs) -> Tensor:
        """Hidden states ``[B, h]`` before each action."""
        assert isinstance(obs, dict)
        if self.adapters is not None:
            self.adapters.unmerge()
        return self._body(lm, obs["input_ids"], positions=obs["position_ids"])[obs["rows"], obs["cols"]]

    def _score(self, lm: Any, hidden: Tensor, obs: PyTorchObs, actions: Tensor) -> tuple[Tensor, Tensor]:
        assert isinstance(obs, dict)
        return self.distribution.score(lm, hidden, obs["new_tokens"], actions.long().view(-1))

    def _values(self, heads: nn.ModuleList, hidden: Tensor) -> Tensor:
        """Values ``[B, K]`` from hidden states ``[B, h]``."""
        if self.critic_gradient < 1:
            hidden = th.lerp(hidden.detach(), hidden, self.critic_gradient) if self.critic_gradient else hidden.detach()
        return th.cat([head(hidden.float()) for head in heads], dim=-1)

    def _used_value(self, hidden: Tensor) -> Tensor:
        heads = self.heads if self.target_heads is None else self.target_heads
        return self.aggregate(self._values(heads, hidden))

    # -- reference policy and target critics -----------------------------------------------------------------------

    def freeze_reference(self) -> None:
        """Make the model as it is now the reference of the KL penalty. Saved with the parameters.

        With adapters the reference is always the model without them: no copy is made, and none is saved.
        """
        if self.adapters is None:
            self.reference = copy.deepcopy(self.lm).requires_grad_(False)

    @contextmanager
    def _reference(self) -> Iterator[Any]:
        """Within it the reference model may be used, and with adapters nothing else."""
        if self.adapters is None:
            assert self.reference is not None, "freeze_reference() has not been called"
            yield self.reference
        else:
            with self.adapters.disabled():
                yield self.lm

    @th.no_grad()
    def reference_log_prob(self, obs: PyTorchObs, actions: Tensor) -> Tensor:
        """Log-probability ``[B]`` of tokens under the reference model, nats."""
        with self._reference() as lm:
            return self._score(lm, self._hidden(lm, obs), obs, actions)[0]

    def exact_kl(self, obs: PyTorchObs, latents: Tensor | None = None) -> Tensor:
        """``KL(policy || reference)`` ``[B]`` over the whole vocabulary, nats per token.

        :param obs: as for :meth:`evaluate`.
        :param latents: those that :meth:`evaluate` gave; ``None``: the model is run for them.
        """
        assert isinstance(obs, dict)
        with th.no_grad(), self._reference() as lm:
            reference_hidden = self._hidden(lm, obs)
        hidden = self._hidden(self.lm, obs) if latents is None else latents
        # Adapters leave the output layer alone, so that it is the reference's too.
        reference = self.lm if self.adapters is not None else self.reference
        return self.distribution.kl(self.lm, hidden, reference, reference_hidden, obs["new_tokens"])

    def log_others(self, obs: PyTorchObs, actions: Tensor, evaluation: Evaluation, rows: Tensor) -> Tensor:
        """See :meth:`~sb3_safe.policies.PessimisticCritics.log_others`."""
        assert isinstance(obs, dict)
        hidden = self._hidden(self.lm, obs) if evaluation.latents is None else evaluation.latents
        chosen = actions.long().view(-1)[rows]
        return self.distribution.log_others(self.lm, hidden[rows], obs["new_tokens"][rows], chosen)

    def make_target_critics(self) -> None:
        """Add lagging copies of the heads, which then supply the values that advantages are made of."""
        self.target_heads = copy.deepcopy(self.heads).requires_grad_(False)

    def drop_target_critics(self) -> None:
        """The heads themselves supply the values again."""
        self.target_heads = None

    def update_target_critics(self, tau: float) -> None:
        """Move the target heads towards the heads by ``tau`` in (0, 1]."""
        if self.target_heads is not None:
            polyak_update(self.heads.parameters(), self.target_heads.parameters(), tau)


def _check_observations(observation_space: spaces.Space[Any]) -> None:
    if not isinstance(observation_space, spaces.Dict) or not {"input_ids", "length", "prompt_length"} <= set(
        observation_space.spaces
    ):
        raise ValueError(
            "policy='LanguagePolicy' needs observations Dict(input_ids, length, prompt_length) as TextGenEnv-v0 gives "
            f"them, got {observation_space}"
        )


def _check(
    model: str | None, critic_gradient: float, critic_rate: float, critic_max_grad_norm: float, use_sde: bool
) -> None:
    if model is None:
        raise ValueError("policy_kwargs: model is missing; an environment like TextGenEnv-v0 names it in its metadata")
    if not 0 <= critic_gradient <= 1:
        raise ValueError(f"critic_gradient must be in [0, 1], got {critic_gradient}")
    if not critic_rate > 0:
        raise ValueError(f"critic_rate must be positive, got {critic_rate}")
    if not critic_max_grad_norm > 0:
        raise ValueError(f"critic_max_grad_norm must be positive, got {critic_max_grad_norm}")
    if use_sde:
        raise ValueError("use_sde is for continuous actions, not for tokens")
