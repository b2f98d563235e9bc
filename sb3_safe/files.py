"""Files that are there as a whole or not at all."""

import os
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from io import BufferedIOBase
from pathlib import Path


@contextmanager
def replacing(path: str | Path) -> Iterator[BufferedIOBase]:
    """A file to write and read, which takes its place when all of it is there; until then what was there before stays.

    Its place, and what is said of it, are those of Stable-Baselines3's ``open_path``: a name without a suffix gets
    ``.zip``, missing folders are made, and beside a folder of that name the file is called ``..._2``. On the way it is
    called ``....partial``.

    :param path: where it will be.
    :raises OSError: it cannot be written. No part of it is left.
    """
    target = _target(Path(path))
    partial = Path(f"{target}.partial")
    try:
        with partial.open("w+b") as file:
            yield file
        if target.exists():
            shutil.copymode(target, partial)
        os.replace(partial, target)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def _target(path: Path) -> Path:
    if path.suffix == "":
        path = Path(f"{path}.zip")
    while path.is_dir():
        warnings.warn(f"Path '{path}' is a folder. Will save instead to {path}_2", stacklevel=5)
        path = Path(f"{path}_2")
    if not path.parent.exists():
        warnings.warn(f"Path '{path.parent}' does not exist. Will create it.", stacklevel=5)
        path.parent.mkdir(exist_ok=True, parents=True)
    path = Path(os.path.realpath(path))  # what a link points to is replaced, not the link
    if path.exists():
        path.open("r+b").close()  # one that may not be written stays
    return path
