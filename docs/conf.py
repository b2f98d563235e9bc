"""Sphinx configuration: furo, MyST, and an API reference that has to be complete."""

import importlib
import inspect
from typing import Any

from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment
from sphinx.util import logging

import sb3_safe

project = "sb3-safe"
author = "the sb3-safe authors"
copyright = "2026, the sb3-safe authors"
release = version = sb3_safe.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.mathjax"]
myst_enable_extensions = ["amsmath", "colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 3
exclude_patterns = ["_build"]

html_theme = "furo"
html_title = f"sb3-safe {release}"
html_copy_source = False

# textgen_env writes single backticks in its docstrings.
default_role = "code"
autodoc_default_options = {"members": True, "member-order": "bysource", "show-inheritance": True}
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
autodoc_class_signature = "mixed"
add_module_names = False

# A cross-reference that leads nowhere fails the build (make docs passes -W). Only this project is looked up: the
# build must work offline.
nitpicky = True
nitpick_ignore_regex = [(r"py:.*", r"(?!sb3_safe|textgen_env).*")]

DOCUMENTED_FACES = ("sb3_safe", "sb3_safe.language", "textgen_env")


def undocumented(faces: tuple[str, ...], documented: set[str]) -> list[str]:
    """Public names of packages that are missing from a set of documented, fully qualified names."""
    missing = []
    for face in faces:
        module = importlib.import_module(face)
        for name in module.__all__:
            member = getattr(module, name)
            home = f"{member.__module__}.{member.__qualname__}" if hasattr(member, "__qualname__") else f"{face}.{name}"
            if not {home, f"{face}.{name}"} & documented:
                missing.append(f"{face}.{name}")
    return missing


def check_reference(app: Sphinx, env: BuildEnvironment) -> None:
    documented = set(env.domaindata["py"]["objects"])
    for name in undocumented(DOCUMENTED_FACES, documented):
        logging.getLogger(__name__).warning("%s is public but not in the API reference (docs/api)", name)


def skip_namedtuple_fields(app: Sphinx, what: str, name: str, member: Any, skip: bool, options: Any) -> bool | None:
    """Fields without a docstring of their own say only "Alias for field number ..."."""
    return True if (inspect.getdoc(member) or "").startswith("Alias for field number") else None


def setup(app: Sphinx) -> None:
    app.connect("env-check-consistency", check_reference)
    app.connect("autodoc-skip-member", skip_namedtuple_fields)
