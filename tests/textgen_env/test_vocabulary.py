"""What is refused of a language model before its weights are touched, and what is taken."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from textgen_env import TextGenVectorEnv
from textgen_env.vocabulary import load_vocabulary
from transformers import BartConfig, GenerationConfig, T5Config, ViTConfig

from tests.textgen_env import checkpoints
from tests.textgen_env.checkpoints import HH_PROMPT, QUESTION, edit_config


def zero(completions: list[Any], **_: Any) -> list[float]:
    return [0.0] * len(completions)


@pytest.fixture
def qwen2(tmp_path: Path) -> str:
    return checkpoints.language_model(tmp_path / "qwen2")


@pytest.mark.parametrize("architecture", ["qwen2", "llama", "gemma", "gpt2"])
def test_a_checkpoint_gives_its_vocabulary_and_context(architecture: str, tmp_path: Path) -> None:
    folder = checkpoints.language_model(tmp_path, architecture)
    tokenizer = checkpoints.TOKENIZERS[architecture]()
    vocabulary = load_vocabulary(folder)
    assert (vocabulary.size, vocabulary.context) == (len(tokenizer), 256)
    assert vocabulary.pad_id == tokenizer.pad_token_id
    assert vocabulary.end_ids == (tokenizer.eos_token_id,)


def test_weights_are_not_needed(qwen2: str) -> None:
    for file in Path(qwen2).glob("*.safetensors"):
        file.unlink()
    TextGenVectorEnv(1, model=qwen2, reward_model=zero, prompts=[QUESTION])


def test_a_text_ends_at_every_token_at_which_the_models_generate_would(tmp_path: Path) -> None:
    folder = checkpoints.language_model(tmp_path, "gemma")
    turn = checkpoints.gemma_tokenizer().convert_tokens_to_ids("<end_of_turn>")
    GenerationConfig(eos_token_id=[1, turn]).save_pretrained(folder)
    envs = TextGenVectorEnv(2, model=folder, reward_model=zero, prompts=[QUESTION], missing_eos_penalty=1.0)
    assert envs.metadata["policy_kwargs"]["eos_token_id"] == [1, turn]
    envs.reset(seed=0)
    _, rewards, terminations, _, infos = envs.step(np.array([turn, 100]))
    assert terminations.tolist() == [True, False]
    assert infos["final_info"]["finish_reason"][0] == "stop"
    assert rewards[0] == 0.0


def test_without_a_generation_config_the_end_tokens_are_those_of_the_models_configuration(tmp_path: Path) -> None:
    folder = checkpoints.language_model(tmp_path, "gemma", eos_token_id=[1, 4])
    (tmp_path / "generation_config.json").unlink()
    assert checkpoints.gemma_tokenizer().eos_token_id == 1
    assert load_vocabulary(folder).end_ids == (1, 4)
    edit_config(folder, eos_token_id=4)
    assert load_vocabulary(folder).end_ids == (1, 4)


def test_a_revision_is_that_of_the_model_and_not_of_another_tokenizer(
    qwen2: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []
    from textgen_env import loading

    class Recorder:
        @staticmethod
        def from_pretrained(name: str, **arguments: Any) -> Any:
            asked.append((name, arguments))
            return checkpoints.chatml_tokenizer()

    monkeypatch.setattr(loading, "AutoTokenizer", Recorder)
    arguments = {"revision": "v2", "trust_remote_code": True, "dtype": "bfloat16"}
    load_vocabulary(qwen2, None, None, arguments)
    load_vocabulary(qwen2, "other/tokenizer", None, arguments)
    load_vocabulary(qwen2, "other/tokenizer")
    assert asked == [
        (qwen2, {"trust_remote_code": True, "revision": "v2"}),
        ("other/tokenizer", {"trust_remote_code": True}),
        ("other/tokenizer", {"trust_remote_code": False}),
    ]


def test_code_of_its_own_needs_leave_even_where_transformers_has_a_class_for_its_configuration(qwen2: str) -> None:
    edit_config(qwen2, architectures=["OwnForCausalLM"], auto_map={"AutoModelForCausalLM": "own.OwnForCausalLM"})
    with pytest.raises(ValueError, match=r"model=.*OwnForCausalLM is .* pass model_kwargs=\{'trust_remote_code': True"):
        load_vocabulary(qwen2)
    load_vocabulary(qwen2, model_kwargs={"trust_remote_code": True})
    edit_config(qwen2, architectures=["Qwen2ForCausalLM"])
    load_vocabulary(qwen2)


def test_an_adapter_without_its_model_is_told_to_be_merged(qwen2: str) -> None:
    (Path(qwen2) / "config.json").rename(Path(qwen2) / "adapter_config.json")
    with pytest.raises(ValueError, match=r"model=.* it is an adapter, .* policy\.export\(path, merged=True\)"):
        load_vocabulary(qwen2)


@pytest.mark.parametrize("config", [T5Config(), BartConfig(), ViTConfig()])
def test_models_of_another_kind_are_refused(config: Any, tmp_path: Path) -> None:
    config.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=rf"model=.* it is no causal language model: .* {type(config).__name__}"):
        load_vocabulary(str(tmp_path))


def test_missing_and_broken_files_are_named(qwen2: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"model='textgen_env:assets/nothing' cannot be loaded: .*has no"):
        load_vocabulary("textgen_env:assets/nothing")
    with pytest.raises(ValueError, match=r"(?s)^tokenizer=.*nothing' cannot be loaded: "):
        load_vocabulary(qwen2, str(tmp_path / "nothing"))
    for file in Path(qwen2).glob("*token*"):
        file.unlink()
    with pytest.raises(ValueError, match=r"(?s)^model=.*qwen2' cannot be loaded: there is no tokenizer; .*tokenizer="):
        load_vocabulary(qwen2)
    (Path(qwen2) / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"(?s)^model=.*qwen2' cannot be loaded: .*config.json"):
        load_vocabulary(qwen2)
    shutil.rmtree(qwen2)
    for name in (qwen2, "./qwen2"):
        with pytest.raises(ValueError, match=r"^model=.*qwen2' cannot be loaded: there is no such folder$"):
            load_vocabulary(name)


def test_chats_of_a_checkpoint_are_written_through_its_own_template(tmp_path: Path) -> None:
    folder = checkpoints.language_model(tmp_path, "llama")
    envs = TextGenVectorEnv(1, model=folder, reward_model=zero, prompts=[HH_PROMPT], prompt_format="chat")
    observation, _ = envs.reset(seed=0)
    ids = observation["input_ids"][0, : observation["length"][0, 0]]
    assert ids.tolist().count(envs.tokenizer.bos_token_id) == 1
    assert envs.tokenizer.decode(ids) == checkpoints.llama3_tokenizer().apply_chat_template(
        checkpoints.HH_MESSAGES, tokenize=False, add_generation_prompt=True
    )
