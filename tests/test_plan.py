import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch as th
from textgen_env.resolve import resolve
from torch import Tensor
from transformers import LlamaConfig, Qwen2Config, T5Config

from sb3_safe import SAFE, cli
from sb3_safe.language import adapters as adapters_module
from sb3_safe.language import onednn
from sb3_safe.language import plan as plan_module
from sb3_safe.language import policy as policy_module
from sb3_safe.language.plan import MemoryPlan, available_memory, check_memory, format_bytes, parse_bytes, plan_memory

GIB = 2**30
LORA = {"r": 8}
SIZES = {
    "vocab_size": 1024, "hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 1, "num_attention_heads": 4,
    "num_key_value_heads": 2,
}  # fmt: skip
QWEN = Qwen2Config(**SIZES, tie_word_embeddings=True)


def small_plan(model: Any = QWEN, **changes: Any) -> MemoryPlan:
    return plan_memory(model, **({"n_envs": 4, "max_length": 48, "micro_batch_size": 96} | changes))


# -- the plan itself ---------------------------------------------------------------------------------------------------


def test_the_total_is_what_is_always_there_and_the_largest_phase() -> None:
    plan = MemoryPlan({"a": 5, "b": 1}, {"x": {"c": 3, "d": 4}, "y": {"e": 6}}, {})
    assert plan.total == 5 + 1 + 3 + 4
    assert plan.largest_phase == "x"
    assert plan.parts == {"a": 5, "b": 1, "c": 3, "d": 4, "e": 6}


def test_the_table_has_every_part_and_the_verdict() -> None:
    plan = MemoryPlan({"a": 3 * GIB, "b": 2**20}, {"x": {"c": GIB}, "y": {"dd": 512}}, {})
    assert str(plan).splitlines() == [
        "all the time                  3.00 GiB",
        "  a                           3.00 GiB",
        "  b                           1.00 MiB",
        "x                             1.00 GiB",
        "  c                           1.00 GiB",
        "y                             512.00 B",
        "  dd                          512.00 B",
        "total: all the time and x     4.00 GiB",
    ]
    assert plan.table(5 * GIB).splitlines()[-2:] == ["available                     5.00 GiB", "it fits"]
    assert plan.table(4 * GIB).splitlines()[-1] == "it does not fit"


def test_the_reference_is_a_copy_only_without_adapters_and_where_it_is_asked_for() -> None:
    plan = small_plan()
    assert plan.parts["reference"] == plan.parts["language model"]
    assert "reference" not in small_plan(reference=False).parts
    assert "reference" not in small_plan(lora=LORA).parts


@pytest.mark.parametrize("argument", ["n_envs", "max_length", "micro_batch_size", "n_critics", "reward_batch_size"])
def test_sizes_must_be_positive(argument: str) -> None:
    with pytest.raises(ValueError, match=f"{argument} must be at least 1, got 0"):
        small_plan(**{argument: 0})


def test_a_model_without_a_configuration_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"model='.*' has no configuration that can be read"):
        small_plan(str(tmp_path))
    with pytest.raises(ValueError, match=r"reward_model='.*' has no configuration that can be read"):
        small_plan(reward_model=str(tmp_path))


def test_a_model_of_another_kind_is_refused() -> None:
    with pytest.raises(ValueError, match="AutoModelForCausalLM does not load models of type 't5'"):
        small_plan(T5Config())


def test_an_architecture_that_cannot_be_traced_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def forward(self: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return hidden_states if bool((hidden_states > 0).any()) else -hidden_states

    monkeypatch.setattr("transformers.models.llama.modeling_llama.LlamaMLP.forward", forward)
    config = LlamaConfig(**SIZES | {"vocab_size": 77})
    with pytest.raises(ValueError, match="memory cannot be foreseen for models of type llama"):
        small_plan(config)


# -- does it fit? ------------------------------------------------------------------------------------------------------


def changed(advice: str) -> dict[str, Any]:
    """The arguments that a piece of advice says to pass."""
    if lowered := re.search(r"lower (\w+) to (\d+)", advice):
        return {lowered[1]: int(lowered[2])}
    return {"gradient_checkpointing": True} if "gradient_checkpointing" in advice else {"lora": {}}


def advice_for(plan: MemoryPlan, available: int) -> list[str]:
    with pytest.raises(ValueError, match="What helps, most first: ") as error:
        check_memory(plan, available)
    return str(error.value).partition("most first: ")[2].split("; ")


def test_what_fits_passes() -> None:
    plan = small_plan()
    check_memory(plan, plan.total)


def test_advice_that_is_enough_is_enough_and_the_largest_saving_comes_first() -> None:
    plan = small_plan(micro_batch_size=1000)
    available = plan.total * 2 // 3
    pieces = advice_for(plan, available)
    totals = [small_plan(**{"micro_batch_size": 1000} | changed(piece)).total for piece in pieces]
    assert totals == sorted(totals)
    enough = ["enough by itself" in piece for piece in pieces]
    assert any(enough) and not all(enough)
    assert enough == [total <= available for total in totals]


def test_advice_says_when_all_of_it_is_needed_or_not_enough() -> None:
    settings = {"lora": LORA, "dtype": th.bfloat16, "n_envs": 64, "micro_batch_size": 2000}
    plan = small_plan(**settings)
    least = small_plan(**settings | {"gradient_checkpointing": True, "n_envs": 8, "micro_batch_size": 250}).total
    *_, last = advice_for(plan, least)
    assert f"All of that together makes it {format_bytes(least)}" in last
    assert "choose a smaller model" not in last
    assert advice_for(plan, least - 1)[-1].endswith("choose a smaller model")


def test_adapters_that_are_there_are_not_advised_but_lower_precision_is() -> None:
    plan = small_plan(lora=LORA)
    advice = advice_for(plan, plan.total - 1)
    assert not any("lora" in piece for piece in advice)
    assert any('env_kwargs={"model_kwargs": {"dtype": "bfloat16"}}' in piece for piece in advice)


def test_available_memory_is_the_machines_or_the_containers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    meminfo, limit, older = (tmp_path / name for name in ("meminfo", "memory.max", "memory.limit_in_bytes"))
    monkeypatch.setattr(plan_module, "MEMINFO", meminfo)
    monkeypatch.setattr(plan_module, "CONTAINER_LIMITS", (limit, older))
    assert available_memory("cpu") is None
    meminfo.write_text("MemTotal:       16000 kB\nMemFree:  100 kB\nMemAvailable:    8000 kB\n")
    assert available_memory("cpu") == 8000 * 1024
    limit.write_text("max\n")
    assert available_memory("cpu") == 8000 * 1024
    older.write_text("4096000\n")
    assert available_memory("cpu") == 4096000
    assert available_memory("meta") is None


@pytest.mark.parametrize(
    ("text", "size"),
    [("80GiB", 80 * GIB), ("24 GB", 24 * 10**9), ("1.5MiB", 3 * 2**19), ("7B", 7), (" 2TB", 2 * 10**12)],
)
def test_sizes_are_read_as_people_write_them(text: str, size: int) -> None:
    assert parse_bytes(text) == size


@pytest.mark.parametrize("text", ["80", "GiB", "80 gigabytes", "-1GiB", "80GiB!"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=rf"'{text}' is not a size such as 80GiB or 24GB"):
        parse_bytes(text)


@pytest.mark.parametrize(
    ("size", "text"), [(0, "0.00 B"), (1023, "1023.00 B"), (1536, "1.50 KiB"), (80 * GIB, "80.00 GiB")]
)
def test_sizes_are_written_as_people_read_them(size: int, text: str) -> None:
    assert format_bytes(size) == text


# -- the command -------------------------------------------------------------------------------------------------------

SMALL = ["--n-envs", "2", "--max-prompt-tokens", "16", "--max-new-tokens", "8", "--micro-batch-size", "48"]


def test_the_command_needs_a_configuration_and_nothing_else(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    QWEN.save_pretrained(tmp_path / "lm")
    LlamaConfig(**SIZES, num_labels=1).save_pretrained(tmp_path / "judge")
    models = ["--model", str(tmp_path / "lm"), "--reward-model", str(tmp_path / "judge")]
    assert cli.main(["plan", *models, *SMALL, "--memory", "1GiB"]) == 0
    table = capsys.readouterr().out
    reward_model = str(tmp_path / "judge")
    plan = plan_memory(str(tmp_path / "lm"), n_envs=2, max_length=24, micro_batch_size=48, reward_model=reward_model)
    assert table == plan.table(GIB) + "\n"


def test_the_page_on_memory_shows_what_the_command_prints(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """To 3 %: other versions of PyTorch and transformers may keep other tensors."""
    qwen = {
        "hidden_size": 2048, "intermediate_size": 11008, "num_hidden_layers": 36, "num_attention_heads": 16,
        "num_key_value_heads": 2, "vocab_size": 151936,
    }  # fmt: skip
    llama = {
        "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
        "num_key_value_heads": 8, "vocab_size": 128256,
    }  # fmt: skip
    Qwen2Config(**qwen, tie_word_embeddings=True).save_pretrained(tmp_path / "qwen")
    LlamaConfig(**llama, num_labels=1, dtype="bfloat16").save_pretrained(tmp_path / "llama")
    models = ["--model", str(tmp_path / "qwen"), "--reward-model", str(tmp_path / "llama")]
    assert cli.main(["plan", *models, "--memory", "80GiB"]) == 0
    printed = capsys.readouterr().out.splitlines()
    page = (Path(__file__).parents[1] / "docs" / "memory.md").read_text(encoding="utf-8")
    shown = page.partition("```text\n")[2].partition("\n```")[0].splitlines()
    for line, expected in zip(printed[:-1], shown[:-1], strict=True):
        (name, size), (expected_name, expected_size) = (re.split(r"  +(?=\d)", text) for text in (line, expected))
        assert name == expected_name
        assert parse_bytes(size) == pytest.approx(parse_bytes(expected_size), rel=0.03)
    assert printed[-1] == shown[-1]


def test_the_command_fails_where_it_does_not_fit(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["plan", "--model", "textgen_env:assets/lm", *SMALL, "--memory", "20MB"]) == 1
    output = capsys.readouterr()
    assert output.out.endswith("it does not fit\n")
    assert "What helps, most first: " in output.err


@pytest.mark.parametrize("option", ["--max-prompt-tokens", "--max-new-tokens"])
def test_the_command_refuses_negative_lengths_though_their_sum_is_positive(
    option: str, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["plan", "--model", "textgen_env:assets/lm", *SMALL, "--memory", "1GiB"]
    assert cli.main([*command, option, "-4"]) == 1
    assert f"{option} must be at least 1, got -4" in capsys.readouterr().err


def test_the_command_plans_for_the_cpu_of_this_machine(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["plan", "--model", "textgen_env:assets/lm", *SMALL, "--device", "cpu"]) == 0
    assert "available" in capsys.readouterr().out


def test_the_command_asks_for_the_memory_of_a_gpu_that_is_not_here(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(th.cuda, "is_available", lambda: False)
    assert cli.main(["plan", "--model", "textgen_env:assets/lm", *SMALL]) == 0
    assert capsys.readouterr().out.endswith("the memory of cuda is not known here: pass --memory\n")


def test_large_models_have_adapters_in_bfloat16_unless_asked_otherwise(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(adapters_module, "LORA_FROM", 100_000)
    monkeypatch.setattr(onednn, "is_faster", lambda: True)
    QWEN.save_pretrained(tmp_path)
    command = ["plan", "--model", str(tmp_path), *SMALL, "--memory", "1GiB"]
    planned = {"n_envs": 2, "max_length": 24, "micro_batch_size": 48}
    for arguments, expected in (
        ([], {"lora": {}, "dtype": th.bfloat16}),
        (["--device", "cpu"], {"lora": {}, "packs": True}),
        (["--lora-rank", "4"], {"lora": {"r": 4}, "dtype": th.bfloat16}),
        (["--dtype", "float32"], {"lora": {}}),
        (["--full"], {"lora": None}),
    ):
        assert cli.main([*command, *arguments]) == 0
        assert capsys.readouterr().out == small_plan(**planned | expected).table(GIB) + "\n"


def test_the_constructor_refuses_what_does_not_fit_before_anything_is_loaded(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """There are no weights in the folder: loading would be another error."""
    folder = tmp_path / "large"
    shutil.copytree(resolve("textgen_env:assets/lm"), folder, ignore=shutil.ignore_patterns("*.safetensors"))
    monkeypatch.setattr(adapters_module, "LORA_FROM", 1000)
    monkeypatch.setattr(policy_module, "LORA_FROM", 1000)
    monkeypatch.setattr(plan_module, "available_memory", lambda device: 2**20)
    with pytest.raises(ValueError, match=r"the run takes .* of memory, and 1.00 MiB are available.*n_envs"):
        SAFE("TextGenEnv-v0", env_kwargs={"model": str(folder), "max_prompt_tokens": 16, "max_new_tokens": 8})
    monkeypatch.setattr(plan_module, "available_memory", lambda device: 2**34)
    with pytest.raises(ValueError, match="cannot be loaded"):
        SAFE("TextGenEnv-v0", env_kwargs={"model": str(folder), "max_prompt_tokens": 16, "max_new_tokens": 8})


@pytest.mark.parametrize(
    ("chosen", "planned"), [({}, 4096), ({"micro_batch_size": 100}, 100), ({"micro_batch_size": None}, 4 * 24)]
)
def test_the_constructor_plans_with_the_pieces_that_the_buffer_makes(
    chosen: dict[str, Any], planned: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a limit: two thirds of a rollout of six texts that fill their slots."""
    monkeypatch.setattr(policy_module, "LORA_FROM", 1000)
    sizes: list[int] = []
    monkeypatch.setattr(plan_module, "plan_memory", lambda *_, micro_batch_size, **__: sizes.append(micro_batch_size))
    monkeypatch.setattr(plan_module, "available_memory", lambda device: None)
    model = SAFE(
        "TextGenEnv-v0", env_kwargs={"max_prompt_tokens": 16, "max_new_tokens": 8}, n_envs=6, n_steps=9, batch_size=36,
        rollout_buffer_kwargs=chosen, policy_kwargs={"lora": False},
    )  # fmt: skip
    assert sizes == [planned]
    assert model.rollout_buffer.micro_batch_size == chosen.get("micro_batch_size", 4096)


@pytest.mark.parametrize(("stored", "dtype"), [("bfloat16", th.bfloat16), (None, th.float32)])
def test_the_constructor_plans_with_the_precision_that_auto_stands_for(
    stored: str | None, dtype: th.dtype, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    folder = tmp_path / "large"
    shutil.copytree(resolve("textgen_env:assets/lm"), folder, ignore=shutil.ignore_patterns("*.safetensors"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"dtype": stored}))
    monkeypatch.setattr(policy_module, "LORA_FROM", 1000)
    planned: list[th.dtype] = []

    def spy(*_: Any, dtype: th.dtype, **__: Any) -> None:
        planned.append(dtype)
        raise ValueError("enough")

    monkeypatch.setattr(plan_module, "plan_memory", spy)
    kwargs = {"model": str(folder), "max_prompt_tokens": 16, "max_new_tokens": 8, "model_kwargs": {"dtype": "auto"}}
    with pytest.raises(ValueError, match="cannot be loaded"), pytest.warns(UserWarning, match="enough"):
        SAFE("TextGenEnv-v0", env_kwargs=kwargs)
    assert planned == [dtype]
