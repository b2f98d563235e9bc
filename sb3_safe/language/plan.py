"""What a run will take in memory, known before anything is loaded.

Weights are counted, and passes traced, on models that have shapes and no contents
(:mod:`~sb3_safe.language.footprint`): a plan follows the code that will run and the architecture that it will run on.
"""

import math
import re
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import torch as th
from textgen_env.loading import file_arguments
from textgen_env.resolve import resolve
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

from sb3_safe.language.adapters import lora_arguments
from sb3_safe.language.buffer import MICRO_BATCH_SIZE, PACKED_WIDTH
from sb3_safe.language.footprint import (
    Blueprint,
    choice_bytes,
    parameter_bytes,
    prefill_bytes,
    score_bytes,
    scoring_bytes,
    training_bytes,
    weight_bytes,
)
from sb3_safe.language.loading import default_dtype
from sb3_safe.language.onednn import is_faster

#: What is trained, as often as it is kept while an update is taken back: before it, and after it.
WALK_BACK_COPIES = 2
#: Shares of an argument that are tried where a run does not fit.
SHARES = (3 / 4, 1 / 2, 1 / 4, 1 / 8)
UNITS = {"TiB": 2**40, "GiB": 2**30, "MiB": 2**20, "KiB": 2**10, "B": 1}
DECIMAL_UNITS = {"TB": 10**12, "GB": 10**9, "MB": 10**6, "kB": 10**3}
MEMINFO = Path("/proc/meminfo")
#: Limit of a container, by version 2 and version 1 of control groups.
CONTAINER_LIMITS = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes that a run takes on its device.

    What the driver takes, and what the allocator loses between blocks, comes on top.
    """

    always: dict[str, int]
    """Parts that are there all the time."""
    phases: dict[str, dict[str, int]]
    """Parts that come and go, by phase. One phase follows the other, so that the largest counts."""
    arguments: dict[str, Any] = field(repr=False, compare=False)
    """What the plan was made of."""

    @property
    def parts(self) -> dict[str, int]:
        """All parts by name."""
        return self.always | {name: size for phase in self.phases.values() for name, size in phase.items()}

    @property
    def largest_phase(self) -> str:
        """The phase that decides."""
        return max(self.phases, key=lambda phase: sum(self.phases[phase].values()))

    @property
    def total(self) -> int:
        """All that is always there, and the largest phase."""
        return sum(self.always.values()) + sum(self.phases[self.largest_phase].values())

    def __str__(self) -> str:
        return self.table()

    def table(self, available: int | None = None) -> str:
        """The parts, one a line, and whether they fit.

        :param available: bytes; ``None`` where that is not known.
        """
        rows = []
        for title, parts in ({"all the time": self.always} | self.phases).items():
            rows += [(title, sum(parts.values())), *((f"  {name}", size) for name, size in parts.items())]
        rows.append((f"total: all the time and {self.largest_phase}", self.total))
        if available is not None:
            rows.append(("available", available))
        width = max(len(name) for name, _ in rows)
        lines = [f"{name:<{width}}  {format_bytes(size):>11}" for name, size in rows]
        if available is not None:
            lines.append("it fits" if self.total <= available else "it does not fit")
        return "\n".join(lines)


def plan_memory(
    model: Any,
    *,
    n_envs: int,
    max_length: int,
    micro_batch_size: int,
    lora: Mapping[str, Any] | None = None,
    dtype: th.dtype = th.float32,
    reference: bool = True,
    gradient_checkpointing: bool = False,
    n_critics: int = 2,
    optimizer_states: int = 2,
    reward_model: Any = None,
    reward_batch_size: int = 32,
    reward_dtype: th.dtype | None = None,
    packs: bool = False,
) -> MemoryPlan:
    """What a run will take, from configurations alone.

    :param model: name on the Hugging Face hub, folder or ``package:folder``, or a configuration.
    :param n_envs: texts written side by side.
    :param max_length: longest text in tokens, prompt and completion together.
    :param micro_batch_size: tokens, prompts and padding included, that are trained on at a time.
    :param lora: arguments of :class:`~sb3_safe.language.adapters.Adapters`; ``None``: the model itself is trained.
    :param dtype: of the model's weights. Adapters and value heads are in float32.
    :param reference: whether the KL to the initial model is measured; without adapters that takes a copy of it.
    :param gradient_checkpointing: as for :class:`~sb3_safe.language.policy.LanguagePolicy`.
    :param n_critics: number of value heads.
    :param optimizer_states: tensors that the optimizer keeps for each that is trained; 2 for Adam.
    :param reward_model: like ``model``, a sequence classifier; ``None``: texts are not scored by a model.
    :param reward_batch_size: texts scored at a time.
    :param reward_dtype: of its weights; ``None``: as they are stored.
    :param packs: whether rollouts pack weights in float32, as they do on CPUs where oneDNN is faster; see
        :mod:`~sb3_safe.language.onednn`.
    :raises ValueError: a configuration that cannot be read, an architecture that cannot be traced, or a size that is
        not positive.
    """
    sizes = {
        "n_envs": n_envs,
        "max_length": max_length,
        "micro_batch_size": micro_batch_size,
        "n_critics": n_critics,
        "reward_batch_size": reward_batch_size,
    }
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"{name} must be at least 1, got {size}")
    judge = None
    if reward_model is not None:
        config = _configuration("reward_model", reward_model)
        judge = Blueprint(config, AutoModelForSequenceClassification, reward_dtype or _stored_dtype(config))
    policy = Blueprint(_configuration("model", model), AutoModelForCausalLM, dtype, lora)
    try:
        return _plan(
            policy=policy,
            judge=judge,
            reference=reference,
            gradient_checkpointing=gradient_checkpointing,
            optimizer_states=optimizer_states,
            packs=packs,
            **sizes,
        )
    except (AttributeError, RuntimeError, TypeError) as error:  # a pass whose shapes depend on contents, among others
        types = {blueprint.config.model_type for blueprint in (policy, judge) if blueprint is not None}
        raise ValueError(f"memory cannot be foreseen for models of type {', '.join(sorted(types))}: {error}") from error


def _plan(
    *,
    policy: Blueprint,
    judge: Blueprint | None,
    n_envs: int,
    max_length: int,
    micro_batch_size: int,
    reference: bool,
    gradient_checkpointing: bool,
    n_critics: int,
    optimizer_states: int,
    reward_batch_size: int,
    packs: bool,
) -> MemoryPlan:
    arguments = locals().copy()
    weights = weight_bytes(policy, n_critics)
    slots, prefill = policy.in_depth(prefill_bytes, n_envs, max_length)
    rows, width = _packed(micro_batch_size, max_length)
    activations, *peaks = policy.in_depth(training_bytes, rows, width, gradient_checkpointing, n_critics)
    always = {
        "language model": weights.model,
        "adapters": weights.adapters,
        "weights with adapters merged": weights.merged,
        "reference": weights.model if reference and policy.lora is None else 0,
        "value heads": weights.heads,
        "gradients": weights.trained,
        "optimizer": optimizer_states * weights.trained,
        "key/value slots": slots,
    }
    phases = {
        "writing": {"prefill": prefill, "choice of a token": choice_bytes(policy, n_envs)},
        "training": {
            "parameters before the update": weights.trained,
            "activations": activations,
            "forward and backward pass": max(peaks) - activations,
            "log-probabilities": score_bytes(policy, rows * width),
        },
        "taking an update back": {"parameters to go back to": WALK_BACK_COPIES * weights.trained},
    }
    if packs and weights.linear > 0:
        phases["writing"]["packed weights"] = weights.linear
    if judge is not None:
        always["reward model"] = parameter_bytes(judge.build())
        (scoring,) = judge.in_depth(scoring_bytes, min(reward_batch_size, n_envs), max_length)
        phases["scoring"] = {"texts in the reward model": scoring}
    return MemoryPlan({name: size for name, size in always.items() if size > 0}, phases, arguments)


def _configuration(argument: str, model: Any) -> Any:
    if not isinstance(model, str):
        return model
    try:
        return AutoConfig.from_pretrained(resolve(model), **file_arguments(None))
    except (OSError, ValueError) as error:
        raise ValueError(f"{argument}={model!r} has no configuration that can be read: {error}") from error


def _stored_dtype(config: Any) -> th.dtype:
    return getattr(config, "dtype", None) or th.float32


def _packed(micro_batch_size: int, max_length: int) -> tuple[int, int]:
    """Rows and width of the largest piece of a minibatch: as many tokens as there may be, but one row at least."""
    widest = max(max_length, PACKED_WIDTH)
    rows = math.ceil(micro_batch_size / widest)
    return rows, widest if rows == 1 else micro_batch_size // rows


# -- does it fit? ------------------------------------------------------------------------------------------------------


class Change(NamedTuple):
    """A change of arguments that makes a run smaller."""

    saved: int
    """Bytes."""
    advice: str
    arguments: dict[str, Any]


def check_memory(plan: MemoryPlan, available: int) -> None:
    """Refuse a run that does not fit, and say what would help.

    :param plan: what it takes.
    :param available: bytes.
    :raises ValueError: it takes more. What to change is named, the largest saving first.
    """
    if plan.total <= available:
        return
    changes = sorted(_changes(plan, available), key=lambda change: change.saved, reverse=True)
    alone = [plan.total - change.saved <= available for change in changes]
    advice = "; ".join(
        f"{change.advice} ({format_bytes(change.saved)} less{', enough by itself' if enough else ''})"
        for change, enough in zip(changes, alone, strict=True)
    )
    if not any(alone):
        together = _plan(**plan.arguments | {name: value for c in changes for name, value in c.arguments.items()}).total
        advice += f". All of that together makes it {format_bytes(together)}"
        smaller = "model" if plan.arguments["judge"] is None else "model or reward_model"
        advice += "" if together <= available else f", which is still too much: choose a smaller {smaller}"
    raise ValueError(
        f"the run takes {format_bytes(plan.total)} of memory, and {format_bytes(available)} are available. What helps, "
        f"most first: {advice}"
    )


def _changes(plan: MemoryPlan, available: int) -> Iterator[Change]:
    """What would make a run smaller, each as little as is enough, or else as much as it may."""
    arguments = plan.arguments
    policy: Blueprint = arguments["policy"]
    ladders: dict[str, list[tuple[str, Any]]] = {
        "gradient_checkpointing": [("pass gradient_checkpointing=True", True)],
        "policy": [('pass env_kwargs={"model_kwargs": {"dtype": "bfloat16"}}', replace(policy, dtype=th.bfloat16))],
    }
    if policy.lora is None:  # what is trained itself needs its precision
        ladders["policy"] = [("pass lora=True", replace(policy, lora={}))] if find_spec("peft") else []
    for name in ("n_envs", "micro_batch_size", "reward_batch_size"):
        values = [max(1, int(arguments[name] * share)) for share in SHARES]
        ladders[name] = [(f"lower {name} to {value}", value) for value in values]
    for name, steps in ladders.items():
        best = Change(0, "", {})
        for advice, value in steps:
            saved = plan.total - _plan(**arguments | {name: value}).total
            if saved > best.saved:
                best = Change(saved, advice, {name: value})
            if plan.total - best.saved <= available:
                break
        if best.saved > 0:
            yield best


def check_run(algorithm: Any) -> None:
    """Refuse a run that would not fit on its device, before its policy is built.

    What is on the device already, such as the reward model of its environment, is not counted again. Without a limit on
    the pieces of a minibatch (``micro_batch_size=None``) its texts are taken to fill their slots; if they end early,
    there are more of them, and the run takes more.

    :param algorithm: a SAFE whose policy is a language model.
    :raises ValueError: it does not fit; see :func:`check_memory`.
    """
    available = available_memory(algorithm.device)
    settings, capacity = algorithm.policy_kwargs, algorithm.observation_space["input_ids"].shape[0]
    kwargs = dict(settings.get("model_kwargs") or {})
    lora = lora_arguments(settings.get("lora", "auto"), settings["model"], kwargs)
    dtype = kwargs.get("dtype", default_dtype(lora is not None))
    piece = (algorithm.rollout_buffer_kwargs or {}).get("micro_batch_size", MICRO_BATCH_SIZE)
    if piece is None:  # a whole minibatch at a time: nobody knows how many texts it will have
        share = min(1.0, algorithm.batch_size / (algorithm.n_steps * algorithm.n_envs))
        piece = math.ceil(share * algorithm.n_envs * capacity)
    try:
        config = AutoConfig.from_pretrained(resolve(settings["model"]), **file_arguments(kwargs))
        if isinstance(dtype, str):
            dtype = _stored_dtype(config) if dtype == "auto" else getattr(th, dtype)
        plan = plan_memory(
            config,
            n_envs=algorithm.n_envs,
            max_length=capacity,
            micro_batch_size=piece,
            lora=lora,
            dtype=dtype,
            reference=algorithm.controller.active and algorithm.kl_reference == "initial",
            gradient_checkpointing=settings.get("gradient_checkpointing", False),
            n_critics=settings.get("n_critics", 2),
            packs=algorithm.device.type == "cpu" and is_faster(),
        )
    except ValueError as error:  # it may well run; nobody knows in how much memory
        warnings.warn(str(error), stacklevel=2)
        return
    if available is not None:
        check_memory(plan, available)


def available_memory(device: th.device | str) -> int | None:
    """Bytes that this process could still take on a device; ``None`` where that is not known.

    :param device: a CUDA device, or the CPU, whose memory is the machine's or, if that is less, the container's.
    """
    device = th.device(device)
    if device.type == "cuda" and th.cuda.is_available():
        free, _ = th.cuda.mem_get_info(device)
        return int(free + th.cuda.memory_reserved(device) - th.cuda.memory_allocated(device))
    if device.type == "cpu" and MEMINFO.exists():
        (kibibytes,) = re.findall(r"^MemAvailable:\s+(\d+) kB$", MEMINFO.read_text(), re.MULTILINE)
        limits = [path.read_text().strip() for path in CONTAINER_LIMITS if path.exists()]
        return min([int(kibibytes) * 1024, *(int(limit) for limit in limits if limit.isdigit())])
    return None


def format_bytes(size: int) -> str:
    """A size as people write it: ``1.50 GiB``."""
    unit = next((unit for unit, factor in UNITS.items() if size >= factor), "B")
    return f"{size / UNITS[unit]:.2f} {unit}"


def parse_bytes(text: str) -> int:
    """The size that people write ``80GiB`` or ``24 GB``.

    :raises ValueError: it has another form.
    """
    factors = UNITS | DECIMAL_UNITS
    match = re.fullmatch(rf"(\d+(?:\.\d+)?)\s*({'|'.join(factors)})", text.strip())
    if match is None:
        raise ValueError(f"{text!r} is not a size such as 80GiB or 24GB; units are {', '.join(factors)}")
    return int(float(match[1]) * factors[match[2]])
