r"""Conversations written as one text, in the form of Anthropic's HH data, and as chat messages.

A transcript alternates `\n\nHuman: ...` and `\n\nAssistant: ...`, and ends with `\n\nAssistant:`, where the model
goes on.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

Messages = list[dict[str, Any]]

_SPEAKER = re.compile(r"(?:^|\n\n)(Human|Assistant):")
_ROLES = {"Human": "user", "Assistant": "assistant"}


def is_transcript(text: str) -> bool:
    r"""Whether a text ends with `\n\nAssistant:`, white space aside."""
    return text.rstrip().endswith("\n\nAssistant:")


def messages_of(transcript: str) -> Messages:
    """The messages of a transcript, to which the assistant's next one is to be added.

    Turns of one speaker that follow each other are one message. Of a transcript that was cut on the left, the rest of a
    user's turn is a message, the rest of an answer without its question is not.

    :return: beginning with a user's message; white space around contents is gone.
    """
    first, *marked = _SPEAKER.split(transcript)
    turns = list(zip(marked[::2], marked[1::2], strict=True))
    if first.strip() and (not turns or turns[0][0] == "Assistant"):
        turns.insert(0, ("Human", first))
    messages: Messages = []
    for speaker, text in turns:
        role, content = _ROLES[speaker], text.strip()
        if messages and messages[-1]["role"] == role:
            messages[-1]["content"] += "\n\n" + content
        elif messages or role == "user":
            messages.append({"role": role, "content": content})
    if messages and messages[-1] == {"role": "assistant", "content": ""}:
        messages.pop()
    return messages


def conversation(prompt: str, turns: Sequence[str]) -> Messages:
    """The messages of a transcript and what was written after it.

    A turn of the policy is one message, even where it speaks for the human: nobody else said that.

    :param prompt: a transcript.
    :param turns: texts, in turn of the policy and of the environment, the policy's first and last.
    """
    messages = messages_of(prompt)
    for number, text in enumerate(turns):
        if number % 2 == 0:
            messages.append({"role": "assistant", "content": text.strip()})
        else:
            messages.extend(messages_of(text))
    return messages
