"""What writes and trains on the same texts as SAFE: ``generate()``, the paper's published trainer, TRL's last PPO.

Nothing of them is in this repository: they are given as folders, and used as they are but for what is said here.
"""

import sys
from pathlib import Path
from typing import Any

import torch as th
from language_models import SHAPES, Task, count_written, load_model, make_tokenizer, seconds_of

LEARNING_RATE = 1e-6
EPOCHS = 2


class Generate:
    """``generate()`` on one batch of prompts, on its best terms: no padding, and no scores asked for."""

    def __init__(self, task: Task, folder: Path) -> None:
        self.task = task
        self.batches = task.batches()
        self.tokenizer = make_tokenizer(task.shape.vocabulary)
        self.model = load_model(task.model(folder))

    @th.no_grad()
    def measure(self) -> dict[str, float]:
        """Seconds, tokens and texts of one batch."""
        ids = th.tensor(self.tokenizer(next(self.batches))["input_ids"])
        seconds, written = seconds_of(
            lambda: self.model.generate(
                input_ids=ids, attention_mask=th.ones_like(ids), max_new_tokens=self.task.new_tokens
            )
        )
        return {"seconds": seconds, "tokens": count_written(written[:, ids.shape[1] :]), "texts": len(ids)}


class Published:
    """The paper's published ``SAFETrainer`` (https://github.com/ryyzn9/SAFE), whole model trained.

    One change, without which it does not run in float32: its critics, which it makes in bfloat16, are cast to float32.

    :param directory: a checkout.
    """

    def __init__(self, task: Task, folder: Path, directory: Path) -> None:
        sys.path.insert(0, str(directory))
        from safe.config import SAFEConfig
        from safe.trainers.safe import SAFETrainer

        self.batches = task.batches()
        policy, reference = load_model(task.model(folder)), load_model(task.model(folder)).requires_grad_(False)
        config = SAFEConfig(
            batch_size=task.rows, max_new_tokens=task.new_tokens, epochs_per_batch=EPOCHS,
            policy_lr=LEARNING_RATE, critic_lr=LEARNING_RATE,
        )  # fmt: skip
        tokenizer = make_tokenizer(task.shape.vocabulary)
        self.trainer = SAFETrainer(policy, reference, tokenizer, lambda text: len(text) % 10 / 10, config)
        self.trainer.critic.float()
        self.trainer.critic_target.float()

    def measure(self) -> dict[str, float]:
        """Seconds, tokens and texts of one iteration."""
        prompts = next(self.batches)
        rollout, texts = seconds_of(lambda: self.trainer.generate_rollouts(prompts))
        update, _ = seconds_of(lambda: self.trainer.train_step(texts))
        tokens = count_written(texts["ids"][:, texts["prompt_len"] :])
        return {"seconds": rollout + update, "tokens": tokens, "texts": len(prompts), "update": update}


class Trl:
    """The ``PPOTrainer`` of TRL, up to 1.12.0, with a value model of the policy's size, as it wants one.

    The reward model, which it wants to be a classifier, is one of 0.1 M parameters.

    :param directory: a folder with the package (``pip install --no-deps --target <directory> trl==1.12.0``).
    """

    def __init__(self, task: Task, folder: Path, directory: Path) -> None:
        sys.path.insert(0, str(directory))
        from datasets import Dataset
        from transformers import AutoModelForSequenceClassification
        from trl.experimental.ppo import PPOConfig, PPOTrainer, ppo_trainer

        path, tokenizer = task.model(folder), make_tokenizer(task.shape.vocabulary)
        value = AutoModelForSequenceClassification.from_pretrained(path, num_labels=1, dtype=th.float32)
        small = SHAPES["0.1M"]._replace(vocabulary=task.shape.vocabulary).config()
        small.num_labels = 1
        config = PPOConfig(
            output_dir=str(folder / "trl"), report_to=[], save_strategy="no", disable_tqdm=True, use_cpu=True,
            bf16=False, gradient_checkpointing=False, learning_rate=LEARNING_RATE, total_episodes=task.rows,
            per_device_train_batch_size=task.rows, gradient_accumulation_steps=1, num_mini_batches=1,
            num_ppo_epochs=EPOCHS, response_length=task.new_tokens, temperature=1.0, stop_token="eos",
            local_rollout_forward_batch_size=task.rows, num_sample_generations=0,
        )  # fmt: skip
        prompts = Dataset.from_dict({"input_ids": tokenizer(task.prompts())["input_ids"]})
        self.trainer = PPOTrainer(
            args=config, processing_class=tokenizer, model=load_model(path), ref_model=load_model(path),
            reward_model=AutoModelForSequenceClassification.from_config(small), value_model=value,
            train_dataset=prompts, eval_dataset=prompts,
        )  # fmt: skip
        # train() tells nobody what was written.
        self.task, self.written = task, th.empty(0)
        self.generation_seconds = 0.0
        generate = ppo_trainer.batch_generation

        def recorded(*arguments: Any) -> Any:
            self.generation_seconds, result = seconds_of(lambda: generate(*arguments))
            self.written = result[0]
            return result

        ppo_trainer.batch_generation = recorded

    def measure(self) -> dict[str, float]:
        """Seconds, tokens and texts of one iteration."""
        seconds, _ = seconds_of(self.trainer.train)
        tokens = count_written(self.written[:, self.task.prompt_tokens :])
        return {"seconds": seconds, "tokens": tokens, "texts": len(self.written), "generation": self.generation_seconds}
