from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from textgen_env import RewardModel, TextGenVectorEnv
from textgen_env.reward_model import load_classifier
from textgen_env.rewards import make_reward
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    MPNetConfig,
    Qwen2Config,
    Qwen2ForSequenceClassification,
    RobertaConfig,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTModel,
)
from transformers.modeling_outputs import ModelOutput

from tests.textgen_env import checkpoints
from tests.textgen_env.checkpoints import HH_MESSAGES, HH_PROMPT, QUESTION, edit_config

OLD = tuple(int(part) for part in transformers.__version__.split(".")[:2]) < (5, 23)

PROMPTS = ["Hotel review:", "About this film: The", "Phone review: The", "Review of a book:"]
TEXTS = [" The room was great.", " plot was dull, but the cast was superb. I hated the script.", " case", ""]
CHAT = [{"role": "user", "content": "Hotel review:"}]
GOOD = [{"role": "assistant", "content": "Good."}]


def tiny_classifier(**config: Any) -> Qwen2ForSequenceClassification:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1}
    settings = {"vocab_size": 1024, "intermediate_size": 16, "num_labels": 1, "max_position_embeddings": 64}
    return Qwen2ForSequenceClassification(Qwen2Config(**{**sizes, **settings, **config}))


def seen_text(model: RewardModel, prompt: Any, completion: Any, turns: Any = None) -> str:
    """What a reward model reads, special tokens included."""
    read: list[list[int]] = []
    score = model.score
    model.score = lambda texts: read.extend(texts) or score(texts)  # type: ignore[method-assign, func-returns-value]
    model([prompt], [completion], turns)
    model.score = score  # type: ignore[method-assign]
    return str(model.tokenizer.decode(read[0]))


@pytest.fixture(scope="module")
def embedded() -> RewardModel:
    return RewardModel("textgen_env:assets/reward_model", batch_size=3)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> str:
    return checkpoints.reward_model(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def language_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return checkpoints.language_model(tmp_path_factory.mktemp("qwen2"))


@pytest.fixture
def gated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    return checkpoints.gated_reward_model(tmp_path / "gated")


# -- scores ------------------------------------------------------------------------------------------------------------


def test_a_score_does_not_depend_on_the_batch(embedded: RewardModel) -> None:
    together = embedded(PROMPTS, TEXTS)
    alone = [embedded([prompt], [text])[0] for prompt, text in zip(PROMPTS, TEXTS, strict=True)]
    backwards = embedded(PROMPTS[::-1], TEXTS[::-1])[::-1]
    assert np.allclose(together, alone, atol=1e-5)
    assert np.allclose(together, backwards, atol=1e-5)
    assert len({round(score, 3) for score in together}) == 4


def test_a_score_is_the_classifiers_logit_of_prompt_and_completion_as_one_string(embedded: RewardModel) -> None:
    ids = embedded.tokenizer(PROMPTS[0] + TEXTS[0], return_tensors="pt")
    with torch.no_grad():
        expected = embedded.model(**ids).logits.item()
    assert embedded(PROMPTS[:1], TEXTS[:1])[0] == pytest.approx(expected, abs=1e-6)


def test_the_reward_of_an_episode_is_the_score_of_its_finished_text_alone(embedded: RewardModel) -> None:
    envs = TextGenVectorEnv(8, reward_model=embedded, max_new_tokens=6)
    envs.reset(seed=0)
    rng = np.random.default_rng(0)
    checked = 0
    for _ in range(12):
        actions = np.where(rng.random(8) < 0.3, 1, rng.integers(2, 1024, 8))
        _, rewards, terminations, _, infos = envs.step(actions)
        for row in np.flatnonzero(terminations):
            final = infos["final_info"]
            (alone,) = embedded([final["prompt"][row]], [final["completion"][row]])
            assert rewards[row] == pytest.approx(alone, abs=1e-5)
            checked += 1
    assert checked > 10


@pytest.mark.parametrize("architecture", ["qwen2", "llama", "gemma", "gpt2"])
def test_checkpoints_in_shards_score_as_the_classifier_does_whatever_the_policys_tokenizer(
    architecture: str, tmp_path: Path, language_model: str
) -> None:
    folder = checkpoints.reward_model(tmp_path, architecture)
    envs = TextGenVectorEnv(2, model=language_model, reward_model=folder, prompts=[QUESTION], max_new_tokens=3)
    envs.reset(seed=0)
    for _ in range(3):
        _, rewards, _, _, infos = envs.step(np.array([70, 80]))
    model = RewardModel(folder)
    for row, completion in enumerate(infos["final_info"]["completion"]):
        ids = model.tokenizer(QUESTION + completion, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            assert rewards[row] == pytest.approx(model.model(input_ids=ids).logits.item(), abs=1e-5)


@pytest.mark.parametrize("pad_id", [None, -1, 1024])
def test_without_a_pad_token_of_the_vocabulary_a_text_is_scored_at_its_last_token_whatever_that_is(
    tokenizer: Any, pad_id: int | None
) -> None:
    classifier = tiny_classifier()
    classifier.config.pad_token_id = pad_id
    model = RewardModel(classifier, tokenizer)
    texts = [[5, 6, 0], [7, 1], [8, 9, 10, 2]]
    expected = []
    for text in texts:
        model.model.config.pad_token_id = None
        with torch.no_grad():
            expected.append(model.model(input_ids=torch.tensor([text])).logits.item())
    assert np.allclose(model.score(texts), expected, atol=1e-6)


# -- what it reads -----------------------------------------------------------------------------------------------------


def test_chats_are_scored_through_the_reward_models_own_template(tokenizer: Any) -> None:
    tokenizer.chat_template = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    model = RewardModel(tiny_classifier(pad_token_id=0), tokenizer)
    (chat,) = model([CHAT], [GOOD])
    (plain,) = model(["user: Hotel review:\nassistant: "], ["Good.\n"])
    assert chat == pytest.approx(plain, abs=1e-6)
    tokenizer.chat_template = None
    with pytest.raises(ValueError, match=r"has no chat template.*reward_tokenizer"):
        model([CHAT], [GOOD])


def test_a_transcript_is_read_as_the_conversation_that_it_is(llama: str) -> None:
    model = RewardModel(llama)
    expected = model.tokenizer.apply_chat_template(
        [*HH_MESSAGES, {"role": "assistant", "content": "as well"}], tokenize=False
    )
    assert seen_text(model, HH_PROMPT, " as well ") == expected
    assert seen_text(model, HH_MESSAGES, [{"role": "assistant", "content": "as well"}]) == expected


def test_a_turn_in_which_the_policy_speaks_for_the_human_is_still_its_own(llama: str) -> None:
    text = seen_text(RewardModel(llama), HH_PROMPT, " yes\n\nHuman: thank you so much")
    assert text.endswith("<|end_header_id|>\n\nyes\n\nHuman: thank you so much<|eot_id|>")
    assert text.count("user") == 2


def test_the_turns_of_a_long_transcript_are_those_that_were_written(llama: str) -> None:
    turns = [" yes", "\n\nHuman: why\n\nAssistant:", " because"]
    text = seen_text(RewardModel(llama), HH_PROMPT, "".join(turns), [turns])
    chat = [*HH_MESSAGES, {"role": "assistant", "content": "yes"}, {"role": "user", "content": "why"}]
    assert text == RewardModel(llama).tokenizer.apply_chat_template(
        [*chat, {"role": "assistant", "content": "because"}], tokenize=False
    )


def test_other_strings_and_readers_without_a_template_get_the_joined_text(llama: str) -> None:
    model = RewardModel(llama)
    assert seen_text(model, QUESTION, " it is") == f"<|begin_of_text|>{QUESTION} it is"
    model.tokenizer.chat_template = None
    assert seen_text(model, HH_PROMPT, " it is") == f"<|begin_of_text|>{HH_PROMPT} it is"


# -- several outputs ---------------------------------------------------------------------------------------------------


def test_the_end_token_comes_after_joined_texts_where_the_tokenizer_puts_it_and_chats_are_their_templates(
    llama: str,
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(llama, add_bos_token=True, add_eos_token=True)
    plain, ending = RewardModel(llama), RewardModel(llama, tokenizer)
    joined = seen_text(plain, QUESTION, " a cat")
    assert joined.startswith(tokenizer.bos_token)
    assert seen_text(ending, QUESTION, " a cat") == joined + tokenizer.eos_token
    assert seen_text(ending, CHAT, GOOD) == seen_text(plain, CHAT, GOOD)


def test_several_logits_need_a_score_field_or_a_column(tokenizer: Any) -> None:
    class Scored(Qwen2ForSequenceClassification):
        def forward(self, *arguments: Any, **named: Any) -> ModelOutput:
            logits = super().forward(*arguments, **named).logits
            return ModelOutput(logits=logits, score=logits.sum(dim=1))

    model = tiny_classifier(num_labels=3, pad_token_id=0)
    with pytest.raises(ValueError, match=r"gives 3 logits per text: .*reward_column"):
        RewardModel(model, tokenizer)
    columns = [RewardModel(model, tokenizer, column=column)(PROMPTS, TEXTS) for column in range(3)]
    model.__class__ = Scored
    assert np.allclose(RewardModel(model, tokenizer)(PROMPTS, TEXTS), np.sum(columns, axis=0), atol=1e-5)
    assert RewardModel(model, tokenizer, column=1)(PROMPTS, TEXTS) == columns[1]
    with pytest.raises(ValueError, match=r"reward_column=3: reward model .* has 3 logits"):
        RewardModel(model, tokenizer, column=3)


def test_the_environment_hands_reward_column_on(tmp_path: Path) -> None:
    folder = checkpoints.reward_model(tmp_path, "llama", num_labels=2)
    with pytest.raises(ValueError, match="reward_column"):
        make_reward(folder)
    envs = TextGenVectorEnv(1, reward_model=folder, reward_column=1, prompts=[HH_PROMPT], max_new_tokens=2)
    envs.reset(seed=0)
    _, rewards, _, _, infos = envs.step(np.array([1]))
    assert rewards.tolist() == RewardModel(folder, column=1)([HH_PROMPT], infos["final_info"]["completion"])


# -- loading -----------------------------------------------------------------------------------------------------------


def test_loading_arguments_reach_the_model_and_a_cpu_runs_in_half_precision(llama: str, tmp_path: Path) -> None:
    default = RewardModel(llama).model
    assert (default.dtype, default.config._attn_implementation) == (torch.float32, "sdpa")
    half = RewardModel(llama, model_kwargs={"dtype": torch.bfloat16, "attn_implementation": "eager"})
    assert (half.model.dtype, half.model.config._attn_implementation) == (torch.bfloat16, "eager")
    assert np.allclose(half([HH_PROMPT], [" yes"]), RewardModel(llama)([HH_PROMPT], [" yes"]), atol=0.1)
    half.model.save_pretrained(tmp_path)
    assert load_classifier(str(tmp_path), "cpu", {"dtype": "auto"}).dtype == torch.bfloat16
    assert load_classifier(str(tmp_path), "cpu").dtype == torch.float32


@pytest.mark.parametrize("batch_size", [0, -1])
def test_a_batch_without_a_text_is_refused(batch_size: int) -> None:
    with pytest.raises(ValueError, match=f"batch_size={batch_size} must be at least 1"):
        RewardModel("textgen_env:assets/reward_model", batch_size=batch_size)


def test_the_old_name_of_dtype_is_refused(llama: str, language_model: str) -> None:
    """Beside the default for the new one transformers would say nothing and ignore it."""
    old = {"torch_dtype": "bfloat16"}
    with pytest.raises(ValueError, match=r"reward_model=.*torch_dtype is called dtype"):
        RewardModel(llama, model_kwargs=old)
    with pytest.raises(ValueError, match=r"(?<!reward_)model=.*torch_dtype is called dtype"):
        TextGenVectorEnv(1, model=language_model, model_kwargs=old, prompts=["a"], reward_model=llama)


def test_a_revision_is_that_of_the_model_and_not_of_another_tokenizer(
    llama: str, language_model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[str, Any]] = []

    def spy(loader: str) -> None:
        import importlib

        module, name = loader.rsplit(".", 1)
        kind = getattr(importlib.import_module(module), name)

        class Recorder:
            @staticmethod
            def from_pretrained(path: str, **arguments: Any) -> Any:
                asked.append((path, arguments.get("revision")))
                return kind.from_pretrained(path, **arguments)

        monkeypatch.setattr(loader, Recorder)

    spy("textgen_env.loading.AutoTokenizer")
    spy("textgen_env.reward_model.AutoModelForSequenceClassification")
    RewardModel(llama, model_kwargs={"revision": "main"})
    RewardModel(llama, tokenizer=language_model, model_kwargs={"revision": "main"})
    assert asked == [(llama, "main"), (llama, "main"), (llama, "main"), (language_model, None)]


def test_code_of_its_own_runs_once_it_is_allowed_and_its_score_is_read(gated: str, language_model: str) -> None:
    arguments = {"model": language_model, "reward_model": gated, "max_new_tokens": 3, "prompts": [HH_PROMPT]}
    with pytest.raises(ValueError, match=r"reward_model=.*reward_model_kwargs=\{'trust_remote_code': True\}"):
        TextGenVectorEnv(2, **arguments)
    envs = TextGenVectorEnv(2, reward_model_kwargs={"trust_remote_code": True}, **arguments)
    envs.reset(seed=0)
    for _ in range(3):
        _, rewards, _, _, infos = envs.step(np.array([70, 80]))
    model = RewardModel(gated, model_kwargs={"trust_remote_code": True})
    for row, completion in enumerate(infos["final_info"]["completion"]):
        chat = [*HH_MESSAGES, {"role": "assistant", "content": completion}]
        text = model.tokenizer.apply_chat_template(chat, tokenize=False)
        ids = model.tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            assert rewards[row] == pytest.approx(model.model(input_ids=ids).score.item(), abs=1e-5)


def test_a_prompt_that_a_model_cannot_score_is_refused_before_the_first_step(gated: str) -> None:
    arguments = {"reward_model": gated, "reward_model_kwargs": {"trust_remote_code": True}, "max_new_tokens": 2}
    with pytest.raises(
        ValueError, match=r"cannot score the prompt 'what is a cat': Token pattern .*prompt_format='chat'"
    ):
        TextGenVectorEnv(1, prompts=[QUESTION, HH_PROMPT], **arguments)
    TextGenVectorEnv(1, prompts=[QUESTION, HH_PROMPT], prompt_format="chat", **arguments)


def test_a_language_model_is_no_reward_model(language_model: str) -> None:
    with pytest.raises(ValueError, match=r"reward_model=.*it is not a reward model: its checkpoint lacks score.weight"):
        TextGenVectorEnv(1, reward_model=language_model)


def test_models_of_another_kind_are_no_reward_models(tmp_path: Path) -> None:
    sizes = {"num_layers": 1, "num_heads": 2, "d_model": 16, "d_kv": 8, "d_ff": 16, "vocab_size": 300}
    T5ForConditionalGeneration(T5Config(**sizes)).save_pretrained(tmp_path / "t5")
    vision = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    ViTModel(ViTConfig(**vision, image_size=16, patch_size=8)).save_pretrained(tmp_path / "vit")
    for name, cause in (("t5", "it is not a reward model: .*classification_head"), ("vit", "ViTConfig")):
        with pytest.raises(ValueError, match=rf"reward_model=.*{name}' cannot be loaded: .*{cause}"):
            RewardModel(str(tmp_path / name))


def test_a_reward_model_that_fails_to_load_raises(tmp_path: Path, llama: str) -> None:
    with pytest.raises(ValueError, match=r"reward_model=.*nothing' cannot be loaded: there is no such folder"):
        TextGenVectorEnv(1, reward_model=str(tmp_path / "nothing"))
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"reward_model=.* cannot be loaded: .*model_type"):
        TextGenVectorEnv(1, reward_model=str(tmp_path))
    with pytest.raises(ValueError, match=r"reward_model='textgen_env:assets/nothing' cannot be loaded: .*has no"):
        TextGenVectorEnv(1, reward_model="textgen_env:assets/nothing")
    with pytest.raises(ValueError, match=r"reward_tokenizer=.*nothing' cannot be loaded"):
        TextGenVectorEnv(1, reward_model=llama, reward_tokenizer=str(tmp_path / "nothing"))


def test_a_checkpoint_with_a_missing_shard_or_other_sizes_is_refused(tmp_path: Path) -> None:
    folder = checkpoints.reward_model(tmp_path)
    edit_config(folder, intermediate_size=24)
    with pytest.raises(ValueError, match=r"reward_model=.* cannot be loaded: .*size"):
        RewardModel(folder)
    edit_config(folder, intermediate_size=16)
    max(tmp_path.glob("*.safetensors")).unlink()
    with pytest.raises(ValueError, match=r"reward_model=.* cannot be loaded: .*safetensors"):
        RewardModel(folder)


def test_a_loaded_reward_model_of_unknown_origin_needs_a_tokenizer() -> None:
    with pytest.raises(ValueError, match=r"does not say where its tokenizer is: pass reward_tokenizer"):
        RewardModel(tiny_classifier(pad_token_id=0))


def test_messages_without_a_template_to_score_them_are_refused_before_the_first_step(llama: str) -> None:
    tokenizer = checkpoints.llama3_tokenizer()
    tokenizer.chat_template = None
    with pytest.raises(ValueError, match=r"tokenizer of reward model .* has no chat template"):
        TextGenVectorEnv(1, reward_model=llama, reward_tokenizer=tokenizer, prompts=[CHAT])


def test_a_template_that_refuses_a_conversation_is_an_error_that_says_so(tmp_path: Path) -> None:
    model = RewardModel(checkpoints.reward_model(tmp_path, "gemma"))
    with pytest.raises(ValueError, match=r"chat template of reward model .* refuses messages: .*must alternate"):
        model([[*CHAT, *CHAT]], [GOOD])


def test_prompts_that_leave_the_reward_model_no_room_are_refused_before_the_first_step(tokenizer: Any) -> None:
    tokenizer.chat_template = None
    model = RewardModel(tiny_classifier(max_position_embeddings=24), tokenizer)
    with pytest.raises(ValueError, match=r"takes 24 tokens but a prompt has \d+ and 20 may be written after it: lower"):
        TextGenVectorEnv(1, reward_model=model, prompts=["Hotel review: The room"], max_new_tokens=20)
    TextGenVectorEnv(1, reward_model=model, prompts=["Hotel review: The room"], max_new_tokens=10)


def test_a_text_of_more_tokens_than_the_policy_wrote_is_scored_without_the_oldest_and_warned_of_once(
    tokenizer: Any,
) -> None:
    tokenizer.chat_template = None
    model = RewardModel(tiny_classifier(max_position_embeddings=24), tokenizer)
    ids = tokenizer("Hotel review:" * 9 + " The room was great.")["input_ids"]
    assert len(ids) > 24
    with pytest.warns(UserWarning, match=r"takes 24 tokens but a text has \d+.*lower max_prompt_tokens"):
        (score,) = model(["Hotel review:" * 9], [" The room was great."])
    assert score == model.score([ids[-24:]])[0] != model.score([ids[:24]])[0]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert model(["Hotel review:" * 9], [" The room was great."]) == [score]


def test_the_special_token_at_which_a_text_is_scored_is_not_cut_off(tokenizer: Any) -> None:
    tokenizer.add_special_tokens({"cls_token": "<cls>"})
    model = RewardModel(tiny_classifier(max_position_embeddings=24, vocab_size=2048), tokenizer)
    words = list(range(5, 35))
    with pytest.warns(UserWarning, match="takes 24 tokens"):
        (score,) = model.score([[tokenizer.cls_token_id, *words]])
    assert [score] == model.score([[tokenizer.cls_token_id, *words[-23:]]])


@pytest.mark.parametrize("kind", [RobertaConfig, MPNetConfig, BertConfig])
def test_the_longest_text_that_a_model_of_another_architecture_takes_is_scored_and_a_longer_one_cut(
    kind: Any, tokenizer: Any
) -> None:
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    config = kind(**sizes, vocab_size=1024, max_position_embeddings=20, num_labels=1, pad_token_id=1)
    tokenizer.chat_template = None
    model = RewardModel(AutoModelForSequenceClassification.from_config(config), tokenizer)
    longest = 20 if kind is BertConfig else 18
    (word,) = tokenizer(" room")["input_ids"]
    assert np.isfinite(model.score([[word] * longest, [word]])).all()
    model.check(" room" * (longest - 5), new_tokens=5)
    with pytest.warns(UserWarning, match=rf"takes {longest} tokens but a text has {longest + 1}"):
        assert np.isfinite(model.score([[word] * (longest + 1)])).all()
    with pytest.raises(ValueError, match=rf"takes {longest} tokens but a prompt has {longest - 4} and 5 may be"):
        model.check(" room" * (longest - 4), new_tokens=5)


@pytest.mark.parametrize("order", [1, -1])
def test_a_chat_that_is_too_long_to_be_scored_is_refused_although_the_policy_gets_its_end_alone(
    order: int, tmp_path: Path, language_model: str
) -> None:
    folder = checkpoints.reward_model(tmp_path, max_position_embeddings=64)
    chats = [[{"role": "user", "content": " ".join([QUESTION] * times)}] for times in (2, 40)]
    arguments = {"model": language_model, "reward_model": folder, "max_prompt_tokens": 8, "long_prompts": "truncate"}
    with pytest.raises(ValueError, match=r"takes 64 tokens but a prompt has \d+"):
        TextGenVectorEnv(1, prompts=chats[::order], max_new_tokens=4, **arguments)
    TextGenVectorEnv(1, prompts=chats[:1], max_new_tokens=4, **arguments)


def test_an_adapter_with_its_head_is_a_reward_model(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    base = checkpoints.language_model(tmp_path / "base", "llama")
    whole = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1)
    adapted = peft.get_peft_model(whole, peft.LoraConfig(task_type="SEQ_CLS", r=2))
    adapted.save_pretrained(tmp_path / "adapter")
    checkpoints.llama3_tokenizer().save_pretrained(tmp_path / "adapter")
    if OLD:  # such a transformers does not load the head
        with pytest.raises(ValueError, match=r"brings along: update to transformers 5\.23"):
            RewardModel(str(tmp_path / "adapter"), model_kwargs={"num_labels": 1})
        return
    model = RewardModel(str(tmp_path / "adapter"), model_kwargs={"num_labels": 1})
    ids = model.tokenizer(QUESTION, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        assert model([QUESTION], [""])[0] == pytest.approx(adapted.eval()(input_ids=ids).logits.item(), abs=1e-6)


def test_a_model_with_code_of_its_own_is_not_allowed_to_ask_on_the_terminal(
    language_model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked"))
    folder = tmp_path / "own"
    AutoModelForCausalLM.from_pretrained(language_model).save_pretrained(folder)
    edit_config(
        folder, model_type="unheard-of", auto_map={"AutoConfig": "code.Own", "AutoModelForCausalLM": "code.Own"}
    )
    with pytest.raises(ValueError, match=r"(?s)^model=.* pass model_kwargs=\{'trust_remote_code': True\}"):
        TextGenVectorEnv(1, model=str(folder))
    with pytest.raises(ValueError, match=r"(?s)reward_model=.* pass reward_model_kwargs=\{'trust_remote_code': True\}"):
        TextGenVectorEnv(1, reward_model=str(folder))
