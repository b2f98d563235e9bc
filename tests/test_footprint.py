"""What is counted on models without contents is what real ones take."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch as th
from textgen_env.resolve import resolve
from textgen_env.reward_model import RewardModel
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, Gemma2Config, GPT2Config, LlamaConfig, Qwen2Config
from transformers.modeling_layers import GradientCheckpointingLayer

from sb3_safe import SAFE
from sb3_safe.language import onednn
from sb3_safe.language.adapters import Adapters
from sb3_safe.language.footprint import Blueprint, score_bytes, training_bytes
from sb3_safe.language.loading import checkpoint_layers
from sb3_safe.language.plan import MemoryPlan, plan_memory
from sb3_safe.language.policy import ValueHead
from sb3_safe.language.tokens import CHUNK_LOGITS
from sb3_safe.language.tracing import Allocations, fake, saved_bytes

LORA = {"r": 8}
QWEN = Qwen2Config(
    vocab_size=1024, hidden_size=64, intermediate_size=160, num_hidden_layers=5, num_attention_heads=4,
    num_key_value_heads=2, tie_word_embeddings=True, max_position_embeddings=128, pad_token_id=0, eos_token_id=1,
)  # fmt: skip
CONFIGS = {
    "qwen2": QWEN,
    "wide qwen2": Qwen2Config(
        vocab_size=500, hidden_size=160, intermediate_size=500, num_hidden_layers=6, num_attention_heads=10,
        num_key_value_heads=2, tie_word_embeddings=False,
    ),
    "llama": LlamaConfig(
        vocab_size=500, hidden_size=96, intermediate_size=256, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=4,
    ),
    "deep llama": LlamaConfig(
        vocab_size=500, hidden_size=128, intermediate_size=450, num_hidden_layers=8, num_attention_heads=8,
        num_key_value_heads=2,
    ),
    "gemma2": Gemma2Config(
        vocab_size=500, hidden_size=64, intermediate_size=160, num_hidden_layers=5, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16,
    ),
    "gpt2": GPT2Config(vocab_size=500, n_embd=64, n_layer=5, n_head=4),
}  # fmt: skip


def small_plan(model: Any, **changes: Any) -> MemoryPlan:
    return plan_memory(model, **({"n_envs": 4, "max_length": 48, "micro_batch_size": 96} | changes))


# -- counting allocations ----------------------------------------------------------------------------------------------


def test_allocations_are_counted_until_they_are_freed() -> None:
    before = th.zeros(1000)
    with Allocations() as memory:
        a = th.ones(1000)
        b = a + before
        assert (memory.now, memory.peak) == (8000, 8000)
        del a
        assert (memory.now, memory.peak) == (4000, 8000)
        del b
        assert (memory.now, memory.peak) == (0, 8000)


def test_views_and_what_is_done_in_place_allocate_nothing() -> None:
    before = th.zeros(10, 100)
    with Allocations() as memory:
        before.add_(1).view(-1)[3:].mul_(2)
        before.detach().t()
        assert memory.peak == 0
        a = th.ones(10, 100)
        parts = a.split(5)
        del a
        assert memory.now == 4000 and len(parts) == 2


def test_fake_models_of_any_size_run() -> None:
    with th.device("meta"):
        model = th.nn.Linear(10**6, 10**6)  # 4 TB
    memory = Allocations()
    with fake(model), memory:
        kept, output = saved_bytes(lambda: model(th.zeros(8, 10**6)).relu(), model)
        output.sum().backward()
    assert model.weight.grad is not None
    assert kept == 2 * 8 * 10**6 * 4  # the input, and where the output is positive
    # The gradient of the weights is made before it is added to what was there.
    assert 4 * 10**12 < memory.peak < 4.001 * 10**12


# -- against real models -----------------------------------------------------------------------------------------------


def checkpoint(folder: Path, config: Any = QWEN) -> str:
    """A folder with a model of random weights and the embedded model's tokenizer."""
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(resolve("textgen_env:assets/lm")).save_pretrained(folder)
    return str(folder)


def nbytes(tensors: Any) -> int:
    return sum(tensor.nbytes for tensor in tensors)


@pytest.mark.parametrize("lora", [None, LORA])
def test_what_is_there_all_the_time_is_what_a_run_has(lora: dict[str, Any] | None, tmp_path: Path) -> None:
    folder = checkpoint(tmp_path)
    model = SAFE(
        "TextGenEnv-v0",
        n_envs=4,
        n_steps=24,
        batch_size=48,
        n_epochs=1,
        env_kwargs={"model": folder, "max_prompt_tokens": 32, "max_new_tokens": 16},
        policy_kwargs={"lora": lora or False},
    ).learn(96)
    policy = model.policy
    trained = [parameter for group in policy.optimizer.param_groups for parameter in group["params"]]
    states = [value for state in policy.optimizer.state.values() for value in state.values() if value.dim() > 0]
    in_layers = [layer.get_base_layer().weight for layer in policy.adapters._layers] if lora else []
    adapters = nbytes(value for name, value in policy.lm.named_parameters() if "lora_" in name)
    reward_model = RewardModel("textgen_env:assets/reward_model").model
    parts = {
        "language model": nbytes(policy.lm.parameters()) - adapters,
        "adapters": adapters,
        "weights with adapters merged": nbytes(in_layers),
        "reference": 0 if lora else nbytes(policy.reference.parameters()),
        "value heads": nbytes(policy.heads.parameters()),
        "gradients": nbytes(parameter.grad for parameter in trained),
        "optimizer": nbytes(states),
        "key/value slots": nbytes(tensor for layer in policy._slots.layers for tensor in (layer.keys, layer.values)),
        "reward model": nbytes(reward_model.parameters()),
    }
    planned = small_plan(folder, lora=lora, reward_model="textgen_env:assets/reward_model", reward_dtype=th.float32)
    assert planned.always == {name: size for name, size in parts.items() if size > 0}


def measured(config: Any, lora: dict[str, Any] | None, dtype: th.dtype, checkpointing: bool) -> tuple[int, int]:
    """Bytes that real tensors keep for the backward pass, and the peak of both passes."""
    lm = AutoModelForCausalLM.from_config(config, dtype=dtype)
    heads = [ValueHead(config.hidden_size) for _ in range(2)]
    if lora is not None:
        Adapters(lm, lora)
    lm.eval()
    if checkpointing:
        checkpoint_layers(lm)
        for layer in lm.modules():
            layer.training = isinstance(layer, GradientCheckpointingLayer)
    parameters = [*lm.parameters(), *(parameter for head in heads for parameter in head.parameters())]
    for parameter in parameters:
        if parameter.requires_grad:
            parameter.grad = th.zeros_like(parameter)
    known = {parameter.data_ptr() for parameter in parameters}
    kept: dict[int, Any] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage
        return tensor

    ids = th.randint(config.vocab_size, (6, 64))
    positions = (th.arange(64) % 40).expand(6, 64)
    mixed = lora is not None and dtype != th.float32
    with Allocations() as memory:
        with th.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            with th.autocast("cpu", dtype if mixed else None, enabled=mixed):
                hidden = lm.base_model(input_ids=ids, position_ids=positions, use_cache=False).last_hidden_state
            loss = hidden.sum() + sum(head(hidden.detach().float()).sum() for head in heads)
        saved = sum(storage.nbytes() for storage in kept.values())
        kept.clear()
        loss.backward()
    return saved, memory.peak


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(
    ("architecture", "lora", "dtype"),
    [
        *((name, lora, th.float32) for name in ("qwen2", "wide qwen2", "llama", "deep llama") for lora in (None, LORA)),
        *((name, LORA, th.bfloat16) for name in ("qwen2", "deep llama", "gemma2", "gpt2")),
    ],
)
def test_activations_are_what_autograd_keeps(
    architecture: str, lora: dict[str, Any] | None, dtype: th.dtype, checkpointing: bool
) -> None:
    """Though only two and three layers are traced."""
    config = CONFIGS[architecture]
    blueprint = Blueprint(config, AutoModelForCausalLM, dtype, lora)
    kept, *peaks = blueprint.in_depth(training_bytes, 6, 64, checkpointing, 2)
    saved, peak = measured(config, lora, dtype, checkpointing)
    assert kept == pytest.approx(saved, rel=0.05)
    assert max(peaks) == pytest.approx(peak, rel=0.05)


@pytest.mark.parametrize("lora", [None, LORA])
def test_writing_takes_what_is_planned(lora: dict[str, Any] | None, tmp_path: Path) -> None:
    folder = checkpoint(tmp_path)
    env_kwargs = {"model": folder, "max_prompt_tokens": 32, "max_new_tokens": 16}
    policy = SAFE("TextGenEnv-v0", n_envs=16, env_kwargs=env_kwargs, policy_kwargs={"lora": lora or False}).policy
    if lora:
        policy.adapters.merge()  # which is there all the time
    texts = {
        "input_ids": th.randint(2, 1024, (16, 48)),
        "length": th.full((16, 1), 48),
        "prompt_length": th.full((16, 1), 32),
    }
    with Allocations() as memory, th.no_grad():
        policy(texts)
    planned = small_plan(folder, n_envs=16, lora=lora)
    slots_and_writing = planned.parts["key/value slots"] + sum(planned.phases["writing"].values())
    assert slots_and_writing == pytest.approx(memory.peak, rel=0.1)


@pytest.mark.skipif(not onednn.is_available(), reason="this PyTorch was built without oneDNN: nothing is ever packed")
@pytest.mark.parametrize("lora", [None, LORA])
def test_rollouts_pack_what_is_planned(
    lora: dict[str, Any] | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(onednn, "is_faster", lambda: True)
    folder = checkpoint(tmp_path)
    env_kwargs = {"model": folder, "max_prompt_tokens": 32, "max_new_tokens": 16}
    policy = SAFE("TextGenEnv-v0", n_envs=2, env_kwargs=env_kwargs, policy_kwargs={"lora": lora or False}).policy
    texts = {"input_ids": th.ones(2, 8, dtype=th.long), "length": th.tensor([[4], [8]])}
    with policy.collecting(lambda: None), th.no_grad():
        policy(texts | {"prompt_length": th.ones(2, 1)})
        packed = nbytes(copy.weight for copy in onednn._packed.values() if copy is not None)
    assert small_plan(folder, lora=lora, packs=True).phases["writing"]["packed weights"] == packed
    assert "packed weights" not in small_plan(folder, lora=lora).parts
    in_half = small_plan(folder, lora=LORA, dtype=th.bfloat16, packs=True).parts["packed weights"]
    assert in_half == nbytes(weight for weight in policy.heads.parameters() if weight.dim() == 2)


def test_scoring_takes_what_is_planned() -> None:
    embedded = "textgen_env:assets/reward_model"
    judge = RewardModel(embedded, batch_size=8)
    with Allocations() as memory:
        judge.score([[5] * 40] * 16)
    planned = small_plan(
        QWEN, max_length=40, n_envs=16, reward_model=embedded, reward_batch_size=8, reward_dtype=th.float32
    )
    assert planned.parts["texts in the reward model"] == pytest.approx(memory.peak, rel=0.05)


def test_log_probabilities_take_a_few_chunks_however_large_the_batch() -> None:
    config = Qwen2Config(**QWEN.to_dict() | {"vocab_size": 150_000})
    small, large = (score_bytes(Blueprint(config, AutoModelForCausalLM, th.float32, LORA), n) for n in (200, 1000))
    chunk = 4 * CHUNK_LOGITS
    assert 3 * chunk < small < large < 6 * chunk


WHOLE_RUN = """
import re, sys
import torch as th
from sb3_safe import SAFE
from sb3_safe.language.plan import plan_memory

th.set_num_threads(1)
folder, lora = sys.argv[1], {} if sys.argv[2] == "lora" else None

def status(name):
    return 1024 * int(re.search(rf"{name}:\\s+(\\d+) kB", open("/proc/self/status").read())[1])

SAFE("TextGenEnv-v0", n_envs=2, n_steps=8, batch_size=8, n_epochs=1, policy_kwargs={"lora": lora or False}).learn(16)
before = status("VmRSS")
open("/proc/self/clear_refs", "w").write("5")  # resets VmHWM, the most that was ever resident
model = SAFE(
    "TextGenEnv-v0", n_envs=32, n_steps=48, batch_size=1536, n_epochs=1, learning_rate=1e-6,
    env_kwargs={"model": folder, "max_prompt_tokens": 32, "max_new_tokens": 32},
    rollout_buffer_kwargs={"micro_batch_size": 2048},
    policy_kwargs={"lora": lora if lora is not None else False},
).learn(2 * 48 * 32)
plan = plan_memory(
    folder, n_envs=32, max_length=64, micro_batch_size=2048, lora=lora, reward_model="textgen_env:assets/reward_model"
)
print(plan.total, status("VmHWM") - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="only Linux tells a process its peak of memory")
@pytest.mark.parametrize("trained", ["full", "lora"])
def test_a_whole_run_takes_what_is_planned(trained: str, tmp_path: Path) -> None:
    """As the operating system sees it: 1.6 GB, most of it activations."""
    sizes = {"hidden_size": 512, "num_hidden_layers": 8, "num_attention_heads": 8, "intermediate_size": 2048}
    folder = checkpoint(tmp_path, Qwen2Config(**QWEN.to_dict() | sizes | {"layer_types": None}))
    # Freed memory is to go back to the system at once.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    command = [sys.executable, "-W", "ignore", "-c", WHOLE_RUN, folder, trained]
    output = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
    planned, taken = map(int, output.split())
    assert planned == pytest.approx(taken, rel=0.1)
