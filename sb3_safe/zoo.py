"""SAFE in the RL Zoo: ``python -m sb3_safe.zoo train --env CartPole-v1`` is ``rl_zoo3`` with one algorithm more.

All of the Zoo's commands and options, with three defaults of our own: ``--algo safe``; SAFE's hyperparameters from
``presets.yml``, which is in the Zoo's format; and ``enjoy`` and ``record_video`` look where ``train`` writes.

See https://rl-baselines3-zoo.readthedocs.io
"""

import argparse
import runpy
import sys
from collections.abc import Sequence
from io import BufferedIOBase
from pathlib import Path
from typing import Any

from stable_baselines3.common.type_aliases import MaybeCallback

from sb3_safe.finite import NonFiniteError
from sb3_safe.presets import PRESETS_FILE, entries
from sb3_safe.safe import SAFE

COMMANDS = {
    "train": "rl_zoo3.train",
    "enjoy": "rl_zoo3.enjoy",
    "record_video": "rl_zoo3.record_video",
    "plot_train": "rl_zoo3.plots.plot_train",
    "plot_from_file": "rl_zoo3.plots.plot_from_file",
    "all_plots": "rl_zoo3.plots.all_plots",
}
"""Name on the command line, and the module that it is."""
LOG_FOLDER = "logs"
"""Where the Zoo's ``train`` writes by default."""


class ZooSAFE(SAFE):
    """SAFE as the Zoo expects it.

    A breakdown is a ``ValueError``, which the Zoo's hyperparameter search takes as a pruned trial, and a model loaded
    without an environment leaves normalisation to the Zoo.
    """

    def learn(
        self,
        total_timesteps: int | None = None,
        callback: MaybeCallback = None,
        log_interval: int = 1,
        tb_log_name: str = "SAFE",
        reset_num_timesteps: bool = True,
        progress_bar: bool = False,
    ) -> "ZooSAFE":
        """See :meth:`SAFE.learn`.

        :raises ValueError: a reward, loss or gradient is NaN or infinite.
        """
        try:
            return super().learn(
                total_timesteps, callback, log_interval, tb_log_name, reset_num_timesteps, progress_bar
            )
        except NonFiniteError as error:
            raise ValueError(str(error)) from error

    @classmethod
    def load(cls, path: str | Path | BufferedIOBase, env: Any = None, *args: Any, **kwargs: Any) -> "ZooSAFE":
        """See :meth:`SAFE.load`. The Zoo keeps the statistics of a ``VecNormalize`` itself, and normalises by them."""
        model = super().load(path, env, *args, **kwargs)
        model._normalizer = None
        return model


def register() -> None:
    """Make ``safe`` an algorithm of ``rl_zoo3`` in this process: class, search space, conversion of what it finds.

    :raises ImportError: ``rl_zoo3`` is not installed.
    """
    try:
        import rl_zoo3
        from rl_zoo3 import hyperparams_opt
    except ImportError as error:
        raise ImportError(f"the RL Zoo is missing ({error}); install it with: pip install 'sb3-safe[zoo]'") from error
    # These dicts are shared by all modules of the Zoo.
    rl_zoo3.ALGOS["safe"] = ZooSAFE
    hyperparams_opt.HYPERPARAMS_SAMPLER["safe"] = sample_safe_params
    hyperparams_opt.HYPERPARAMS_CONVERTER["safe"] = convert_safe_params


def sample_safe_params(
    trial: Any, n_actions: int, n_envs: int, additional_args: dict[str, Any], **_: Any
) -> dict[str, Any]:
    """Search space: PPO's in the Zoo, and SAFE's own four that the task decides about.

    :param trial: Optuna's.
    :param n_actions: dimensions of the action.
    :param n_envs: number of environments.
    :param additional_args: the Zoo's, not used.
    :return: constructor arguments.
    """
    from rl_zoo3.hyperparams_opt import sample_ppo_params

    arguments: dict[str, Any] = sample_ppo_params(trial, n_actions, n_envs, additional_args)
    own = {
        "tau_base": trial.suggest_float("tau_base", 0.005, 0.2, log=True),
        "coef": trial.suggest_float("coef", 0.2, 20.0, log=True),
        "soft_min_alpha": trial.suggest_float("soft_min_alpha", 0.03, 3.0, log=True),
        "huber_delta": trial.suggest_float("huber_delta", 0.3, 10.0, log=True),
    }
    return _with_own(arguments, own)


def convert_safe_params(sampled: dict[str, Any]) -> dict[str, Any]:
    """Constructor arguments from the parameters of a finished trial.

    :param sampled: as Optuna stores them.
    """
    from rl_zoo3.hyperparams_opt import convert_onpolicy_params

    own = {name: sampled[name] for name in ("tau_base", "coef", "soft_min_alpha", "huber_delta")}
    rest = {name: value for name, value in sampled.items() if name not in own}
    return _with_own(convert_onpolicy_params(rest), own)


def _with_own(arguments: dict[str, Any], own: dict[str, float]) -> dict[str, Any]:
    """SAFE's own parameters where its constructor takes them."""
    policy_kwargs = arguments.get("policy_kwargs", {}) | {"soft_min_alpha": own["soft_min_alpha"]}
    controller = {"tau_base": own["tau_base"], "coef": own["coef"]}
    return arguments | {
        "policy_kwargs": policy_kwargs,
        "kl_controller_kwargs": controller,
        "huber_delta": own["huber_delta"],
    }


def with_defaults(command: str, options: Sequence[str]) -> list[str]:
    """The options of a command of the Zoo, completed by what is different for SAFE; what is given stays.

    :param command: of :data:`COMMANDS`.
    :param options: the command line after it.
    :raises ValueError: an argument of the environment with which another preset is meant than the Zoo would find.
    """
    given = list(options)
    if command not in ("train", "enjoy", "record_video"):
        return given  # plots: -a names the algorithms, and has no default
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--algo")
    parser.add_argument("--env", default="")
    parser.add_argument("--env-kwargs", nargs="+", default=[])
    parser.add_argument("-conf", "--conf-file")
    parser.add_argument("-f", "--folder", "--log-folder", dest="folder")
    known, _ = parser.parse_known_args(given)
    if known.algo is None:
        given += ["--algo", "safe"]
    if command == "train" and known.conf_file is None and known.algo in (None, "safe"):
        named = entries()
        for argument in (option.partition(":")[0] for option in known.env_kwargs):
            if f"{known.env}/{argument}" in named:
                raise ValueError(
                    f"--env-kwargs {argument}: the Zoo finds the preset of {known.env} without it only, whose settings "
                    "are others; write those that you want into a file and pass --conf-file"
                )
        given += ["--conf-file", str(PRESETS_FILE)]
    if command != "train" and known.folder is None:
        given += ["--folder", LOG_FOLDER]
    return given


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command of the RL Zoo.

    :param arguments: of the command line; ``None``: the program's own.
    :return: exit code.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    if not given or given[0] not in COMMANDS:
        print(f"usage: python -m sb3_safe.zoo {{{','.join(COMMANDS)}}} ...", file=sys.stderr)
        return 0 if given[:1] in (["-h"], ["--help"]) else 2
    command = given[0]
    try:
        options = with_defaults(command, given[1:])
    except ValueError as error:
        print(f"sb3_safe.zoo: error: {error}", file=sys.stderr)
        return 2
    sys.argv = [f"sb3_safe.zoo {command}", *options]  # what the Zoo's commands read
    try:
        register()
        # Only the module of the command: each needs packages that the others do not.
        runpy.run_module(COMMANDS[command], run_name="__main__")
    except ImportError as error:
        print(f"sb3_safe.zoo: error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
