"""Sphinx: pages beside this file, the notebooks, and one page of reference for each package.

AVQ_DOCS_EXECUTE=off builds without running the notebooks.
"""

import inspect
import os
import pathlib
import re
import sys

import jupytext
import sphinx.util.inspect
from sphinx.errors import ExtensionError

import avq_jax

HERE = pathlib.Path(__file__).parent
sys.path.insert(0, str(HERE))

import reference  # noqa: E402

ROOT = HERE.parent

project = "avq_jax"
author = "The avq_jax authors"
project_copyright = "The avq_jax authors"
release = version = avq_jax.__version__

extensions = [
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.napoleon",
    "sphinx.ext.mathjax",
    "myst_nb",
]
exclude_patterns = ["conf.py", "reference.py", "files"]
html_theme = "furo"
html_title = "avq_jax"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_copy_source = False

myst_enable_extensions = ["dollarmath", "colon_fence"]
myst_heading_anchors = 3
nb_custom_formats = {".py": ["jupytext.reads", {"fmt": "py:percent"}]}
nb_execution_mode = os.environ.get("AVQ_DOCS_EXECUTE", "cache")
nb_execution_cache_path = str(ROOT / "build" / "jupyter_cache")
nb_execution_timeout = 900
nb_execution_raise_on_error = True
nb_merge_streams = True

default_role = "literal"  # single backticks in docstrings are code
autosummary_generate = False
autodoc_typehints = "none"  # shapes and dtypes are told in Args, where they can be read
autodoc_member_order = "bysource"
python_maximum_signature_line_length = 80
napoleon_numpy_docstring = False
napoleon_use_rtype = False
napoleon_use_ivar = True
napoleon_attr_annotations = False  # likewise
toc_object_entries_show_parents = "hide"


def copy_notebooks():
    """Sphinx reads only below this folder; what readers run is a file beside the pages."""
    for source in sorted((ROOT / "notebooks").glob("[0-9]*.py")):
        text = source.read_text()
        reference.write(HERE / "notebooks" / source.name, text)
        notebook = jupytext.reads(text, fmt="py:percent")
        for number, cell in enumerate(notebook.cells):
            cell["id"] = f"cell-{number}"  # the same in every build
        plain = jupytext.writes(notebook, fmt="ipynb")
        reference.write(HERE / "files" / f"{source.stem}.ipynb", plain)


def escape_bars(app, what, name, obj, options, lines):
    """Norms like ||x|| in running text are not substitutions of reStructuredText."""
    kept = r"(``[^`]*``|`[^`]*`|^ *>>>.*$|^ *\.\. math::.*(?:\n(?: +.*)?)*)"  # code and formulas
    parts = re.split(kept, "\n".join(lines), flags=re.M)
    parts[::2] = [part.replace("|", r"\|") for part in parts[::2]]
    lines[:] = "".join(parts).split("\n")


def skip(app, what, name, obj, skipped, options):
    """Leave out the fields of named tuples, whose class docstring tells what they are."""
    text = inspect.getdoc(obj) or ""
    return True if text.startswith("Alias for field number") else None


def shorten(app, what, name, obj, options, signature, annotation):
    """Leave out the static field that tells the weight families apart; it is never passed."""
    if signature:
        return re.sub(r",? ?\*, family='\w+'", "", signature), annotation
    return None


# Functions that dispatch on a type would be listed once for each, always with the same arguments.
sphinx.util.inspect.is_singledispatch_function = lambda obj: False

missing = [
    name for package, _ in reference.PACKAGES.values() for name in reference.undocumented(package)
]
if missing:
    raise ExtensionError(f"public names without a docstring: {', '.join(missing)}")
for name, text in reference.pages().items():
    reference.write(HERE / "api" / f"{name}.rst", text)
copy_notebooks()


def setup(app):
    """Connect the hooks."""
    app.connect("autodoc-process-docstring", escape_bars)
    app.connect("autodoc-process-signature", shorten)
    app.connect("autodoc-skip-member", skip)
