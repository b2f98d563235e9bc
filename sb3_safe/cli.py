"""The command ``sb3-safe``: one function per subcommand."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sb3_safe.callbacks import ROWS_FILE, SAMPLES_FILE, read_json_lines
from sb3_safe.report import write_report


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a subcommand.

    :param arguments: of the command line; ``None``: the program's own.
    :return: exit code: 0, or 1 for an error that the user can mend, which is printed.
    """
    parser = argparse.ArgumentParser(prog="sb3-safe", description="Tools around SAFE for Stable-Baselines3.")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    _add_report(commands)
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
    folders: list[Path] = options.folders
    samples_file = folders[0] / SAMPLES_FILE
    samples = read_json_lines(samples_file) if len(folders) == 1 and samples_file.exists() else []
    runs = {name: _read_rows(folder) for name, folder in zip(_names(folders), folders, strict=True)}
    print(write_report(runs, options.output, samples, title=" · ".join(runs)))


def _read_rows(folder: Path) -> list[dict[str, Any]]:
    path = folder / ROWS_FILE
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder")
    if not path.exists():
        raise ValueError(f"{folder} has no {ROWS_FILE}; train with StabilityCallback({str(folder)!r})")
    rows = read_json_lines(path)
    if not rows:
        raise ValueError(f"{path} is empty: its run did not finish a rollout")
    return rows


def _names(folders: Sequence[Path]) -> list[str]:
    """The folders' last names; their paths where two have the same."""
    names = [folder.resolve().name for folder in folders]
    return names if len(set(names)) == len(names) else [str(folder) for folder in folders]


if __name__ == "__main__":
    sys.exit(main())
