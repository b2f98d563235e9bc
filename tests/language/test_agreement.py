"""What is computed while writing equals what is computed in training."""

from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3 import PPO
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import make_vec_env
from transformers import AutoModelForCausalLM

from sb3_safe import SAFE, environments
from sb3_safe.language import LanguagePolicy, SegmentBuffer

from .conftest import ARCHITECTURES, VOCAB_SIZE


class Silent(BaseCallback):
    def _on_step(self) -> bool:
        return True


def rollout(model: SAFE) -> SegmentBuffer:
    """Collect one rollout without training."""
    callback = model._setup_learn(10_000, None, reset_num_timesteps=model._last_obs is None)[1]
    model.collect_rollouts(model.env, callback, model.rollout_buffer, model.n_steps)
    return model.rollout_buffer  # type: ignore[return-value]


def text_model(env_kwargs: dict[str, Any], **kwargs: Any) -> SAFE:
    defaults: dict[str, Any] = {"n_envs": 6, "n_steps": 13, "batch_size": 20, "n_epochs": 2, "seed": 0, "device": "cpu"}
    return SAFE("TextGenEnv-v0", env_kwargs=env_kwargs, **(defaults | kwargs))


@pytest.mark.parametrize("min_new_tokens", [0, 3])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_rollout_and_training_agree_on_log_probs_and_values(
    architecture: str, min_new_tokens: int, checkpoints: dict[str, str], env_kwargs: dict[str, Any]
) -> None:
    """Across rows that end, restart and cross a rollout's border, and with updates in between."""
    env_kwargs |= {"model": checkpoints[architecture], "min_new_tokens": min_new_tokens}
    model = text_model(env_kwargs, policy_kwargs={"temperature": 0.7})
    for _ in range(3):
        scale = model.policy.return_scale.clone()
        buffer = rollout(model)
        # The unit of the soft-min's temperature is measured on the rollout; its values were made with the one before.
        model.policy.return_scale.copy_(scale)
        # Otherwise this test would not see texts that end within and cross the border of a rollout.
        assert len(buffer.segments) > buffer.n_envs
        assert (buffer.lengths[0] > buffer.prompt_lengths[0]).any() or model._n_updates == 0
        seen = 0
        for batch in buffer.get(20):
            with th.no_grad():
                values, log_prob, _ = model.policy.evaluate_actions(batch.observations, batch.actions)
            np.testing.assert_allclose(log_prob, batch.old_log_prob, atol=1e-5)
            np.testing.assert_allclose(values.flatten(), batch.old_values, atol=1e-5)
            seen += len(log_prob)
        assert seen == model.n_steps * model.n_envs
        model.train()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_probabilities_are_those_of_the_model_itself(
    architecture: str, checkpoints: dict[str, str], env_kwargs: dict[str, Any]
) -> None:
    """What was written has the probability that transformers' own forward pass gives it."""
    model = text_model(env_kwargs | {"model": checkpoints[architecture]}, policy_kwargs={"temperature": 0.7})
    lm = AutoModelForCausalLM.from_pretrained(checkpoints[architecture])
    buffer = rollout(model)
    for segment in buffer.segments[: buffer.n_envs]:  # the first of each environment
        ends = [s.start for s in buffer.segments if s.env == segment.env and s.start > 0]
        steps = slice(0, min(ends, default=buffer.buffer_size))
        written = th.as_tensor(buffer.actions[steps, segment.env, 0]).long()
        text = th.cat([th.as_tensor(segment.context), written])
        with th.no_grad():
            logits = lm(text[None]).logits[0, len(segment.context) - 1 : -1] / 0.7
        expected = logits.log_softmax(-1).gather(-1, written[:, None])[:, 0]
        np.testing.assert_allclose(buffer.log_probs[steps, segment.env], expected, atol=1e-4)


class Editor(gym.Env[dict[str, np.ndarray], int]):
    """Writes another token than was chosen, changes an earlier one, or forgets the beginning of a text."""

    def __init__(self, edit: str) -> None:
        lengths = {name: spaces.Box(0, 16, (1,), np.int64) for name in ("length", "prompt_length")}
        self.observation_space = spaces.Dict({"input_ids": spaces.Box(0, VOCAB_SIZE - 1, (16,), np.int64)} | lengths)
        self.action_space = spaces.Discrete(VOCAB_SIZE)
        self.edit = edit

    def reset(self, **kwargs: Any) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        super().reset(**kwargs)
        self.text, self.written = self.np_random.integers(2, VOCAB_SIZE, 5).tolist(), 0
        return self.observe(), {}

    def step(self, action: int) -> tuple[dict[str, np.ndarray], float, bool, bool, dict[str, Any]]:
        self.written += 1
        self.text.append(int(action))
        if self.written == 3 and self.edit != "nothing":
            if self.edit == "the action":
                self.text[-1] = (int(action) + 1) % VOCAB_SIZE
            elif self.edit == "a token before":
                self.text[1] = (self.text[1] + 1) % VOCAB_SIZE
            else:
                self.text = self.text[2:]
        return self.observe(), float(action % 2), self.written == 8, False, {}

    def observe(self) -> dict[str, np.ndarray]:
        ids = np.array(self.text + [0] * (16 - len(self.text)))
        return {"input_ids": ids, "length": np.array([len(self.text)]), "prompt_length": np.array([3])}


@pytest.mark.parametrize("edit", ["nothing", "the action", "a token before", "the beginning"])
def test_rollout_and_training_agree_where_the_environment_changes_texts(edit: str, checkpoints: dict[str, str]) -> None:
    env = make_vec_env(lambda: Editor(edit), 3, seed=0)
    kwargs = {"model": checkpoints["qwen2"]}
    model = SAFE("LanguagePolicy", env, policy_kwargs=kwargs, n_steps=12, batch_size=10, seed=0, device="cpu")
    for edits in (2, 1):  # texts have 8 tokens: 8 and 4 of two are in a rollout, then 4 and 8
        buffer = rollout(model)
        assert len(buffer.segments) == 3 * (2 if edit == "nothing" else 2 + edits)
        for batch in buffer.get(10):
            with th.no_grad():
                log_prob = model.policy.evaluate(batch.observations, batch.actions).log_prob
            np.testing.assert_allclose(log_prob, batch.old_log_prob, atol=1e-5)
        model.train()


def test_first_ratios_are_one(env_kwargs: dict[str, Any]) -> None:
    model = text_model(env_kwargs, n_epochs=1, batch_size=1000)
    rollout(model)
    ratios = []
    loss = model._loss

    def spy(batch: Any, *args: Any) -> Any:
        log_prob = model.policy.evaluate(batch.observations, batch.actions).log_prob
        ratios.append(th.exp(log_prob - batch.old_log_prob).detach())
        return loss(batch, *args)

    model._loss = spy  # type: ignore[method-assign]
    model.train()
    np.testing.assert_allclose(th.cat(ratios), 1.0, atol=1e-5)


def test_stock_ppo_trains_the_text_policy(env_kwargs: dict[str, Any]) -> None:
    env = environments.make("TextGenEnv-v0", 16, env_kwargs)
    policy_kwargs = environments.advertised_policy_kwargs(env, "LanguagePolicy")
    model = PPO(
        LanguagePolicy, env, n_steps=16, batch_size=128, n_epochs=3, gamma=1.0, learning_rate=5e-3, seed=0,
        policy_kwargs=policy_kwargs, rollout_buffer_class=SegmentBuffer, device="cpu",
    )  # fmt: skip
    rewards: list[float] = []
    model.learn(
        16 * 16 * 12, callback=lambda local, _: rewards.extend(i["episode"]["r"] for i in local["infos"] if i) or True
    )
    tenth = len(rewards) // 10
    assert np.mean(rewards[-tenth:]) > np.mean(rewards[:tenth]) + 0.2
