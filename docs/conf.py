"""Sphinx: the pages of this folder, the API from its docstrings, the notebooks as they were saved.

.venv/bin/pip install -c constraints.txt -e '.[docs]'
.venv/bin/sphinx-build -W --keep-going docs build/docs
.venv/bin/python docs/check_links.py build/docs
"""

import re
from pathlib import Path
from typing import Any

import pipeinfer_dask

project = "pipeinfer_dask"
author = "The pipeinfer_dask authors"
project_copyright = author
release = pipeinfer_dask.__version__
version = release

extensions = [
    "myst_nb",
    "numpydoc",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx_copybutton",
]
# Single backticks in docstrings name objects; what is none stays text.
default_role = "autolink"
autodoc_member_order = "bysource"
autodoc_typehints = "none"  # numpydoc sections say it, in words and with units
templates_path = ["_templates"]
numpydoc_show_class_members = False  # autodoc shows them

# Notebooks carry the outputs that they were saved with; a test runs them.
nb_execution_mode = "off"
nb_mime_priority_overrides = [
    ("html", "application/vnd.jupyter.widget-view+json", None),
]
myst_enable_extensions = ["colon_fence", "deflist"]
myst_heading_anchors = 3

html_theme = "pydata_sphinx_theme"
html_title = "pipeinfer_dask"
html_theme_options = {
    "navigation_with_keys": False,
    "show_prev_next": True,
    "show_toc_level": 2,
    "header_links_before_dropdown": 6,
}
html_copy_source = False
html_show_sourcelink = False
copybutton_exclude = ".linenos, .gp, .go"


def unreleased(app, docname, source):
    """Put what lies in changelog.d/ at the end of the changelog."""
    if docname == "changelog":
        folder = Path(app.srcdir).parent / "changelog.d"
        changes = sorted(path.read_text(encoding="utf-8") for path in folder.glob("*.md"))
        items = "".join(f"- {change}" for change in changes)
        if items:  # right after a release there are none
            source[0] += f"\n## Not released yet\n\n{items}"


def setup(app):
    app.connect("source-read", unreleased)
    app.connect("source-read", _link_lessons)


def _link_lessons(_: Any, name: str, source: list[str]) -> None:
    # Lessons are reached through a link of the file system, which relative names do not survive.
    if name.startswith("notebooks/"):
        source[0] = re.sub(
            r"\[([^\[\]]+)\]\((\d\d_\w+)\.ipynb\)", r'<a href=\\"\2.html\\">\1</a>', source[0]
        )
