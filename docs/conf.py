"""Sphinx: pages beside this file, the notebooks, and one page of reference for each package.

AVQ_DOCS_EXECUTE=off builds without running the notebooks.
"""

import importlib
import inspect
import os
import pathlib
import re
import shutil
import sys

from sphinx.errors import ExtensionError

import avq_jax

HERE = pathlib.Path(__file__).parent
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
exclude_patterns = ["conf.py"]
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
suppress_warnings = ["myst.header"]  # sections of the README start at its third level

autosummary_generate = False
autodoc_typehints = "none"  # shapes and dtypes are told in Args, where they can be read
autodoc_member_order = "bysource"
python_maximum_signature_line_length = 80
napoleon_numpy_docstring = False
napoleon_use_rtype = False
napoleon_use_ivar = True
toc_object_entries_show_parents = "hide"

PACKAGES = {
    "loss": ("avq_jax.loss", "The score-aware loss (section 3)"),
    "quantization": ("avq_jax.quantization", "Codebooks and codes (section 4)"),
    "mips": ("avq_jax.mips", "The search engine (sections 2 and 5.3)"),
    "layers": ("avq_jax.layers", "Inside a model"),
    "serving": ("avq_jax.serving", "Serving"),
    "evaluation": ("avq_jax.evaluation", "Evaluation (sections 5 and 7.8)"),
    "xla_kernels": ("xla_kernels", "Kernels"),
}


def public_names(module):
    """Public names of a package: its ``__all__``, or what it imports from its own modules."""
    if hasattr(module, "__all__"):
        return list(module.__all__)
    return [
        name
        for name, value in vars(module).items()
        if not name.startswith("_")
        and not inspect.ismodule(value)
        and str(getattr(value, "__module__", "")).startswith(module.__name__)
    ]


def undocumented(module):
    """Public names of a package, and public methods of its classes, without a docstring."""
    for name in public_names(module):
        value = getattr(module, name)
        # Aliases of types carry the text of the type; they have no docstring of their own.
        if not (inspect.isclass(value) or callable(value)) or not hasattr(value, "__module__"):
            continue
        if not value.__module__.startswith(("avq_jax", "xla_kernels")):
            continue
        text = inspect.getdoc(value)
        if not text or text.startswith(f"{name}("):  # what dataclass and NamedTuple make up
            yield f"{module.__name__}.{name}"
        if inspect.isclass(value):
            for part, member in vars(value).items():
                shown = inspect.isfunction(member) or isinstance(member, property)
                generated = part in getattr(value, "_fields", ()) or part in ("_replace", "_asdict")
                named = shown and not part.startswith("_") and not generated
                if named and not inspect.getdoc(member):
                    yield f"{module.__name__}.{name}.{part}"


def home(package, name):
    """Where a name is documented: its package, or for an alias the module that assigns it."""
    value = getattr(sys.modules[package], name)
    if inspect.isclass(value) or inspect.isroutine(value) or hasattr(value, "__wrapped__"):
        return package
    for module_name, module in sorted(sys.modules.items()):
        if not module_name.startswith(f"{package}.") or getattr(module, name, None) is not value:
            continue
        if re.search(rf"^{name}\b.*=", inspect.getsource(module), re.M):
            return module_name
    return package


def write_reference():
    """One page a package: a table of its names, then their docstrings."""
    missing, described = [], set()
    for page, (module_name, title) in PACKAGES.items():
        module = importlib.import_module(module_name)
        missing += undocumented(module)
        names = []
        for name in public_names(module):
            flat = getattr(avq_jax, name, None) is getattr(module, name)
            names.append(f"avq_jax.{name}" if flat else f"{home(module_name, name)}.{name}")
        lines = [title, "=" * len(title), "", inspect.getdoc(module) or "", ""]
        lines += [".. autosummary::", "   :nosignatures:", ""]
        lines += [f"   {name}" for name in names] + [""]
        for name in [name for name in names if name not in described]:
            described.add(name)
            value = getattr(module, name.rpartition(".")[2])
            if inspect.isclass(value):
                lines += [f".. autoclass:: {name}", "   :members:", ""]
            elif inspect.isroutine(value) or (callable(value) and hasattr(value, "__wrapped__")):
                lines += [f".. autofunction:: {name}", ""]
            else:
                lines += [f".. autodata:: {name}", ""]
        write(HERE / "api" / f"{page}.rst", "\n".join(lines))
    if missing:
        raise ExtensionError(f"public names without a docstring: {', '.join(missing)}")


def write(path, text):
    """Write a page only where it differs, so that Sphinx does not read it again."""
    path.parent.mkdir(exist_ok=True)
    if not path.exists() or path.read_text() != text:
        path.write_text(text)


def copy_notebooks():
    """Sphinx reads only below this folder."""
    for source in sorted((ROOT / "notebooks").glob("[0-9]*.py")):
        target = HERE / "notebooks" / source.name
        target.parent.mkdir(exist_ok=True)
        if not target.exists() or target.read_text() != source.read_text():
            shutil.copyfile(source, target)


def escape_bars(app, what, name, obj, options, lines):
    """Norms like ||x|| in running text are not substitutions of reStructuredText."""
    for i, line in enumerate(lines):
        if not line.lstrip().startswith(">>>") and ".. math" not in line:
            parts = re.split(r"(``[^`]*``|:math:`[^`]*`|`[^`]*`)", line)
            lines[i] = "".join(
                p if p.startswith(("`", ":")) else p.replace("|", r"\|") for p in parts
            )


def skip(app, what, name, obj, skipped, options):
    """Leave out the fields of named tuples, whose class docstring tells what they are."""
    text = inspect.getdoc(obj) or ""
    return True if text.startswith("Alias for field number") else None


def shorten(app, what, name, obj, options, signature, annotation):
    """Leave out the static field that tells the weight families apart; it is never passed."""
    return (re.sub(r", \*, family='\w+'|\*, family='\w+'", "", signature or ""), annotation)


write_reference()
copy_notebooks()


def setup(app):
    """Connect the hooks."""
    app.connect("autodoc-process-docstring", escape_bars)
    app.connect("autodoc-process-signature", shorten)
    app.connect("autodoc-skip-member", skip)
