"""The pages of the reference, from the docstrings of the public names."""

import importlib
import inspect
import re
import sys

import avq_jax

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


def undocumented(package):
    """Public names of a package, and public methods of its classes, without a docstring."""
    module = importlib.import_module(package)
    for name in public_names(module):
        value = getattr(module, name)
        # Aliases of types carry the text of the type; they have no docstring of their own.
        if not (inspect.isclass(value) or callable(value)) or not hasattr(value, "__module__"):
            continue
        if not value.__module__.startswith(module.__name__.partition(".")[0]):
            continue
        text = inspect.getdoc(value)
        if not text or text.startswith(f"{name}("):  # what dataclass and NamedTuple make up
            yield f"{module.__name__}.{name}"
        if inspect.isclass(value):
            for part, member in vars(value).items():
                shown = inspect.isfunction(member) or isinstance(member, property)
                generated = part in getattr(value, "_fields", ())
                if shown and not part.startswith("_") and not generated:
                    missing = not inspect.getdoc(member)
                    yield from [f"{module.__name__}.{name}.{part}"] if missing else []


def home(package, name):
    """Where a name is documented: its package, or for an alias the module that assigns it."""
    value = getattr(sys.modules[package], name)
    if inspect.isclass(value) or inspect.isroutine(value) or hasattr(value, "__wrapped__"):
        return package
    for module_name, module in sorted(sys.modules.items()):
        own = module_name.startswith(f"{package}.") and getattr(module, name, None) is value
        if own and re.search(rf"^{name}\b.*=", inspect.getsource(module), re.M):
            return module_name
    return package


def pages():
    """One page a package: a table of its names, then their docstrings."""
    described, found = set(), {}
    for page, (module_name, title) in PACKAGES.items():
        module = importlib.import_module(module_name)
        names = []
        for name in public_names(module):
            flat = getattr(avq_jax, name, None) is getattr(module, name)
            names.append(f"avq_jax.{name}" if flat else f"{home(module_name, name)}.{name}")
        lines = [title, "=" * len(title), "", inspect.getdoc(module) or "", ""]
        lines += [".. autosummary::", "   :nosignatures:", ""]
        # A summary table cannot hold aliases: they are no objects of their own.
        lines += [f"   {name}" for name in names if name.count(".") <= module_name.count(".") + 1]
        lines += [""]
        for name in [name for name in names if name not in described]:
            described.add(name)
            value = getattr(module, name.rpartition(".")[2])
            if inspect.isclass(value):
                lines += [f".. autoclass:: {name}", "   :members:", ""]
            elif inspect.isroutine(value) or hasattr(value, "__wrapped__"):
                lines += [f".. autofunction:: {name}", ""]
            else:
                lines += [f".. autodata:: {name}", ""]
        found[page] = "\n".join(lines)
    return found


def write(path, text):
    """Write a page only where it differs, so that Sphinx does not read it again."""
    path.parent.mkdir(exist_ok=True)
    if not path.exists() or path.read_text() != text:
        path.write_text(text)
