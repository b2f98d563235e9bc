"""Small checkpoints on disk, in the form of those that people use: sharded safetensors, tokenizer, chat template."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    GemmaConfig,
    GPT2Config,
    LlamaConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
)

QUESTION, ANSWER = "what is a cat", "a cat is an animal"
HH_PROMPT = f"\n\nHuman: {QUESTION}\n\nAssistant: {ANSWER}\n\nHuman: and a dog\n\nAssistant:"
HH_MESSAGES = [
    {"role": "user", "content": QUESTION},
    {"role": "assistant", "content": ANSWER},
    {"role": "user", "content": "and a dog"},
]

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
#: As Llama 3 has it: contents trimmed, the text begun by the template.
LLAMA3 = (
    "<|begin_of_text|>{% for m in messages %}<|start_header_id|>{{ m['role'] }}<|end_header_id|>\n\n"
    "{{ m['content'] | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
#: As Gemma has it: speakers must alternate, turns end by another token than the tokenizer's end token.
GEMMA = (
    "<bos>{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate') }}{% endif %}"
    "<start_of_turn>{{ 'model' if m['role'] == 'assistant' else 'user' }}\n{{ m['content'] | trim }}<end_of_turn>\n"
    "{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)


def chatml_tokenizer() -> PreTrainedTokenizerFast:
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    return _tokenizer(special, CHATML, pad_token="<|endoftext|>", eos_token="<|im_end|>")


def llama3_tokenizer() -> PreTrainedTokenizerFast:
    special = ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|pad|>"]
    return _tokenizer(special, LLAMA3, bos_token="<|begin_of_text|>", eos_token="<|eot_id|>", pad_token="<|pad|>")


def gemma_tokenizer() -> PreTrainedTokenizerFast:
    special = ["<pad>", "<eos>", "<bos>", "<start_of_turn>", "<end_of_turn>"]
    return _tokenizer(special, GEMMA, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>")


TOKENIZERS = {"qwen2": chatml_tokenizer, "llama": llama3_tokenizer, "gemma": gemma_tokenizer, "gpt2": chatml_tokenizer}


def config(architecture: str, tokenizer: Any, **overrides: Any) -> Any:
    ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    if architecture == "gpt2":
        sizes = {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 256}
        return GPT2Config(vocab_size=len(tokenizer), **(sizes | ids | overrides))
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1}
    sizes |= {"intermediate_size": 16, "max_position_embeddings": 256}
    if architecture == "gemma":
        sizes["head_dim"] = 8
    kind = {"qwen2": Qwen2Config, "llama": LlamaConfig, "gemma": GemmaConfig}[architecture]
    return kind(vocab_size=len(tokenizer), initializer_range=0.3, **(sizes | ids | overrides))


def language_model(folder: Path, architecture: str = "qwen2", **overrides: Any) -> str:
    """A causal language model, in several shards."""
    tokenizer = TOKENIZERS[architecture]()
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config(architecture, tokenizer, **overrides)).save_pretrained(
        folder, max_shard_size="20KB"
    )
    tokenizer.save_pretrained(folder)
    assert (folder / "model.safetensors.index.json").exists()
    return str(folder)


def reward_model(folder: Path, architecture: str = "llama", **overrides: Any) -> str:
    """A sequence classifier, in several shards."""
    tokenizer = TOKENIZERS[architecture]()
    torch.manual_seed(1)
    AutoModelForSequenceClassification.from_config(
        config(architecture, tokenizer, **({"num_labels": 1} | overrides))
    ).save_pretrained(folder, max_shard_size="20KB")
    tokenizer.save_pretrained(folder)
    assert (folder / "model.safetensors.index.json").exists()
    return str(folder)


def edit_config(folder: str | Path, **changes: Any) -> None:
    """Change a saved configuration; None removes."""
    path = Path(folder) / "config.json"
    data = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in data.items() if value is not None}))


def _tokenizer(special: list[str], template: str, **names: str) -> PreTrainedTokenizerFast:
    """Bytes and a few merges; the tokenizer adds a token that begins every text, if it has one."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=256 + len(special) + 40, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([QUESTION, ANSWER, "user", "assistant", "model", HH_PROMPT], trainer)
    if "bos_token" in names:
        begin = names["bos_token"]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{begin} $A", special_tokens=[(begin, special.index(begin))]
        )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, chat_template=template, **names)


def gated_reward_model(folder: Path) -> str:
    """A reward model with code of its own, :mod:`tests.textgen_env.gated_reward_model`."""
    from transformers.models.llama import modeling_llama

    modeling_llama.LLAMA_INPUTS_DOCSTRING = ""
    from tests.textgen_env import gated_reward_model as code

    del modeling_llama.LLAMA_INPUTS_DOCSTRING  # as transformers 5 is
    tokenizer = llama3_tokenizer()
    head = tokenizer("<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n", add_special_tokens=False)
    torch.manual_seed(2)
    model = code.LlamaForGatedReward(
        config("llama", tokenizer, num_objectives=3, assistant_pattern=head["input_ids"], num_labels=3)
    )
    torch.nn.init.normal_(model.transform)
    model.save_pretrained(folder, max_shard_size="20KB")
    tokenizer.save_pretrained(folder)
    shutil.copy(code.__file__, folder / "modeling_gated.py")
    name = "modeling_gated.LlamaForGatedReward"
    edit_config(folder, auto_map={"AutoModelForSequenceClassification": name})
    return str(folder)
