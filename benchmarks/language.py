"""Speed on text: SAFE against `generate()`, the paper's published trainer, TRL's last PPO, and one row per token.

    python benchmarks/language.py [--sizes 5M 25M 100M] [--repeats 5] [--published DIR] [--trl DIR]

Models of Qwen2's architecture with random weights, 32 rows, prompts of 32 tokens, up to 64 new ones; all texts equally
long, or ending at random after 22 tokens on average. One process a contender, one thread each, asked in turns to write
and train; CPU seconds. Only tokens up to the end token count. Results go to benchmarks/results/language-cpu.json, where
those of other sizes are kept.

The published trainer and TRL are given as folders (see language_peers.py), and left out where they are not.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import textgen_env
from reporting import markdown
from runs import versions

import sb3_safe

RESULTS = Path(__file__).parent / "results"
SIZES = ("5M", "25M", "100M")
LENGTHS = ("equal", "spread")
PACKAGES = ("torch", "transformers", "stable-baselines3")
CONTENDERS = ("generate", "safe", "ppo-fixed-kl", "ppo", "row-per-token", "published", "trl")

Row = dict[str, float]
Rows = dict[str, list[Row]]
"""Contender -> measurements, one a repeat."""


def make(contender: str, task: Any, scratch: Path, published: Path | None, trl: Path | None) -> Any:
    """What a worker measures."""
    import language_peers
    import language_safe

    if contender == "generate":
        return language_peers.Generate(task, scratch)
    if contender == "published":
        return language_peers.Published(task, scratch, published)
    if contender == "trl":
        return language_peers.Trl(task, scratch, trl)
    model = task.model(scratch)
    if contender == "row-per-token":
        return language_safe.RowPerToken(language_safe.make_safe(task, model))
    return language_safe.Safe(task, language_safe.make_safe(task, model, contender))


def work(arguments: argparse.Namespace) -> None:
    """A worker: measures once for every line that it reads."""
    answers, sys.stdout = sys.stdout, sys.stderr  # some contenders are talkative
    import torch as th
    from language_models import Task

    th.set_num_threads(1)
    contender, size, lengths = arguments.work
    measured = make(contender, Task(size, lengths), arguments.scratch, arguments.published, arguments.trl)
    for _ in sys.stdin:
        print(json.dumps(measured.measure()), file=answers, flush=True)


class Worker:
    """A contender in a process of its own."""

    def __init__(self, contender: str, size: str, lengths: str, arguments: argparse.Namespace) -> None:
        command = [sys.executable, "-W", "ignore", __file__, "--work", contender, size, lengths]
        for option in ("scratch", "published", "trl"):
            value = getattr(arguments, option)
            command += [f"--{option}", str(value)] if value is not None else []
        environment = os.environ | {"OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1", "TRL_EXPERIMENTAL_SILENCE": "1"}
        self._errors = tempfile.TemporaryFile("w+")
        self._process = subprocess.Popen(
            command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors, text=True
        )

    def measure(self) -> Row:
        """One measurement.

        :raises RuntimeError: the worker broke down, with the last line that it wrote.
        """
        assert self._process.stdin is not None and self._process.stdout is not None
        try:
            self._process.stdin.write("\n")
            self._process.stdin.flush()
            answer = self._process.stdout.readline()
        except BrokenPipeError:
            answer = ""
        if not answer:
            self._errors.seek(0)
            raise RuntimeError(self._errors.read().strip().rpartition("\n")[2])
        row: Row = json.loads(answer)
        return row

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.communicate()
        self._errors.close()


def measure(size: str, lengths: str, arguments: argparse.Namespace) -> Rows:
    """All contenders on one task, in turns; the first turn is warm-up."""
    workers: dict[str, Worker] = {}
    rows: Rows = {}
    try:
        for contender in arguments.contenders:
            worker = workers[contender] = Worker(contender, size, lengths, arguments)
            try:
                worker.measure()
            except RuntimeError as error:
                print(f"{contender} on {size}/{lengths} is left out: {error}", flush=True)
                workers.pop(contender).close()
        rows = {contender: [] for contender in workers}
        for _ in range(arguments.repeats):
            for contender, worker in workers.items():
                rows[contender].append(worker.measure())
    finally:
        for worker in workers.values():
            worker.close()
    return rows


# -- figures -----------------------------------------------------------------------------------------------------------


def ratios(rows: Rows, mean_length: float) -> dict[str, float]:
    """SAFE's tokens per second over those of others, on one task.

    :param mean_length: new tokens that a text has on average.
    """

    def seconds(contender: str, part: str = "seconds") -> float:
        return statistics.median(row[part] for row in rows[contender])

    def rate(contender: str) -> float:
        # A batch takes as long as its longest text, whatever the others' lengths happen to be.
        return rows[contender][0]["texts"] * mean_length / seconds(contender)

    tokens, found = rows["safe"][0]["tokens"], {}
    if "generate" in rows:
        found["rollout / generate()"] = tokens / seconds("safe", "rollout") / rate("generate")
    for peer in ("published", "trl"):
        if peer in rows:
            found[f"iteration / {peer}"] = tokens / seconds("safe") / rate(peer)
    if "row-per-token" in rows:
        passes, one = 2, rows["row-per-token"][0]["tokens"] / seconds("row-per-token")
        found["update / row per token"] = passes * tokens / seconds("safe", "update") / one
    for other in ("ppo-fixed-kl", "ppo"):
        if other in rows:
            found[f"iteration / {other}"] = seconds(other) / seconds("safe")
    return found


def shares(rows: Rows) -> dict[str, float]:
    """What SAFE's iteration has beyond one of PPO without a KL penalty, as shares of it, timed within it."""
    return {
        f"share of {part}": statistics.median(row.get(part, 0.0) / row["seconds"] for row in rows["safe"])
        for part in ("controller", "penalty", "bound", "head", "reference")
    }


def measured_length(rows: Rows) -> float:
    """New tokens that a text had on average."""
    texts = [row for measured in rows.values() for row in measured if "texts" in row]
    return sum(row["tokens"] for row in texts) / sum(row["texts"] for row in texts)


def table(results: dict[str, Any]) -> str:
    """Markdown."""
    from language_models import Task

    figures = {}
    for name, result in results.items():
        rows = result["contenders"]
        if "safe" in rows:
            found = ratios(rows, Task(*name.split("/")).mean_length) | shares(rows)
            figures[name] = found | {"tokens a text": measured_length(rows)}
    lines: list[list[str]] = []
    for label in dict.fromkeys(label for found in figures.values() for label in found):
        form = "{:.1%}" if label.startswith("share") else "{:.2f}"
        cells = [form.format(found[label]) if label in found else "" for found in figures.values()]
        lines.append([label, *cells])
    return markdown(["", *figures], lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", default=SIZES)
    parser.add_argument("--lengths", nargs="+", choices=LENGTHS, default=LENGTHS)
    parser.add_argument("--contenders", nargs="+", choices=CONTENDERS, default=CONTENDERS)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--published", type=Path, help="a checkout of the paper's code")
    parser.add_argument("--trl", type=Path, help="a folder with TRL 1.12.0 or older")
    parser.add_argument("--scratch", type=Path, default=Path(tempfile.gettempdir()) / "sb3_safe_language")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="cuda: see language_gpu.py")
    parser.add_argument("--tiny", action="store_true", help="what --device cuda does, on tiny models and the CPU")
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/language-<device>.json")
    parser.add_argument("--work", nargs=3, metavar=("CONTENDER", "SIZE", "LENGTHS"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.work:
        work(arguments)
        return
    if arguments.out is None:
        folder = arguments.scratch if arguments.tiny else RESULTS
        arguments.out = folder / f"language-{arguments.device}.json"
    if arguments.device == "cuda" or arguments.tiny:
        import language_gpu

        language_gpu.run(arguments)
        return
    absent = [peer for peer in ("published", "trl") if getattr(arguments, peer) is None]
    arguments.contenders = [contender for contender in arguments.contenders if contender not in absent]
    results: dict[str, Any] = {}
    if arguments.out.exists():
        results = json.loads(arguments.out.read_text(encoding="utf-8"))
    for size in arguments.sizes:
        for lengths in arguments.lengths:
            rows = measure(size, lengths, arguments)
            results[f"{size}/{lengths}"] = {"versions": versions(PACKAGES, sb3_safe, textgen_env), "contenders": rows}
            arguments.out.parent.mkdir(parents=True, exist_ok=True)
            arguments.out.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
            print(f"after {size}/{lengths}:\n{table(results)}\n", flush=True)


if __name__ == "__main__":
    main()
