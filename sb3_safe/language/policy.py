"""A causal language model as an SB3 actor-critic policy over tokens."""

import copy
from typing import Any, ClassVar

import torch as th
from gymnasium import spaces
from stable_baselines3.common.policies import BasePolicy
from stable_baselines3.common.type_aliases import PyTorchObs, Schedule
from stable_baselines3.common.utils import polyak_update
from torch import Tensor, nn

from sb3_safe.functional import categorical_kl
from sb3_safe.language.buffer import SegmentBuffer
from sb3_safe.language.loading import load_language_model
from sb3_safe.language.slots import SlotCache
from sb3_safe.policies import Evaluation, PessimisticCritics

# Far enough below any logit that its probability is exactly 0, and finite, so that 0 * log 0 is 0 and not NaN.
SUPPRESSED = -1e9


class ValueHead(nn.Sequential):
    """``LayerNorm - Linear(h, h/4) - GELU - Linear(h/4, 1)``, in float32 (paper, section on the critic)."""

    def __init__(self, hidden_size: int) -> None:
        inner = max(hidden_size // 4, 1)
        super().__init__(nn.LayerNorm(hidden_size), nn.Linear(hidden_size, inner), nn.GELU(), nn.Linear(inner, 1))


class LanguagePolicy(PessimisticCritics, BasePolicy):
    """Next-token distribution of a causal language model, and ``n_critics`` value heads on its hidden states.

    Observations are ``Dict(input_ids [L], length [1], prompt_length [1])``, right-padded; an action is a token. While
    texts are written each row keeps its keys and values in a slot, so that a step costs one token. Training sees whole
    texts (:class:`~sb3_safe.language.buffer.SegmentBuffer`). Both use the same temperature and the same suppression of
    early end tokens, so that a probability ratio is 1 as long as the weights have not changed.

    The heads read the hidden state of each position BEFORE its action. Their gradient stops there by default.

    :param model: name, folder or ``package:folder`` of the model.
    :param eos_token_id: the end token; only needed with ``min_new_tokens``.
    :param min_new_tokens: the end token has probability 0 before so many tokens were written.
    :param temperature: divides all logits, in rollout, training and reference alike.
    :param n_critics: number of value heads.
    :param soft_min_alpha: temperature of the soft-min, in running standard deviations of the return.
    :param critic_gradient: share of the critics' gradient that reaches the language model, 0 to 1.
    :param critic_rate: learning rate of the heads, in multiples of the policy's.
    :param model_kwargs: arguments of ``from_pretrained``.
    :param optimizer_class: the optimizer.
    :param optimizer_kwargs: its arguments, but for the rate.
    :raises ValueError: the model cannot be loaded, its vocabulary is not the action space, an argument out of range.
    """

    kl_reference: ClassVar[str] = "initial"
    rollout_buffer_class: ClassVar[type[SegmentBuffer]] = SegmentBuffer
    optimizer: th.optim.Optimizer
    lm: Any

    def __init__(
        self,
        observation_space: spaces.Dict,
        action_space: spaces.Discrete,
        lr_schedule: Schedule,
        model: str | None = None,
        eos_token_id: int | None = None,
        min_new_tokens: int = 0,
        temperature: float = 1.0,
        n_critics: int = 2,
        soft_min_alpha: float = 0.3,
        critic_gradient: float = 0.0,
        critic_rate: float = 1.0,
        model_kwargs: dict[str, Any] | None = None,
        use_sde: bool = False,
        optimizer_class: type[th.optim.Optimizer] = th.optim.Adam,
        optimizer_kwargs: dict[str, Any] | None = None,
    ) -> None:
        optimizer_kwargs = {"eps": 1e-5} if optimizer_kwargs is None else optimizer_kwargs
        super(PessimisticCritics, self).__init__(
            observation_space, action_space, optimizer_class=optimizer_class, optimizer_kwargs=optimizer_kwargs
        )
        _check(observation_space, model, temperature, min_new_tokens, eos_token_id, critic_gradient, use_sde)
        assert model is not None
        self._arguments = {
            "model": model,
            "eos_token_id": eos_token_id,
            "min_new_tokens": min_new_tokens,
            "temperature": temperature,
            "n_critics": n_critics,
            "soft_min_alpha": soft_min_alpha,
            "critic_gradient": critic_gradient,
            "critic_rate": critic_rate,
            "model_kwargs": model_kwargs,
        }
        self.eos_token_id = eos_token_id
        self.min_new_tokens = min_new_tokens
        self.temperature = temperature
        self.critic_gradient = critic_gradient
        lm: Any = load_language_model(model, **(model_kwargs or {}))
        self.lm = lm
        config = lm.config.get_text_config()
        if config.vocab_size != action_space.n:
            raise ValueError(
                f"model={model!r} has a vocabulary of {config.vocab_size}, the environment's actions are "
                f"{action_space.n}: both must come from the same model"
            )
        self._init_critics(n_critics, soft_min_alpha)
        self.heads = nn.ModuleList([ValueHead(config.hidden_size) for _ in range(n_critics)])
        self.target_heads: nn.ModuleList | None = None
        self.reference: Any = None
        self._slots: SlotCache | None = None
        rate = lr_schedule(1)
        groups = [
            {"params": [parameter for parameter in self.lm.parameters() if parameter.requires_grad], "lr": rate},
            {"params": list(self.heads.parameters()), "lr": rate * critic_rate, "rate_factor": critic_rate},
        ]
        self.optimizer = optimizer_class(groups, **self.optimizer_kwargs)

    def _get_constructor_parameters(self) -> dict[str, Any]:
        parameters = {"observation_space": self.observation_space, "action_space": self.action_space}
        optimizer = {"optimizer_class": self.optimizer_class, "optimizer_kwargs": self.optimizer_kwargs}
        return parameters | optimizer | self._arguments | {"lr_schedule": self._dummy_schedule}

    def set_training_mode(self, mode: bool) -> None:
        """Entering and leaving training, weights change: no slot is trusted any more. Dropout stays off."""
        if mode or self.training:  # not on every predict(), which asks for evaluation mode each time
            self._invalidate()
        self.training = mode

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """As ``nn.Module.load_state_dict``; no slot is trusted any more."""
        self._invalidate()
        return super().load_state_dict(*args, **kwargs)

    def _invalidate(self) -> None:
        if self._slots is not None:
            self._slots.invalidate()

    # -- writing ---------------------------------------------------------------------------------------------------

    def forward(self, obs: PyTorchObs, deterministic: bool = False) -> tuple[Tensor, Tensor, Tensor]:
        """Choose the next token of every row: ``(tokens [B], soft-min values [B, 1], log-probabilities [B])``."""
        assert isinstance(obs, dict)
        hidden = self._continue(obs["input_ids"].long(), obs["length"].long().view(-1))
        new_tokens = (obs["length"] - obs["prompt_length"]).view(-1)
        log_probs = self._log_probs(self.lm, hidden, new_tokens)
        tokens = log_probs.argmax(dim=-1) if deterministic else _sample(log_probs)
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
        if self._slots is None or self._slots.n_rows != len(ids) or self._slots.ids.device != ids.device:
            n_layers = self.lm.config.get_text_config().num_hidden_layers
            self._slots = SlotCache(n_layers, len(ids), ids.shape[1], ids.device)
        slots, last = self._slots, lengths - 1
        stale = slots.stale_rows(ids, last)
        width = int(last[stale].max()) if len(stale) > 0 else 0
        if width > 0:
            # All but the last token: that one is decoded together with everybody else's. What a shorter text
            # leaves in its slot beyond its own end is overwritten before anything attends to it.
            slots.begin_prefill(stale)
            self._body(self.lm, ids[stale, :width], None, slots)
        mask = slots.begin_decode(last, int(lengths.max()))
        if self.lm.config._attn_implementation == "eager":  # adds its mask to the scores; sdpa takes booleans
            mask = th.zeros(mask.shape, dtype=self.lm.dtype, device=mask.device).masked_fill_(~mask, -th.inf)
        hidden = self._body(self.lm, ids.gather(1, last.unsqueeze(1)), mask, slots, last.unsqueeze(1))
        slots.remember(ids, lengths)
        return hidden[:, 0]

    def _body(
        self,
        lm: Any,
        ids: Tensor,
        mask: Tensor | None = None,
        slots: SlotCache | None = None,
        positions: Tensor | None = None,
    ) -> Tensor:
        """Last hidden states ``[b, q, h]``.

        Without a mask rows are causal, which right-padding does not disturb, and where positions begin anew within
        a row, so does attention.
        """
        if positions is None:
            positions = th.arange(ids.shape[1], device=ids.device).expand_as(ids)
        output = lm.base_model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=slots,
            use_cache=slots is not None,
        )
        return output.last_hidden_state  # type: ignore[no-any-return]

    # -- scoring ---------------------------------------------------------------------------------------------------

    def evaluate(self, obs: PyTorchObs, actions: Tensor) -> Evaluation:
        """Values of every critic ``[B, K]``, log-probability and entropy ``[B]`` of the B tokens of a minibatch.

        :param obs: packed texts ``input_ids``, ``position_ids`` ``[R, W]``, and for each action ``[B]`` where the
            token before it stands (``rows``, ``cols``) and how many tokens had been written (``new_tokens``), as
            :class:`~sb3_safe.language.buffer.SegmentBuffer` yields them.
        :param actions: ``[B]``
        """
        hidden, log_probs = self._score(self.lm, obs)
        log_prob = log_probs.gather(-1, actions.long().view(-1, 1)).squeeze(-1)
        entropy = -(log_probs.exp() * log_probs).sum(dim=-1)
        return Evaluation(self._values(self.heads, hidden), log_prob, entropy)

    def evaluate_actions(self, obs: PyTorchObs, actions: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """SB3's interface: ``(soft-min values [B, 1], log-probabilities [B], entropies [B])``."""
        values, log_prob, entropy = self.evaluate(obs, actions)
        return self.aggregate(values), log_prob, entropy

    def predict_values(self, obs: PyTorchObs) -> Tensor:
        """Soft-min values ``[B, 1]``, of the target critics where there are any; leaves the slots alone."""
        assert isinstance(obs, dict)
        ids, lengths = obs["input_ids"].long(), obs["length"].long().view(-1)
        hidden = self._body(self.lm, ids[:, : int(lengths.max())])
        return self._used_value(hidden[th.arange(len(ids), device=ids.device), lengths - 1])

    def _score(self, lm: Any, obs: PyTorchObs) -> tuple[Tensor, Tensor]:
        """Hidden states ``[B, h]`` before each action, and log-probabilities ``[B, V]`` of all tokens."""
        assert isinstance(obs, dict)
        hidden = self._body(lm, obs["input_ids"], positions=obs["position_ids"])[obs["rows"], obs["cols"]]
        return hidden, self._log_probs(lm, hidden, obs["new_tokens"])

    def _log_probs(self, lm: Any, hidden: Tensor, new_tokens: Tensor) -> Tensor:
        """Log-probabilities ``[B, V]`` in float32.

        :param hidden: ``[B, h]``
        :param new_tokens: ``[B]``, how many tokens had been written before this one.
        """
        logits = lm.get_output_embeddings()(hidden).float()
        cap = getattr(lm.config.get_text_config(), "final_logit_softcapping", None)
        if cap is not None:
            logits = cap * th.tanh(logits / cap)
        if self.temperature != 1.0:
            logits = logits / self.temperature
        if self.min_new_tokens > 0:
            early = (new_tokens < self.min_new_tokens).unsqueeze(-1)
            eos = th.arange(logits.shape[-1], device=logits.device) == self.eos_token_id
            logits = logits.masked_fill(early & eos, SUPPRESSED)
        return th.log_softmax(logits, dim=-1)

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
        """Make the model as it is now the reference of the KL penalty. Saved with the parameters."""
        self.reference = copy.deepcopy(self.lm).requires_grad_(False)

    @th.no_grad()
    def reference_log_prob(self, obs: PyTorchObs, actions: Tensor) -> Tensor:
        """Log-probability ``[B]`` of tokens under the reference model, nats."""
        log_probs = self._score(self.reference, obs)[1]
        return log_probs.gather(-1, actions.long().view(-1, 1)).squeeze(-1)

    def exact_kl(self, obs: PyTorchObs) -> Tensor:
        """``KL(policy || reference)`` ``[B]`` over the whole vocabulary, nats per token."""
        with th.no_grad():
            reference = self._score(self.reference, obs)[1]
        return categorical_kl(self._score(self.lm, obs)[1], reference)

    def make_target_critics(self) -> None:
        """Add lagging copies of the heads, which then supply the values that advantages are made of."""
        self.target_heads = copy.deepcopy(self.heads).requires_grad_(False)

    def update_target_critics(self, tau: float) -> None:
        """Move the target heads towards the heads by ``tau`` in (0, 1]."""
        if self.target_heads is not None:
            polyak_update(self.heads.parameters(), self.target_heads.parameters(), tau)


def _sample(log_probs: Tensor) -> Tensor:
    """Draw from categorical distributions by inverting the cumulative distribution: 4 x as fast as multinomial.

    :param log_probs: ``[B, V]``
    :return: ``[B]``
    """
    cumulative = log_probs.exp().cumsum(dim=-1)
    # Scaled by what the probabilities really sum to; strict, so that a token of probability 0 is never drawn.
    threshold = th.rand(len(log_probs), 1, device=log_probs.device) * cumulative[:, -1:]
    tokens = th.searchsorted(cumulative, threshold, right=True).squeeze(-1)
    return tokens.clamp_(max=log_probs.shape[-1] - 1)


def _check(
    observation_space: spaces.Space[Any],
    model: str | None,
    temperature: float,
    min_new_tokens: int,
    eos_token_id: int | None,
    critic_gradient: float,
    use_sde: bool,
) -> None:
    if not isinstance(observation_space, spaces.Dict) or not {"input_ids", "length", "prompt_length"} <= set(
        observation_space.spaces
    ):
        raise ValueError(
            "policy='LanguagePolicy' needs observations Dict(input_ids, length, prompt_length) as TextGenEnv-v0 gives "
            f"them, got {observation_space}"
        )
    if model is None:
        raise ValueError("policy_kwargs: model is missing; an environment like TextGenEnv-v0 names it in its metadata")
    if not temperature > 0:
        raise ValueError(f"temperature must be positive, got {temperature}")
    if min_new_tokens > 0 and eos_token_id is None:
        raise ValueError("min_new_tokens needs eos_token_id")
    if not 0 <= critic_gradient <= 1:
        raise ValueError(f"critic_gradient must be in [0, 1], got {critic_gradient}")
    if use_sde:
        raise ValueError("use_sde is for continuous actions, not for tokens")
