"""What a model keeps when it is saved, loaded, given another environment, or stopped by an error."""

import copy
import json
import tempfile
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from io import BufferedIOBase
from pathlib import Path
from typing import Any, Self
from zipfile import ZipFile

import numpy as np
from stable_baselines3.common.logger import Logger
from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm
from stable_baselines3.common.save_util import open_path
from stable_baselines3.common.vec_env import VecNormalize, unwrap_vec_normalize

from sb3_safe import environments
from sb3_safe.files import replacing
from sb3_safe.finite import LastGood, NonFiniteError


class ResumableAlgorithm(OnPolicyAlgorithm):
    """SB3's on-policy algorithm, with files that training can go on from, and a rescue file where an error ends it.

    Besides what SB3 saves, a file has the statistics of a ``VecNormalize`` around the environment.
    """

    policy_kwargs: dict[str, Any]
    _last_good: LastGood | None = None
    """What numbers that are not finite would spoil, as it was before the rollout at hand."""
    _normalizer: VecNormalize | None = None
    """Of a loaded model, until there is an environment for it."""
    preset_env_kwargs: Mapping[str, Any] = {}
    """Arguments of the environment that a preset gave."""
    _advertised: Mapping[str, Any] = {}
    """What the environment asked of the policy when that was built."""

    def predict(
        self,
        observation: np.ndarray | dict[str, np.ndarray],
        state: tuple[np.ndarray, ...] | None = None,
        episode_start: np.ndarray | None = None,
        deterministic: bool = False,
    ) -> tuple[np.ndarray, tuple[np.ndarray, ...] | None]:
        """See ``BaseAlgorithm.predict``.

        :param observation: as the environment gives it that the model was trained in: normalised, where that was in a
            ``VecNormalize``.
        """
        if self._normalizer is not None and self._normalizer.norm_obs:
            warnings.warn(
                "the model was trained on observations that VecNormalize had normalised, and predict does not do that: "
                "give load() an env and predict what model.get_env() returns (or normalise observations yourself)",
                stacklevel=2,
            )
        return super().predict(observation, state, episode_start, deterministic)

    def save(
        self,
        path: str | Path | BufferedIOBase,
        exclude: Iterable[str] | None = None,
        include: Iterable[str] | None = None,
    ) -> None:
        """Save parameters, optimizer, controller, and the statistics of a ``VecNormalize`` around the environment.

        A file that is there already is replaced when all of the new one is written: a full disk or the end of the
        process leaves it as it was.

        :param path: file, with or without ``.zip``.
        :param exclude: attributes to leave out besides the usual ones.
        :param include: attributes to save although they usually are not.
        """
        waiting = self._normalizer
        self._normalizer = self._vec_normalize_env or waiting
        try:
            with replacing(path) if isinstance(path, str | Path) else nullcontext(path) as file:
                super().save(file, exclude, include)
        finally:
            self._normalizer = waiting

    @classmethod
    def load(
        cls,
        path: str | Path | BufferedIOBase,
        env: Any = None,
        *args: Any,
        n_envs: int | None = None,
        env_kwargs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> Self:
        """Load a saved model; see ``BaseAlgorithm.load``.

        An environment without ``VecNormalize`` is wrapped in the saved one if there was one: without its statistics
        the policy would see numbers it has never seen in training. For the same reason a ``VecNormalize`` that is there
        and has seen nothing yet takes the saved statistics, of observations by key with the keys. An environment that
        comes later, by ``set_env``, likewise.
        Where an environment asks for another policy than the model has, there is a warning, and the model's stays.
        The controller goes on where it was; a default ``tau_base`` is recomputed if the rollout size changes.

        Not in a file are the environment, its unfinished episodes, and the state of random generators: a model with a
        seed that has taken steps goes on with ``seed + num_timesteps``, and so with random numbers that depend on the
        file alone and are not those that it began with.

        :param path: what ``save`` was given; beside a folder of that name, the file with ``.zip``, as for ``save``.
        :param env: the environment to go on with, or its id; ``None`` to predict only.
        :param n_envs: how many, when ``env`` is an id; ``None``: as many as the model had.
        :param env_kwargs: arguments of the environment, when ``env`` is an id; of those that the model was made with,
            only its preset's are in the file.
        :raises ValueError: ``n_envs`` or ``env_kwargs`` without an id, or an id that is not registered.
        """
        if isinstance(path, str | Path) and Path(path).is_dir() and (file := Path(f"{path}.zip")).is_file():
            path = file
        if isinstance(env, str):
            saved = _saved_attributes(path)
            env_kwargs = saved.get("preset_env_kwargs", {}) | (env_kwargs or {})
            env = environments.make(env, saved["n_envs"] if n_envs is None else n_envs, env_kwargs)
        elif n_envs is not None or env_kwargs is not None:
            raise ValueError(environments.ONLY_FOR_IDS)
        model = super().load(path, env, *args, **kwargs)
        model._place_normalizer()
        model._compare_advertised()
        return model

    def set_env(self, env: Any, force_reset: bool = True) -> None:
        """See ``BaseAlgorithm.set_env``. Statistics of a ``VecNormalize`` go along, and it warns as :meth:`load` does.

        :param env: the environment to go on with; one in a ``VecNormalize`` keeps its own statistics if it has any.
        :param force_reset: whether the next ``learn`` begins with new episodes.
        """
        normalizer = self._normalizer or copy.deepcopy(self._vec_normalize_env)  # a copy is around no environment
        super().set_env(env, force_reset)
        self._normalizer = normalizer
        self._place_normalizer()
        self._compare_advertised()

    def _compare_advertised(self) -> None:
        """Warn where an environment asks for another policy than the one that was built, and not for what it did then.

        What it asks for is among the arguments of the policy, unless load() was given others in their place.
        """
        if not self._advertised or self.env is None:
            return
        for name, value in environments.advertised_policy_kwargs(self.env).items():
            given = name in self.policy_kwargs
            own = (self.policy_kwargs if given else self.policy._get_constructor_parameters()).get(name)
            if value != own and not (given and value == self._advertised.get(name)):
                warnings.warn(
                    f"this environment is for a policy with {name}={value!r}; the model's goes on with "
                    f"{own!r}, unless load() is given other policy_kwargs in custom_objects",
                    stacklevel=3,
                )

    def _place_normalizer(self) -> None:
        if self._normalizer is None:
            return
        if self.env is None:
            # What SB3 leaves out of a file but expects to find when it writes the next one.
            self._normalizer.class_attributes, self._normalizer.returns = {}, np.zeros(0)
            return
        saved, own = self._normalizer, self._vec_normalize_env
        if own is None:
            self.env = environments.with_normalizer(self.env, saved)
            self._vec_normalize_env = unwrap_vec_normalize(self.env)
        elif own.ret_rms.count < 1:  # such as the Zoo's, where a run was stopped before it wrote its statistics
            own.ret_rms = copy.deepcopy(saved.ret_rms)
            if own.norm_obs and saved.norm_obs:  # with them, of observations by key, the keys that they are of
                own.obs_rms, own.norm_obs_keys = copy.deepcopy((saved.obs_rms, saved.norm_obs_keys))
        self._normalizer = None

    @contextmanager
    def _rescuing(self) -> Iterator[None]:
        """Where an error ends training, leave what was learned before it in the model, and in a file."""
        n_updates = self._n_updates
        try:
            yield
        except BaseException as error:
            self._last_obs = None  # environments may have stopped halfway through a step: next time they begin anew
            broke_down = isinstance(error, NonFiniteError)
            if broke_down and self._last_good is not None:
                self._last_good.restore()
            if broke_down or (isinstance(error, Exception) and self._n_updates > n_updates):
                self._rescue(error)
            raise

    def _rescue(self, error: BaseException) -> None:
        """Save what was learned before an error goes up, and note on it where. Nothing may take the error's place."""
        logger: Logger | None = getattr(self, "_logger", None)
        log_folder = logger and logger.get_dir()
        folders = [log_folder] if log_folder else []
        with suppress(OSError):  # there may be no place for temporary files
            folders.append(tempfile.gettempdir())
        for folder in dict.fromkeys(folders):
            path = Path(folder) / f"safe_rescue_{self.num_timesteps}_steps.zip"
            try:
                self.save(path)
            except Exception as failure:
                error.add_note(
                    f"The last good parameters are in the model; they could not be saved to {path}: {failure!r}"
                )
            else:
                error.add_note(f"The last good parameters are in the model, and saved to {path}")
                return


def _saved_attributes(path: str | Path | BufferedIOBase) -> dict[str, Any]:
    """A saved model's attributes that JSON can hold; others are as SB3 writes them, and parameters are not read."""
    with open_path(path, "r", suffix="zip") if isinstance(path, str | Path) else nullcontext(path) as file:
        attributes: dict[str, Any] = json.loads(ZipFile(file).read("data"))
        return attributes
