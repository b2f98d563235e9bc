"""SAFE in the benchmark of speed on text: iterations timed by part, PPO by the same code, and a row per token."""

from collections import defaultdict
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch as th
from language_models import Task, make_tokenizer, no_reward_model, seconds_of
from language_peers import EPOCHS, LEARNING_RATE

from sb3_safe import SAFE
from sb3_safe.buffers import SafeSamples
from sb3_safe.language.policy import ValueHead
from sb3_safe.trust_bound import TrustBound

OFF: dict[str, Any] = {"huber_delta": None, "max_preview_kl": None, "policy_kwargs": {"n_critics": 1}}
# The same code path all three: with every layer off, SAFE is PPO.
VARIANTS: dict[str, dict[str, Any]] = {
    "safe": {},
    "ppo-fixed-kl": OFF | {"kl_controller": "fixed"},
    "ppo": OFF | {"kl_controller": "none"},
}


def make_safe(
    task: Task, model: str, variant: str = "safe", env_kwargs: Mapping[str, Any] | None = None, **arguments: Any
) -> SAFE:
    """SAFE on a task, or PPO by its code: one minibatch an epoch, no reward model unless one is given.

    :param model: folder of the language model.
    :param variant: of :data:`VARIANTS`.
    """
    environment = {
        "model": model,
        "tokenizer": make_tokenizer(task.shape.vocabulary),
        "reward_model": no_reward_model,
        "prompts": task.prompts(),
        "max_new_tokens": task.new_tokens,
        "min_new_tokens": 0,
    }
    settings: dict[str, Any] = {
        "n_envs": task.rows,
        "n_steps": task.new_tokens,
        "batch_size": task.rows * task.new_tokens,
        "n_epochs": EPOCHS,
        "learning_rate": LEARNING_RATE,
        "seed": 0,
        "device": "cpu",
    }
    changed = VARIANTS[variant]
    policy_kwargs = changed.get("policy_kwargs", {}) | arguments.pop("policy_kwargs", {})
    settings |= changed | arguments | {"policy_kwargs": policy_kwargs}
    return SAFE("TextGenEnv-v0", env_kwargs=environment | dict(env_kwargs or {}), **settings)


class Stopwatch:
    """Adds up the seconds of methods, by label."""

    def __init__(self, device: str) -> None:
        self.device = device
        self.seconds: dict[str, float] = defaultdict(float)

    def watch(self, owner: Any, method: str, label: str) -> None:
        """Time every call of a method from now on."""
        original: Callable[..., Any] = getattr(owner, method)

        def timed(*args: Any, **kwargs: Any) -> Any:
            seconds, result = seconds_of(lambda: original(*args, **kwargs), self.device)
            self.seconds[label] += seconds
            return result

        setattr(owner, method, timed)


class Safe:
    """Iterations of SAFE, or of PPO by its code, timed by part."""

    def __init__(self, task: Task, model: SAFE) -> None:
        self.task, self.model = task, model
        self.stopwatch = Stopwatch(model.device.type)
        for owner, method, label in (
            (self.model, "collect_rollouts", "collect"),
            (self.model, "_observe_rollout", "observe"),
            (self.model, "train", "update"),
            # Parts of the latter two.
            (self.model.policy, "reference_log_prob", "reference"),
            (self.model.controller, "update", "controller"),
            (self.model, "_kl_term", "penalty"),
            # One is made for every update.
            (TrustBound, "__init__", "bound"),
            (TrustBound, "step_scale", "bound"),
            (TrustBound, "keep", "bound"),
        ):
            self.stopwatch.watch(owner, method, label)

    def measure(self) -> dict[str, float]:
        """Seconds, tokens and texts of one iteration, and seconds of its parts."""
        self.stopwatch.seconds.clear()
        self.model._finished_returns.clear()
        tokens = self.task.rows * self.task.new_tokens
        seconds, _ = seconds_of(lambda: self.model.learn(tokens, reset_num_timesteps=False), self.model.device.type)
        parts = dict(self.stopwatch.seconds)
        rollout = parts.pop("collect") - parts["observe"]
        texts = len(self.model._finished_returns)
        return {
            "seconds": seconds,
            "tokens": tokens,
            "texts": texts,
            "rollout": rollout,
            "head": self.head_seconds(),
            **parts,
        }

    def head_seconds(self) -> float:
        """What one value head takes of an iteration: each step of the rollout, each pass of the update."""
        device = self.model.device
        hidden = th.randn(self.task.rows * self.task.new_tokens, self.task.shape.hidden, device=device)
        head = ValueHead(self.task.shape.hidden).to(device)

        def work() -> None:
            with th.no_grad():
                for rows in hidden.split(self.task.rows):
                    head(rows)
            for _ in range(EPOCHS):
                head(hidden).mean().backward()

        return seconds_of(work, device.type)[0]


class RowPerToken:
    """An update with one padded row per token, which is what an unmodified PPO makes of a text environment."""

    TOKENS = 64

    def __init__(self, model: SAFE) -> None:
        self.model = model
        model.learn(model.n_steps * model.n_envs)

    def measure(self) -> dict[str, float]:
        """Seconds of one pass over some tokens, which stand in for all."""
        packed = next(self.model.rollout_buffer.in_order(10**9))
        batch = rows_per_token(packed, np.random.permutation(len(packed.actions))[: self.TOKENS])
        self.model.policy.set_training_mode(True)

        def update() -> None:
            self.model._gradient([batch])
            self.model._step(1.0)

        return {"seconds": seconds_of(update)[0], "tokens": self.TOKENS}


def rows_per_token(packed: SafeSamples, chosen: np.ndarray) -> SafeSamples:
    """Some of the actions of packed texts, each at the end of a row that has all before it."""
    observations: Any = packed.observations
    texts = []
    for index in chosen:
        row, col = int(observations["rows"][index]), int(observations["cols"][index])
        length = int(observations["position_ids"][row, col]) + 1
        texts.append(observations["input_ids"][row, col + 1 - length : col + 1])
    ids = th.nn.utils.rnn.pad_sequence(texts, batch_first=True)
    rows = {
        "input_ids": ids,
        "position_ids": th.arange(ids.shape[1]).expand_as(ids),
        "rows": th.arange(len(ids)),
        "cols": th.tensor([len(text) - 1 for text in texts]),
        "new_tokens": observations["new_tokens"][chosen],
    }
    fields = {name: value[chosen] for name, value in packed._asdict().items() if isinstance(value, th.Tensor)}
    return packed._replace(observations=rows, **fields)
