"""Loading language models: what goes through, and what is refused with a reason."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch as th
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    DeepseekV3Config,
    GPT2Config,
    GPTNeoConfig,
    GptOssConfig,
    MambaConfig,
    MixtralConfig,
    OPTConfig,
    Qwen2Config,
    Qwen2ForSequenceClassification,
    Qwen2Model,
)

from sb3_safe.language.body import check_architecture
from sb3_safe.language.loading import checkpoint_layers, default_dtype, load_language_model, model_size

from .conftest import make_config


def test_a_size_is_counted_without_loading(checkpoints: dict[str, str], tmp_path: Path) -> None:
    lm = load_language_model(checkpoints["qwen2"])
    assert model_size(checkpoints["qwen2"]) == sum(parameter.numel() for parameter in lm.parameters())
    # The shape of Qwen2.5-3B, of which there is only a configuration.
    Qwen2Config(
        hidden_size=2048, intermediate_size=11008, num_hidden_layers=36, num_attention_heads=16, num_key_value_heads=2,
        vocab_size=151936, tie_word_embeddings=True,
    ).save_pretrained(tmp_path)  # fmt: skip
    assert model_size(str(tmp_path)) == pytest.approx(3.09e9, rel=0.01)


def test_shards_precision_and_attention_go_through(tmp_path: Path) -> None:
    AutoModelForCausalLM.from_config(make_config("llama")).save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    lm = load_language_model(str(tmp_path))
    assert lm.dtype == th.float32
    other = load_language_model(str(tmp_path), dtype=th.bfloat16, attn_implementation="eager")
    assert other.dtype == th.bfloat16
    assert other.config._attn_implementation == "eager"


@pytest.mark.parametrize(("generation", "dtype"), [(7, th.float32), (8, th.bfloat16)])
def test_a_gpu_that_only_emulates_bfloat16_does_not_get_it(
    generation: int, dtype: th.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    replaced = {
        "is_available": lambda: True,
        "current_device": lambda: 0,
        "get_device_properties": lambda device: SimpleNamespace(major=generation),
        "_check_bf16_tensor_supported": lambda device: True,
    }
    for name, function in replaced.items():
        monkeypatch.setattr(th.cuda, name, function)
    monkeypatch.setattr(th.version, "cuda", "12.8")
    assert default_dtype(adapted=True) == dtype
    assert default_dtype(adapted=False) == th.float32


def test_dropout_is_silent_even_in_training_mode(tmp_path: Path) -> None:
    config = GPT2Config(vocab_size=50, n_embd=16, n_layer=2, n_head=2, resid_pdrop=0.5, attn_pdrop=0.5, embd_pdrop=0.5)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    lm = load_language_model(str(tmp_path))
    ids = th.arange(10)[None]
    assert not lm.training
    quiet = lm(ids).logits
    checkpoint_layers(lm)
    assert th.equal(lm.train()(ids, use_cache=False).logits, quiet)


@pytest.mark.parametrize(
    "config",
    [
        MambaConfig(vocab_size=50, hidden_size=16, num_hidden_layers=2),
        # Its local layers have masks of their own, in which all rows are at the same position.
        GPTNeoConfig(vocab_size=50, hidden_size=16, num_layers=2, num_heads=2,
                     attention_types=[[["global", "local"], 1]]),
    ],
)  # fmt: skip
def test_an_architecture_that_writes_otherwise_is_refused(config: Any, tmp_path: Path) -> None:
    lm = AutoModelForCausalLM.from_config(config)
    lm.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=rf"{type(lm).__name__}.* is not supported: texts are written with a cache"):
        load_language_model(str(tmp_path))


@pytest.mark.parametrize(
    "config",
    [
        # The first two do not see where positions begin anew: what is behind in a row would read what is before. Nor
        # does Falcon before transformers 5.24.
        OPTConfig(vocab_size=50, hidden_size=16, word_embed_proj_dim=16, ffn_dim=16, num_hidden_layers=2,
                  num_attention_heads=2, init_std=0.2),
        GptOssConfig(vocab_size=50, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
                     num_key_value_heads=2, head_dim=8, num_local_experts=2, num_experts_per_tok=1,
                     initializer_range=0.2),
        # Its output layer is only the last of those between hidden states and logits.
        BertConfig(vocab_size=50, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
                   is_decoder=True),
    ],
)  # fmt: skip
def test_an_architecture_that_would_get_other_probabilities_is_refused(config: Any, tmp_path: Path) -> None:
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    with pytest.raises(
        ValueError, match="is not supported: texts that are packed into one row get other probabilities"
    ):
        load_language_model(str(tmp_path))


@pytest.mark.parametrize(
    "config",
    [
        MixtralConfig(vocab_size=50, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
                      num_key_value_heads=2, num_local_experts=4, initializer_range=0.2),
        # Its values are of another size than its keys.
        DeepseekV3Config(vocab_size=50, hidden_size=16, intermediate_size=16, moe_intermediate_size=16,
                         num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2, n_routed_experts=4,
                         num_experts_per_tok=2, n_group=1, topk_group=1, kv_lora_rank=8, q_lora_rank=8,
                         qk_rope_head_dim=4, qk_nope_head_dim=8, v_head_dim=10, first_k_dense_replace=1,
                         initializer_range=0.2),
    ],
)  # fmt: skip
def test_mixtures_of_experts_go_through(config: Any, tmp_path: Path) -> None:
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    for dtype in (th.float32, th.bfloat16):
        assert load_language_model(str(tmp_path), dtype=dtype).dtype == dtype


class Before(Qwen2Model):
    def forward(
        self,
        input_ids: Any,
        attention_mask: Any,
        position_ids: Any,
        use_cache: bool,
        past_key_values: Any = None,
        **_: Any,
    ) -> Any:
        return super().forward(input_ids, attention_mask, position_ids, past_key_values, use_cache=use_cache)


class Since(Qwen2Model):
    def forward(
        self, input_ids: Any, attention_mask: Any, position_ids: Any, use_cache: bool, cache: Any = None, **_: Any
    ) -> Any:
        return super().forward(input_ids, attention_mask, position_ids, cache, use_cache=use_cache)


@pytest.mark.parametrize("body", [Before, Since])
def test_keys_and_values_go_by_either_name_that_models_have_for_them(
    body: type[Qwen2Model], checkpoints: dict[str, str]
) -> None:
    """Transformers 5.24 renames them in its models; code that comes with a model has the name it was written with."""
    lm = AutoModelForCausalLM.from_pretrained(checkpoints["qwen2"]).eval()
    lm.model.__class__ = body
    check_architecture(lm, "mine")


def test_attention_that_takes_no_masks_is_refused(checkpoints: dict[str, str]) -> None:
    with pytest.raises(ValueError, match=r"attn_implementation='flex_attention'.*'sdpa', 'eager'"):
        load_language_model(checkpoints["qwen2"], attn_implementation="flex_attention")


def test_a_checkpoint_that_is_no_language_model_is_refused(tmp_path: Path) -> None:
    config = make_config("qwen2", num_labels=1)
    config.tie_word_embeddings = False
    Qwen2ForSequenceClassification(config).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"not a causal language model.*lm_head"):
        load_language_model(str(tmp_path))


def test_code_that_comes_with_a_model_is_not_run_unasked(checkpoints: dict[str, str], tmp_path: Path) -> None:
    config = json.loads(Path(checkpoints["qwen2"], "config.json").read_text())
    classes = {"AutoConfig": "other.OtherConfig", "AutoModelForCausalLM": "other.OtherForCausalLM"}
    (tmp_path / "config.json").write_text(json.dumps(config | {"auto_map": classes, "model_type": "other"}))
    (tmp_path / "other.py").write_text("raise SystemExit('this code was run')")
    with pytest.raises(ValueError, match=r"(?s)model=.*model_kwargs=\{'trust_remote_code': True\}"):
        load_language_model(str(tmp_path))


def test_a_missing_model_is_named() -> None:
    with pytest.raises(ValueError, match=r"model='/no/such/folder' cannot be loaded"):
        load_language_model("/no/such/folder")
