"""GRPO as TRL has it, on the tasks of the RLHF laboratory, and what is recorded of it.

The model, prompts, rewards, number of tokens and measures are the laboratory's; what writes and trains is the library.
Called by rlhf_run.py for the methods of the family ``grpo``.
"""

import copy
import json
import tempfile
import time
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch as th
from datasets import Dataset
from rlhf_run import PACKAGES, SOURCES, curve, gold_columns, prepare, samples
from rlhf_settings import ENV_ID, GRPO_UPDATES, arguments_of, described
from rlhf_tasks import TASKS
from runs import PartialResult, Run, learn, versions, write_json
from textgen_env.rewards import make_reward
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from sb3_safe import SAFE
from sb3_safe.callbacks import episode_columns

ASSETS = files("textgen_env") / "assets"


class Grpo(TrainerCallback):
    """A GRPO trainer that counts tokens and notes of all texts of an iteration what the laboratory notes of a rollout.

    :param run: which.
    :param result: file of the result, beside which the curve so far is written now and then.
    """

    def __init__(self, run: Run, result: Path | None = None) -> None:
        self.task, self.partial = TASKS[run.task], PartialResult(result)
        self.rows: list[dict[str, float]] = []
        self.num_timesteps = 0
        #: CPU seconds of measuring, which are no part of training.
        self.seconds_measuring = 0.0
        self._reward = make_reward(self.task.proxy)
        self._tokenizer = AutoTokenizer.from_pretrained(ASSETS / "lm")
        self.lm = AutoModelForCausalLM.from_pretrained(ASSETS / "lm", dtype=th.float32)
        self._start = copy.deepcopy(self.lm).eval()
        prompts = [json.loads(line) for line in (ASSETS / "prompts.jsonl").read_text(encoding="utf-8").splitlines()]
        self._folder = tempfile.TemporaryDirectory()
        self.trainer = GRPOTrainer(
            model=self.lm,
            reward_funcs=self.score,
            args=GRPOConfig(self._folder.name, seed=run.seed, **arguments_of(run)),
            train_dataset=Dataset.from_list(prompts),
            processing_class=self._tokenizer,
            callbacks=[self],
        )

    def learn(self, budget: int, **_: Any) -> None:
        """Train until so many tokens are written; with the arguments of SB3's algorithms."""
        self._budget = budget
        self.trainer.train()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Stop after the last update on the texts with which the budget was reached."""
        control.should_training_stop = self.num_timesteps >= self._budget and state.global_step % GRPO_UPDATES == 0

    def score(self, prompts: list[str], completions: list[str], completion_ids: list[list[int]], **_: Any) -> Any:
        """The reward function of the trainer: the proxy."""
        rewards, _ = self._reward(prompts, completions, completion_ids, {})
        start = time.process_time()
        eos = self._tokenizer.eos_token_id
        texts = [
            {
                "prompt": prompt,
                "completion": completion,
                "completion_ids": ids,
                "episode": {"r": reward, "l": len(ids)},
                "finish_reason": "stop" if ids[-1] == eos else "length",
            }
            for prompt, completion, ids, reward in zip(prompts, completions, completion_ids, rewards, strict=True)
        ]
        self.num_timesteps += sum(map(len, completion_ids))
        row = {"timesteps": float(self.num_timesteps), **episode_columns(texts), **gold_columns(self.task.gold, texts)}
        self.rows.append(row | self._kl_and_entropy(prompts, completion_ids))
        self.partial.update(lambda: curve(self.rows))
        self.seconds_measuring += time.process_time() - start
        return rewards.tolist()

    @th.no_grad()
    def _kl_and_entropy(self, prompts: Sequence[str], completion_ids: Sequence[Sequence[int]]) -> dict[str, float]:
        """Means over the tokens of all texts: KL to the untrained model, nats a text, and entropy, nats a token."""
        befores = [self._tokenizer(prompt)["input_ids"] for prompt in prompts]
        texts = [th.tensor([*before, *ids]) for before, ids in zip(befores, completion_ids, strict=True)]
        # Padded on the right, where causal attention does not look.
        padded = th.nn.utils.rnn.pad_sequence(texts, batch_first=True)
        logs, start_logs = (th.log_softmax(lm(padded).logits[:, :-1], dim=-1) for lm in (self.lm, self._start))
        drift = (logs - start_logs).gather(2, padded[:, 1:, None])[..., 0]
        entropy = -(logs.exp() * logs).sum(dim=-1)
        place = th.arange(1, padded.shape[1])
        begins, ends = (th.tensor([[len(ids)] for ids in rows]) for rows in (befores, texts))
        written = (begins <= place) & (place < ends)
        return {
            "kl_per_text": drift[written].sum().item() / len(texts),
            "entropy": entropy[written].mean().item(),
        }


def train(run: Run, path: Path) -> dict[str, Any]:
    """Train, and write everything that there is to know about it; as ``rlhf_run.train``."""
    prepare()
    grpo = Grpo(run, path)
    result = described(run) | learn(grpo, run, grpo)
    writer = SAFE("auto", ENV_ID, kl_controller="none", seed=run.seed, device="cpu")
    writer.policy.lm.load_state_dict(grpo.lm.state_dict())
    result |= {
        "curve": curve(grpo.rows),
        "samples": [] if result["diverged"] else samples(writer, run.task),
        "versions": versions((*PACKAGES, "trl"), *SOURCES),
    }
    write_json(path, result)
    grpo.partial.remove()
    return result
