"""Speed on text on a GPU, at the paper's size: what language.py runs with ``--device cuda``.

Qwen2.5-3B's shape and an 8-billion Llama reward model, random bfloat16 weights made on the GPU, adapters of rank 128,
64 rows, prompts of 128 tokens, 128 new ones. Beside the ratios there is what the GPU could do at best: a step of
writing reads every weight and every slot once, at the rate that memory is copied at; an update multiplies matrices, at
the rate of a large product. Wall-clock seconds. Each figure is written as soon as it is known.

``--tiny`` does all of it with models of 0.1 M parameters on the CPU, which measures nothing but that it works.
"""

import argparse
import gc
import json
import statistics
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import torch as th
from language_models import PAD, Task, make_tokenizer, seconds_of
from language_peers import EPOCHS, LEARNING_RATE
from language_safe import VARIANTS, Safe, make_safe
from textgen_env.rewards import RewardModel
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, LlamaConfig

import sb3_safe.language.policy
from sb3_safe import SAFE
from sb3_safe.language.plan import plan_memory

MICRO_BATCH_SIZE = 4096
MODULES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


class Setting(NamedTuple):
    """What is measured, and where."""

    task: Task
    device: str
    rank: int
    """Of the adapters."""
    reward_config: LlamaConfig
    matrix: int
    """Side of the matrices that the machine's rates are measured with."""
    repeats: int


def llama(hidden: int, layers: int, heads: int, kv_heads: int, intermediate: int, vocabulary: int) -> LlamaConfig:
    return LlamaConfig(
        hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=heads, num_key_value_heads=kv_heads,
        intermediate_size=intermediate, vocab_size=vocabulary, num_labels=1, pad_token_id=PAD,
    )  # fmt: skip


def setting(tiny: bool) -> Setting:
    if tiny:
        task = Task("0.1M", "equal", rows=4, prompt_tokens=8, new_tokens=8)
        return Setting(task, "cpu", 4, llama(64, 2, 2, 1, 128, 256), 128, 1)
    task = Task("3B", "equal", rows=64, prompt_tokens=128, new_tokens=128)
    return Setting(task, "cuda", 128, llama(4096, 32, 32, 8, 14336, 128256), 8192, 3)


# -- models ------------------------------------------------------------------------------------------------------------


def random_model(auto_class: Any, config: Any, device: str) -> Any:
    """Random bfloat16 weights, made where they are used."""
    with th.device(device):
        return auto_class.from_config(config, dtype=th.bfloat16).eval()


def language_model(at: Setting) -> Any:
    return random_model(AutoModelForCausalLM, at.task.shape.config(), at.device)


def make_policy(at: Setting, scratch: Path, variant: str, reward_model: RewardModel) -> SAFE:
    """SAFE on a model that is named by a folder with its configuration, and made, not loaded."""
    folder = scratch / f"{at.task.size}-configuration"
    at.task.shape.config().save_pretrained(folder)
    adapters = {"r": at.rank, "lora_alpha": at.rank}
    with patch.object(sb3_safe.language.policy, "load_language_model", lambda model, **_: language_model(at)):
        return make_safe(
            at.task, str(folder), variant, device=at.device,
            env_kwargs={"reward_model": reward_model, "min_new_tokens": at.task.new_tokens},
            rollout_buffer_kwargs={"micro_batch_size": MICRO_BATCH_SIZE},
            policy_kwargs={"lora": adapters, "model_kwargs": {"dtype": th.bfloat16}},
        )  # fmt: skip


def make_reward_model(at: Setting) -> RewardModel:
    classifier = random_model(AutoModelForSequenceClassification, at.reward_config, at.device)
    return RewardModel(classifier, tokenizer=make_tokenizer(at.reward_config.vocab_size))


# -- what the machine can do -------------------------------------------------------------------------------------------


def repeated(work: Callable[[], Any], at: Setting, repeats: int = 5) -> float:
    """Median seconds, warm."""
    work()
    return statistics.median(seconds_of(work, at.device)[0] for _ in range(repeats))


def memory_rate(at: Setting) -> float:
    """Bytes per second that are read or written when memory is copied."""
    source = th.randn(8 * at.matrix * at.matrix, device=at.device)
    target = th.empty_like(source)
    return 2 * source.nbytes / repeated(lambda: target.copy_(source), at)


def matrix_rate(at: Setting) -> float:
    """Floating-point operations per second of a large bfloat16 product."""
    left, right = th.randn(2, at.matrix, at.matrix, device=at.device, dtype=th.bfloat16)
    return 2 * at.matrix**3 / repeated(lambda: left @ right, at)


def bytes_of_writing(at: Setting) -> int:
    """What a rollout reads at least: each step every weight, and of each row's slot what is in it."""
    task, shape = at.task, at.task.shape
    weights = sum(parameter.numel() for parameter in meta_model(at).parameters())
    slot = 2 * shape.layers * shape.kv_heads * shape.head
    lengths = sum(task.prompt_tokens + step for step in range(task.new_tokens))
    return 2 * (task.new_tokens * weights + task.rows * lengths * slot)


def operations_of_update(at: Setting) -> int:
    """Of the products with weights, forward and backward: frozen weights take two each per token, adapters three.

    Attention's own products, 1 % at these lengths, are left out. Only new tokens are scored over the vocabulary.
    """
    task, shape = at.task, at.task.shape
    matrices = [module for name, module in meta_model(at).named_modules() if name.rpartition(".")[2] in MODULES]
    frozen = sum(module.weight.numel() for module in matrices)
    adapters = sum(at.rank * sum(module.weight.shape) for module in matrices)
    texts = task.rows * (task.prompt_tokens + task.new_tokens - 1)
    output = task.rows * task.new_tokens * shape.hidden * shape.vocabulary
    return EPOCHS * 2 * (texts * (2 * frozen + 3 * adapters) + 2 * output)


def meta_model(at: Setting) -> Any:
    return random_model(AutoModelForCausalLM, at.task.shape.config(), "meta")


# -- contenders --------------------------------------------------------------------------------------------------------


def peak(at: Setting, work: Callable[[], Any]) -> tuple[Any, float | None]:
    """What something returned, and the most bytes that were allocated on the GPU meanwhile."""
    if at.device == "cpu":
        return work(), None
    gc.collect()
    th.cuda.empty_cache()
    th.cuda.reset_peak_memory_stats()
    return work(), float(th.cuda.max_memory_allocated())


def generate_seconds(at: Setting) -> float:
    """A batch by ``generate()``'s defaults, of the model without adapters."""
    model, task = language_model(at), at.task
    ids = th.randint(2, task.shape.vocabulary, (task.rows, task.prompt_tokens), device=at.device)
    return repeated(
        lambda: model.generate(
            input_ids=ids, attention_mask=th.ones_like(ids), do_sample=True, top_k=0, top_p=1.0,
            max_new_tokens=task.new_tokens, min_new_tokens=task.new_tokens,
        ),
        at, at.repeats,
    )  # fmt: skip


def timed_safe(at: Setting, scratch: Path, variant: str, reward_model: RewardModel) -> dict[str, float]:
    """Medians over SAFE's iterations, scoring included, and over their parts."""
    contender = ScoredSafe(at.task, make_policy(at, scratch, variant, reward_model))
    contender.measure()  # warm-up
    rows = [contender.measure() for _ in range(at.repeats)]
    return {name: statistics.median(row[name] for row in rows) for name in rows[0]}


class ScoredSafe(Safe):
    """Iterations of SAFE that score texts by a reward model, timed apart from writing."""

    def __init__(self, task: Task, model: SAFE) -> None:
        super().__init__(task, model)
        self.stopwatch.watch(model.env.envs._rows, "_reward", "scoring")

    def measure(self) -> dict[str, float]:
        """See :meth:`Safe.measure`."""
        row = super().measure()
        return row | {"rollout": row["rollout"] - row["scoring"]}


def timed_published(at: Setting, directory: Path, reward_model: RewardModel, rows: int) -> dict[str, float]:
    """The published trainer as its ``scripts/train.py`` builds it; it scores one text at a time."""
    sys.path.insert(0, str(directory))
    from peft import LoraConfig, get_peft_model
    from safe.config import SAFEConfig
    from safe.trainers.safe import SAFETrainer

    task = at.task._replace(rows=rows)
    policy, reference = language_model(at), language_model(at).requires_grad_(False)
    policy.generation_config.update(do_sample=True, top_k=0, min_new_tokens=task.new_tokens)
    adapters = LoraConfig(
        r=at.rank, lora_alpha=at.rank, target_modules=MODULES, lora_dropout=0.05, bias="none", task_type="CAUSAL_LM"
    )
    config = SAFEConfig(
        batch_size=rows, max_new_tokens=task.new_tokens, epochs_per_batch=EPOCHS,
        policy_lr=LEARNING_RATE, critic_lr=LEARNING_RATE,
    )  # fmt: skip
    trainer = SAFETrainer(
        get_peft_model(policy, adapters), reference, make_tokenizer(task.shape.vocabulary),
        lambda text: reward_model([""], [text])[0], config,
    )  # fmt: skip
    batches = task.batches()

    def iterate() -> None:
        trainer.train_step(trainer.generate_rollouts(next(batches)))

    return {"seconds": repeated(iterate, at, at.repeats), "tokens": rows * task.new_tokens}


def published_that_fits(at: Setting, directory: Path, reward_model: RewardModel) -> dict[str, Any]:
    """With as many rows as there is memory for, since it trains on all of them at a time."""
    rows = at.task.rows
    while rows > 0:
        try:
            result, memory = peak(at, partial(timed_published, at, directory, reward_model, rows))
            return result | {"rows": rows, "peak_bytes": memory}
        except th.OutOfMemoryError:
            rows //= 2
    raise RuntimeError("the published trainer has too little memory for a single row")


def figures(at: Setting, published: Path | None, scratch: Path) -> Iterator[dict[str, Any]]:
    """Everything that is measured, one by one."""
    tokens = at.task.rows * at.task.new_tokens
    copy, product = memory_rate(at), matrix_rate(at)
    yield {"copy_bytes_per_second": copy, "matrix_operations_per_second": product}
    generation = generate_seconds(at)
    yield {"generate": {"seconds": generation, "tokens": tokens}}
    reward_model = make_reward_model(at)
    results: dict[str, dict[str, Any]] = {}
    for variant in VARIANTS:
        results[variant], memory = peak(at, partial(timed_safe, at, scratch, variant, reward_model))
        yield {variant: results[variant] | {"peak_bytes": memory}}
    safe = results["safe"]
    plan = plan_memory(
        at.task.shape.config(), n_envs=at.task.rows, max_length=at.task.prompt_tokens + at.task.new_tokens,
        micro_batch_size=MICRO_BATCH_SIZE, lora={"r": at.rank, "lora_alpha": at.rank}, dtype=th.bfloat16,
        reward_model=at.reward_config, reward_dtype=th.bfloat16,
    )  # fmt: skip
    yield {"planned_bytes": plan.total}
    yield {
        "rollout / generate()": generation / safe["rollout"],
        "rollout of memory bound": bytes_of_writing(at) / copy / safe["rollout"],
        "update of matrix rate": operations_of_update(at) / product / safe["update"],
        "iteration / ppo": results["ppo"]["seconds"] / safe["seconds"],
        "iteration / ppo-fixed-kl": results["ppo-fixed-kl"]["seconds"] / safe["seconds"],
    }
    if published is not None:
        peer = published_that_fits(at, published, reward_model)
        yield {"published": peer}
        yield {"iteration / published": tokens / safe["seconds"] / (peer["tokens"] / peer["seconds"])}


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Measure, print and write."""
    at = setting(arguments.tiny)
    machine = "cpu" if at.device == "cpu" else th.cuda.get_device_name()
    results: dict[str, Any] = {"machine": machine, "size": at.task.size}
    for found in figures(at, arguments.published, arguments.scratch):
        results |= found
        print(found, flush=True)
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    return results
