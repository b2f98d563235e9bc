"""Aligning a small language model with a reward model: ``python -m sb3_safe.demo``.

The whole of RLHF on two CPU cores in minutes. A model of a million parameters writes reviews; SAFE tunes it to please
a reward model that has learned from preferences. A gold score, which the algorithm never sees, tells whether
the texts really became better or only please the reward model.
"""

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import torch as th
from textgen_env.gold import gold_reward
from transformers.utils import logging

from sb3_safe import SAFE, GymVecEnv, SampleCallback, StabilityCallback
from sb3_safe.callbacks import Infos, episode_columns, write_texts
from sb3_safe.report import write_report
from sb3_safe.text_callbacks import printable

ENV_ID = "TextGenEnv-v0"
N_EVALUATED = 256
N_SHOWN = 6
LABELS = {
    "reward": "reward",
    "kl_per_token": "KL to the start, nats per token",
    "kl_per_text": "KL to the start, nats per text",
    "entropy": "entropy, nats per token",
    "length": "length, tokens",
    "stop_share": "ended by the end token, share",
    "distinct_2": "distinct bigrams, share",
    "gold": "gold score",
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Train, and show what training changed.

    :param arguments: of the command line; ``None``: the program's own.
    """
    options = _parse(arguments)
    # On models this small a second thread costs more than it brings.
    th.set_num_threads(1)
    logging.disable_progress_bar()

    model = SAFE(ENV_ID, seed=options.seed)
    before = evaluate(model, options.seed)
    stability = StabilityCallback(options.out, extra=gold_column)
    sampler = SampleCallback(text_env(N_SHOWN), every=25, seed=options.seed, folder=options.out)
    model.learn(options.timesteps, callback=[stability, sampler], progress_bar=True)
    model.save(options.out / "model.zip")
    after = evaluate(model, options.seed)

    show_texts(sampler.samples)
    evaluation = {label: (before[name], after[name]) for name, label in LABELS.items()}
    show_table(evaluation)
    title = f"SAFE on {ENV_ID}, {model.num_timesteps} tokens, seed {options.seed}"
    report = write_report({"SAFE": stability.rows}, options.out / "report.html", sampler.samples, title, evaluation)
    print(f"\nModel:  {options.out / 'model.zip'}\nReport: {report}")


def text_env(n_texts: int) -> GymVecEnv:
    """An environment that writes so many texts side by side."""
    return GymVecEnv(gym.make_vec(ENV_ID, n_texts, vectorization_mode="vector_entry_point"))


def gold_column(texts: Infos) -> dict[str, float]:
    """Mean gold score of finished texts."""
    scores = gold_reward([text["prompt"] for text in texts], [text["completion"] for text in texts])
    return {"gold": float(np.mean(scores))}


def evaluate(model: SAFE, seed: int) -> dict[str, float]:
    """Measure a policy on texts it writes; the same seed gives the same prompts.

    :return: by the names in :data:`LABELS`.
    """
    env = text_env(N_EVALUATED)
    texts = write_texts(model, env, seed=seed)
    env.close()
    return episode_columns(texts) | gold_column(texts) | divergence(model, texts)


@th.no_grad()
def divergence(model: SAFE, texts: Infos) -> dict[str, float]:
    """KL of the policy to the model it started from, by what it wrote, and its entropy, in nats.

    A text's KL is estimated by its ``log pi - log pi_start``, summed over the tokens written.
    """
    last = [text["terminal_observation"] for text in texts]
    ids, length, prompt_length = (
        th.as_tensor(np.stack([row[key] for row in last]), device=model.device)
        for key in ("input_ids", "length", "prompt_length")
    )
    # Column c predicts the token of column c + 1; the tokens written begin where the prompt ends.
    following = th.arange(1, ids.shape[1], device=model.device)
    rows, cols = th.nonzero((following >= prompt_length) & (following < length), as_tuple=True)
    observations = {
        "input_ids": ids,
        "position_ids": th.arange(ids.shape[1], device=model.device).expand_as(ids),
        "rows": rows,
        "cols": cols,
        "new_tokens": cols + 1 - prompt_length[rows, 0],
    }
    tokens = ids[rows, cols + 1]
    _, log_prob, entropy, _ = model.policy.evaluate(observations, tokens)
    drift = log_prob - model.policy.reference_log_prob(observations, tokens)
    return {
        "kl_per_token": drift.mean().item(),
        "kl_per_text": drift.sum().item() / len(texts),
        "entropy": entropy.mean().item(),
    }


def show_texts(samples: Sequence[Mapping[str, Any]]) -> None:
    """Print what was written on the same prompts before and after training."""
    for first, last in zip(samples[:N_SHOWN], samples[-N_SHOWN:], strict=True):
        print(f"\n{printable(first['prompt'])}")
        print(f"  before ({first['reward']:+.2f}): {printable(first['completion'].strip())}")
        print(f"  after  ({last['reward']:+.2f}): {printable(last['completion'].strip())}")


def show_table(evaluation: Mapping[str, tuple[float, float]]) -> None:
    """Print values before and after training."""
    print(f"\n{N_EVALUATED} texts on the same prompts{'before':>12}{'after':>10}")
    for label, (before, after) in evaluation.items():
        print(f"{label:<34}{before:>9.3f}{after:>10.3f}")


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m sb3_safe.demo", description=__doc__.partition(":")[0] + ".")
    parser.add_argument("--timesteps", type=int, help=f"tokens to train on; default: the preset of {ENV_ID}")
    parser.add_argument("--out", type=Path, default=Path("runs/demo"), help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
