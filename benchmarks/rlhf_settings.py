"""What the RLHF laboratory compares: methods, learning rates, tasks; the arguments of a run by name.

Every method is one class, SAFE, on one code path, but for GRPO, which is TRL's. With its layers off SAFE is PPO; the
fixed and the adaptive KL in PPO's reward are controllers of it.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

from control_settings import VARIANTS, only, plain, safe_defaults, without
from runs import Run
from stable_baselines3.common.policies import BasePolicy
from stable_baselines3.common.type_aliases import PyTorchObs
from torch import Tensor

from sb3_safe import SAFE
from sb3_safe.controller import CONTROLLERS
from sb3_safe.language import LanguagePolicy
from sb3_safe.policies import Evaluation
from sb3_safe.presets import preset

ENV_ID = "TextGenEnv-v0"
# As small an iteration as shows what is studied: 256 tokens, about 17 texts, 4 gradient steps.
HYPERPARAMETERS = {"n_envs": 16, "n_steps": 16, "batch_size": 128, "learning_rate": 3e-4}
TOKENS = HYPERPARAMETERS["n_envs"] * HYPERPARAMETERS["n_steps"]
# An iteration of GRPO has whole texts: as many as the others write side by side, in as many minibatches and passes.
GRPO_ARGUMENTS = {
    "per_device_train_batch_size": 8, "steps_per_generation": 2, "num_iterations": 2, "num_generations": 8,
    "max_completion_length": 32, "max_grad_norm": 1.0,
    "learning_rate": HYPERPARAMETERS["learning_rate"], "lr_scheduler_type": "constant",
    "max_steps": 1_000_000, "use_cpu": True, "bf16": False, "gradient_checkpointing": False,
    "save_strategy": "no", "logging_strategy": "no", "report_to": [], "disable_tqdm": True,
}  # fmt: skip
GRPO_UPDATES = GRPO_ARGUMENTS["steps_per_generation"] * GRPO_ARGUMENTS["num_iterations"]
"""Gradient steps on the texts of an iteration."""


class Setting(NamedTuple):
    """A stress on all methods alike."""

    rate: float = 1.0
    """In multiples of the tuned learning rate."""
    iterations: int = 400


SETTINGS = {
    "tuned": Setting(),
    "lr-x3": Setting(rate=3.0),
    "lr-x10": Setting(rate=10.0),
    # On seeds of its own, from TUNING_SEED on.
    "tuning": Setting(),
    "tuning-x3": Setting(rate=3.0),
    "tuning-x10": Setting(rate=10.0),
    "quick": Setting(rate=3.0, iterations=150),
    "quick-x10": Setting(rate=10.0, iterations=150),
}
TUNING = {"tuning": "tuned", "tuning-x3": "lr-x3", "tuning-x10": "lr-x10"}
"""Settings that choose, and those of the same rate on which what is chosen is compared."""
TUNING_SEED = 100
TUNED_FILE = "tuned.json"
"""In the folder of the results: the member of each family that is best at each task."""
OWN_RATES_FILE = "own_rates.json"
"""Beside it: setting and method of PPO and of SAFE at the learning rate that is best for them, by task."""

# -- methods -----------------------------------------------------------------------------------------------------------


class PublishedPolicy(LanguagePolicy):
    """Both heads are regressed through their soft-min, which is fitted to the return: no pessimism is left."""

    def evaluate(self, obs: PyTorchObs, actions: Tensor) -> Evaluation:
        """As the base class, with the soft-min as the only critic ``[B, 1]``."""
        evaluation = super().evaluate(obs, actions)
        return evaluation._replace(values=self.aggregate(evaluation.values))


class PublishedSAFE(SAFE):
    """The rule of the code published with the paper, as far as it reaches the weights.

    Its penalty is a number without a gradient, so there is none here either; its preview is never called.
    """

    def _get_policy_from_name(self, policy_name: str) -> type[BasePolicy]:
        return PublishedPolicy


GRPO = "GRPOTrainer"
"""TRL's class, by its name: importing it takes seconds."""
Method = tuple[type[SAFE] | str, dict[str, Any]]

PPO: dict[str, Any] = only()
COEFFICIENTS = (0.01, 0.02, 0.05, 0.1, 0.2)
"""Of the KL in PPO's reward, units of reward per nat."""
TARGETS = (0.02, 0.05, 0.1, 0.2, 0.4, 0.8)
"""Of the adaptive coefficient, nats per token."""
BETAS = (0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
"""Of GRPO: coefficients of the KL in its loss, where rewards have unit deviation."""
PRICES = (0.01, 0.02, 0.1, 0.2)
"""Of SAFE, units of the reward's spread per nat: with its default, 0.05, as many as PPO has coefficients."""


def kl_in_reward(controller: str, **arguments: float) -> Method:
    """PPO with the KL to the start in its reward."""
    kl = {"kl_controller": controller, "kl_controller_kwargs": arguments, "kl_estimator": "k1"}
    return SAFE, PPO | kl


def safe_with(**arguments: float | None) -> Method:
    """SAFE with other arguments of its controller."""
    return SAFE, {"kl_controller_kwargs": arguments}


PRICED = {f"safe-price-{p:g}": safe_with(price=p) for p in PRICES}
"""What SAFE, whose default is one for all tasks, could be tuned to."""
STRENGTHS = {f"safe-coef-{c:g}": safe_with(coef=c) for c in (0.02, 0.4)}
"""Of SAFE's penalty above the threshold: a range of 20 times around its default."""
ABLATION: dict[str, Method] = {
    **{name: (SAFE, arguments) for name, arguments in VARIANTS.items() if name != "safe-off"},
    # The limit on the drift of one action, which control tasks do not have.
    "safe-no-drift": (SAFE, without("drift")),
    "only-penalty-drift": (SAFE, only("penalty", "drift")),
}
# A family's methods differ in one number, which is tuned per task.
FAMILIES: dict[str, dict[str, Method]] = {
    "ppo-kl": {f"ppo-kl-{c:g}": kl_in_reward("fixed", coef=c) for c in COEFFICIENTS},
    "ppo-adaptive": {f"ppo-adaptive-{t:g}": kl_in_reward("adaptive", target=t) for t in TARGETS},
    "grpo": {f"grpo-{b:g}": (GRPO, {"beta": b}) for b in BETAS},
}
UNTUNED = {"ppo-kl": "ppo-kl-0.1", "ppo-adaptive": "ppo-adaptive-0.1", "grpo": "grpo-0.1"}
"""What stands for a family until it is tuned."""
METHODS: dict[str, Method] = {
    "safe": (SAFE, {}),
    "ppo": (SAFE, PPO),
    "ppo-target-kl": (SAFE, PPO | {"target_kl": 0.03}),
    "published": (PublishedSAFE, {"kl_controller": "none", "max_preview_kl": None}),
    **FAMILIES["ppo-kl"],
    "ppo-kl-0.005": kl_in_reward("fixed", coef=0.005),  # beyond the edge, where the best coefficient is at it: sparse
    **FAMILIES["ppo-adaptive"],
    **FAMILIES["grpo"],
    **PRICED,
    **STRENGTHS,
    **ABLATION,
}


def resolved(method: str, task: str, tuned: Mapping[str, Mapping[str, str]]) -> str:
    """A method's name, where a family's stands for the member that is tuned to the task.

    :param tuned: task -> family -> method, as ``rlhf.py report`` writes it.
    """
    return tuned.get(task, {}).get(method) or UNTUNED.get(method, method)


# -- runs --------------------------------------------------------------------------------------------------------------


def run_of(setting: str, task: str, method: str, seed: int, iterations: int | None = None) -> Run:
    """A run; ``None``: as many iterations as its setting has."""
    return Run(setting, task, method, seed, (iterations or SETTINGS[setting].iterations) * TOKENS)


def arguments_of(run: Run) -> dict[str, Any]:
    """Constructor arguments of a run: the preset's, the laboratory's smaller iteration, the method's own.

    Of GRPO those of its ``GRPOConfig``.
    """
    algorithm, own = METHODS[run.algorithm]
    if algorithm == GRPO:
        rate = GRPO_ARGUMENTS["learning_rate"] * SETTINGS[run.setting].rate
        return GRPO_ARGUMENTS | own | {"learning_rate": rate}
    settings = preset(ENV_ID) | HYPERPARAMETERS
    del settings["n_timesteps"], settings["policy"]
    policy_kwargs = settings["policy_kwargs"] | own.get("policy_kwargs", {})
    rate = settings["learning_rate"] * SETTINGS[run.setting].rate
    return settings | own | {"learning_rate": rate, "policy_kwargs": policy_kwargs}


def described(run: Run) -> dict[str, Any]:
    """Everything that decides a run's outcome but the code, as JSON: what tells whether a result is still valid."""
    arguments, (algorithm, _) = arguments_of(run), METHODS[run.algorithm]
    if isinstance(algorithm, str):
        return {**run._asdict(), "class": algorithm, "arguments": plain(arguments)}
    controller = CONTROLLERS[arguments.get("kl_controller", "safe")]
    arguments = safe_defaults(LanguagePolicy, controller, "initial", TOKENS) | arguments
    return {**run._asdict(), "class": algorithm.__name__, "arguments": plain(arguments)}
