"""With every layer off SAFE is SB3's PPO: same seed, same actions, same parameters."""

from typing import Any

import numpy as np
import pytest
import torch as th
from stable_baselines3 import PPO
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.policies import ActorCriticPolicy

from sb3_safe import SAFE, TwinCriticPolicy

LAYERS_OFF: dict[str, Any] = {"huber_delta": None, "kl_controller": "none", "max_preview_kl": None}
N_ENVS, N_STEPS, UPDATES = 2, 32, 3


class Actions(BaseCallback):
    """Keeps the actions of every rollout, ``[T, N, ...]``."""

    def __init__(self) -> None:
        super().__init__()
        self.rollouts: list[np.ndarray] = []

    def _on_step(self) -> bool:
        return True

    def _on_rollout_end(self) -> None:
        self.rollouts.append(self.model.rollout_buffer.actions.copy())  # type: ignore[attr-defined]


def train(
    algorithm: Any, policy: str, env_id: str, own: dict[str, Any], policy_kwargs: Any = None, **kwargs: Any
) -> tuple[Any, list[np.ndarray]]:
    """Build and learn in one go: two models at once would share NumPy's and torch's generators."""
    env = make_vec_env(env_id, N_ENVS, seed=7)
    settings = {"n_steps": N_STEPS, "batch_size": 16, "n_epochs": 3, "seed": 3} | kwargs
    model = algorithm(policy, env, policy_kwargs={"net_arch": [16, 8], **(policy_kwargs or {}), **own}, **settings)
    actions = Actions()
    model.learn(UPDATES * N_ENVS * N_STEPS, callback=actions)
    return model, actions.rollouts


def networks(policy: ActorCriticPolicy) -> dict[str, th.Tensor]:
    """Every trained number of either kind of policy, under SB3's names."""
    state = policy.state_dict()
    if not isinstance(policy, TwinCriticPolicy):
        return dict(state)
    assert policy.joint
    renamed = {
        name: tensor
        for name, tensor in state.items()
        if name.split(".")[0] not in ("bodies", "value_weight", "value_bias", "return_scale")
    }
    for layer, (weight, bias) in enumerate(zip(policy.bodies.weights, policy.bodies.biases, strict=True)):
        for index, net in enumerate(("policy_net", "value_net")):
            renamed[f"mlp_extractor.{net}.{2 * layer}.weight"] = weight[index].t()
            renamed[f"mlp_extractor.{net}.{2 * layer}.bias"] = bias[index, 0]
    renamed["value_net.weight"], renamed["value_net.bias"] = policy.value_weight[0].t(), policy.value_bias[0, 0]
    return renamed


def steps_taken(model: Any) -> float:
    return max(float(state["step"]) for state in model.policy.optimizer.state.values())


@pytest.mark.filterwarnings("ignore:You have specified a mini-batch size")
@pytest.mark.parametrize(
    ("policy", "env_id", "kwargs"),
    [
        pytest.param("MlpPolicy", "CartPole-v1", {}, id="discrete"),
        pytest.param("MlpPolicy", "Pendulum-v1", {"gamma": 0.9}, id="box"),
        pytest.param("MlpPolicy", "Pendulum-v1", {"use_sde": True, "sde_sample_freq": 4}, id="sde"),
        pytest.param(
            "MlpPolicy",
            "Pendulum-v1",
            {"use_sde": True, "ent_coef": 0.1, "policy_kwargs": {"squash_output": True}},
            id="squashed",
        ),
        pytest.param("MlpPolicy", "Tiny-vector-multi_discrete-v0", {"ent_coef": 0.01}, id="multi_discrete"),
        pytest.param("MlpPolicy", "Tiny-vector-multi_binary-v0", {"ent_coef": 0.01}, id="multi_binary"),
        pytest.param("MultiInputPolicy", "Tiny-dict-box-v0", {}, id="dict"),
        pytest.param("CnnPolicy", "Tiny-image-discrete-v0", {"batch_size": 32, "n_epochs": 1}, id="image"),
        pytest.param(
            "MlpPolicy", "CartPole-v1", {"ent_coef": 0.1, "vf_coef": 0.3, "max_grad_norm": 0.1}, id="coefficients"
        ),
        pytest.param("MlpPolicy", "CartPole-v1", {"target_kl": 1e-3, "learning_rate": 1e-2}, id="target_kl"),
        pytest.param("MlpPolicy", "CartPole-v1", {"clip_range_vf": 0.05, "clip_range": 0.1}, id="clip_range_vf"),
        # Returns on both sides of the old values.
        pytest.param("MlpPolicy", "Tiny-vector-box-v0", {"clip_range_vf": 0.05, "ent_coef": 0.01}, id="clipped_values"),
        pytest.param(
            "MlpPolicy", "CartPole-v1", {"normalize_advantage": False, "gae_lambda": 0.5}, id="raw_advantages"
        ),
        pytest.param("MlpPolicy", "CartPole-v1", {"learning_rate": lambda progress: 1e-2 * progress}, id="schedule"),
        pytest.param("MlpPolicy", "CartPole-v1", {"batch_size": 13}, id="odd_minibatches"),
    ],
)
def test_with_every_layer_off_it_is_ppo(policy: str, env_id: str, kwargs: dict[str, Any]):
    ppo, expected = train(PPO, policy, env_id, {}, **kwargs)
    safe, actions = train(SAFE, policy, env_id, {"n_critics": 1}, **LAYERS_OFF, **kwargs)
    assert len(actions) == UPDATES
    for ours, theirs in zip(actions, expected, strict=True):
        assert ours.shape == theirs.shape
        np.testing.assert_allclose(ours, theirs, atol=1e-5)
    assert safe._n_updates == ppo._n_updates
    assert steps_taken(safe) == steps_taken(ppo)
    if "target_kl" in kwargs:
        assert steps_taken(safe) < UPDATES * 3 * N_ENVS * N_STEPS / 16
    ours, theirs = networks(safe.policy), networks(ppo.policy)
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        np.testing.assert_allclose(ours[name].detach(), tensor.detach(), atol=1e-5, err_msg=name)


@pytest.mark.parametrize(
    "layer",
    [
        {"huber_delta": 0.1},
        {"max_preview_kl": 1e-4},
        {"critic_tau": 0.1},
        {"kl_controller": "fixed", "kl_controller_kwargs": {"coef": 1.0}},
        {"kl_controller_kwargs": {"tau_base": 1e-6}, "kl_controller": "safe"},
    ],
    ids=["huber", "preview", "target_critics", "fixed_kl", "safe_kl"],
)
def test_each_layer_alone_makes_a_difference(layer: dict[str, Any]):
    off, _ = train(SAFE, "MlpPolicy", "CartPole-v1", {"n_critics": 1}, learning_rate=3e-3, **LAYERS_OFF)
    on, _ = train(SAFE, "MlpPolicy", "CartPole-v1", {"n_critics": 1}, learning_rate=3e-3, **(LAYERS_OFF | layer))
    before, after = networks(off.policy), networks(on.policy)
    assert max((before[name] - after[name]).abs().max() for name in before) > 1e-4


def test_whatever_ppo_logs_of_an_update_is_logged():
    logs = []
    for algorithm, own, off in ((PPO, {}, {}), (SAFE, {"n_critics": 1}, LAYERS_OFF)):
        model, _ = train(algorithm, "MlpPolicy", "Pendulum-v1", own, clip_range_vf=0.2, n_epochs=1, **off)
        logs.append({name: value for name, value in model.logger.name_to_value.items() if name.startswith("train/")})
    ppo, safe = logs
    assert "train/loss" in ppo and "train/explained_variance" in ppo and "train/std" in ppo
    del ppo["train/loss"]  # of the last minibatch alone
    assert {name: safe[name] for name in ppo} == pytest.approx(ppo, rel=1e-4, abs=1e-6)
