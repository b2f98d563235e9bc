"""Slots, sampling, suppression, heads, reference."""

import contextlib
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import numpy as np
import pytest
import torch as th
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.vec_env import VecNormalize
from transformers import AutoModelForCausalLM, AutoTokenizer, Phi3Config

from sb3_safe import SAFE, environments
from sb3_safe.functional import categorical_kl
from sb3_safe.language import LanguagePolicy, SegmentBuffer
from sb3_safe.language.decoding import DecodeStep
from sb3_safe.language.slots import SlotCache
from sb3_safe.language.tokens import SUPPRESSED, sample
from sb3_safe.policies import Evaluation
from sb3_safe.trust_bound import trained_parameters

from .conftest import VOCAB_SIZE, make_config
from .test_agreement import Silent, rollout, text_model


def observe(texts: list[list[int]], width: int = 20) -> dict[str, th.Tensor]:
    ids = th.zeros(len(texts), width, dtype=th.long)
    for row, text in enumerate(texts):
        ids[row, : len(text)] = th.tensor(text)
    lengths = th.tensor([[len(text)] for text in texts])
    return {"input_ids": ids, "length": lengths, "prompt_length": th.ones_like(lengths)}


def test_arguments_of_the_model_come_from_the_environment_and_from_the_policy(env_kwargs: dict[str, Any]) -> None:
    env_kwargs = env_kwargs | {"model_kwargs": {"attn_implementation": "eager", "dtype": "float64"}}
    lm = text_model(env_kwargs, policy_kwargs={"lora": {"r": 4}, "model_kwargs": {"dtype": "bfloat16"}}).policy.lm
    assert lm.config._attn_implementation == "eager"
    assert lm.dtype == th.bfloat16


class OwnPolicy(LanguagePolicy):
    """As researchers derive one."""


def test_a_policy_derived_from_the_one_that_is_named_gets_its_arguments(env_kwargs: dict[str, Any]) -> None:
    env_kwargs = env_kwargs | {"min_new_tokens": 2}
    env = environments.make("TextGenEnv-v0", 2, env_kwargs)
    model = SAFE(OwnPolicy, env, n_steps=8, batch_size=8, policy_kwargs={"min_new_tokens": 3}, device="cpu")
    assert model.policy_kwargs["model"] == env_kwargs["model"]
    assert model.policy_kwargs["min_new_tokens"] == 3
    with pytest.warns(UserWarning, match="min_new_tokens=4"):
        model.set_env(environments.make("TextGenEnv-v0", 2, env_kwargs | {"min_new_tokens": 4}))


def test_a_slot_is_stale_when_its_text_changed_though_not_its_length() -> None:
    slots = SlotCache(make_config("qwen2"), 3, 6, th.device("cpu"))
    ids = th.tensor([[5, 6, 7, 0, 0, 0], [5, 6, 8, 0, 0, 0], [4, 0, 0, 0, 0, 0]])
    assert slots.stale_rows(ids, th.tensor([2, 2, 0])).tolist() == [0, 1]  # nothing is needed of the third
    slots.remember(ids.clone(), th.tensor([3, 3, 1]))
    assert slots.stale_rows(ids, th.tensor([3, 3, 1])).tolist() == []
    ids[1, 1] = 9
    assert slots.stale_rows(ids, th.tensor([3, 3, 1])).tolist() == [1]
    assert slots.stale_rows(ids, th.tensor([4, 1, 1])).tolist() == [0]
    slots.invalidate()
    assert slots.stale_rows(ids, th.tensor([1, 1, 1])).tolist() == [0, 1, 2]


def test_slots_give_what_a_fresh_forward_pass_gives(env_kwargs: dict[str, Any]) -> None:
    """Whatever was in them: shorter, longer, other texts, single tokens."""
    policy = text_model(env_kwargs).policy
    generator = np.random.default_rng(0)
    texts = [generator.integers(2, 300, n).tolist() for n in (1, 5, 9)]
    for _ in range(12):
        obs = observe(texts)
        with th.no_grad():
            hidden = policy._continue(obs["input_ids"], obs["length"].view(-1))
            for row, text in enumerate(texts):
                alone = policy.lm.base_model(input_ids=th.tensor([text])).last_hidden_state[0, -1]
                np.testing.assert_allclose(hidden[row], alone, atol=2e-5)
        for row in range(3):
            texts[row] = texts[row] + [int(generator.integers(2, 300))]
            if generator.random() < 0.3 or len(texts[row]) > 18:
                texts[row] = generator.integers(2, 300, generator.integers(1, 12)).tolist()


def test_the_value_of_a_text_is_the_same_whether_or_not_it_is_being_written(env_kwargs: dict[str, Any]) -> None:
    """Before anything is written, and of another number of texts than are being written."""
    policy = text_model(env_kwargs).policy
    texts = [[5, 6, 7], [8, 9, 10, 11, 12, 13], [4]]
    with th.no_grad():
        alone = [policy.lm.base_model(input_ids=th.tensor([text])).last_hidden_state[0, -1] for text in texts]
        expected = policy._used_value(th.stack(alone))
        before = policy.predict_values(observe(texts))
        _, written, _ = policy(observe(texts))
        fewer = policy.predict_values(observe(texts[:2]))
    for actual in (before, written):
        np.testing.assert_allclose(actual, expected, atol=1e-5)
    np.testing.assert_allclose(fewer, expected[:2], atol=1e-5)


def test_a_step_of_fixed_shape_gives_what_one_of_the_right_width_gives(env_kwargs: dict[str, Any]) -> None:
    """A recorded step attends to whole slots, whatever lies beyond a text's end."""
    policy = text_model(env_kwargs).policy
    obs = observe([[5, 6, 7], [8, 9, 10, 11, 12, 13], [4]])
    with th.no_grad():
        expected = policy._continue(obs["input_ids"], obs["length"].view(-1)).clone()
        last = obs["length"].view(-1) - 1
        for layer in policy._slots.layers:
            layer.keys[:, :, 6:] = layer.values[:, :, 6:] = 100.0
        whole = policy._decode(obs["input_ids"].gather(1, last[:, None]).squeeze(1), last, obs["input_ids"].shape[1])
    np.testing.assert_allclose(whole, expected, atol=1e-6)


def test_a_model_that_cannot_be_recorded_is_told_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch's part of it is replaced: the first call succeeds in a plain stream, and fails while it is recorded."""
    recording: list[object] = []

    @contextlib.contextmanager
    def graph(recorded: object, stream: object) -> Iterator[None]:
        recording.append(recorded)
        yield

    stream = MagicMock()
    replaced = {"Stream": stream, "current_stream": stream, "stream": stream, "device": stream, "CUDAGraph": object}
    for name, value in replaced.items():
        monkeypatch.setattr(th.cuda, name, value)
    monkeypatch.setattr(th.cuda, "graph", graph)

    def body(tokens: th.Tensor, *_: Any) -> th.Tensor:
        if recording:
            raise RuntimeError("CUDA error: operation not permitted when stream is capturing")
        return tokens.unsqueeze(-1).float()

    slots = MagicMock(ids=MagicMock(device=th.device("cuda"), shape=(2, 8)))
    step = DecodeStep(body, slots, graphs=True)
    tokens = th.tensor([3, 4])
    for _ in range(2):  # what failed once is not replayed the second time
        recording.clear()
        with pytest.raises(RuntimeError, match="cuda_graphs") as error, th.no_grad():
            step(tokens, tokens, 8)
        assert "stream is capturing" in str(error.value.__cause__)
    with th.no_grad():
        recording.clear()
        assert DecodeStep(body, slots, graphs=False)(tokens, tokens, 8).tolist() == [[3.0], [4.0]]


def test_a_step_is_recorded_and_replayed_on_the_device_of_its_slots(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which is not the current one, outside. PyTorch's part of it is replaced by what tells on which device it acts."""
    devices = [th.device("cuda:0")]
    acted: dict[str, set[th.device]] = {}

    def on(device: th.device, what: str) -> None:
        acted.setdefault(what, set()).add(device)

    @contextlib.contextmanager
    def device(chosen: th.device) -> Iterator[None]:
        devices.append(chosen)
        yield
        devices.pop()

    class Stream:
        def __init__(self) -> None:
            self.device = devices[-1]

        def wait_stream(self, other: Any) -> None:
            on(self.device, "wait")
            on(other.device, "wait")

    class Graph:
        def replay(self) -> None:
            on(devices[-1], "replay")

    @contextlib.contextmanager
    def graph(recorded: Graph, stream: Any) -> Iterator[None]:
        on(stream.device, "record")
        yield

    @contextlib.contextmanager
    def inside(stream: Stream) -> Iterator[None]:
        on(stream.device, "warm up")
        yield

    replaced = {
        "device": device, "Stream": Stream, "current_stream": Stream, "stream": inside, "CUDAGraph": Graph,
        "graph": graph,
    }  # fmt: skip
    for name, value in replaced.items():
        monkeypatch.setattr(th.cuda, name, value)
    slots = MagicMock(ids=MagicMock(device=th.device("cuda:1"), shape=(2, 8)))
    step = DecodeStep(lambda tokens, *_: tokens.unsqueeze(-1).float(), slots, graphs=True)
    tokens = th.tensor([3, 4])
    with th.no_grad():
        for _ in range(2):
            step(tokens, tokens, 8)
    assert acted == {what: {th.device("cuda:1")} for what in ("wait", "warm up", "record", "replay")}
    assert devices == [th.device("cuda:0")]


@pytest.mark.parametrize(
    ("scaling", "refused"),
    [
        ({"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [4.0] * 4}, True),
        (None, False),
    ],
)
def test_texts_are_not_longer_than_a_scaling_by_the_longest_of_a_batch_lets_them(
    scaling: dict[str, Any] | None, refused: bool, env_kwargs: dict[str, Any], tmp_path: Path
) -> None:
    config = Phi3Config(
        vocab_size=VOCAB_SIZE, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4,
        max_position_embeddings=64, original_max_position_embeddings=19, rope_scaling=scaling, pad_token_id=0,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(env_kwargs["model"]).save_pretrained(tmp_path)
    env_kwargs |= {"model": str(tmp_path), "max_prompt_tokens": 12}
    text_model(env_kwargs | {"max_new_tokens": 7})
    said = r"longrope.*more than 19 tokens, and here .* up to 20: lower max_prompt_tokens or max_new_tokens"
    with pytest.raises(ValueError, match=said) if refused else contextlib.nullcontext():
        text_model(env_kwargs | {"max_new_tokens": 8})


def test_samples_follow_the_probabilities_and_never_have_probability_zero() -> None:
    th.manual_seed(0)
    probabilities = th.tensor([0.0, 0.5, 0.0, 0.3, 0.2, 0.0])
    log_probs = th.log_softmax(th.where(probabilities > 0, probabilities.log(), SUPPRESSED), -1)
    draws = sample(log_probs.expand(200_000, -1))
    frequencies = th.bincount(draws, minlength=6) / 200_000
    assert frequencies[[0, 2, 5]].sum() == 0
    np.testing.assert_allclose(frequencies, probabilities, atol=4 * np.sqrt(0.25 / 200_000))


def test_no_token_of_probability_zero_is_drawn_even_by_the_smallest_random_number(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Which is 0, and comes once in 17 million draws."""
    monkeypatch.setattr(th, "rand", th.zeros)
    log_probs = th.log_softmax(th.tensor([[SUPPRESSED, SUPPRESSED, 0.0, 0.0], [0.0, SUPPRESSED, 0.0, 0.0]]), -1)
    assert sample(log_probs).tolist() == [2, 0]


def test_no_end_token_before_the_minimum(env_kwargs: dict[str, Any]) -> None:
    model = text_model(env_kwargs | {"min_new_tokens": 3}, n_steps=40)
    with th.no_grad():
        model.policy.lm.get_output_embeddings().weight[1] *= 0
        model.policy.lm.get_output_embeddings().weight[1] += 1.0  # an eager end token
    lengths: list[int] = []
    model.learn(240, callback=lambda local, _: lengths.extend(i["episode"]["l"] for i in local["infos"] if i) or True)
    assert min(lengths) >= 3


def test_the_end_token_receives_gradient(env_kwargs: dict[str, Any]) -> None:
    """Its log-probability is trained like any other token's, and its reward is the text's score."""
    model = text_model(env_kwargs, n_steps=40, n_envs=16)
    with th.no_grad():
        model.policy.lm.get_output_embeddings().weight[1] += 0.5
    buffer = rollout(model)
    ends = np.argwhere(buffer.actions[..., 0] == 1)
    assert len(ends) > 0
    assert all(buffer.rewards[step, env] != 0 or step == 0 for step, env in ends)
    seen = 0
    for batch in buffer.get(64):
        is_end = batch.actions == 1
        if not is_end.any():
            continue
        seen += int(is_end.sum())
        model.policy.optimizer.zero_grad()
        log_prob = model.policy.evaluate(batch.observations, batch.actions).log_prob
        log_prob[is_end].sum().backward()
        assert model.policy.lm.get_output_embeddings().weight.grad[1].abs().max() > 0
    assert seen == len(ends)


def test_the_share_of_the_critics_gradient_that_is_asked_for_reaches_the_language_model(
    env_kwargs: dict[str, Any],
) -> None:
    batch = next(iter(rollout(text_model(env_kwargs)).get(1000)))
    reached = []
    for share in (0.0, 0.5, 1.0):
        policy = text_model(env_kwargs, policy_kwargs={"critic_gradient": share}).policy
        policy.evaluate(batch.observations, batch.actions).values.sum().backward()
        reached.append([th.zeros(()) if p.grad is None else p.grad for p in policy.lm.parameters()])
    nothing, half, whole = reached
    assert not any(gradient.any() for gradient in nothing)
    assert any(gradient.any() for gradient in whole)
    for one, other in zip(half, whole, strict=True):
        np.testing.assert_allclose(2 * one, other, atol=1e-5)


def test_heads_start_different(env_kwargs: dict[str, Any]) -> None:
    policy = text_model(env_kwargs).policy
    hidden = th.randn(5, 32)
    values = policy._values(policy.heads, hidden)
    assert values.shape == (5, 2)
    assert (values[:, 0] - values[:, 1]).abs().min() > 1e-4


def test_the_reference_stays_where_it_was(env_kwargs: dict[str, Any]) -> None:
    model = text_model(env_kwargs, learning_rate=1e-2)
    batch = next(iter(rollout(model).get(1000)))
    before = model.policy.reference_log_prob(batch.observations, batch.actions)
    np.testing.assert_allclose(before, batch.old_log_prob, atol=1e-5)
    assert model.policy.exact_kl(batch.observations).abs().max() < 1e-6
    model.train()
    np.testing.assert_array_equal(model.policy.reference_log_prob(batch.observations, batch.actions), before)
    log_probs, reference = (
        model.policy.distribution.log_probs(
            lm, model.policy._hidden(lm, batch.observations), batch.observations["new_tokens"]
        )
        for lm in (model.policy.lm, model.policy.reference)
    )
    expected = (log_probs.exp() * (log_probs - reference)).sum(-1)
    assert expected.mean() > 1e-4
    np.testing.assert_allclose(model.policy.exact_kl(batch.observations).detach(), expected.detach(), atol=1e-5)
    np.testing.assert_allclose(categorical_kl(log_probs, reference).detach(), expected.detach(), atol=1e-5)


@pytest.mark.parametrize("lora", [False, {"r": 4}])
def test_the_exact_kl_takes_one_pass_of_the_policy(
    lora: Any, env_kwargs: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And its gradient is that of a pass of its own."""
    model = text_model(
        env_kwargs, kl_estimator="exact", kl_controller="fixed", learning_rate=1e-2, policy_kwargs={"lora": lora}
    )
    model.learn(13 * 6 * 2)
    policy, batch = model.policy, next(iter(rollout(model).get(1000)))
    model._objective = model._make_objective()
    passes: list[bool] = []
    hidden = policy._hidden
    monkeypatch.setattr(policy, "_hidden", lambda *args: passes.append(th.is_grad_enabled()) or hidden(*args))
    gradients = []
    for forget in (False, True):
        if forget:
            evaluate = policy.evaluate
            monkeypatch.setattr(policy, "evaluate", lambda *args: Evaluation(*evaluate(*args)[:3]))  # noqa: B023
        policy.optimizer.zero_grad()
        model._loss(batch)[0].backward()
        gradients.append([parameter.grad.clone() for parameter in trained_parameters(model.policy)])
    assert passes == [True, False, True, False, True]
    for one, other in zip(*gradients, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-6)


def test_a_policy_tells_the_probability_of_all_other_tokens(env_kwargs: dict[str, Any]) -> None:
    """Of the hidden states that an evaluation has, or of those of a pass of its own."""
    model = text_model(env_kwargs, policy_kwargs={"top_k": 50})
    policy, batch = model.policy, next(iter(rollout(model).get(1000)))
    rows = th.tensor([5, 0, 7])
    evaluation = policy.evaluate(batch.observations, batch.actions)
    expected = th.log(-th.expm1(evaluation.log_prob[rows])).detach()
    for given in (evaluation, evaluation._replace(latents=None)):
        others = policy.log_others(batch.observations, batch.actions, given, rows)
        assert others.requires_grad
        np.testing.assert_allclose(others.detach(), expected, atol=1e-5)
    assert policy.log_others(batch.observations, batch.actions, evaluation, rows[:0]).shape == (0,)


def test_lost_tokens_are_pushed_down_and_only_they(env_kwargs: dict[str, Any]) -> None:
    model = text_model(env_kwargs, kl_controller_kwargs={"max_drift": 3.0, "coef": 0.5})
    batch = next(iter(rollout(model).get(1000)))
    model._objective = model._make_objective()
    n = len(batch.actions)
    drifts = th.where(th.arange(n) % 3 == 0, 4.0, 0.0)
    batch = batch._replace(reference_log_prob=batch.old_log_prob - drifts)
    without, _ = model._loss(batch)
    with_them, _ = model._loss(batch._replace(lost=drifts > 3.0))
    log_prob = model.policy.evaluate(batch.observations, batch.actions).log_prob
    expected = -th.log(-th.expm1(log_prob))[drifts > 0].sum() * 0.5 / n
    assert (with_them - without).item() == pytest.approx(expected.item(), rel=1e-3)


def test_critic_rate_multiplies_the_learning_rate_of_the_heads(env_kwargs: dict[str, Any]) -> None:
    model = text_model(env_kwargs, learning_rate=1e-3, policy_kwargs={"critic_rate": 4.0})
    model.learn(100)
    assert [group["lr"] for group in model.policy.optimizer.param_groups] == pytest.approx([1e-3, 4e-3])


@pytest.mark.parametrize("optimizer", [th.optim.SGD, th.optim.Adafactor, th.optim.AdamW])
def test_other_optimizers_have_their_own_defaults(optimizer: Any, env_kwargs: dict[str, Any], tmp_path: Path) -> None:
    model = text_model(env_kwargs, policy_kwargs={"optimizer_class": optimizer}).learn(13 * 6)
    assert type(model.policy.optimizer) is optimizer
    assert model.policy.optimizer.defaults.get("eps") == optimizer(model.policy.parameters()).defaults.get("eps")
    model.save(tmp_path / "model")
    SAFE.load(tmp_path / "model", env=model.env).learn(13 * 6)
    assert text_model(env_kwargs).policy.optimizer.defaults["eps"] == 1e-5


def test_greedy_prediction_is_deterministic_and_evaluation_runs(env_kwargs: dict[str, Any]) -> None:
    model = text_model(env_kwargs)
    obs = model.env.reset()
    first, _ = model.predict(obs, deterministic=True)
    np.testing.assert_array_equal(first, model.predict(obs, deterministic=True)[0])
    row = {key: value[0] for key, value in obs.items()}
    assert model.predict(row, deterministic=True)[0] == first[0]
    mean, _ = evaluate_policy(model, model.get_env(), n_eval_episodes=8)
    assert 0 <= mean <= 1


def test_save_and_load_keep_policy_reference_and_controller(env_kwargs: dict[str, Any], tmp_path: Any) -> None:
    model = text_model(env_kwargs, learning_rate=5e-3).learn(13 * 6 * 3)
    model.save(tmp_path / "model")
    for env in (None, model.get_env()):
        loaded = SAFE.load(tmp_path / "model", env=env, device="cpu")
        for (name, value), (_, other) in zip(
            model.policy.state_dict().items(), loaded.policy.state_dict().items(), strict=True
        ):
            assert th.equal(value, other), name
        assert vars(loaded.controller) == vars(model.controller)
        obs = model.env.reset()
        np.testing.assert_array_equal(
            loaded.predict(obs, deterministic=True)[0], model.predict(obs, deterministic=True)[0]
        )
    loaded.learn(13 * 6 * 2, reset_num_timesteps=False)
    assert loaded.num_timesteps == model.num_timesteps + 13 * 6 * 2


def test_an_environment_that_asks_for_another_policy_than_was_saved_is_warned_of(
    env_kwargs: dict[str, Any], tmp_path: Any
) -> None:
    model = text_model(env_kwargs)
    model.save(tmp_path / "model")
    longer = environments.make("TextGenEnv-v0", 6, env_kwargs | {"min_new_tokens": 2})
    wanted = {"policy_kwargs": model.policy_kwargs | {"min_new_tokens": 2}}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        SAFE.load(tmp_path / "model", env=model.get_env())
        SAFE.load(tmp_path / "model", env=longer, custom_objects=wanted)
    with pytest.warns(UserWarning, match=r"min_new_tokens=2.* goes on with 0.*custom_objects"):
        SAFE.load(tmp_path / "model", env=longer)
    with pytest.warns(UserWarning, match="min_new_tokens=2"):
        model.set_env(longer)
    model = text_model(env_kwargs, policy_kwargs={"min_new_tokens": 1})
    model.save(tmp_path / "model")
    alone = {"policy_kwargs": {"model": env_kwargs["model"]}}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        SAFE.load(tmp_path / "model", env=model.get_env())  # the user had decided
    with pytest.warns(UserWarning, match=r"eos_token_id=\[1\].* goes on with None") as warned:
        SAFE.load(tmp_path / "model", env=model.get_env(), custom_objects=alone)
    assert len(warned) == 1  # of the other arguments that are left out, what the environment asks for is the default


def test_trust_bound_holds_for_absurd_learning_rates(env_kwargs: dict[str, Any]) -> None:
    model = text_model(env_kwargs, learning_rate=1e-1, n_epochs=3)
    for _ in range(4):
        rollout(model)
        model.train()
        total = count = 0.0
        for batch in model.rollout_buffer.in_order(50):
            with th.no_grad():
                log_ratio = model.policy.evaluate(batch.observations, batch.actions).log_prob - batch.old_log_prob
            total += float((log_ratio.double().exp() - 1 - log_ratio.double()).sum())
            count += len(log_ratio)
        assert total / count <= model.max_preview_kl * (1 + 1e-4)
    assert all(th.isfinite(parameter).all() for parameter in model.policy.parameters())


def test_a_stronger_penalty_keeps_the_model_nearer_to_its_start(env_kwargs: dict[str, Any]) -> None:
    def drift(estimator: str, coef: float) -> float:
        """Mean over seeds: one rollout of 256 tokens tells a KL of 0.05 to within its half."""
        kls = []
        for seed in range(4):
            model = text_model(
                env_kwargs, learning_rate=5e-3, n_envs=16, n_steps=16, batch_size=128, kl_estimator=estimator,
                kl_controller="fixed", kl_controller_kwargs={"coef": coef}, seed=seed,
            )  # fmt: skip
            model.learn(16 * 16 * 10)
            kls.append(model.measured_kl)
        return float(np.mean(kls))

    free = drift("k1", 0.0)
    assert {name: kl for name in ("k1", "k2", "k3", "exact") if (kl := drift(name, 3.0)) >= 0.7 * free} == {}


def test_a_reward_function_that_breaks_down_loses_nothing(env_kwargs: dict[str, Any], tmp_path: Any) -> None:
    """The error names function and text, and what was learned is saved."""
    score, calls = env_kwargs["reward_model"], []

    def breaks_down(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
        calls.append(None)
        return score(prompts, completions, **columns) if len(calls) < 20 else [float("nan")] * len(prompts)

    model = text_model(env_kwargs | {"reward_model": breaks_down}, tensorboard_log=str(tmp_path))
    with pytest.raises(ValueError, match="breaks_down") as caught:
        model.learn(13 * 6 * 20)
    assert model._n_updates > 0
    rescue = caught.value.__notes__[0].split(" saved to ")[1]
    loaded = SAFE.load(rescue, device="cpu")
    for value, other in zip(model.policy.parameters(), loaded.policy.parameters(), strict=True):
        assert th.equal(value, other)


@pytest.mark.parametrize("error", [ConnectionError, KeyboardInterrupt])
def test_training_goes_on_after_a_reward_function_was_interrupted(
    error: type[BaseException], env_kwargs: dict[str, Any]
) -> None:
    """The texts that it was asked about are given up."""
    score, calls = env_kwargs["reward_model"], []

    def interrupted(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
        calls.append(None)
        if len(calls) == 20:
            raise error
        return score(prompts, completions, **columns)

    model = text_model(env_kwargs | {"reward_model": interrupted})
    with pytest.raises(error):
        model.learn(13 * 6 * 20)
    done = model.num_timesteps
    model.learn(13 * 6 * 3, reset_num_timesteps=False)
    assert model.num_timesteps >= done + 13 * 6 * 3
    lengths = model._last_obs["length"] - model._last_obs["prompt_length"]
    assert lengths.max() <= env_kwargs["max_new_tokens"]


@pytest.mark.parametrize(
    ("saved", "loaded"),
    [
        ({"critic_tau": 0.5}, {"critic_tau": 1.0}),
        ({}, {"critic_tau": 0.5}),
        ({}, {"kl_controller": "none"}),
        ({"kl_controller": "none"}, {"kl_controller": "safe"}),
    ],
    ids=str,
)
@pytest.mark.parametrize("lora", [False, {"r": 4}], ids=["full", "lora"])
def test_arguments_can_be_replaced_on_loading(
    saved: dict[str, Any], loaded: dict[str, Any], lora: Any, env_kwargs: dict[str, Any], tmp_path: Any
) -> None:
    model = text_model(env_kwargs, policy_kwargs={"lora": lora}, **saved)
    model.learn(13 * 6)
    model.save(tmp_path / "model")
    again = SAFE.load(tmp_path / "model", env=model.env, **loaded)
    assert (again.policy.target_heads is not None) == (again.critic_tau < 1)
    again.learn(13 * 6)


def test_a_policy_alone_can_be_saved_and_loaded(env_kwargs: dict[str, Any], tmp_path: Any) -> None:
    model = text_model(env_kwargs, critic_tau=0.5)
    model.learn(13 * 6)
    model.policy.save(tmp_path / "policy")
    policy = LanguagePolicy.load(tmp_path / "policy")
    for name, value in model.policy.state_dict().items():
        assert th.equal(policy.state_dict()[name], value), name


@pytest.mark.parametrize(
    ("name", "value"), [("critic_gradient", 1.5), ("critic_rate", -1.0), ("critic_max_grad_norm", 0.0)]
)
def test_numbers_out_of_range_are_named(name: str, value: float, env_kwargs: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=name):
        text_model(env_kwargs, policy_kwargs={name: value})


def test_token_ids_are_not_normalised(env_kwargs: dict[str, Any]) -> None:
    env = environments.make("TextGenEnv-v0", 2, env_kwargs)
    for norm_obs in (False, True):
        with pytest.raises(ValueError, match="norm_obs=False") if norm_obs else contextlib.nullcontext():
            SAFE("LanguagePolicy", VecNormalize(env, norm_obs=norm_obs), n_steps=8)


def test_the_price_of_drift_is_the_same_when_rewards_are_normalised(
    env_kwargs: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is taken off the rewards is in their unit: divided by what they were divided by."""
    taken: list[np.ndarray] = []
    monkeypatch.setattr(SegmentBuffer, "subtract_from_rewards", lambda _, penalty: taken.append(penalty))
    unit = []
    for normalise in (False, True):
        env = environments.make("TextGenEnv-v0", 6, env_kwargs)
        if normalise:
            env = VecNormalize(env, norm_obs=False, gamma=1.0)
        model = SAFE("LanguagePolicy", env, n_steps=13, batch_size=32, learning_rate=0.0, gamma=1.0, seed=0)
        # A reference other than the policy, so that there is something to take off.
        for parameter in model.policy.reference.parameters():
            parameter.data.mul_(1.1)
        model.controller.reward_scale = 1000.0
        model.learn(13 * 6)
        unit.append(float(np.sqrt(env.ret_rms.var + env.epsilon)) if normalise else 1.0)
    assert unit[1] != pytest.approx(1.0, rel=0.05)
    np.testing.assert_allclose(taken[1] * unit[1], taken[0] * unit[0], rtol=1e-4, atol=1e-7)
    assert np.abs(taken[0]).max() > 0


# -- values after the last step ----------------------------------------------------------------------------------------


def collect(model: SAFE, told: bool) -> SegmentBuffer:
    """A rollout whose policy is told of the texts that have ended, or not."""
    if told:
        return rollout(model)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SegmentBuffer, "awaits_last_values", False)
        return rollout(model)


@pytest.mark.parametrize("min_new_tokens", [0, 8])
def test_prompts_that_have_just_come_are_not_read_for_values_that_nobody_uses(
    min_new_tokens: int, env_kwargs: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Texts of any length, or all of one, which end together with the rollout. Returns are the same."""
    env_kwargs |= {"min_new_tokens": min_new_tokens}
    buffers, ended, through = [], [], []
    for told in (True, False):
        model = text_model(env_kwargs, n_steps=16)
        with th.no_grad():
            model.policy.lm.get_output_embeddings().weight[1] += 1.0  # an eager end token
        tokens: list[int] = []
        body = model.policy._body

        def counted(lm: Any, ids: Any, *args: Any, body: Any = body, tokens: list[int] = tokens, **kwargs: Any) -> Any:
            tokens.append(ids.numel())
            return body(lm, ids, *args, **kwargs)

        monkeypatch.setattr(model.policy, "_body", counted)
        th.manual_seed(0)
        for _ in range(2):
            buffers.append(collect(model, told))
            model.policy.set_training_mode(True)  # slots are not trusted any more
            ended.append(int(buffers[-1]._last_dones.sum()))
        through.append(sum(tokens))
    assert ended == [6] * 4 if min_new_tokens else 0 < ended[0] < 6
    assert through[0] < through[1]
    for one, other in zip(buffers[:2], buffers[2:], strict=True):
        for name in ("actions", "values", "rewards", "log_probs", "advantages", "returns"):
            np.testing.assert_allclose(getattr(one, name), getattr(other, name), atol=1e-6, err_msg=name)
            if min_new_tokens:
                np.testing.assert_array_equal(getattr(one, name), getattr(other, name))


class AsksForValues(Silent):
    """Compares values that it asks for with those of whole texts, at every step and at the end."""

    def _on_step(self) -> bool:
        self.compare(self.locals["new_obs"])
        return True

    def _on_rollout_end(self) -> None:
        self.compare(self.model._last_obs)

    def compare(self, observations: dict[str, np.ndarray]) -> None:
        policy: Any = self.model.policy
        obs, _ = policy.obs_to_tensor(observations)
        ids, last = obs["input_ids"].long(), obs["length"].long().view(-1) - 1
        with th.no_grad():
            hidden = policy._body(policy.lm, ids)[th.arange(len(ids)), last]
            np.testing.assert_allclose(policy.predict_values(obs), policy._used_value(hidden), atol=1e-5)


def test_callbacks_get_the_values_of_prompts_that_have_just_come(env_kwargs: dict[str, Any]) -> None:
    model = text_model(env_kwargs | {"min_new_tokens": 8}, n_steps=16)
    callback = model._setup_learn(10_000, AsksForValues())[1]
    assert model.collect_rollouts(model.env, callback, model.rollout_buffer, 16)
    assert model.rollout_buffer._last_dones.all()
