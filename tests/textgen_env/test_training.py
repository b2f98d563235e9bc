"""The models and data that people use, in small: a language model, a reward model and preference data on disk."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from sb3_safe import SAFE
from tests.textgen_env import checkpoints
from tests.textgen_env.checkpoints import HH_MESSAGES, HH_PROMPT


@pytest.mark.parametrize("prompt_format", ["text", "chat"])
def test_preference_data_a_language_model_and_a_reward_model_with_code_of_its_own_train(
    prompt_format: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    pairs = [{"chosen": f"{HH_PROMPT} yes {number}", "rejected": f"{HH_PROMPT} no"} for number in range(8)]
    datasets.Dataset.from_list(pairs).to_parquet(str(tmp_path / "hh.parquet"))
    model = SAFE(
        "TextGenEnv-v0",
        env_kwargs={
            "model": checkpoints.language_model(tmp_path / "lm"),
            "reward_model": checkpoints.gated_reward_model(tmp_path / "rm"),
            "reward_model_kwargs": {"trust_remote_code": True},
            "prompts": str(tmp_path / "hh.parquet"),
            "prompt_format": prompt_format,
            "max_prompt_tokens": 200,
            "max_new_tokens": 6,
        },
        n_envs=4,
        n_steps=12,
        batch_size=24,
        n_epochs=1,
        device="cpu",
    )
    infos: list[dict[str, Any]] = []
    before = [parameter.clone() for parameter in model.policy.lm.parameters() if parameter.requires_grad]
    model.learn(96, callback=lambda local, _: infos.extend(info for info in local["infos"] if info) or True)
    after = [parameter for parameter in model.policy.lm.parameters() if parameter.requires_grad]
    assert any(not torch.equal(*pair) for pair in zip(before, after, strict=True))
    assert len(infos) >= 16
    assert len({info["episode"]["r"] for info in infos}) > 4
    assert np.isfinite([info["episode"]["r"] for info in infos]).all()
    assert infos[0]["prompt"] == (HH_PROMPT if prompt_format == "text" else HH_MESSAGES)
