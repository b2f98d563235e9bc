"""Minibatches hold whole texts, and every token exactly once."""

from typing import Any

import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from hypothesis import given
from hypothesis import strategies as st

from sb3_safe.language import SegmentBuffer
from sb3_safe.language.buffer import PACKED_WIDTH, merge_small, pack

from .test_agreement import rollout, text_model


@given(st.lists(st.integers(1, 100), min_size=1, max_size=60))
def test_packed_texts_neither_overlap_nor_leave_their_row(lengths: list[int]) -> None:
    rows, offsets, width = pack(np.array(lengths))
    taken = np.zeros((rows.max() + 1, width), dtype=int)
    for row, offset, length in zip(rows, offsets, lengths, strict=True):
        assert offset + length <= width
        taken[row, offset : offset + length] += 1
    assert taken.max() == 1
    assert taken.sum() == sum(lengths)
    assert width == max(PACKED_WIDTH, *lengths)


@given(st.lists(st.integers(1, 100), min_size=1, max_size=30), st.integers(1, 30), st.integers(1, 200), st.data())
def test_groups_of_segments_are_joined_until_none_is_small_and_large_ones_are_left_alone(
    lengths: list[int], n_groups: int, least: int, data: st.DataObject
) -> None:
    cuts = data.draw(st.lists(st.integers(1, len(lengths)), max_size=n_groups - 1))
    groups = [group for group in np.split(np.arange(len(lengths)), sorted(cuts)) if len(group) > 0]
    merged = merge_small(groups, np.array(lengths), least)
    sizes = [sum(lengths[i] for i in group) for group in merged]
    assert np.concatenate(merged).tolist() == list(range(len(lengths)))
    assert len(merged) == 1 or min(sizes) >= least
    if all(sum(lengths[i] for i in group) >= least for group in groups):
        assert [group.tolist() for group in merged] == [group.tolist() for group in groups]


def test_the_smallest_group_joins_the_smaller_of_its_neighbours() -> None:
    lengths = np.array([9, 5, 8, 30, 2, 40])
    merged = merge_small([np.array([segment]) for segment in range(6)], lengths, 8)
    assert [group.tolist() for group in merged] == [[0], [1, 2], [3, 4], [5]]


@pytest.mark.parametrize("seed", range(5))
def test_no_minibatch_has_so_few_actions_that_they_cannot_be_compared(seed: int) -> None:
    """Though texts are longer than a minibatch, or of one token."""
    n_tokens = [64, 1, 64, 20, 1, 33, 1, 40, 32]
    box = {"input_ids": spaces.Box(0, 9, (80,), np.int64)}
    places = {name: spaces.Box(0, 80, (1,), np.int64) for name in ("length", "prompt_length")}
    buffer = SegmentBuffer(sum(n_tokens), spaces.Dict(box | places), spaces.Discrete(10), device="cpu", n_envs=1)
    for n in n_tokens:
        for step in range(n):
            ids = np.where(np.arange(80) < 4, 7, np.where(np.arange(80) < 4 + step, 5, 0))[None]
            obs = {"input_ids": ids, "length": np.array([[4 + step]]), "prompt_length": np.array([[4]])}
            buffer.add(obs, np.array([[5]]), np.zeros(1), np.array([step == 0]), th.zeros(1, 1), th.zeros(1))
    buffer.compute_returns_and_advantage(th.zeros(1), np.array([True]))
    np.random.seed(seed)
    sizes = [sum(len(piece.actions) for piece in pieces) for pieces in buffer.minibatches(32)]
    assert sum(sizes) == sum(n_tokens)
    assert min(sizes) >= 8


def test_every_token_is_seen_once_in_minibatches_of_about_equal_size(env_kwargs: dict[str, Any]) -> None:
    model = text_model(env_kwargs, n_steps=32)
    buffer = rollout(model)
    flat_actions = buffer.actions.swapaxes(0, 1).ravel()
    flat_log_probs = buffer.log_probs.swapaxes(0, 1).ravel()
    expected = sorted(zip(flat_actions.tolist(), flat_log_probs.tolist(), strict=True))
    for draw in (buffer.get(48), buffer.in_order(48)):
        batches = list(draw)
        assert len(batches) == 4
        # Cut between texts, so a minibatch can be off by one text (8 tokens here) at either end.
        assert all(abs(len(batch.actions) - 48) <= 8 for batch in batches)
        actions = np.concatenate([batch.actions for batch in batches])
        log_probs = np.concatenate([batch.old_log_prob for batch in batches])
        assert sorted(zip(actions.tolist(), log_probs.tolist(), strict=True)) == expected


def test_samples_know_where_in_the_flat_order_they_are(env_kwargs: dict[str, Any]) -> None:
    model = text_model(env_kwargs)
    buffer = rollout(model)
    for batch in buffer.in_order(20):
        np.testing.assert_array_equal(batch.old_log_prob, buffer.flat("log_probs")[batch.flat_index])
        np.testing.assert_array_equal(batch.actions, buffer.flat("actions")[batch.flat_index])


def test_packed_ids_are_the_text_before_each_action(env_kwargs: dict[str, Any]) -> None:
    """The id at an action's position is the token before it; following ids are the actions themselves."""
    model = text_model(env_kwargs)
    buffer = rollout(model)
    for batch in buffer.get(20):
        obs = batch.observations
        rows, cols = obs["rows"], obs["cols"]
        for i in range(len(batch.actions) - 1):
            same_text = obs["new_tokens"][i] + 1 == obs["new_tokens"][i + 1] and rows[i] == rows[i + 1]
            if same_text:
                assert cols[i] + 1 == cols[i + 1]
                assert obs["input_ids"][rows[i + 1], cols[i + 1]] == batch.actions[i]
                assert obs["position_ids"][rows[i + 1], cols[i + 1]] == obs["position_ids"][rows[i], cols[i]] + 1


def test_rows_are_filled_up_with_a_token_of_their_texts(env_kwargs: dict[str, Any]) -> None:
    """The embedding of token 0 may be zeros, where the gradient of a norm is NaN."""
    buffer = rollout(text_model(env_kwargs))
    for batch in buffer.get(20):
        obs = batch.observations
        rows, cols, ids = obs["rows"], obs["cols"], obs["input_ids"]
        assert (obs["position_ids"][:, -1] == 0).any()
        # What stands in a text is read by one of its actions, or before one that is.
        begins = cols - obs["position_ids"][rows, cols]
        written = np.concatenate([ids[r, b : c + 1] for r, b, c in zip(rows, begins, cols, strict=True)])
        assert set(ids.flatten().tolist()) == set(written.tolist())


def space() -> spaces.Dict:
    box = {"input_ids": spaces.Box(0, 9, (12,), np.int64)}
    lengths = {name: spaces.Box(0, 12, (1,), np.int64) for name in ("length", "prompt_length")}
    return spaces.Dict(box | lengths)


@pytest.mark.parametrize("new_tokens", [1, 4])
def test_the_score_lands_on_the_last_real_token(new_tokens: int) -> None:
    """Of a text of one token, and of one that fills the rollout."""
    import torch as th

    buffer = SegmentBuffer(4, space(), spaces.Discrete(10), device="cpu", gamma=1.0, gae_lambda=1.0, n_envs=1)
    ids = np.zeros((1, 12), dtype=np.int64)
    ids[0, :3] = (7, 8, 9)
    length, step_of_text = 3, 0
    for step in range(4):
        obs = {"input_ids": ids.copy(), "length": np.array([[length]]), "prompt_length": np.array([[3]])}
        action = np.array([[step + 2]])
        ends = step_of_text + 1 == new_tokens
        start = np.array([step_of_text == 0])
        buffer.add(obs, action, np.array([5.0 * ends]), start, th.zeros(1, 1), th.zeros(1))
        ids[0, length] = action.item()
        length, step_of_text = (3, 0) if ends else (length + 1, step_of_text + 1)
    buffer.compute_returns_and_advantage(th.zeros(1), np.array([True]))
    for batch in buffer.get(100):
        # With gamma = lambda = 1 every token of a text shares its score, and no token that of another text.
        np.testing.assert_allclose(batch.returns, 5.0)
        assert len(batch.actions) == 4
        assert (batch.observations["new_tokens"].numpy() < new_tokens).all()
    assert buffer.rewards.ravel().tolist() == [5.0 * ((step + 1) % new_tokens == 0) for step in range(4)]
