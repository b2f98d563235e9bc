"""Pieces of a minibatch, checkpoints within layers, tokens that the environment wrote."""

from typing import Any

import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from transformers import AutoModelForCausalLM, MistralConfig

from sb3_safe import SAFE
from sb3_safe.language import SegmentBuffer
from sb3_safe.trust_bound import trained_parameters

from .conftest import VOCAB_SIZE, make_config, make_tokenizer
from .test_agreement import rollout, text_model


def gradient(model: Any, pieces: Any) -> tuple[list[th.Tensor], dict[str, float]]:
    means = model._gradient(pieces)
    return [parameter.grad.clone() for parameter in trained_parameters(model.policy)], means


STEEP = {"kl_controller": "safe", "kl_controller_kwargs": {"tau_base": 0.001, "coef": 5.0}}


@pytest.mark.parametrize(
    "arguments",
    [
        {"kl_controller": "fixed", "normalize_advantage": True},
        {"kl_controller": "fixed", "normalize_advantage": False},
        {"kl_estimator": "k2"} | STEEP,
        {"kl_estimator": "exact"} | STEEP,
    ],
    ids=["normalized", "as-they-are", "penalty", "exact-penalty"],
)
def test_pieces_give_the_gradient_of_the_minibatch(arguments: dict[str, Any], env_kwargs: dict[str, Any]) -> None:
    """Whatever their sizes: each action counts the same, and all have one coefficient of the penalty."""
    model = text_model(env_kwargs, n_steps=40, batch_size=120, ent_coef=0.01, learning_rate=1e-2, **arguments)
    model.learn(240)
    buffer = rollout(model)
    model._objective = model._make_objective()
    wholes = list(buffer.minibatches(120))
    assert [len(pieces) for pieces in wholes] == [1, 1]
    for (whole,) in wholes:
        buffer.micro_batch_size = 130
        buffer._minibatches = {}
        segments = [s for s in buffer.segments if np.isin(s.env * 40 + s.start, whole.flat_index.numpy())]
        order = [buffer.segments.index(segment) for segment in segments]
        ends = {s.env: 40 for s in buffer.segments}
        lengths = np.zeros(len(buffer.segments), dtype=int)
        for number in range(len(buffer.segments) - 1, -1, -1):
            segment = buffer.segments[number]
            lengths[number] = ends[segment.env] - segment.start
            ends[segment.env] = segment.start
        pieces = [buffer._samples(piece) for piece in buffer._pieces(segments, lengths[order])]
        assert len(pieces) > 1
        assert all(piece.observations["input_ids"].numel() <= 130 for piece in pieces)
        (one, means), (other, summed) = gradient(model, [whole]), gradient(model, pieces)
        for a, b in zip(one, other, strict=True):
            np.testing.assert_allclose(a, b, atol=2e-6)
        assert summed == pytest.approx(means, abs=1e-5)


def test_every_pass_takes_the_same_minibatches_in_another_order(env_kwargs: dict[str, Any]) -> None:
    buffer = rollout(text_model(env_kwargs, n_steps=60))
    passes = [[frozenset(batch.flat_index.tolist()) for batch in buffer.get(20)] for _ in range(4)]
    assert len({frozenset(one) for one in passes}) == 1
    assert len({tuple(one) for one in passes}) > 1


def test_texts_that_end_early_make_more_pieces_not_larger_ones() -> None:
    """Two hundred texts of one token after a prompt of a hundred."""
    box = {"input_ids": spaces.Box(0, 9, (128,), np.int64)}
    places = {name: spaces.Box(0, 128, (1,), np.int64) for name in ("length", "prompt_length")}
    obs = {"input_ids": np.full((1, 128), 7), "length": np.array([[100]]), "prompt_length": np.array([[100]])}
    sizes = []
    for limit in ({}, {"micro_batch_size": None}):
        buffer = SegmentBuffer(200, spaces.Dict(box | places), spaces.Discrete(10), device="cpu", n_envs=1, **limit)
        for _ in range(200):
            buffer.add(obs, np.array([[5]]), np.zeros(1), np.ones(1), th.zeros(1, 1), th.zeros(1))
        buffer.compute_returns_and_advantage(th.zeros(1), np.array([True]))
        ((*pieces,),) = buffer.minibatches(200)
        sizes.append([piece.observations["input_ids"].numel() for piece in pieces])
    limited, whole = sizes
    assert len(limited) > 1 and max(limited) <= 4096
    assert whole == [200 * 128]


def test_a_minibatch_of_the_embedded_model_goes_through_in_one_piece() -> None:
    model = SAFE("TextGenEnv-v0", seed=0, device="cpu")
    assert [len(pieces) for pieces in rollout(model).minibatches(model.batch_size)] == [1] * 4


@pytest.mark.parametrize("size", [0, -3])
def test_a_piece_has_at_least_a_token(size: int, env_kwargs: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="micro_batch_size"):
        text_model(env_kwargs, rollout_buffer_kwargs={"micro_batch_size": size})


@pytest.mark.parametrize("architecture", ["qwen2", "gpt2", "gemma2"])
@pytest.mark.parametrize("lora", [False, {"r": 4}])
def test_checkpoints_within_layers_change_memory_and_nothing_else(
    architecture: str, lora: Any, env_kwargs: dict[str, Any], checkpoints: dict[str, str]
) -> None:
    results, kept = [], []
    for checkpointing in (False, True):
        model = text_model(
            env_kwargs | {"model": checkpoints[architecture]}, batch_size=1000,
            policy_kwargs={"gradient_checkpointing": checkpointing, "lora": lora},
        )  # fmt: skip
        buffer = rollout(model)
        model.policy.set_training_mode(True)
        model._objective = model._make_objective()
        sizes: list[int] = []
        with th.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, lambda t: t):  # noqa: B023
            results.append(gradient(model, next(iter(buffer.minibatches(1000)))))
        kept.append(sum(sizes))
        assert not any(module.training for module in model.policy.lm.modules() if isinstance(module, th.nn.Dropout))
        model.learn(13 * 6)
    assert kept[1] < 0.9 * kept[0]
    for one, other in zip(results[0][0], results[1][0], strict=True):
        np.testing.assert_allclose(one, other, atol=1e-6)


@pytest.mark.parametrize("architecture", ["gemma2", "mistral"])
def test_layers_that_look_back_over_a_window_write_what_they_train(
    architecture: str, env_kwargs: dict[str, Any], tmp_path: Any
) -> None:
    if architecture == "mistral":
        config: Any = MistralConfig(
            vocab_size=VOCAB_SIZE, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=64, sliding_window=4, pad_token_id=0, eos_token_id=1,
            bos_token_id=None, initializer_range=0.2,
        )  # fmt: skip
    else:
        config = make_config("gemma2", sliding_window=4)
    th.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    model = text_model(env_kwargs | {"model": str(tmp_path), "max_new_tokens": 16}, n_steps=40)
    for batch in rollout(model).get(1000):
        with th.no_grad():
            log_prob = model.policy.evaluate(batch.observations, batch.actions).log_prob
        np.testing.assert_allclose(log_prob, batch.old_log_prob, atol=1e-5)


def test_tokens_of_the_environment_are_context_and_in_no_loss() -> None:
    """A text of two turns: 7 8 | 2 3 <4 5 6> 2 3, where what is in brackets was written by the environment."""
    box = {"input_ids": spaces.Box(0, 9, (12,), np.int64)}
    lengths = {name: spaces.Box(0, 12, (1,), np.int64) for name in ("length", "prompt_length")}
    buffer = SegmentBuffer(4, spaces.Dict(box | lengths), spaces.Discrete(10), device="cpu", n_envs=1)
    text = np.array([[7, 8, 2, 3, 4, 5, 6, 2, 3, 0, 0, 0]])
    for step, (length, prompt_length) in enumerate([(2, 2), (3, 2), (7, 7), (8, 7)]):
        ids = np.where(np.arange(12) < length, text, 0)
        obs = {"input_ids": ids, "length": np.array([[length]]), "prompt_length": np.array([[prompt_length]])}
        action = text[:, [length]]
        buffer.add(obs, action, np.zeros(1), np.array([step == 0]), th.zeros(1, 1), th.zeros(1))
    buffer.compute_returns_and_advantage(th.zeros(1), np.array([True]))
    (batch,) = buffer.get(100)
    obs = batch.observations
    assert batch.actions.tolist() == [2, 3, 2, 3]
    assert obs["input_ids"][0, :8].tolist() == [7, 8, 2, 3, 4, 5, 6, 2]  # nothing is asked after the last one
    assert obs["position_ids"][0, :8].tolist() == list(range(8))
    assert obs["cols"].tolist() == [1, 2, 6, 7]
    assert obs["new_tokens"].tolist() == [0, 1, 0, 1]


def test_critics_warm_up_before_the_policy_moves(env_kwargs: dict[str, Any]) -> None:
    model = text_model(env_kwargs, critic_warmup=2, learning_rate=1e-2, ent_coef=0.01)
    lm = [parameter.clone() for parameter in model.policy.lm.parameters()]
    heads = [parameter.clone() for parameter in model.policy.heads.parameters()]
    model.learn(13 * 6 * 2)
    assert all(th.equal(old, new) for old, new in zip(lm, model.policy.lm.parameters(), strict=True))
    assert not all(th.equal(old, new) for old, new in zip(heads, model.policy.heads.parameters(), strict=True))
    model.learn(13 * 6, reset_num_timesteps=False)
    assert not all(th.equal(old, new) for old, new in zip(lm, model.policy.lm.parameters(), strict=True))


def test_policy_and_critics_are_clipped_each_to_its_own_norm(env_kwargs: dict[str, Any]) -> None:
    model = text_model(env_kwargs, max_grad_norm=1.0, policy_kwargs={"critic_max_grad_norm": 0.25}, batch_size=1000)
    rollout(model)
    model._objective = model._make_objective()
    model._gradient(next(iter(model.rollout_buffer.minibatches(1000))))
    before = [parameter.grad.clone() for parameter in model.policy.lm.parameters()]
    for parameter in model.policy.heads.parameters():
        parameter.grad *= 1000
    model._step(1.0)
    norm = th.nn.utils.get_total_norm([parameter.grad for parameter in model.policy.heads.parameters()])
    assert norm == pytest.approx(0.25, rel=1e-4)
    scale = min(1.0, 1.0 / float(th.nn.utils.get_total_norm(before)))
    for old, parameter in zip(before, model.policy.lm.parameters(), strict=True):
        np.testing.assert_allclose(parameter.grad, scale * old, rtol=1e-4, atol=1e-8)
