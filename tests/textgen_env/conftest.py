from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from textgen_env.resolve import resolve
from transformers import AutoTokenizer


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def _loaded_tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(resolve("textgen_env:assets/lm"))


@pytest.fixture
def tokenizer(_loaded_tokenizer: Any) -> Any:
    """The embedded tokenizer, safe to change."""
    return copy.deepcopy(_loaded_tokenizer)
