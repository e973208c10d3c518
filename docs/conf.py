"""Sphinx's configuration. The source directory is the checkout, so every relative link works here and in a browser."""

from __future__ import annotations

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

import generate  # noqa: E402

from splitbundle import __version__  # noqa: E402

generate.write(HERE / "generated")

project = "splitbundle"
author = "the splitbundle contributors"
version = release = __version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
root_doc = "docs/index"
include_patterns = [
    "docs/**",
    "spec/**",
    "SECURITY.md",
    "CHANGELOG.md",
    "benchmarks/NOTES.md",
    "benchmarks/results/*.md",
    "tests/README.md",
    "tests/conformance/README.md",
]
exclude_patterns = [".*", "build", "dist", "docs/generated", "tests/golden", "tests/conformance/bundles"]

suppress_warnings = ["ref.python"]  # "bytes" is a type, and the name of attributes of several classes
nitpick_ignore_regex = [("py:.*", ".*")]  # links between pages are checked; names of types are text
myst_heading_anchors = 4
smartquotes = False  # or --json becomes a dash and a word
autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
autodoc_inherit_docstrings = False
autodoc_mock_imports = ["ray"]  # 300 MB that these pages don't need

html_theme = "furo"
html_title = f"splitbundle {__version__}"
html_additional_pages = {"index": "redirect.html"}
templates_path = ["templates"]
html_copy_source = False
html_show_copyright = False
