from __future__ import annotations

import pytest
from textgen_env.transcripts import conversation, is_transcript, messages_of

from tests.textgen_env.checkpoints import HH_MESSAGES, HH_PROMPT


def test_turns_become_messages_without_the_one_that_is_to_be_written() -> None:
    assert is_transcript(HH_PROMPT)
    assert messages_of(HH_PROMPT) == HH_MESSAGES


@pytest.mark.parametrize("text", ["Assistant:", "what is a cat", "\n\nHuman: hi", "\n\nHuman: hi\n\nAssistant: hello"])
def test_a_text_that_does_not_end_where_the_assistant_begins_is_no_transcript(text: str) -> None:
    assert not is_transcript(text)


def test_words_within_a_line_are_no_turns() -> None:
    text = "\n\nHuman: he said Human: no\nAssistant: yes\n\nAssistant:"
    assert messages_of(text) == [{"role": "user", "content": "he said Human: no\nAssistant: yes"}]


def test_turns_of_one_speaker_are_one_message_so_that_speakers_alternate() -> None:
    text = "\n\nHuman: hi\n\nHuman: are you there\n\nAssistant: yes\n\nAssistant: I am\n\nHuman: good\n\nAssistant: "
    assert messages_of(text) == [
        {"role": "user", "content": "hi\n\nare you there"},
        {"role": "assistant", "content": "yes\n\nI am"},
        {"role": "user", "content": "good"},
    ]


def test_a_transcript_cut_on_the_left_begins_with_what_is_left_of_a_users_turn() -> None:
    assert messages_of("the cat\n\nAssistant: yes\n\nHuman: why\n\nAssistant:") == [
        {"role": "user", "content": "the cat"},
        {"role": "assistant", "content": "yes"},
        {"role": "user", "content": "why"},
    ]
    assert messages_of("an answer\n\nHuman: why\n\nAssistant:") == [{"role": "user", "content": "why"}]


def test_turns_of_policy_and_environment_follow_and_the_policy_never_speaks_for_the_user() -> None:
    turns = [" yes\n\nHuman: thanks", "\n\nHuman: why\n\nAssistant:", " because"]
    assert conversation("\n\nHuman: hi\n\nAssistant:", turns) == [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "yes\n\nHuman: thanks"},
        {"role": "user", "content": "why"},
        {"role": "assistant", "content": "because"},
    ]
    # A reply need not repeat the marks of a transcript.
    assert conversation("\n\nHuman: hi\n\nAssistant:", ["yes", "why", "so"])[2] == {"role": "user", "content": "why"}
