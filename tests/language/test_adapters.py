"""Low-rank adapters: what they train, what the reference is, what is kept, what is written for others."""

from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch as th
from peft import PeftModel
from stable_baselines3.common.save_util import load_from_zip_file
from torch.nn import functional as F
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DeepseekV3Config,
    GPTNeoXConfig,
    PhimoeConfig,
    Qwen3MoeConfig,
)

from sb3_safe import SAFE
from sb3_safe.language import LanguagePolicy
from sb3_safe.language import adapters as adapters_module

from .conftest import VOCAB_SIZE, make_config, make_tokenizer
from .test_agreement import rollout, text_model

LORA: dict[str, Any] = {"r": 4, "lora_alpha": 8}


def adapted(env_kwargs: dict[str, Any], dtype: th.dtype = th.float32, **kwargs: Any) -> SAFE:
    policy_kwargs = {"lora": LORA} | kwargs.pop("policy_kwargs", {})
    env_kwargs = env_kwargs | {"model_kwargs": {"dtype": dtype}}
    return text_model(env_kwargs, policy_kwargs=policy_kwargs, **({"learning_rate": 5e-3} | kwargs))


def base_weights(model: SAFE) -> dict[str, th.Tensor]:
    return {name: value.clone() for name, value in model.policy.lm.state_dict().items() if "lora_" not in name}


@pytest.mark.parametrize("architecture", ["qwen2", "llama", "gpt2", "gemma2"])
@pytest.mark.parametrize("dtype", [th.float32, th.bfloat16])
def test_only_adapters_and_heads_change(
    architecture: str, dtype: th.dtype, checkpoints: dict[str, str], env_kwargs: dict[str, Any]
) -> None:
    """And the model's own weights not by a bit, however often the adapters were merged into them."""
    model = adapted(env_kwargs | {"model": checkpoints[architecture]}, dtype)
    lora = {name: value.clone() for name, value in model.policy.lm.named_parameters() if "lora_" in name}
    before = base_weights(model)
    model.learn(13 * 6 * 4)
    model.policy.adapters.unmerge()
    for name, value in base_weights(model).items():
        assert th.equal(value, before[name]), name
    now = dict(model.policy.lm.named_parameters())
    assert all(now[name].dtype == th.float32 for name in lora)
    assert any(not th.equal(now[name], value) for name, value in lora.items())


@pytest.mark.parametrize(
    ("lora", "scaling"), [(True, 1.0), ({"r": 4}, 1.0), ({"r": 4, "lora_alpha": 8}, 2.0), ({"lora_alpha": 64}, 0.5)]
)
def test_adapters_of_any_rank_have_the_same_weight_unless_it_is_chosen(
    lora: Any, scaling: float, env_kwargs: dict[str, Any]
) -> None:
    policy = text_model(env_kwargs, policy_kwargs={"lora": lora}).policy
    assert {value for layer in policy.adapters._layers for value in layer.scaling.values()} == {scaling}


@pytest.mark.parametrize("lora", [LORA, LORA | {"target_modules": ["q_proj", "embed_tokens"]}])
def test_merged_weights_write_what_the_adapters_say(lora: dict[str, Any], env_kwargs: dict[str, Any]) -> None:
    model = adapted(env_kwargs, policy_kwargs={"lora": lora}).learn(13 * 6 * 4)
    buffer = rollout(model)
    model.predict(model._last_obs)
    assert model.policy.adapters.merged
    for batch in buffer.get(20):
        with th.no_grad():
            log_prob = model.policy.evaluate(batch.observations, batch.actions).log_prob
        assert not model.policy.adapters.merged
        np.testing.assert_allclose(log_prob, batch.old_log_prob, atol=2e-5)


def test_in_low_precision_the_first_ratio_is_exactly_one(env_kwargs: dict[str, Any]) -> None:
    """Though writing rounds otherwise: the rollout's log-probabilities are replaced by those of training."""
    model = adapted(env_kwargs, th.bfloat16, rollout_buffer_kwargs={"micro_batch_size": 128}).learn(13 * 6 * 3)
    assert model.policy.rollout_is_approximate
    buffer = rollout(model)
    for pieces in buffer.minibatches(model.batch_size):
        for piece in pieces:
            log_prob = model.policy.evaluate(piece.observations, piece.actions).log_prob
            assert th.equal(log_prob.detach(), piece.old_log_prob)


@pytest.mark.parametrize("architecture", ["gpt2", "neox"])
def test_a_last_norm_that_autocast_makes_float32_fits_an_output_layer_in_low_precision(
    architecture: str, env_kwargs: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As that of a GPU does with nn.LayerNorm; that of a CPU does not."""
    config = make_config("gpt2")
    if architecture == "neox":
        config = GPTNeoXConfig(
            vocab_size=VOCAB_SIZE, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
            max_position_embeddings=64, pad_token_id=0, eos_token_id=1, bos_token_id=None,
        )  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    layer_norm = F.layer_norm

    def as_on_a_gpu(x: th.Tensor, shape: Any, weight: Any = None, bias: Any = None, eps: float = 1e-5) -> th.Tensor:
        if not th.is_autocast_enabled("cpu"):
            return layer_norm(x, shape, weight, bias, eps)
        with th.autocast("cpu", enabled=False):
            x, weight, bias = (None if tensor is None else tensor.float() for tensor in (x, weight, bias))
            return layer_norm(x, shape, weight, bias, eps)

    monkeypatch.setattr(F, "layer_norm", as_on_a_gpu)
    model = adapted(env_kwargs | {"model": str(tmp_path)}, th.bfloat16)
    model.learn(13 * 6 * 2)
    assert all(th.isfinite(value).all() for value in model.policy.state_dict().values())


def test_the_reference_is_the_model_without_adapters(env_kwargs: dict[str, Any]) -> None:
    model = adapted(env_kwargs)
    before = next(iter(rollout(model).get(1000)))
    reference = model.policy.reference_log_prob(before.observations, before.actions)
    np.testing.assert_allclose(reference, before.old_log_prob, atol=1e-5)
    model.train()
    assert model.policy.reference is None
    np.testing.assert_array_equal(model.policy.reference_log_prob(before.observations, before.actions), reference)
    with th.no_grad():
        log_prob = model.policy.evaluate(before.observations, before.actions).log_prob
        assert (log_prob - reference).abs().max() > 1e-3
        assert model.policy.exact_kl(before.observations).mean() > 1e-5
    assert all(value.requires_grad for name, value in model.policy.lm.named_parameters() if "lora_" in name)


@pytest.mark.parametrize("estimator", ["k2", "exact"])
def test_the_gradient_of_the_penalty_does_not_care_that_the_reference_is_the_same_weights(
    estimator: str, env_kwargs: dict[str, Any]
) -> None:
    """It is that of full distributions written out by hand."""
    model = adapted(env_kwargs, kl_estimator=estimator, n_epochs=4)
    rollout(model)
    model.train()
    batch = next(iter(rollout(model).get(1000)))
    policy, obs = model.policy, batch.observations
    parameters = [value for name, value in policy.lm.named_parameters() if "lora_" in name]
    evaluation = policy.evaluate(obs, batch.actions)
    term = model._kl_term(batch, evaluation, evaluation.log_prob - batch.old_log_prob).mean()
    actual = th.autograd.grad(term, parameters)
    with th.no_grad(), policy.adapters.disabled():
        reference = policy.distribution.log_probs(policy.lm, policy._hidden(policy.lm, obs), obs["new_tokens"])
    log_probs = policy.distribution.log_probs(policy.lm, policy._hidden(policy.lm, obs), obs["new_tokens"])
    if estimator == "exact":
        expected = (log_probs.exp() * (log_probs - reference)).sum(-1).mean()
    else:
        expected = 0.5 * (log_probs - reference).gather(-1, batch.actions.view(-1, 1)).square().mean()
    for one, other in zip(actual, th.autograd.grad(expected, parameters), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-6)


def test_adapters_learn(env_kwargs: dict[str, Any]) -> None:
    rewards: list[float] = []
    model = adapted(
        env_kwargs, n_envs=16, n_steps=16, batch_size=128, n_epochs=4, learning_rate=1e-2, kl_controller="none",
        max_preview_kl=0.5, policy_kwargs={"lora": {"r": 16}},
    )  # fmt: skip
    model.learn(
        16 * 16 * 24, callback=lambda local, _: rewards.extend(i["episode"]["r"] for i in local["infos"] if i) or True
    )
    tenth = len(rewards) // 10
    assert np.mean(rewards[-tenth:]) > np.mean(rewards[:tenth]) + 0.15


def test_saving_leaves_the_model_out_and_loading_goes_on_as_if_nothing_had_happened(
    env_kwargs: dict[str, Any], tmp_path: Path
) -> None:
    model = adapted(env_kwargs).learn(13 * 6 * 2)
    model.save(tmp_path / "model")
    names = model.policy.state_dict().keys()
    assert all("lora_" in name for name in names if name.startswith("lm."))
    assert any(name.startswith("heads.") for name in names)
    loaded = SAFE.load(tmp_path / "model", env=model.get_env(), device="cpu")
    batch = next(iter(rollout(model).get(1000)))
    for method in ("evaluate", "reference_log_prob"):
        ours, theirs = (getattr(one.policy, method)(batch.observations, batch.actions) for one in (model, loaded))
        for one, other in zip(*((x,) if isinstance(x, th.Tensor) else x for x in (ours, theirs)), strict=True):
            assert th.equal(one, other)
    loaded.learn(13 * 6 * 2, reset_num_timesteps=False)
    with pytest.raises(RuntimeError, match=r"missing.*lora_A"):
        loaded.policy.load_state_dict(
            {name: value for name, value in model.policy.state_dict().items() if "lora_A" not in name}
        )


def test_a_checkpoint_that_has_moved_is_loaded_from_where_it_is(env_kwargs: dict[str, Any], tmp_path: Path) -> None:
    model = adapted(env_kwargs).learn(13 * 6 * 2)
    model.save(tmp_path / "model")
    elsewhere = tmp_path / "elsewhere"
    Path(env_kwargs["model"]).rename(elsewhere)
    try:
        gone = rf"model='{env_kwargs['model']}' cannot be loaded: there is no such folder.*load_from_zip_file"
        with pytest.raises(ValueError, match=gone):
            SAFE.load(tmp_path / "model", device="cpu")
        tokenizer = AutoTokenizer.from_pretrained(elsewhere)
        for arguments in ({"merged": True}, {"merged": True, "tokenizer": tokenizer}, {}):
            with pytest.raises(ValueError, match=gone):
                model.policy.export(tmp_path / "exported", **arguments)
        assert not (tmp_path / "exported").exists()
        model.policy.export(tmp_path / "exported", tokenizer=tokenizer)
        saved = load_from_zip_file(tmp_path / "model")[0]["policy_kwargs"]  # as the message says
        moved = {"policy_kwargs": saved | {"model": str(elsewhere)}}
        loaded = SAFE.load(tmp_path / "model", device="cpu", custom_objects=moved)
        obs = model.env.reset()
        np.testing.assert_array_equal(
            loaded.predict(obs, deterministic=True)[0], model.predict(obs, deterministic=True)[0]
        )
    finally:
        elsewhere.rename(env_kwargs["model"])


@pytest.mark.parametrize("merged", [False, True])
def test_adapters_are_not_written_into_the_folder_from_which_saved_runs_load_the_model(
    env_kwargs: dict[str, Any], merged: bool
) -> None:
    folder = Path(env_kwargs["model"])
    before = {file: file.read_bytes() for file in folder.iterdir()}
    model = adapted(env_kwargs)
    with pytest.raises(ValueError, match=r"has the model that the adapters are for.*another folder"):
        model.policy.export(folder / ".." / folder.name, merged=merged)
    assert {file: file.read_bytes() for file in folder.iterdir()} == before


@pytest.mark.parametrize("by", ["env", "policy"])
def test_a_folder_is_loaded_from_any_working_directory(
    env_kwargs: dict[str, Any], by: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = Path(env_kwargs["model"])
    (tmp_path / folder.name).mkdir()  # where the model is loaded from, the name means another folder
    monkeypatch.chdir(folder.parent)
    named = {"model": folder.name}
    model = adapted(env_kwargs | named) if by == "env" else adapted(env_kwargs, policy_kwargs=named)
    assert model.policy_kwargs["model"] == model.policy._get_constructor_parameters()["model"] == str(folder)
    model.save(tmp_path / "model")
    model.policy.save(tmp_path / "policy")
    monkeypatch.chdir(tmp_path)
    assert SAFE.load(tmp_path / "model", device="cpu").policy.lm.config.name_or_path == str(folder)
    LanguagePolicy.load(tmp_path / "policy", device="cpu")


def greedy(model: SAFE, ids: list[int], n: int) -> list[int]:
    """Tokens that the policy writes, one at a time."""
    width, written = model.observation_space["input_ids"].shape[0], list(ids)
    for _ in range(n):
        obs = {
            "input_ids": np.array(written + [0] * (width - len(written))),
            "length": np.array([len(written)]),
            "prompt_length": np.array([len(ids)]),
        }
        written.append(int(model.predict(obs, deterministic=True)[0]))
    return written


@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("lora", [LORA, False])
def test_what_is_exported_writes_the_same_tokens_elsewhere(
    lora: Any, merged: bool, env_kwargs: dict[str, Any], tmp_path: Path
) -> None:
    model = adapted(env_kwargs, policy_kwargs={"lora": lora}, learning_rate=2e-2).learn(13 * 6 * 4)
    model.policy.export(tmp_path, merged=merged)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    ids = tokenizer("the cat sat")["input_ids"]
    if lora and not merged:
        base = AutoModelForCausalLM.from_pretrained(env_kwargs["model"])
        alone = base.generate(th.tensor([ids]), do_sample=False, max_new_tokens=8)[0].tolist()
        lm = PeftModel.from_pretrained(base, tmp_path)
        assert not list(tmp_path.glob("model*.safetensors"))
        assert alone != lm.generate(input_ids=th.tensor([ids]), do_sample=False, max_new_tokens=8)[0].tolist()
    else:
        lm = AutoModelForCausalLM.from_pretrained(tmp_path)
    written = lm.generate(input_ids=th.tensor([ids]), do_sample=False, max_new_tokens=8)[0].tolist()
    assert written == greedy(model, ids, len(written) - len(ids))


def moe_config(kind: str) -> Any:
    sizes: dict[str, Any] = {
        "vocab_size": VOCAB_SIZE, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
        "moe_intermediate_size": 16, "num_experts_per_tok": 2, "initializer_range": 0.2,
    }  # fmt: skip
    if kind == "qwen3":
        return Qwen3MoeConfig(**sizes, intermediate_size=32, num_key_value_heads=2, head_dim=8, num_experts=4)
    # Beside its experts it has layers of their names, whose adapters PEFT would put on the experts.
    return DeepseekV3Config(
        **sizes, intermediate_size=32, num_key_value_heads=4, n_routed_experts=4, n_group=1, topk_group=1,
        kv_lora_rank=8, q_lora_rank=8, qk_rope_head_dim=4, qk_nope_head_dim=8, v_head_dim=8, first_k_dense_replace=1,
    )  # fmt: skip


@pytest.mark.parametrize("kind", ["qwen3", "deepseek"])
def test_mixtures_of_experts_are_trained_through_their_other_layers(
    kind: str, env_kwargs: dict[str, Any], tmp_path: Path
) -> None:
    AutoModelForCausalLM.from_config(moe_config(kind)).save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(env_kwargs["model"]).save_pretrained(tmp_path)
    model = adapted(env_kwargs | {"model": str(tmp_path)}, policy_kwargs={"lora": True}).learn(13 * 6)
    trained = {name for name, value in model.policy.lm.named_parameters() if value.requires_grad}
    assert trained
    assert all(".self_attn." in name and ".lora_" in name for name in trained)
    model.policy.export(tmp_path / "adapter")
    exported = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp_path), tmp_path / "adapter")
    model.policy.adapters.unmerge()
    ids = th.arange(10)[None]
    np.testing.assert_allclose(exported(ids).logits.detach(), model.policy.lm(ids).logits.detach(), atol=1e-4)
    with pytest.raises(ValueError, match=r"mlp\.experts cannot be merged.*none of down_proj"):
        adapted(
            env_kwargs | {"model": str(tmp_path)}, policy_kwargs={"lora": {"target_modules": ["q_proj", "down_proj"]}}
        )


def test_a_router_that_is_a_linear_layer_with_outputs_of_its_own_gets_no_adapters() -> None:
    """PhiMoE's. A class of linear layers that only has another name gets them."""
    config = PhimoeConfig(
        vocab_size=VOCAB_SIZE, hidden_size=32, intermediate_size=16, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=4,
    )  # fmt: skip
    lm = AutoModelForCausalLM.from_config(config)
    lm.model.layers[0].self_attn.q_proj.__class__ = type("Projection", (th.nn.Linear,), {})
    adapters_module.Adapters(lm, {"r": 4})
    trained = {name.split(".lora_")[0] for name, value in lm.named_parameters() if value.requires_grad}
    assert trained == {
        f"model.layers.{number}.self_attn.{name}_proj" for number in range(2) for name in ("q", "k", "v", "o")
    }
    assert lm(th.arange(10)[None]).logits.isfinite().all()


@pytest.mark.parametrize("merged", [False, True])
def test_the_tokenizer_of_the_environment_is_exported_where_it_is_named(
    merged: bool, env_kwargs: dict[str, Any], tmp_path: Path
) -> None:
    """With the user's chat template, and where the model has no tokenizer of its own."""
    AutoModelForCausalLM.from_config(make_config("qwen2")).save_pretrained(tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(env_kwargs["model"])
    tokenizer.chat_template = "{{ messages[0]['content'] }}"
    model = adapted(env_kwargs | {"model": str(tmp_path / "model"), "tokenizer": tokenizer})
    with pytest.raises(ValueError, match="there is no tokenizer; name another one by tokenizer="):
        model.policy.export(tmp_path / "exported", merged)
    larger = AutoTokenizer.from_pretrained(env_kwargs["model"])
    larger.add_tokens([f"<{number}>" for number in range(VOCAB_SIZE)])
    with pytest.raises(ValueError, match=r"tokenizer=\.\.\. knows \d+ tokens, but model="):
        model.policy.export(tmp_path / "exported", merged, larger)
    assert not (tmp_path / "exported").exists()
    model.policy.export(tmp_path / "exported", merged, tokenizer)
    exported = AutoTokenizer.from_pretrained(tmp_path / "exported")
    assert exported.get_vocab() == tokenizer.get_vocab()
    assert exported.chat_template == tokenizer.chat_template


def test_large_models_get_adapters_unless_the_user_says_otherwise(
    env_kwargs: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert text_model(env_kwargs).policy.adapters is None
    monkeypatch.setattr(adapters_module, "LORA_FROM", 1000)
    assert text_model(env_kwargs).policy.adapters is not None
    assert text_model(env_kwargs, policy_kwargs={"lora": False}).policy.adapters is None


@pytest.mark.parametrize(
    ("lora", "said"),
    [
        ("yes", "lora must be"),
        ({"r": 4, "lora_dropout": 0.1}, "lora_dropout must be 0"),
        ({"rank": 4}, rf"does not fit the model \(PEFT {version('peft')}, transformers {version('transformers')}\)"),
        ({"target_modules": ["no_such_layer"]}, "does not fit"),
        ({"target_modules": ["q_proj", "lm_head"]}, "output layer"),
        ({"use_dora": True}, "leave out use_dora"),
        ({"lora_bias": True}, "leave out lora_bias"),
        ({"bias": "all"}, "leave out bias"),
        ({"modules_to_save": ["norm"]}, "leave out modules_to_save"),
        ({"trainable_token_indices": [5]}, "leave out trainable_token_indices"),
        ({"init_lora_weights": "pissa"}, "leave out init_lora_weights"),
        ({"init_lora_weights": False}, "leave out init_lora_weights"),
        ({"task_type": "SEQ_CLS"}, "leave out task_type"),
    ],
)
def test_bad_arguments_are_named(lora: Any, said: str, env_kwargs: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=said):
        text_model(env_kwargs, policy_kwargs={"lora": lora})


def test_arguments_that_change_nothing_go_through(env_kwargs: dict[str, Any]) -> None:
    """As configurations for other trainers name them."""
    lora = {"r": 4, "task_type": "CAUSAL_LM", "bias": "none", "init_lora_weights": True, "modules_to_save": None}
    assert text_model(env_kwargs, policy_kwargs={"lora": lora}).policy.adapters is not None


def test_embeddings_that_are_the_output_layer_get_no_adapters(env_kwargs: dict[str, Any], tmp_path: Path) -> None:
    AutoModelForCausalLM.from_config(make_config("qwen2", tie_word_embeddings=True)).save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(env_kwargs["model"]).save_pretrained(tmp_path)
    lora = {"target_modules": ["q_proj", "embed_tokens"]}
    with pytest.raises(ValueError, match=r"leave the output layer.*and embeddings that share its weights"):
        text_model(env_kwargs | {"model": str(tmp_path)}, policy_kwargs={"lora": lora})


def test_missing_peft_is_said_with_the_fix(env_kwargs: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "peft", None)
    with pytest.raises(ImportError, match=r"sb3-safe\[lora\]"):
        adapters_module.Adapters(None, {})


def test_low_precision_without_adapters_is_warned_of(env_kwargs: dict[str, Any]) -> None:
    with pytest.warns(UserWarning, match="dtype"):
        text_model(env_kwargs | {"model_kwargs": {"dtype": th.bfloat16}}, policy_kwargs={"lora": False})
