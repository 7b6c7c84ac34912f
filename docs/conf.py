"""Sphinx: ``sphinx-build -W docs docs/_build``."""

from __future__ import annotations

import re
from typing import Any

import fbkernels

project = "fbkernels"
version = release = fbkernels.__version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode", "sphinxarg.ext"]
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = f"fbkernels {version}"
myst_heading_anchors = 3
autodoc_typehints = "none"  # the docstrings give dtypes and shapes, which types do not
autodoc_member_order = "bysource"
autodoc_inherit_docstrings = False  # torch's say nothing of these classes
html_show_copyright = False
smartquotes = False  # the options are --so
maximum_signature_line_length = 100
napoleon_numpy_docstring = False
napoleon_use_rtype = False
napoleon_custom_sections = [("Fields", "params_style")]


def link_sections(app: Any, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """``SPEC 4`` in a docstring is section 4 of method.md."""
    lines[:] = [re.sub(r"\bSPEC (\d)", r":ref:`SPEC \1 <spec-\1>`", line) for line in lines]


def setup(app: Any) -> None:
    app.connect("autodoc-process-docstring", link_sections)
