"""A sequence classifier as a reward function."""

from __future__ import annotations

import re
import sys
import warnings
from collections.abc import Mapping, Sequence
from itertools import count
from pathlib import PurePath
from typing import Any

import torch
from transformers import AutoModelForSequenceClassification

from textgen_env.loading import blaming, file_arguments, load_tokenizer
from textgen_env.resolve import find_folder
from textgen_env.transcripts import conversation, is_transcript


class RewardModel:
    """A sequence classifier, as a reward function.

    Chat messages, and transcripts in the form of Anthropic's HH data, go through the chat template of its own
    tokenizer. Any other string prompt and its completion are joined and tokenised as ONE string; so are transcripts
    where the tokenizer has no chat template. After those there is an end token only where the tokenizer puts one
    (`add_eos_token`). Batches are sorted by length, padded on the right and masked, so a text's score does not depend
    on its company (to 1e-5 in single precision).

    Prompts are checked to leave room for a completion, whose length is counted in the policy's tokens. A text that is
    longer all the same, as another tokenizer may make more tokens of it, loses the oldest of its tokens, and there is a
    warning once.

    The score is the field `score` of the model's output where there is one, else its only logit.

    :param model: hub name, path, `package:path`, or a loaded model.
    :param tokenizer: a tokenizer, its name, or None for the model's own.
    :param batch_size: texts per forward pass.
    :param device: `"auto"` for a GPU where there is one. A loaded model stays where it is.
    :param model_kwargs: arguments of `from_pretrained`. Without a `dtype`, weights are single precision on CPU and as
        stored elsewhere.
    :param column: the logit that is the score, where there are several.
    :raises ValueError: a model that cannot be loaded, whose head is not in its checkpoint, or that does not give one
        score per text; no tokenizer; a batch size below 1.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any = None,
        batch_size: int = 32,
        device: str = "auto",
        model_kwargs: Mapping[str, Any] | None = None,
        column: int | None = None,
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size={batch_size} must be at least 1")
        name = model if isinstance(model, str) else model.config.name_or_path
        self.__name__ = PurePath(name.partition(":")[2] or name).name or type(model).__name__
        if isinstance(model, str):
            model = load_classifier(model, device, model_kwargs)
        if tokenizer is None and not name:
            raise ValueError(
                f"reward model {self.__name__!r} does not say where its tokenizer is: pass reward_tokenizer=..."
            )
        if tokenizer is None or isinstance(tokenizer, str):
            tokenizer = load_tokenizer(tokenizer, "reward_tokenizer", name, "reward_model", model_kwargs)
        self.model = model.eval()
        self.tokenizer = tokenizer
        self._batch_size = batch_size
        self._column = column
        config = model.config.get_text_config()
        # Outside the vocabulary it means none: there are models of Llama's kind with -1.
        in_vocabulary = config.pad_token_id in range(getattr(config, "vocab_size", sys.maxsize))
        self._pad_id: int | None = config.pad_token_id if in_vocabulary else None
        self._context = _positions(model, config)
        self._has_cut = False
        # A wrong kind of model should fail now, not after a rollout.
        chat = [{"role": "user", "content": "a"}] if tokenizer.chat_template else "a"
        self.check(chat, new_tokens=0)

    def __call__(
        self,
        prompts: Sequence[Any],
        completions: Sequence[Any],
        turns: Sequence[Sequence[str]] | None = None,
        **columns: Any,
    ) -> list[float]:
        """Scores of finished texts: one per completion.

        :param turns: of each text, what policy and environment wrote in turn; None for completions of one turn.
        """
        spoken = turns or [[text] for text in completions]
        return self.score([self._encode(*text) for text in zip(prompts, completions, spoken, strict=True)])

    def check(self, prompt: Any, new_tokens: int) -> None:
        """Refuse a prompt that could not be scored later on.

        :param prompt: a string or messages.
        :param new_tokens: how many tokens may be written after it.
        :raises ValueError: no chat template for messages, too little context, or a model that fails on the prompt.
        """
        blank = "" if isinstance(prompt, str) else [{"role": "assistant", "content": ""}]
        ids = self._encode(prompt, blank, [""])
        if self._context is not None and len(ids) + new_tokens > self._context:
            raise ValueError(
                f"reward model {self.__name__!r} takes {self._context} tokens but a prompt has {len(ids)} and "
                f"{new_tokens} may be written after it: lower max_prompt_tokens or max_new_tokens, or use another "
                "reward_model"
            )
        try:
            output = self._run([ids])
        except Exception as error:  # a model with code of its own may raise anything
            raise ValueError(
                f"reward model {self.__name__!r} cannot score the prompt {str(prompt)[:200]!r}: {error} (if it "
                "expects a chat, give prompts as messages or pass prompt_format='chat')"
            ) from error
        self._scores(output, 1)

    def score(self, texts: Sequence[list[int]]) -> list[float]:
        """Scores of token id lists, in their order.

        :raises ValueError: an output that is not one score per text.
        """
        texts = [self._fitting(text) for text in texts]
        result = [0.0] * len(texts)
        order = sorted(range(len(texts)), key=lambda index: len(texts[index]))
        for start in range(0, len(order), self._batch_size):
            batch = order[start : start + self._batch_size]
            scores = self._scores(self._run([texts[index] for index in batch]), len(batch))
            for index, value in zip(batch, scores.float().tolist(), strict=True):
                result[index] = value
        return result

    def _fitting(self, text: list[int]) -> list[int]:
        """A text as the model can take it: where it is too long, without its oldest tokens but a special one."""
        if self._context is None or len(text) <= self._context:
            return text
        if not self._has_cut:
            self._has_cut = True
            warnings.warn(
                f"reward model {self.__name__!r} takes {self._context} tokens but a text has {len(text)}: it is scored "
                "without its oldest tokens, and so will be others; lower max_prompt_tokens or max_new_tokens, or use "
                "another reward_model",
                stacklevel=3,
            )
        # Classifiers of BERT's kind read their score at the first token.
        first = int(text[0] in self.tokenizer.all_special_ids)
        return text[:first] + text[len(text) - self._context + first :]

    def _run(self, texts: Sequence[list[int]]) -> Any:
        """The model's output for one batch."""
        longest = max(map(len, texts))
        pad_id = self._padding(texts)
        ids = torch.full((len(texts), longest), pad_id)
        mask = torch.zeros_like(ids)
        for row, text in enumerate(texts):
            ids[row, : len(text)] = torch.tensor(text)
            mask[row, : len(text)] = 1
        device = self.model.device
        with torch.no_grad():
            return self.model(input_ids=ids.to(device), attention_mask=mask.to(device))

    def _padding(self, texts: Sequence[list[int]]) -> int:
        """The id to pad with: that of the model's configuration, or one by which no text ends.

        Classifiers find a text's last token by the pad id of their configuration.
        """
        if self._pad_id is not None:
            return self._pad_id
        last = {text[-1] for text in texts}
        unused = next(token for token in count() if token not in last)
        self.model.config.pad_token_id = self.model.config.get_text_config().pad_token_id = unused
        return unused

    def _scores(self, output: Any, n_texts: int) -> torch.Tensor:
        """One score per text, [n_texts], of the model's output."""
        values = getattr(output, "logits", None)
        if self._column is not None:
            columns = 0 if values is None else values.numel() // n_texts
            if not 0 <= self._column < columns:
                raise ValueError(f"reward_column={self._column}: reward model {self.__name__!r} has {columns} logits")
            return values.view(n_texts, columns)[:, self._column]  # type: ignore[no-any-return, union-attr]
        if getattr(output, "score", None) is not None:
            values = output.score
        if values is None or values.numel() != n_texts:
            columns = 0 if values is None else values.numel() // n_texts
            raise ValueError(
                f"reward model {self.__name__!r} gives {columns} logits per text: say which one is the score by "
                "reward_column, or wrap the model in a function that makes one number of them"
            )
        return values.view(n_texts)  # type: ignore[no-any-return]

    def _encode(self, prompt: Any, completion: Any, turns: Sequence[str]) -> list[int]:
        """Token ids of a finished text."""
        ids: list[int]
        if isinstance(prompt, str):
            if not (self.tokenizer.chat_template and is_transcript(prompt)):
                ids = self.tokenizer(prompt + completion)["input_ids"]
                return ids
            messages = conversation(prompt, turns)
        else:
            messages = [*prompt, *completion]
        if not self.tokenizer.chat_template:
            raise ValueError(
                f"prompts are messages but the tokenizer of reward model {self.__name__!r} has no chat template: set "
                "tokenizer.chat_template and pass it as reward_tokenizer=..."
            )
        try:
            text = self.tokenizer.apply_chat_template(messages, tokenize=False)
        except Exception as error:  # a template may raise anything
            raise ValueError(
                f"the chat template of reward model {self.__name__!r} refuses messages: {error}"
            ) from error
        ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids


def _positions(model: torch.nn.Module, config: Any) -> int | None:
    """The most tokens that a model takes, None where its configuration does not say.

    Models of RoBERTa's kind number positions from the one after that of padding.
    """
    positions: int | None = getattr(config, "max_position_embeddings", None)
    for name, module in model.named_modules():
        if name.endswith("position_embeddings") and isinstance(module, torch.nn.Embedding):
            if positions is not None and module.padding_idx is not None:
                positions = min(positions, module.num_embeddings - module.padding_idx - 1)
    return positions


def load_classifier(name: str, device: str = "auto", model_kwargs: Mapping[str, Any] | None = None) -> Any:
    """Load a sequence classifier whose head is in its checkpoint.

    :param name: hub name, path or `package:path`.
    :param device: `"auto"` for a GPU where there is one; a `device_map` in `model_kwargs` wins.
    :param model_kwargs: arguments of `from_pretrained`.
    :raises ValueError: it cannot be loaded, or is not a reward model.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    with blaming("reward_model", name, "reward_model_kwargs"):
        arguments = file_arguments(model_kwargs) | dict(model_kwargs or {})
        if device == "cpu":
            arguments.setdefault("dtype", torch.float32)
        model, report = _from_pretrained(find_folder(name), arguments)
        # transformers only warns, and goes on with a random head.
        if missing := sorted(report["missing_keys"]):
            own_code = "AutoModelForSequenceClassification" in (getattr(model.config, "auto_map", None) or {})
            of_adapter = any(".modules_to_save." in key for key in missing)
            raise ValueError(
                f"it is not a reward model: its checkpoint lacks {', '.join(missing[:4])}"
                + (", and the code that comes with it needs trust_remote_code" if own_code else "")
                + (", the head that its adapter brings along: update to transformers 5.23" if of_adapter else "")
            )
        model.config.use_cache = False  # keys and values would be kept for nothing
        return model if "device_map" in arguments else model.to(device)


def _from_pretrained(name: str, arguments: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
    """A classifier and what of it was missing in the checkpoint."""
    while True:
        try:
            return AutoModelForSequenceClassification.from_pretrained(  # type: ignore[no-any-return]
                name, output_loading_info=True, **arguments
            )
        except ImportError as error:
            # Code written for transformers 4, such as ArmoRM's, imports docstrings that transformers 5 has dropped.
            docstring = re.search(r"cannot import name '(\w+_DOCSTRING)' from '(transformers\.[\w.]+)'", str(error))
            if docstring is None:
                raise
            setattr(sys.modules[docstring[2]], docstring[1], "")
