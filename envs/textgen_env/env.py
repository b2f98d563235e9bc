"""Text generation as gymnasium environments: many texts stepped together, and one text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from numbers import Integral
from os import PathLike
from typing import Any

import gymnasium
import numpy as np
from gymnasium.error import ResetNeeded
from gymnasium.spaces import Box, Dict, Discrete
from gymnasium.vector import AutoresetMode
from gymnasium.vector.utils import batch_space
from numpy.typing import NDArray

from textgen_env.dialogue import Dialogue, Reply
from textgen_env.prompts import Deck, LongPrompts, Prompt, PromptFormat, PromptReader
from textgen_env.resolve import as_name
from textgen_env.rewards import EMBEDDED_REWARD_MODEL, is_finite, make_reward
from textgen_env.rows import Observation, TextRows
from textgen_env.stopping import StopStrings
from textgen_env.transcripts import Messages, is_transcript
from textgen_env.vocabulary import load_vocabulary

EMBEDDED_MODEL = "textgen_env:assets/lm"
METADATA: dict[str, Any] = {"render_modes": ["ansi"], "render_fps": 1}


class TextGenVectorEnv(gymnasium.vector.VectorEnv[Observation, NDArray[np.int64], NDArray[Any]]):
    """Writing texts token by token, many at a time.

    An observation is a prompt and what has been written after it; an action is the next token; the reward is 0 until
    the text ends, by an end token or after `max_new_tokens`, and then its score. The end is always a termination, never
    a truncation: the text is scored either way and nothing follows that a value could be bootstrapped from. A row whose
    text ends begins its next prompt in the same step, and all texts that end at one step are scored in one call of
    each reward function.

    With `reply`, that is how a TURN ends. The environment then appends what `reply` answers, and the policy goes on;
    `prompt_length` counts all tokens before the turn in progress. The score comes after the last turn.

    `metadata["policy"]` and `metadata["policy_kwargs"]` tell an algorithm which language model the texts are for.

    :param num_envs: number of texts written side by side.
    :param model: the language model that will write: hub name, path, or `package:path`. Only its configuration and
        tokenizer are loaded here.
    :param reward_model: what scores a text: hub name, path or `package:path` of a sequence classifier, a loaded one, a
        function `f(prompts, completions, completion_ids, **columns) -> list[float | None]`, or a list of these.
    :param reward_weights: one weight per part of `reward_model`; None for 1 each.
    :param prompts: strings, message lists, dicts with more columns (handed to reward functions), a dataset, a hub
        dataset's name, or a path to .jsonl, .json or .parquet; None for the embedded prompts. Rows without the column
        `prompt_column` but with `chosen` and `rejected` give what those two begin with.
    :param prompt_format: `"text"` to leave strings as they are, `"chat"` to make messages of them: of a transcript in
        the form of Anthropic's HH data its turns, of any other string one message of the user.
    :param prompt_column: the column that holds the prompt.
    :param split: the split of a dataset.
    :param tokenizer: the language model's tokenizer or its name; None to load it from `model`.
    :param reward_tokenizer: the reward model's tokenizer or its name; None to load it from `reward_model`.
    :param pad_token: a token of the vocabulary to pad with, for tokenizers that have no pad token.
    :param max_prompt_tokens: the longest prompt allowed; None for the longest there is.
    :param n_samples: texts per prompt that is drawn, begun one after the other.
    :param max_new_tokens: tokens after which a turn ends even without an end token.
    :param min_new_tokens: tokens of a turn before which the policy must not choose eos; published for it. An eos that
        comes earlier all the same ends the turn.
    :param stop_strings: strings that end a turn; the completion that is scored ends before them.
    :param missing_eos_penalty: subtracted from the score of a text that ends by `max_new_tokens`, in units of the
        reward.
    :param long_prompts: `"error"`, `"truncate"` (cut on the left) or `"skip"`.
    :param reply: what a user or a tool answers, `f(prompts, completions, turns, **columns) -> list[str | None]`, asked
        of all turns that end at one step; None ends a conversation.
    :param max_turns: turns of the policy, with `reply`.
    :param max_reply_tokens: the most tokens that an answer may have, marks of the chat template included.
    :param reward_column: the logit that is the score, for reward models with several.
    :param reward_batch_size: texts per forward pass of a reward model.
    :param reward_device: where a reward model that is loaded here runs; `"auto"` for a GPU where there is one.
    :param reward_model_kwargs: arguments of the reward model's `from_pretrained` (dtype, trust_remote_code, ...).
    :param model_kwargs: arguments of the language model's `from_pretrained`, for the policy that loads it.
    :param render_mode: None or `"ansi"`.
    :raises ValueError: an argument that cannot work; the message names it and says what would.
    """

    # On the class, so that it can be known before an environment is made.
    metadata = METADATA | {"autoreset_mode": AutoresetMode.SAME_STEP, "reports_episodes": True}

    def __init__(
        self,
        num_envs: int = 1,
        *,
        model: str | PathLike[str] = EMBEDDED_MODEL,
        reward_model: Any = EMBEDDED_REWARD_MODEL,
        reward_weights: Sequence[float] | None = None,
        prompts: Any = None,
        prompt_format: PromptFormat = "text",
        prompt_column: str = "prompt",
        split: str = "train",
        tokenizer: Any = None,
        reward_tokenizer: Any = None,
        pad_token: str | None = None,
        max_prompt_tokens: int | None = None,
        n_samples: int = 1,
        max_new_tokens: int = 32,
        min_new_tokens: int = 1,
        stop_strings: Sequence[str] = (),
        missing_eos_penalty: float = 0.0,
        long_prompts: LongPrompts = "error",
        reply: Reply | None = None,
        max_turns: int = 1,
        max_reply_tokens: int = 64,
        reward_column: int | None = None,
        reward_batch_size: int = 32,
        reward_device: str = "auto",
        reward_model_kwargs: Mapping[str, Any] | None = None,
        model_kwargs: Mapping[str, Any] | None = None,
        render_mode: str | None = None,
    ) -> None:
        counts = {
            "num_envs": num_envs,
            "max_prompt_tokens": max_prompt_tokens,
            "n_samples": n_samples,
            "max_new_tokens": max_new_tokens,
            "min_new_tokens": min_new_tokens,
            "max_turns": max_turns,
            "max_reply_tokens": max_reply_tokens,
            "reward_batch_size": reward_batch_size,
        }
        for name, value in counts.items():
            least = 0 if name == "min_new_tokens" else 1
            if value is not None and not (isinstance(value, Integral) and value >= least):
                raise ValueError(f"{name}={value!r} must be an integer, at least {least}")
        if min_new_tokens > max_new_tokens:
            raise ValueError(f"min_new_tokens={min_new_tokens} must be at most max_new_tokens={max_new_tokens}")
        if not is_finite(missing_eos_penalty):
            raise ValueError(f"missing_eos_penalty={missing_eos_penalty!r} must be a finite number, 0 for none")
        if render_mode not in (None, *METADATA["render_modes"]):
            raise ValueError(f"render_mode={render_mode!r} must be None or one of {METADATA['render_modes']}")
        if reply is None and max_turns != 1:
            raise ValueError(f"max_turns={max_turns} needs reply=..., a function that answers between turns")
        model_name: str = as_name(model)
        vocabulary = load_vocabulary(model_name, as_name(tokenizer), pad_token, model_kwargs)
        stops = StopStrings(stop_strings, vocabulary.tokenizer)
        dialogue = None if reply is None else Dialogue(reply, max_turns, max_reply_tokens, vocabulary.tokenizer)
        reader = PromptReader(vocabulary, prompt_column, max_prompt_tokens, long_prompts, prompt_format)
        self._prompts = reader.read(prompts, split)
        longest = max(len(prompt.ids) for prompt in self._prompts) if max_prompt_tokens is None else max_prompt_tokens
        room = max_turns * max_new_tokens + (max_turns - 1) * max_reply_tokens
        length = longest + room
        if vocabulary.context is not None and length > vocabulary.context:
            turns = f" (x {max_turns}) + max_reply_tokens={max_reply_tokens} (x {max_turns - 1})" if dialogue else ""
            raise ValueError(
                f"max_prompt_tokens={longest} + max_new_tokens={max_new_tokens}{turns} exceed the {vocabulary.context} "
                f"positions of model={model_name!r}: lower one of them"
            )
        if dialogue is not None:
            dialogue.check(self._prompts)
        reward = make_reward(
            reward_model,
            reward_weights,
            as_name(reward_tokenizer),
            reward_batch_size,
            reward_device,
            reward_model_kwargs,
            reward_column,
        )
        columns = tuple(self._prompts[0].columns)
        reward.check(_longest_of_each_kind(self._prompts), room, columns if dialogue is None else (*columns, "turns"))
        self.num_envs = num_envs
        self.render_mode = render_mode
        self.tokenizer = vocabulary.tokenizer
        #: Numbers of prompts cut and left out because of their length.
        self.prompts_truncated, self.prompts_skipped = reader.truncated, reader.skipped
        # Prompts given to `reset` must fit the room that there now is, and none of them can be left out.
        when_long: LongPrompts = "error" if long_prompts == "skip" else long_prompts
        self._forced = PromptReader(vocabulary, prompt_column, longest, when_long, prompt_format, columns)
        self._deck = Deck(len(self._prompts), n_samples)
        self._rows = TextRows(
            num_envs, length, vocabulary, reward, max_new_tokens, missing_eos_penalty, stops, dialogue
        )
        self.single_observation_space = Dict(
            input_ids=Box(0, vocabulary.size - 1, (length,), np.int64),
            length=Box(0, length, (1,), np.int64),
            prompt_length=Box(0, length, (1,), np.int64),
        )
        self.single_action_space = Discrete(vocabulary.size)
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.action_space = batch_space(self.single_action_space, num_envs)
        self.metadata = self.metadata | {
            "policy": "LanguagePolicy",
            "policy_kwargs": {
                "model": model_name,
                "eos_token_id": list(vocabulary.end_ids),
                "min_new_tokens": min_new_tokens,
                "model_kwargs": dict(model_kwargs or {}),
            },
        }

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Observation, dict[str, Any]]:
        """Begin a text in every row.

        :param seed: the same seed gives the same prompts, now and in the steps that follow.
        :param options: `{"prompts": [...]}` gives the prompts of this reset, one per row.
        :raises ValueError: options without prompts, another number of prompts than rows, or one that the constructor
            would refuse.
        """
        super().reset(seed=seed)
        if seed is not None:
            self._deck.shuffle()
        self._rows.start_all(self._choose(options))
        return self._rows.observe(), {}

    def step(
        self, actions: NDArray[np.int64]
    ) -> tuple[Observation, NDArray[np.float64], NDArray[np.bool_], NDArray[np.bool_], dict[str, Any]]:
        """Append one token to each row and replace the texts that end.

        :param actions: token ids, [num_envs].
        :raises ValueError: actions of another shape or outside the vocabulary.
        """
        finished, rewards, episodes = self._advance(actions)
        terminations = np.zeros(self.num_envs, dtype=np.bool_)
        infos: dict[str, Any] = {}
        if finished.size:
            terminations[finished] = True
            last = self._rows.observe()
            for row, episode in zip(finished.tolist(), episodes, strict=True):
                final = {"final_obs": {key: values[row] for key, values in last.items()}, "final_info": episode}
                infos = self._add_info(infos, final, row)
            self._rows.start(finished, self._draw(len(finished)))
        return self._rows.observe(), rewards, terminations, np.zeros_like(terminations), infos

    def render(self) -> tuple[str, ...] | None:
        """The prompt and the text so far of each row, in mode `"ansi"`."""
        if self.render_mode != "ansi":
            return None
        return tuple(self._rows.text(row) for row in range(self.num_envs))

    def _advance(
        self, actions: NDArray[np.int64]
    ) -> tuple[NDArray[np.int64], NDArray[np.float64], list[dict[str, Any]]]:
        """Append tokens and score what ends: (finished rows, rewards of all rows, infos of the finished)."""
        if not self._rows.started:
            raise ResetNeeded("call reset() before step()")
        rewards = np.zeros(self.num_envs)
        finished = self._rows.append(actions)
        episodes: list[dict[str, Any]] = []
        if finished.size:
            rewards[finished], episodes = self._rows.finish(finished)
        return finished, rewards, episodes

    def _choose(self, options: Mapping[str, Any] | None) -> list[Prompt]:
        if not options:
            return self._draw(self.num_envs)
        if "prompts" not in options:
            raise ValueError(f"options={options!r} must be {{'prompts': [...]}}, one prompt per row")
        if options["prompts"] is None or isinstance(options["prompts"], str | PathLike):  # those name data elsewhere
            raise ValueError(f"options['prompts']={options['prompts']!r} must be a list, one prompt per row")
        prompts = self._forced.read(options["prompts"])
        if len(prompts) != self.num_envs:
            raise ValueError(f"options['prompts'] has {len(prompts)} prompts for {self.num_envs} rows")
        return prompts

    def _draw(self, count: int) -> list[Prompt]:
        return [self._prompts[index] for index in self._deck.draw(count, self.np_random)]


class TextGenEnv(gymnasium.Env[Observation, np.int64]):
    """Writing one text token by token: one row of :class:`TextGenVectorEnv`, without autoreset.

    :param arguments: those of :class:`TextGenVectorEnv`, except `num_envs`.
    """

    metadata = METADATA

    def __init__(self, **arguments: Any) -> None:
        self._vector = TextGenVectorEnv(1, **arguments)
        self.render_mode = self._vector.render_mode
        self.tokenizer = self._vector.tokenizer
        #: Numbers of prompts cut and left out because of their length.
        self.prompts_truncated = self._vector.prompts_truncated
        self.prompts_skipped = self._vector.prompts_skipped
        self.observation_space = self._vector.single_observation_space
        self.action_space = self._vector.single_action_space
        of_vector = ("autoreset_mode", "reports_episodes")
        self.metadata = {key: value for key, value in self._vector.metadata.items() if key not in of_vector}
        self._ended = False

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Observation, dict[str, Any]]:
        """Begin a text.

        :param seed: the same seed gives the same prompts, now and in the resets that follow.
        :param options: `{"prompt": ...}` gives the prompt of this reset.
        :raises ValueError: options without a prompt, or one that the constructor would refuse.
        """
        if options and "prompt" not in options:
            raise ValueError(f"options={options!r} must be {{'prompt': ...}}")
        super().reset(seed=seed)
        forced = {"prompts": [options["prompt"]]} if options else None
        observation, info = self._vector.reset(seed=seed, options=forced)
        self._ended = False
        return _first_row(observation), info

    def step(self, action: np.int64) -> tuple[Observation, float, bool, bool, dict[str, Any]]:
        """Append one token.

        :param action: a token id.
        :raises ValueError: a token outside the vocabulary.
        :raises gymnasium.error.ResetNeeded: the text has ended.
        """
        if self._ended:
            raise ResetNeeded("the text has ended: call reset() before step()")
        finished, rewards, episodes = self._vector._advance(np.array([action]))
        self._ended = bool(finished.size)
        info = episodes[0] if episodes else {}
        # Wrappers of single environments write this, and gymnasium's only where it is not there yet.
        info.pop("episode", None)
        return _first_row(self._vector._rows.observe()), float(rewards[0]), self._ended, False, info

    def render(self) -> str | None:
        """The prompt and the text so far, in mode `"ansi"`."""
        texts = self._vector.render()
        return texts[0] if texts else None


def _longest_of_each_kind(prompts: Sequence[Prompt]) -> list[str | Messages]:
    """The longest prompt, as reward functions see it, among chats, transcripts, and other strings."""
    longest: dict[str, Prompt] = {}
    for prompt in sorted(prompts, key=lambda prompt: prompt.shown):
        if isinstance(prompt.value, str):
            longest["transcript" if is_transcript(prompt.value) else "text"] = prompt
        else:
            longest["chat"] = prompt
    return [prompt.value for prompt in longest.values()]


def _first_row(observation: Observation) -> Observation:
    return {key: values[0] for key, values in observation.items()}
