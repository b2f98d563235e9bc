"""Runs of a benchmark: what names one, its result file, and a pool of processes that does those that are missing.

A run is a process with one thread. It writes ``<out>/<setting>/<task>/<algorithm>/<seed>.json`` when it ends; finished
runs are skipped, so that a benchmark goes on where it was stopped.
"""

import hashlib
import importlib.metadata
import json
import math
import os
import platform
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import FrameType, ModuleType
from typing import Any, NamedTuple

import sb3_safe


class Run(NamedTuple):
    """What names a run; everything else about it follows."""

    setting: str
    task: str
    algorithm: str
    seed: int
    budget: int
    """Steps of the environment."""


Described = Callable[[Run], Mapping[str, Any]]
"""Everything that decides a run's outcome but the code, as JSON has it; a part of the run's result."""


# -- files -------------------------------------------------------------------------------------------------------------


def result_file(out: Path, run: Run) -> Path:
    """Where the result of a run is written."""
    return out / run.setting / run.task / run.algorithm / f"{run.seed}.json"


def is_done(path: Path, run: Run, described: Described) -> bool:
    """Whether a run has its result.

    :raises ValueError: there is one, of other settings than the run would have now.
    """
    if not path.exists():
        return False
    result, wanted = json.loads(path.read_text(encoding="utf-8")), described(run)
    differing = [name for name, value in wanted.items() if result.get(name) != json.loads(json.dumps(value))]
    if differing:
        raise ValueError(
            f"{path} was made with other {', '.join(differing)}; run with --replace, or with another --out"
        )
    return True


def write_json(path: Path, content: Any) -> None:
    """Write a file whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(path.suffix + ".tmp")
    temporary.write_text(json.dumps(content, separators=(",", ":")) + "\n", encoding="utf-8")
    os.replace(temporary, path)


class PartialResult:
    """The curve so far of a run that is under way, in a file beside that of its result, with the ending ``.partial``.

    :param result: file of the result; ``None``: nothing is written.
    """

    SECONDS = 30.0
    """Between two times that it is written."""

    def __init__(self, result: Path | None) -> None:
        self.path = None if result is None else result.with_suffix(".partial")
        self._written = time.monotonic()

    def update(self, curve: Callable[[], Any]) -> None:
        """Write it, if it is time.

        :param curve: makes it.
        """
        if self.path is not None and time.monotonic() - self._written > self.SECONDS:
            self._written = time.monotonic()
            write_json(self.path, {"curve": curve()})

    def remove(self) -> None:
        """The result is there."""
        if self.path is not None:
            self.path.unlink(missing_ok=True)


def short(value: Any) -> float | None:
    """A number as result files have it: six digits are enough, and JSON has no NaN."""
    if value is None or isinstance(value, int):
        return value
    return float(f"{value:.6g}") if math.isfinite(value) else None


# -- what a run tells of itself ----------------------------------------------------------------------------------------


def is_divergence(error: Exception) -> bool:
    """Whether an error says that training broke down.

    SB3's distributions refuse NaN with a ValueError, PyTorch's sampling with a RuntimeError. Any other is a mistake in
    a benchmark, not an outcome.
    """
    return re.search(r"invalid values|not finite|infinite|\bnan\b", str(error), re.IGNORECASE) is not None


def peak_mb() -> float | None:
    """Largest resident memory of this process so far, MiB; None where the system does not tell.

    Not ``getrusage``: its maximum is inherited from the process that started this one.
    """
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        return None
    found = re.search(r"VmHWM:\s+(\d+) kB", status)
    return round(int(found[1]) / 1024, 1) if found else None


def versions(packages: Sequence[str], *sources: ModuleType) -> dict[str, str]:
    """Of what a run depends on; of our own code a digest, which changes between releases.

    :param packages: by their names on PyPI.
    :param sources: packages all modules of which are digested.
    """
    digest = hashlib.sha256()
    for folder in (Path(source.__path__[0]) for source in sources):
        for path in sorted(folder.rglob("*.py")):
            digest.update(path.read_bytes())
    return {
        "python": platform.python_version(),
        **{name.replace("-", "_"): importlib.metadata.version(name) for name in packages},
        "sb3_safe": sb3_safe.__version__,
        "sb3_safe_source": digest.hexdigest()[:12],
        "machine": platform.machine(),
    }


def learn(model: Any, run: Run, recorder: Any) -> dict[str, Any]:
    """Train, up to the budget or to where it breaks down.

    :param model: the algorithm of the run, on its environment.
    :param run: which.
    :param recorder: a callback; its ``seconds_measuring``, in CPU seconds, are no part of what training costs.
    :return: the parts of a result that tell how far it came and what it cost.
    """
    wall, cpu, diverged = time.monotonic(), time.process_time(), None
    try:
        model.learn(run.budget, callback=recorder, log_interval=None)
    except (ValueError, FloatingPointError, RuntimeError) as error:
        if not is_divergence(error):
            raise
        diverged = str(error).splitlines()[0][:200]
    return {
        "timesteps": model.num_timesteps,
        "diverged": diverged,
        "wall_seconds": round(time.monotonic() - wall, 2),
        "cpu_seconds": round(time.process_time() - cpu - recorder.seconds_measuring, 2),
        "cpu_seconds_measuring": round(recorder.seconds_measuring, 2),
        "peak_mb": peak_mb(),
    }


# -- the pool ----------------------------------------------------------------------------------------------------------


def run_missing(
    runs: Iterable[Run],
    out: Path,
    script: Path,
    described: Described,
    workers: int = 2,
    time_limit: float | None = None,
    replace: bool = False,
) -> int:
    """Run what has no result yet, a few at a time, in the order given.

    :param runs: all that are wanted.
    :param out: folder of the results.
    :param script: makes one run; called with the run as JSON and the file of its result.
    :param described: tells whether a result that is there is of the run as it would be now.
    :param workers: runs under way at a time.
    :param time_limit: seconds after which no run is started any more.
    :param replace: make anew what was made with other settings.
    :return: how many runs failed.
    :raises ValueError: a result was made with other settings, and ``replace`` is not set.
    """
    waiting, skipped = [], 0
    for run in runs:
        path = result_file(out, run)
        try:
            if is_done(path, run, described):
                skipped += 1
                continue
        except ValueError:
            if not replace:
                raise
        waiting.append((run, path))
    print(f"{skipped} runs are done, {len(waiting)} to do", flush=True)
    deadline = time.monotonic() + (math.inf if time_limit is None else time_limit)
    running: dict[subprocess.Popen[str], tuple[Run, float]] = {}
    done = failed = 0
    total = len(waiting)

    def stop(*_: int | FrameType | None) -> None:
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, stop)
    try:
        while waiting or running:
            late = time.monotonic() > deadline
            if late and waiting:
                print(f"time limit: {len(waiting)} runs not started", flush=True)
                waiting = []
            while waiting and len(running) < workers:
                run, path = waiting.pop(0)
                running[_start(script, run, path)] = (run, time.monotonic())
            time.sleep(0.2)
            for process in [process for process in running if process.poll() is not None]:
                run, since = running.pop(process)
                done, failed = done + 1, failed + (process.returncode != 0)
                outcome = f"{time.monotonic() - since:.0f} s" if process.returncode == 0 else "FAILED"
                print(f"[{done}/{total}] {run.setting} {run.task} {run.algorithm} {run.seed}: {outcome}", flush=True)
    finally:
        for process in running:
            process.terminate()
    return failed


def exit_code(script: str, run_all: Callable[[], int]) -> int:
    """The exit code of a script that runs what is missing, after a message where it did not get to the end.

    :param script: its name.
    :param run_all: does it; the number of runs that failed.
    """
    try:
        return min(run_all(), 1)
    except ValueError as error:
        print(f"{script}: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; `run` goes on from here", file=sys.stderr)
        return 130


def _start(script: Path, run: Run, path: Path) -> subprocess.Popen[str]:
    """A run in a process of its own: one thread, a peak memory that is its own, errors that stop nothing else."""
    threads = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
    path.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-W", "ignore", str(script), json.dumps(run._asdict()), str(path)]
    return subprocess.Popen(command, env=os.environ | threads, text=True)
