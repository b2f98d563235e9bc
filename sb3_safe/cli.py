"""The command ``sb3-safe``: one function per subcommand."""

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch as th

from sb3_safe.callbacks import ROWS_FILE, SAMPLES_FILE, numbered_json_lines
from sb3_safe.presets import preset
from sb3_safe.report import is_row, write_report


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a subcommand.

    :param arguments: of the command line; ``None``: the program's own.
    :return: exit code: 0, or 1 for an error that the user can mend, which is printed.
    """
    parser = argparse.ArgumentParser(prog="sb3-safe", description="Tools around SAFE for Stable-Baselines3.")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    _add_report(commands)
    _add_plan(commands)
    options = parser.parse_args(arguments)
    try:
        options.run(options)
    except (OSError, ValueError, ImportError) as error:
        print(f"sb3-safe: error: {error}", file=sys.stderr)
        return 1
    return 0


def _add_report(commands: Any) -> None:
    parser = commands.add_parser("report", help="write one HTML report that shows, or compares, runs")
    parser.add_argument("folders", nargs="+", type=Path, metavar="RUN_DIR", help="folder of a StabilityCallback")
    parser.add_argument("-o", "--output", type=Path, default=Path("report.html"), help="default: %(default)s")
    parser.set_defaults(run=_report)


def _report(options: argparse.Namespace) -> None:
    output: Path = options.output
    if output.is_dir():
        raise ValueError(f"--output must be a file, and {str(output)!r} is a folder: {str(output / 'report.html')!r}?")
    folders: list[Path] = options.folders
    samples_file = folders[0] / SAMPLES_FILE
    shows_texts = len(folders) == 1 and samples_file.exists()
    samples = _read(samples_file, "SampleCallback", _is_sample) if shows_texts else []
    runs = {name: _read_rows(folder) for name, folder in zip(_names(folders), folders, strict=True)}
    print(write_report(runs, output, samples, title=" · ".join(runs)))


def _read_rows(folder: Path) -> list[dict[str, Any]]:
    path = folder / ROWS_FILE
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder")
    if not path.exists():
        raise ValueError(f"{folder} has no {ROWS_FILE}; train with StabilityCallback({str(folder)!r})")
    rows = _read(path, "StabilityCallback", is_row)
    if not rows:
        raise ValueError(f"{path} has no complete row: its run did not finish a rollout")
    return rows


def _read(path: Path, writer: str, fits: Callable[[Any], bool]) -> list[dict[str, Any]]:
    """The lines of a file, refused where they are not what its writer writes."""
    rows = numbered_json_lines(path)
    for number, row in rows:
        if not fits(row):
            raise ValueError(f"{path}: line {number} was not written by {writer}")
    return [row for _, row in rows]


def _is_sample(sample: Any) -> bool:
    return (
        isinstance(sample, dict)
        and {"prompt", "completion"} <= sample.keys()
        and all(isinstance(sample.get(name), int | float) for name in ("timesteps", "reward"))
    )


def _names(folders: Sequence[Path]) -> list[str]:
    """The folders' last names; their paths where two have the same.

    :raises ValueError: a folder is there twice.
    """
    given: dict[Path, Path] = {}
    for folder in folders:
        first = given.setdefault(folder.resolve(), folder)
        if first is not folder:
            raise ValueError(f"{first} and {folder} are the same folder: name each run once")
    names = [folder.resolve().name for folder in folders]
    return names if len(set(names)) == len(names) else [str(folder) for folder in folders]


def _add_plan(commands: Any) -> None:
    settings = preset("TextGenEnv-v0", {"model": None})
    parser = commands.add_parser("plan", help="say what training a language model takes in memory, loading nothing")
    parser.add_argument("--model", required=True, metavar="NAME", help="hub name, folder or package:folder")
    parser.add_argument("--reward-model", metavar="NAME", help="likewise, a sequence classifier")
    trained = parser.add_mutually_exclusive_group()
    trained.add_argument("--lora-rank", type=int, metavar="R", help="train adapters of this rank")
    trained.add_argument("--full", action="store_true", help="train the model itself, however large")
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), help="of the model's weights")
    parser.add_argument("--gradient-checkpointing", action="store_true", help="keep no activations within layers")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="default: %(default)s")
    parser.add_argument("--memory", metavar="SIZE", help="of that device, as 80GiB; default: what is free on it here")
    for name, default, meaning in (
        ("--n-envs", settings["n_envs"], "texts written side by side"),
        ("--max-prompt-tokens", settings["env_kwargs"]["max_prompt_tokens"], "longest prompt"),
        ("--max-new-tokens", settings["env_kwargs"]["max_new_tokens"], "longest completion"),
        ("--micro-batch-size", settings["rollout_buffer_kwargs"]["micro_batch_size"], "tokens trained on at a time"),
        ("--reward-batch-size", 32, "texts scored at a time"),
        ("--n-critics", 2, "value heads"),
    ):
        parser.add_argument(name, type=int, default=default, metavar="N", help=f"{meaning}; default: %(default)s")
    parser.set_defaults(run=_plan)


def _plan(options: argparse.Namespace) -> None:
    # Imported on demand: transformers takes seconds.
    from sb3_safe.language.adapters import lora_arguments
    from sb3_safe.language.onednn import is_faster
    from sb3_safe.language.plan import available_memory, check_memory, parse_bytes, plan_memory

    # Of these the plan sees the sum alone.
    for option, tokens in (
        ("--max-prompt-tokens", options.max_prompt_tokens),
        ("--max-new-tokens", options.max_new_tokens),
    ):
        if tokens < 1:
            raise ValueError(f"{option} must be at least 1, got {tokens}")
    available = available_memory(options.device) if options.memory is None else parse_bytes(options.memory)
    if options.lora_rank is not None:
        lora: dict[str, Any] | None = {"r": options.lora_rank}
    else:
        lora = lora_arguments(False if options.full else "auto", options.model, {})
    on_cpu = options.device == "cpu"
    plan = plan_memory(
        options.model,
        n_envs=options.n_envs,
        max_length=options.max_prompt_tokens + options.max_new_tokens,
        micro_batch_size=options.micro_batch_size,
        lora=lora,
        dtype=getattr(th, options.dtype or ("float32" if on_cpu or lora is None else "bfloat16")),
        gradient_checkpointing=options.gradient_checkpointing,
        n_critics=options.n_critics,
        reward_model=options.reward_model,
        reward_batch_size=options.reward_batch_size,
        reward_dtype=th.float32 if on_cpu else None,
        packs=on_cpu and is_faster(),
    )
    print(plan.table(available))
    if available is None:
        print(f"the memory of {options.device} is not known here: pass --memory")
    else:
        check_memory(plan, available)
