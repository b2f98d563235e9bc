"""Speed on text: writing against `generate()`, and an update on whole texts against one row per token.

    python benchmarks/language.py [--repeats 5] [--threads 1]

Interleaved, CPU seconds. Results go to benchmarks/results/language.json.

- rollout: tokens per second of a SAFE rollout through the environment (scoring excluded, as `generate()` does not
  score; values and log-probabilities included, which `generate()` does not give), over those of `model.generate()` on
  the same prompts, batch and sampling. `generate()` is timed on its best terms: one batch of left-padded prompts, and
  only tokens up to the end token count for it, as only those count for the rollout.
- update: tokens per second of one epoch with whole packed texts, over an epoch of the same losses with one padded row
  per token, which is what an unmodified PPO makes of a text environment.
"""

import argparse
import json
import platform
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch as th

from sb3_safe import SAFE
from sb3_safe.language import SegmentBuffer

RESULTS = Path(__file__).parent / "results" / "language.json"


def seconds(work: Any) -> float:
    start = time.process_time()
    work()
    return time.process_time() - start


def rollout_seconds(model: SAFE) -> tuple[float, int]:
    """CPU seconds and tokens of one rollout, the reward model's time taken out."""
    rewards = {"seconds": 0.0}
    rows = model.env.envs._rows
    score = rows._reward

    def timed(*arguments: Any) -> Any:
        start = time.process_time()
        try:
            return score(*arguments)
        finally:
            rewards["seconds"] += time.process_time() - start

    rows._reward = timed
    callback = model._setup_learn(10**9, reset_num_timesteps=model._last_obs is None)[1]
    collect = super(SAFE, model).collect_rollouts
    taken = seconds(lambda: collect(model.env, callback, model.rollout_buffer, model.n_steps))
    rows._reward = score
    return taken - rewards["seconds"], model.n_steps * model.n_envs


@th.no_grad()
def generate_seconds(model: SAFE, prompts: list[list[int]], new_tokens: int) -> tuple[float, int]:
    """CPU seconds and tokens (up to the end token) of `generate()` on a batch of prompts."""
    tokenizer = model.env.envs.tokenizer
    width = max(map(len, prompts))
    ids = th.tensor([[tokenizer.pad_token_id] * (width - len(prompt)) + prompt for prompt in prompts])
    mask = th.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    written: list[Any] = []
    taken = seconds(
        lambda: written.append(
            model.policy.lm.generate(
                input_ids=ids, attention_mask=mask, do_sample=True, top_k=0, top_p=1.0, max_new_tokens=new_tokens,
                pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id,
            )
        )
    )  # fmt: skip
    new = written[0][:, width:]
    ended = (new == tokenizer.eos_token_id).long()
    return taken, int(((ended.cumsum(1) - ended) == 0).sum())


def epoch_seconds(model: SAFE) -> tuple[float, int]:
    """CPU seconds and tokens of one epoch on whole texts."""
    model.n_epochs = 1
    return seconds(model.train), model.n_steps * model.n_envs


def flat_epoch_seconds(model: SAFE, n_batches: int) -> tuple[float, int]:
    """The same losses with one padded row per token, on ``n_batches`` minibatches."""
    policy, buffer = model.policy, model.rollout_buffer
    assert isinstance(buffer, SegmentBuffer)
    rows: list[tuple[np.ndarray, int, Any]] = []
    for batch in buffer.in_order(10**9):
        obs = batch.observations
        for i in range(len(batch.actions)):
            row, col = int(obs["rows"][i]), int(obs["cols"][i])
            length = int(obs["position_ids"][row, col]) + 1
            rows.append((obs["input_ids"][row, col + 1 - length : col + 1].numpy(), length, i))
        samples = batch
    width = max(length for _, length, _ in rows)
    order = np.random.permutation(len(rows))
    batches = []
    for start in range(0, n_batches * model.batch_size, model.batch_size):
        chosen = [rows[i] for i in order[start : start + model.batch_size]]
        ids = np.zeros((len(chosen), width), dtype=np.int64)
        for row, (text, length, _) in enumerate(chosen):
            ids[row, :length] = text
        index = th.tensor([i for _, _, i in chosen])
        lengths = th.tensor([length for _, length, _ in chosen])
        obs = {
            "input_ids": th.as_tensor(ids),
            "position_ids": th.arange(width).expand(len(chosen), -1),
            "rows": th.arange(len(chosen)),
            "cols": lengths - 1,
            "new_tokens": samples.observations["new_tokens"][index],
        }
        fields = {
            name: value[index]
            for name, value in samples._asdict().items()
            if value is not None and name != "observations"
        }
        batches.append(samples._replace(observations=obs, **fields))

    def train() -> None:
        for batch in batches:
            model._step(model._loss(batch)[0], 1.0)

    policy.set_training_mode(True)
    return seconds(train), n_batches * model.batch_size


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    th.set_num_threads(arguments.threads)
    model = SAFE("TextGenEnv-v0", seed=0)
    reader = model.env.envs
    prompts = [prompt.ids.tolist() for prompt in reader._draw(model.n_envs)]
    rows: list[dict[str, float]] = []
    for repeat in range(arguments.repeats + 1):
        written = rollout_seconds(model)
        generated = generate_seconds(model, prompts, 32)
        model.rollout_buffer.annotations = {}
        model._observe_rollout()
        trained = epoch_seconds(model)
        flat = flat_epoch_seconds(model, 2)
        if repeat > 0:  # the first is warm-up
            speed = {
                "rollout": written[1] / written[0],
                "generate": generated[1] / generated[0],
                "update": trained[1] / trained[0],
                "flat_update": flat[1] / flat[0],
            }
            rows.append(speed)
            print({name: round(value) for name, value in speed.items()}, flush=True)
    summary = {
        "rollout_over_generate": statistics.median(row["rollout"] / row["generate"] for row in rows),
        "update_over_flat_update": statistics.median(row["update"] / row["flat_update"] for row in rows),
    }
    machine = {"machine": platform.processor() or platform.machine(), "threads": arguments.threads}
    arguments.out.parent.mkdir(exist_ok=True)
    arguments.out.write_text(json.dumps(machine | summary | {"tokens_per_second": rows}, indent=1) + "\n")
    print(summary)


if __name__ == "__main__":
    main()
