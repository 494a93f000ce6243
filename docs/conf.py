"""How Sphinx makes the site, for `make docs`. Its source is the repository, so links mean the same here and there."""

from __future__ import annotations

import sys
from importlib.metadata import version as installed
from pathlib import Path

from sphinx.application import Sphinx

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY))

from infra import site  # noqa: E402 - it is found by the line above

project = "fnqueue"
author = "the fnqueue authors"
copyright = author  # noqa: A001 - Sphinx's name
release = version = installed("fnqueue")

extensions = ["myst_parser"]
root_doc = "docs/index"
include_patterns = ["docs/*.md", "docs/*/*.md", *site.BESIDE]
exclude_patterns = [".*", "build", "dist", "tests", "infra", "examples", "benchmarks"]

myst_heading_anchors = 5
myst_links_external_new_tab = False

html_theme = "furo"
html_title = f"fnqueue {release}"
html_static_path = ["site"]
html_css_files = ["site.css"]
html_copy_source = False
html_show_sourcelink = False
# Pages are read from disk and from inside a network, so they ask nobody else for anything.
html_theme_options = {"navigation_with_keys": True}
pygments_style = "default"
pygments_dark_style = "github-dark"


def setup(app: Sphinx) -> None:
    app.connect("source-read", lambda _app, name, source: source.__setitem__(0, site.read(name, source[0])))
    app.connect("build-finished", lambda app, error: error or site.finish(Path(app.outdir)))
