"""Training in episodes of several turns: what the environment writes is context and never an action."""

from typing import Any

import numpy as np
import pytest
import torch as th
from textgen_env.gold import gold_score

from sb3_safe import SAFE

HOTELS = ["Review of a hotel: The room", "Hotel review: The lobby", "Our hotel, in short: This hotel"]


def and_the_breakfast(turns: list[list[str]], **_: Any) -> list[str | None]:
    """A reply whose length varies, and None for one conversation in four, so that rows fall out of step."""
    return [None if len(texts[0]) % 4 == 0 else ". The breakfast" * (1 + len(texts[0]) % 2) for texts in turns]


def praises_breakfast(turns: list[list[str]], **_: Any) -> list[float]:
    """Praise in the LAST turn alone."""
    return [gold_score(f"Hotel review: The breakfast{texts[-1]}.").sentiment for texts in turns]


def two_turns(**kwargs: Any) -> SAFE:
    env_kwargs = {
        "prompts": HOTELS,
        "reply": and_the_breakfast,
        "reward_model": praises_breakfast,
        "stop_strings": ["."],
        "max_turns": 2,
        "max_new_tokens": 10,
        "max_reply_tokens": 6,
    }
    settings = {"n_envs": 6, "n_steps": 17, "batch_size": 30, "n_epochs": 2, "seed": 0, "device": "cpu"}
    return SAFE("TextGenEnv-v0", env_kwargs=env_kwargs | kwargs.pop("env_kwargs", {}), **(settings | kwargs))


@pytest.mark.parametrize("min_new_tokens", [0, 3])
def test_rollout_and_training_agree_on_log_probs_across_replies(min_new_tokens: int) -> None:
    """With updates in between, and turns that cross the border of a rollout."""
    replies: list[str | None] = []

    def reply(turns: list[list[str]], **_: Any) -> list[str | None]:
        answers = and_the_breakfast(turns)
        replies.extend(answers)
        return answers

    model = two_turns(env_kwargs={"min_new_tokens": min_new_tokens, "reply": reply})
    for _ in range(3):
        callback = model._setup_learn(10_000, None, reset_num_timesteps=model._last_obs is None)[1]
        model.collect_rollouts(model.env, callback, model.rollout_buffer, model.n_steps)
        tokens = 0
        for batch in model.rollout_buffer.get(30):
            with th.no_grad():
                _, log_prob, _ = model.policy.evaluate_actions(batch.observations, batch.actions)
            np.testing.assert_allclose(log_prob, batch.old_log_prob, atol=2e-5)
            tokens += len(log_prob)
        assert tokens == model.n_steps * model.n_envs
        model.train()
    assert len(set(replies)) == 3  # short, long, none


def test_the_second_turn_is_learned() -> None:
    model = two_turns(n_envs=16, n_steps=24, batch_size=128, learning_rate=2e-3)
    rewards: list[float] = []
    model.learn(
        8 * 16 * 24, callback=lambda local, _: rewards.extend(i["episode"]["r"] for i in local["infos"] if i) or True
    )
    fifth = len(rewards) // 5
    assert np.mean(rewards[-fifth:]) > np.mean(rewards[:fifth]) + 0.2
