from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from textgen_env.prompts import Deck, Prompt, PromptReader, shared_prompt
from textgen_env.vocabulary import load_vocabulary
from tokenizers import processors

from tests.textgen_env import checkpoints
from tests.textgen_env.checkpoints import HH_MESSAGES, HH_PROMPT

CHAT = [{"role": "user", "content": "Review of a hotel:"}]


def read(source: Any, column: str = "prompt", max_tokens: int | None = None, **arguments: Any) -> list[Prompt]:
    tokenizer = arguments.pop("tokenizer", None)
    vocabulary = load_vocabulary("textgen_env:assets/lm", tokenizer)
    settings = [
        arguments.pop(name, default) for name, default in (("long_prompts", "error"), ("prompt_format", "text"))
    ]
    return PromptReader(vocabulary, column, max_tokens, *settings).read(source, **arguments)


def test_strings_are_tokenised_as_they_are(tokenizer: Any) -> None:
    (prompt,) = read(["Review of a hotel: The"])
    assert prompt.value == "Review of a hotel: The"
    assert prompt.ids.tolist() == tokenizer("Review of a hotel: The")["input_ids"]
    assert prompt.columns == {}


def test_an_end_token_that_the_tokenizer_appends_is_no_part_of_a_prompt(tokenizer: Any) -> None:
    plain = tokenizer("Hotel review:")["input_ids"]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="$A <eos>", special_tokens=[("<eos>", tokenizer.eos_token_id)]
    )
    assert tokenizer("Hotel review:")["input_ids"] == [*plain, tokenizer.eos_token_id]
    prompts = read(["Hotel review:", "Hotel review:<eos>"], tokenizer=tokenizer)
    assert [prompt.ids.tolist() for prompt in prompts] == [plain, [*plain, tokenizer.eos_token_id]]
    with pytest.raises(ValueError, match=r"prompts\[0\] is empty"):
        read([""], tokenizer=tokenizer)


def test_messages_go_through_the_chat_template_with_a_generation_prompt(tokenizer: Any) -> None:
    tokenizer.chat_template = "{{ messages[0]['content'] }}{% if add_generation_prompt %} The{% endif %}"
    (prompt,) = read([CHAT], tokenizer=tokenizer)
    assert prompt.value == CHAT
    assert prompt.ids.tolist() == tokenizer("Review of a hotel: The")["input_ids"]


def test_other_columns_stay_with_their_prompt() -> None:
    rows = [{"question": "Hotel review:", "answer": 1}, {"question": "Phone review:", "answer": 2}]
    prompts = read(rows, column="question")
    assert [dict(prompt.columns) for prompt in prompts] == [{"answer": 1}, {"answer": 2}]


def test_files_and_datasets_give_the_same_prompts(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    rows = [{"prompt": "Hotel review:", "n": 1}, {"prompt": "Caf\u00e9\u2028 review:", "n": 2}]
    table = datasets.Dataset.from_list(rows)
    table.to_parquet(str(tmp_path / "rows.parquet"))
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n\n")
    sources = [rows, table, datasets.DatasetDict(train=table), tmp_path / "rows.json"]
    sources += [str(tmp_path / "rows.jsonl"), str(tmp_path / "rows.parquet")]
    for source in sources:
        assert [(prompt.value, prompt.columns["n"]) for prompt in read(source)] == [
            (row["prompt"], row["n"]) for row in rows
        ]


def test_a_name_is_loaded_as_a_hub_dataset_with_its_split(monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    asked = []

    def load_dataset(name: str, split: str) -> Any:
        asked.append((name, split))
        return datasets.Dataset.from_list([{"prompt": "Hotel review:"}])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert read("someone/some-prompts", split="test")[0].value == "Hotel review:"
    assert asked == [("someone/some-prompts", "test")]


def test_preference_data_without_prompts_gives_what_both_sides_share() -> None:
    start = "\n\nHuman: hi\n\nAssistant:"
    assert shared_prompt(start + " I am well", start + " I am not") == start
    assert shared_prompt("Hotel review: good", "Hotel review: bad") == "Hotel review: "
    assert shared_prompt(start + " well", start.replace("hi", "ho") + " well") == start
    assert shared_prompt(start + " well", start + " well") == start
    answers = [[*CHAT, {"role": "assistant", "content": word}] for word in ("good", "bad")]
    assert shared_prompt(*answers) == CHAT
    assert shared_prompt(answers[0], answers[0]) == CHAT
    assert shared_prompt([*answers[0], *CHAT, answers[1][-1]], answers[0]) == CHAT
    assert read([{"chosen": start + " yes", "rejected": start + " no"}])[0].value == start


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_preference_data_in_files_becomes_texts_or_chats(suffix: str, tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    pairs = [{"chosen": HH_PROMPT + " yes", "rejected": HH_PROMPT + " no\n\nHuman: why"}] * 2
    file = tmp_path / f"pairs.{suffix}"
    if suffix == "parquet":
        datasets.Dataset.from_list(pairs).to_parquet(str(file))
    else:
        file.write_text("\n".join(map(json.dumps, pairs)))
    tokenizer = checkpoints.chatml_tokenizer()
    (text, _) = read(str(file), tokenizer=tokenizer)
    (chat, _) = read(str(file), tokenizer=tokenizer, prompt_format="chat")
    assert (text.value, chat.value) == (HH_PROMPT, HH_MESSAGES)
    assert tokenizer.decode(text.ids) == HH_PROMPT
    assert tokenizer.decode(chat.ids) == tokenizer.apply_chat_template(
        HH_MESSAGES, tokenize=False, add_generation_prompt=True
    )
    assert text.columns["chosen"] == HH_PROMPT + " yes"


def test_in_chat_format_other_strings_are_the_users_and_messages_stay_as_they_are(tokenizer: Any) -> None:
    tokenizer.chat_template = checkpoints.CHATML
    prompts = read(["Hotel review:", "\n\nHuman: half a transcript", CHAT], tokenizer=tokenizer, prompt_format="chat")
    assert [prompt.value[0]["content"] for prompt in prompts] == [
        "Hotel review:",
        "\n\nHuman: half a transcript",
        "Review of a hotel:",
    ]
    with pytest.raises(ValueError, match="prompt_format='messages' must be 'text' or 'chat'"):
        read(["Hotel review:"], prompt_format="messages")


def test_a_chat_that_its_template_refuses_is_an_error_that_says_so() -> None:
    tokenizer = checkpoints.gemma_tokenizer()
    with pytest.raises(ValueError, match=r"prompts: the tokenizer's chat template refuses .*must alternate"):
        read([[*CHAT, *CHAT]], tokenizer=tokenizer)


def test_thousands_of_preference_pairs_take_seconds() -> None:
    word = "The room was good and the lobby was fine. "
    pairs = [
        {"chosen": prompt + " yes" + word, "rejected": prompt + " no" + word}
        for prompt in (f"\n\nHuman: {number} {word * (number % 50)}\n\nAssistant:" for number in range(5_000))
    ]
    start = time.process_time()
    assert len(read(pairs)) == 5_000
    assert time.process_time() - start < 10


def test_truncation_keeps_the_token_that_begins_every_text() -> None:
    tokenizer = checkpoints.llama3_tokenizer()
    ids = tokenizer("what is a cat")["input_ids"]
    assert ids[0] == tokenizer.bos_token_id
    (prompt,) = read(["what is a cat"], tokenizer=tokenizer, max_tokens=3, long_prompts="truncate")
    assert prompt.ids.tolist() == [ids[0], *ids[-2:]]
    assert prompt.value == tokenizer.decode(ids[-2:])


def test_truncation_keeps_the_end_and_shows_what_is_left(tokenizer: Any) -> None:
    text = "Review of a hotel: The room was"
    ids = tokenizer(text)["input_ids"]
    (prompt,) = read([text], max_tokens=3, long_prompts="truncate")
    assert prompt.ids.tolist() == ids[-3:]
    assert prompt.value == " The room was"


def test_skipping_leaves_long_prompts_out_and_counts_them() -> None:
    reader = PromptReader(load_vocabulary("textgen_env:assets/lm"), "prompt", 3, "skip")
    assert [prompt.value for prompt in reader.read(["Hotel review:", "Review of a hotel: The room"])] == [
        "Hotel review:"
    ]
    assert (reader.skipped, reader.truncated) == (1, 0)
    with pytest.raises(ValueError, match="long_prompts='skip' leaves none; raise max_prompt_tokens"):
        reader.read(["Review of a hotel: The room"])


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ([], "prompts is empty"),
        (["Hotel review:", ""], r"prompts\[1\] is empty"),
        ([[]], r"prompts\[0\] is neither a string nor a list of messages"),
        ([{"prompt": "Hotel review:", "turns": 1}], "rename the columns"),
        ([{"text": "Hotel review:", "n": 1}], r"no column prompt_column='prompt'; there are \['n', 'text'\]"),
        (["Hotel review: " * 9], r"prompts\[0\] has \d+ tokens, more than max_prompt_tokens=8"),
        ([3], r"prompts\[0\] is neither a string nor a list of messages"),
        ([[{"role": "user"}]], r"prompts\[0\] is neither a string nor a list of messages"),
        ([{"prompt": "Hotel review:", "completions": 1}], "rename the columns"),
        (3, "prompts must be a list"),
    ],
)
def test_bad_prompts_are_named(source: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read(source, max_tokens=8)


def test_unknown_and_missing_files_are_named(tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text("prompt\nHotel review:\n")
    with pytest.raises(ValueError, match=r"prompts=.*rows.csv.*unknown file type '.csv'; use .jsonl"):
        read(tmp_path / "rows.csv")
    for suffix in ("jsonl", "json", "parquet"):
        with pytest.raises(FileNotFoundError):
            read(tmp_path / f"nothing.{suffix}")
    with pytest.raises(FileNotFoundError, match=r"no 'assets/nothing.jsonl'"):
        read("textgen_env:assets/nothing.jsonl")


def test_broken_files_and_unknown_datasets_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    for suffix in ("jsonl", "json", "parquet"):
        (tmp_path / f"rows.{suffix}").write_text('{"prompt": ')
        with pytest.raises(ValueError, match=rf"prompts=.*rows.{suffix}' cannot be loaded: "):
            read(tmp_path / f"rows.{suffix}")

    def load_dataset(name: str, split: str) -> Any:
        raise ValueError(f"Unknown split {split!r}")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(ValueError, match=r"prompts='someone/prompts' cannot be loaded: Unknown split 'tset'"):
        read("someone/prompts", split="tset")


def test_messages_need_a_chat_template(tokenizer: Any) -> None:
    tokenizer.chat_template = None
    with pytest.raises(ValueError, match="tokenizer has no chat template"):
        read([CHAT], tokenizer=tokenizer)


def test_a_deck_deals_every_number_once_per_epoch_across_uneven_draws() -> None:
    deck = Deck(5)
    rng = np.random.default_rng(0)
    dealt = [number for count in (3, 4, 8) for number in deck.draw(count, rng)]
    for epoch in range(3):
        assert sorted(dealt[5 * epoch : 5 * epoch + 5]) == list(range(5))


def test_a_deck_deals_each_number_several_times_in_a_row_whatever_the_draws() -> None:
    deck = Deck(4, repeats=3)
    rng = np.random.default_rng(0)
    dealt = np.reshape([number for count in (1, 5, 7, 11) for number in deck.draw(count, rng)], (8, 3))
    assert (dealt == dealt[:, :1]).all()
    assert sorted(dealt[:4, 0]) == sorted(dealt[4:, 0]) == [0, 1, 2, 3]
