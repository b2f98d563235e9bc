"""The benchmark of speed on text: that it compares like with like, and tiny runs from end to end."""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch as th

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import language  # noqa: E402
import language_gpu  # noqa: E402
import language_models  # noqa: E402
import language_peers  # noqa: E402
import language_safe  # noqa: E402
from language_models import EOS, SHAPES, Task, count_written, load_model  # noqa: E402

SMALL = {"rows": 4, "prompt_tokens": 6, "new_tokens": 16}


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("language")


def make_model(scratch: Path, lengths: str = "spread", **arguments: Any) -> Any:
    task = Task("0.1M", lengths, **SMALL)
    return language_safe.make_safe(task, task.model(scratch), **arguments)


# -- models and texts --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("lengths", "probability"), [("equal", 0.0), ("spread", 0.0425)])
def test_the_chance_that_a_text_ends_is_what_was_set_after_every_text(
    scratch: Path, lengths: str, probability: float
) -> None:
    task = Task("0.1M", lengths)
    model = load_model(task.model(scratch))
    with th.no_grad():
        logits = model(th.randint(2, task.shape.vocabulary, (8, 20))).logits
    chances = logits.softmax(dim=-1)[..., EOS]
    np.testing.assert_allclose(chances, np.full(chances.shape, probability), rtol=0.1, atol=1e-9)
    assert task.eos_probability == probability


@pytest.mark.parametrize(("size", "millions"), [("5M", 5), ("25M", 25), ("100M", 100), ("3B", 3086)])
def test_shapes_have_the_parameters_that_their_names_say(size: str, millions: float) -> None:
    model = language_gpu.random_model(language_gpu.AutoModelForCausalLM, SHAPES[size].config(), "meta")
    assert sum(parameter.numel() for parameter in model.parameters()) / 1e6 == pytest.approx(millions, rel=0.03)


def test_tokens_count_up_to_the_end_token() -> None:
    assert count_written(th.tensor([[5, 6, EOS, 0], [EOS, 7, 7, 7], [5, 6, 7, 8]])) == 3 + 1 + 4


def test_prompts_have_the_length_they_should_as_tokens() -> None:
    task = Task("0.1M", "equal", **SMALL)
    ids = language_models.make_tokenizer(task.shape.vocabulary)(next(task.batches()))["input_ids"]
    assert [len(text) for text in ids] == [6] * 4


# -- contenders --------------------------------------------------------------------------------------------------------


def test_ppo_is_safe_with_every_layer_off(scratch: Path) -> None:
    ppo, fixed = (make_model(scratch, variant=variant) for variant in ("ppo", "ppo-fixed-kl"))
    for model in (ppo, fixed):
        assert (model.policy.n_critics, model.huber_delta, model.max_preview_kl) == (1, None, None)
    assert not ppo.controller.active
    assert fixed.controller.active
    assert make_model(scratch).policy.n_critics == 2


def test_generate_samples_from_all_tokens(scratch: Path) -> None:
    task = Task("0.1M", "equal", rows=64, prompt_tokens=2, new_tokens=16)
    contender = language_peers.Generate(task, scratch)
    ids = th.randint(2, task.shape.vocabulary, (64, 2))
    written = contender.model.generate(input_ids=ids, attention_mask=th.ones_like(ids), max_new_tokens=16)
    # By transformers' defaults it would be the 50 likeliest, which are much the same after each text.
    assert len(written[:, 2:].unique()) > 200


def test_a_row_per_token_scores_as_packed_texts_do(scratch: Path) -> None:
    model = make_model(scratch)
    model.learn(4 * 16)
    packed = next(model.rollout_buffer.in_order(10**9))
    chosen = np.random.default_rng(0).permutation(len(packed.actions))[:20]
    rows = language_safe.rows_per_token(packed, chosen)
    assert len(rows.observations["input_ids"]) == 20
    with th.no_grad():
        expected = model.policy.evaluate(packed.observations, packed.actions)
        found = model.policy.evaluate(rows.observations, rows.actions)
    th.testing.assert_close(found.log_prob, expected.log_prob[chosen], rtol=1e-4, atol=1e-5)
    th.testing.assert_close(found.values, expected.values[chosen], rtol=1e-4, atol=1e-5)


def test_the_parts_of_an_iteration_are_within_it(scratch: Path) -> None:
    contender = language_safe.Safe(Task("0.1M", "equal", **SMALL), make_model(scratch, "equal"))
    contender.measure()
    row = contender.measure()
    assert row["tokens"] == 4 * 16
    assert row["texts"] == 4
    assert row["rollout"] + row["observe"] + row["update"] < row["seconds"]
    assert 0 < row["reference"] < row["observe"]
    assert 0 < row["bound"] < row["update"]


# -- figures -----------------------------------------------------------------------------------------------------------


def test_ratios_are_of_tokens_per_second_where_batches_count_by_their_texts() -> None:
    rows = {
        "safe": [{"seconds": seconds, "tokens": 300, "texts": 30, "rollout": 1.0, "update": 3.0} for seconds in (4, 5)],
        "generate": [{"seconds": 2.0, "tokens": tokens, "texts": 5} for tokens in (10, 60)],
        "published": [{"seconds": 3.0, "tokens": 40, "texts": 5}] * 2,
        "row-per-token": [{"seconds": 8.0, "tokens": 64}] * 2,
        "ppo": [{"seconds": 4.0, "tokens": 300, "texts": 30}] * 2,
    }
    assert language.ratios(rows, mean_length=10) == pytest.approx(
        {
            "rollout / generate()": 300 / (50 / 2),
            "iteration / published": (300 / 4.5) / (50 / 3),
            "update / row per token": (2 * 300 / 3) / (64 / 8),
            "iteration / ppo": 4 / 4.5,
        }
    )
    assert language.measured_length(rows) == (4 * 300 + 70 + 80) / (4 * 30 + 4 * 5)


def test_the_mean_length_is_that_of_texts_that_end_by_chance_or_at_the_most() -> None:
    ends = np.random.default_rng(0).geometric(0.0425, 100_000)
    assert Task("5M", "spread").mean_length == pytest.approx(np.minimum(ends, 64).mean(), rel=0.01)
    assert Task("5M", "equal").mean_length == 64


def test_what_a_gpu_could_do_at_best_follows_from_the_shape() -> None:
    at = language_gpu.setting(tiny=True)
    hidden, layers, kv, intermediate, vocabulary, head, _ = SHAPES["0.1M"]
    projections = [(hidden, hidden), (hidden, kv * head), (hidden, kv * head), (hidden, hidden)]
    projections += [(hidden, intermediate), (hidden, intermediate), (intermediate, hidden)]
    weights = layers * sum(a * b for a, b in projections)
    adapters = layers * at.rank * sum(a + b for a, b in projections)
    texts, scored, epochs = 4 * (8 + 8 - 1), 4 * 8, 2
    expected = epochs * texts * (4 * weights + 6 * adapters) + epochs * scored * 4 * hidden * vocabulary
    assert language_gpu.operations_of_update(at) == expected
    others = (
        2 * vocabulary * hidden + layers * (2 * hidden + hidden + 2 * kv * head) + hidden
    )  # embeddings, norms, bias
    slots = 4 * sum(8 + step for step in range(8)) * layers * 2 * kv * head
    assert language_gpu.bytes_of_writing(at) == 2 * (8 * (weights + others) + slots)


# -- runs --------------------------------------------------------------------------------------------------------------


def test_a_run_writes_its_measurements_and_leaves_out_what_breaks_down(
    scratch: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = scratch / "results.json"
    command = "language.py --sizes 0.1M --lengths spread --repeats 1 --contenders generate safe published"
    monkeypatch.setattr(
        sys, "argv", [*command.split(), "--published", str(scratch), "--scratch", str(scratch), "--out", str(out)]
    )
    language.main()
    task = json.loads(out.read_text())["0.1M/spread"]["contenders"]
    assert set(task) == {"generate", "safe"}
    assert all(len(rows) == 1 for rows in task.values())
    assert 10 < language.measured_length(task) < 40
    printed = capsys.readouterr().out
    assert "published on 0.1M/spread is left out" in printed
    assert "No module named 'safe'" in printed
    assert "| rollout / generate() |" in printed


def test_what_runs_on_a_gpu_runs_on_tiny_models_without_one(scratch: Path) -> None:
    out = scratch / "tiny.json"
    results = language_gpu.run(argparse.Namespace(tiny=True, published=None, scratch=scratch, out=out))
    assert json.loads(out.read_text()) == results
    for figure in ("rollout / generate()", "rollout of memory bound", "update of matrix rate", "iteration / ppo"):
        assert results[figure] > 0
    assert results["safe"]["tokens"] == 4 * 8
    assert results["safe"]["scoring"] > 0
    assert results["planned_bytes"] > 0
