"""Episodes of several turns: what the environment answers when the policy has ended one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from textgen_env.prompts import Prompt, check_call, copied
from textgen_env.transcripts import Messages

Reply = Callable[..., Sequence[str | None]]

#: Stands for the assistant's text while a chat template is rendered. Private use: in no text, and no white space.
_PLACEHOLDER = "\ue000"


class Answer(NamedTuple):
    """What the environment writes after a turn.

    :param text: as `reply` gave it.
    :param ids: its tokens, with the chat template's marks around it where the prompt is a chat.
    """

    text: str
    ids: list[int]


class Dialogue:
    """Asks a function what a user, or a tool, answers.

    :param reply: `f(prompts, completions, turns, **columns) -> list[str | None]`; None ends the conversation.
    :param max_turns: turns of the policy, at least 2.
    :param max_reply_tokens: the most tokens that an answer may have, marks of the chat template included.
    :param tokenizer: the language model's.
    :raises ValueError: too few turns for an answer.
    """

    def __init__(self, reply: Reply, max_turns: int, max_reply_tokens: int, tokenizer: Any) -> None:
        if max_turns < 2:
            raise ValueError(f"max_turns={max_turns} leaves no turn after a reply: pass at least 2, or reply=None")
        self._reply = reply
        self.max_turns = max_turns
        self._max_reply_tokens = max_reply_tokens
        self._tokenizer = tokenizer

    def check(self, prompts: Sequence[Prompt]) -> None:
        """Refuse what would fail at the first reply.

        :raises ValueError: a function that takes other arguments, a chat template that cannot render a second turn.
        """
        check_call(self._reply, "reply", ("prompts", "completions", "turns", *prompts[0].columns))
        chat = next((prompt for prompt in prompts if not isinstance(prompt.value, str)), None)
        if chat is not None:
            self._written(chat, ["a"], "a", ending=None)

    def answer(
        self, prompts: Sequence[Prompt], turns: Sequence[list[str]], endings: Sequence[str | None]
    ) -> list[Answer | None]:
        """Ask for the answers to a batch of conversations in which the policy has ended a turn.

        :param prompts: the prompt of each.
        :param turns: what policy and environment have written in turn, the policy's last.
        :param endings: the text of the end token, or the stop string, that ended that turn; None where it was too long.
        :return: None where a conversation is over.
        :raises ValueError: a wrong number of answers, one that is neither a string nor None, or one that is too long.
        """
        replies: Any = self._reply(
            prompts=copied([prompt.value for prompt in prompts]),
            completions=[completion_of(*pair) for pair in zip(prompts, turns, strict=True)],
            turns=copied(list(turns)),
            **copied(columns_of(prompts)),
        )
        if not isinstance(replies, Sequence) or isinstance(replies, str):
            raise ValueError(f"reply returned {replies!r:.100}: a list is needed, with one answer per conversation")
        if len(replies) != len(prompts):
            raise ValueError(f"reply returned {len(replies)} values for {len(prompts)} conversations")
        return [
            None if reply is None else self._answer(prompt, texts, reply, ending)
            for prompt, texts, reply, ending in zip(prompts, turns, replies, endings, strict=True)
        ]

    def _answer(self, prompt: Prompt, turns: list[str], reply: Any, ending: str | None) -> Answer:
        if not isinstance(reply, str):
            raise ValueError(f"reply returned {reply!r}: a string is needed, or None to end the conversation")
        text = self._written(prompt, turns, reply, ending)
        ids = self._tokenizer(text, add_special_tokens=False)["input_ids"]
        if not 0 < len(ids) <= self._max_reply_tokens:
            raise ValueError(
                f"reply returned {reply!r}, which is written as {len(ids)} tokens; it must be at least 1 and at most "
                f"max_reply_tokens={self._max_reply_tokens}: raise that, or shorten the reply"
            )
        return Answer(reply, ids)

    def _written(self, prompt: Prompt, turns: list[str], reply: str, ending: str | None) -> str:
        """The text that is appended: the reply, and what of the chat template stands between two of the policy's turns.

        What the policy has written is never rendered again: a template may change it, and tokens would differ.
        """
        if isinstance(prompt.value, str):
            text = reply
        else:
            messages = [*prompt.value, *messages_after(turns)]
            messages[-1]["content"] = _PLACEHOLDER
            messages.append({"role": "user", "content": reply})
            try:
                rendered = self._tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
            except Exception as error:  # a template may raise anything
                raise ValueError(f"reply: the tokenizer's chat template refuses a second turn: {error}") from error
            _, found, text = rendered.rpartition(_PLACEHOLDER)
            if not found:
                raise ValueError("reply: the tokenizer's chat template leaves the assistant's text out")
        if ending is not None:  # the policy wrote that itself
            before, found, after = text.partition(ending)
            text = after if found and not before.strip() else text
        return text


def messages_after(turns: Sequence[str]) -> Messages:
    """The messages in which turns of policy and environment follow a chat's prompt."""
    return [{"role": "user" if number % 2 else "assistant", "content": text} for number, text in enumerate(turns)]


def completion_of(prompt: Prompt, turns: Sequence[str]) -> str | Messages:
    """Everything after a prompt: a text if the prompt is one, else messages."""
    return "".join(turns) if isinstance(prompt.value, str) else messages_after(turns)


def columns_of(prompts: Sequence[Prompt]) -> dict[str, list[Any]]:
    """The other columns of prompts, None for those that lack one."""
    names = dict.fromkeys(name for prompt in prompts for name in prompt.columns)
    return {name: [prompt.columns.get(name) for prompt in prompts] for name in names}
