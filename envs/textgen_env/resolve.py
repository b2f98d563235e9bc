"""Names of models and files that ship inside a Python package."""

import os
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path
from typing import Any


def as_name(source: Any) -> Any:
    """A path as the string of it, and a folder that there is by its absolute path; anything else as it is.

    A name is kept in files of models, which are loaded from other working directories.
    """
    name = os.fspath(source) if isinstance(source, os.PathLike) else source
    return os.path.abspath(name) if isinstance(name, str) and os.path.isdir(name) else name


def resolve(name: str) -> str:
    """The path behind `package:relative/path`; every other name is returned as it is.

    A name that exists on disk wins, and so does one whose part before the colon is no importable package (such as
    a drive letter).

    :param name: a hub name, a path, or `package:relative/path`.
    :raises FileNotFoundError: the package exists but has no such file or folder.
    """
    package, colon, inner = name.partition(":")
    if not colon or Path(name).exists() or not package.isidentifier() or find_spec(package) is None:
        return name
    path = files(package).joinpath(inner)
    if not (path.is_dir() or path.is_file()):
        raise FileNotFoundError(f"{name!r}: the package {package!r} has no {inner!r}")
    return str(path)


def find_folder(name: str) -> str:
    """What transformers loads something by: its folder, or its name on the hub.

    :param name: as for :func:`resolve`.
    :raises FileNotFoundError: it can only be a folder, and there is none; transformers would speak of the hub.
    """
    found = resolve(name)
    is_folder = Path(found).is_absolute() or found.startswith(".") or found.count("/") > 1  # the hub's have one at most
    if is_folder and not Path(found).exists():
        raise FileNotFoundError("there is no such folder")
    return found
