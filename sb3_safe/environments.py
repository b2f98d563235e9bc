"""From an environment id or object to SB3's vector environment, and to the policy that fits it."""

import importlib
import warnings
from collections.abc import Collection, Mapping
from difflib import get_close_matches
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from gymnasium.envs.registration import load_env_creator
from gymnasium.vector import AutoresetMode, VectorEnv
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.policies import BasePolicy
from stable_baselines3.common.preprocessing import is_image_space
from stable_baselines3.common.utils import check_shape_equal
from stable_baselines3.common.vec_env import VecEnv, VecEnvWrapper, VecMonitor, VecNormalize

from sb3_safe.vec_env import GymVecEnv

ONLY_FOR_IDS = "n_envs and env_kwargs only apply when env is an id; this environment is built already"


def make(env_id: str, n_envs: int = 1, env_kwargs: dict[str, Any] | None = None) -> VecEnv:
    """Create ``n_envs`` environments of a registered id, or of ``module:id``, whose module registers it.

    An environment that brings its own vector form with same-step reset is used in that form; the others are put
    side by side by SB3's ``make_vec_env`` (with its ``Monitor``).

    :raises ValueError: unknown id (with gymnasium's suggestion), ``n_envs`` below 1.
    """
    if n_envs < 1:
        raise ValueError(f"n_envs must be at least 1, got {n_envs}")
    module, _, name = env_id.rpartition(":")
    try:
        if module:
            importlib.import_module(module)
        spec = gym.spec(name)
    except (gym.error.Error, ImportError) as error:
        raise ValueError(
            f"env={env_id!r} is not a registered environment: {error} Register it, or pass the environment itself."
        ) from error
    if _has_same_step_vector_form(spec):
        native = gym.make_vec(name, n_envs, vectorization_mode="vector_entry_point", **(env_kwargs or {}))
        return wrap_native(native)  # type: ignore[no-any-return]
    return make_vec_env(name, n_envs, env_kwargs=env_kwargs)


def _has_same_step_vector_form(spec: gym.envs.registration.EnvSpec) -> bool:
    entry_point = spec.vector_entry_point
    if entry_point is None:
        return False
    creator: Any = load_env_creator(entry_point) if isinstance(entry_point, str) else entry_point
    metadata = getattr(creator, "metadata", {})
    return bool(metadata.get("autoreset_mode") == AutoresetMode.SAME_STEP)


def fitting_policy(env: VecEnv) -> str:
    """Name of the policy that fits: the one that the environment names in its metadata, else by observation space."""
    named = _metadata(env).get("policy")
    if named is not None:
        return str(named)
    space = env.observation_space
    if isinstance(space, spaces.Dict):
        return "MultiInputPolicy"
    return "CnnPolicy" if is_image_space(space) else "MlpPolicy"


def check_places(policy: Any, env: Any, names: Collection[str]) -> None:
    """Refuse what is neither policy nor environment, and each of them in the other's place.

    :param policy: the first argument of an algorithm, an id that is known already taken out.
    :param env: the second one; ``None``: none.
    :param names: of policies.
    :raises ValueError: with what to pass instead.
    """
    known = ", ".join(names)
    if isinstance(policy, gym.Env | VectorEnv | VecEnv):
        raise ValueError(
            f"policy is an environment, {type(policy).__name__}: pass it as the second argument, SAFE('auto', env)"
        )
    if not isinstance(policy, str | type):
        raise ValueError(f"policy must be a name ({known}), a class or an environment id, got {policy!r}")
    if isinstance(policy, str) and policy not in (*names, "auto"):
        is_policy = isinstance(env, type) and issubclass(env, BasePolicy)
        if is_policy or (isinstance(env, str) and env in (*names, "auto")):
            raise ValueError(f"policy={policy!r} and env={env!r} are swapped: the policy is the first argument")
        what = "neither a policy nor a registered environment id" if env is None else "not a policy"
        meant = get_close_matches(policy, [*names, *(gym.registry if env is None else ())], n=1)
        hint = f"did you mean {meant[0]!r}? Policies" if meant else "policies"
        raise ValueError(f"policy={policy!r} is {what}; {hint} are {known}, or 'auto' for the one that fits")
    if env is None and isinstance(policy, str):
        raise ValueError("env is missing: pass an environment or its id")


def check_policy(env: VecEnv, policy: str) -> None:
    """Refuse another policy than the one that the environment names.

    :raises ValueError: with the name of the right one.
    """
    named = _metadata(env).get("policy", policy)
    if policy != named:
        raise ValueError(f"policy={policy!r} does not fit this environment, which is made for policy={named!r}")


def check_spaces(observation_space: spaces.Space[Any], action_space: spaces.Space[Any]) -> None:
    """Refuse spaces that count from another number than 0: a policy sends actions from 0 on, whatever the space says.

    SB3 encodes observations by their number from 0, and some of such a space would have no place.

    :param observation_space: of a ``Dict`` every key is looked at.
    :param action_space: of one environment.
    :raises ValueError: the space is named, with the wrapper that helps.
    """
    inner = observation_space.spaces if isinstance(observation_space, spaces.Dict) else {}
    named = {"action_space": action_space, "observation_space": observation_space}
    named |= {f"observation_space[{key!r}]": space for key, space in inner.items()}
    for name, space in named.items():
        if isinstance(space, spaces.Discrete | spaces.MultiDiscrete) and np.any(space.start):
            wrapper = "TransformAction to add" if name == "action_space" else "TransformObservation to subtract"
            raise ValueError(
                f"{name}={space} does not start at 0: wrap the environment in gymnasium.wrappers.{wrapper} the start"
            )


def advertised_policy_kwargs(env: VecEnv, policy: str | type | None = None) -> dict[str, Any]:
    """Arguments that the environment's metadata has for the policy it names; empty for any other policy.

    :param env: a vector environment.
    :param policy: the policy that they are for, by name, or a class of that name or derived from one; ``None``: that
        which is named.
    """
    metadata = _metadata(env)
    named = metadata.get("policy")
    names = [ancestor.__name__ for ancestor in policy.__mro__] if isinstance(policy, type) else [policy or named]
    return dict(metadata.get("policy_kwargs", {})) if named in names else {}


def joined_policy_kwargs(advertised: Mapping[str, Any], given: Mapping[str, Any] | None) -> dict[str, Any]:
    """What an environment advertises and what is given, which wins; of ``model_kwargs`` each argument for itself.

    :param advertised: see :func:`advertised_policy_kwargs`.
    :param given: arguments of the policy.
    """
    given = given or {}
    joined = {**advertised, **given}
    if "model_kwargs" in advertised:
        joined["model_kwargs"] = {**(advertised["model_kwargs"] or {}), **(given.get("model_kwargs") or {})}
    return joined


def _metadata(env: VecEnv) -> dict[str, Any]:
    return attribute(env, "metadata") or {}


def attribute(env: VecEnv, name: str) -> Any:
    """An attribute of the first environment; ``None`` where it has none.

    A vector environment of one's own may not tell: SB3 asks for little, and only where it needs it.

    :param env: a vector environment.
    :param name: of the attribute.
    """
    try:
        return env.get_attr(name, indices=[0])[0]
    except (AttributeError, NotImplementedError):
        return None


def with_normalizer(env: VecEnv, normalizer: VecNormalize) -> VecEnv:
    """Put a ``VecNormalize`` around an environment, or around the outermost of those within it that it was made for.

    Wrappers around it may transpose images or stack frames, and be put there before the normaliser is known. Where
    no observations have its shape, there is a warning, and the environment as it is.

    :param env: the environment, without a ``VecNormalize``; its wrappers are changed in place.
    :param normalizer: from a file, around no environment.
    :return: the environment with the normaliser in it.
    """
    level, outer = env, None
    while not _has_shapes_of(level.observation_space, normalizer.observation_space):
        if not isinstance(level, VecEnvWrapper):
            warnings.warn(
                "the saved model's VecNormalize fits no observations of this environment and is left out: wrap the "
                "environment in one of your own",
                stacklevel=3,
            )
            return env
        level, outer = level.venv, level
    normalizer.set_venv(level)
    if outer is None:
        return normalizer
    outer.venv = normalizer  # type: ignore[attr-defined]
    return env


def _has_shapes_of(space: spaces.Space[Any], other: spaces.Space[Any]) -> bool:
    try:
        check_shape_equal(space, other)
    except AssertionError:
        return False
    return True


def wrap_native(env: Any) -> Any:
    """A gymnasium vector environment behind SB3's interface, with episode statistics; anything else as it is."""
    if not isinstance(env, VectorEnv):
        return env
    native = GymVecEnv(env)
    return native if all(native.env_is_wrapped(Monitor)) else VecMonitor(native)
