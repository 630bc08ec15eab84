"""What the documentation shows runs; every public name is on a page of the reference."""

import doctest
import importlib.util
import re
import sys
import types
from pathlib import Path

import jax
import numpy as np
import pytest

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"


def load(path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def reference():
    return load(DOCS / "reference.py")


class TestReference:
    def test_every_public_name_is_documented(self, reference):
        for package, _ in reference.PACKAGES.values():
            assert list(reference.undocumented(package)) == []

    def test_every_public_name_is_on_a_page(self, reference):
        import avq_jax

        text = "\n".join(reference.pages().values())
        for name in avq_jax.__all__:
            assert re.search(rf"auto(class|function):: avq_jax\.{name}$", text, re.M), name

    def test_what_is_not_documented_is_found(self, reference, monkeypatch):
        module = types.ModuleType("avq_jax_fake")
        source = """
import dataclasses
def told(): "Told."
def untold(): pass
@dataclasses.dataclass
class Untold:
    x: int
class Told:
    "Told."
    def untold(self): pass
    @property
    def silent(self): return 1
    def _private(self): pass
"""
        exec(source, vars(module))
        for name in ("told", "untold", "Untold", "Told"):
            getattr(module, name).__module__ = "avq_jax_fake"
        module.__all__ = ["Told", "Untold", "told", "untold"]
        monkeypatch.setitem(sys.modules, "avq_jax_fake", module)
        assert set(reference.undocumented("avq_jax_fake")) == {
            "avq_jax_fake.Told.silent",
            "avq_jax_fake.Told.untold",
            "avq_jax_fake.Untold",
            "avq_jax_fake.untold",
        }


class TestReadme:
    def test_its_tables_are_what_the_results_say(self):
        sys.path.insert(0, str(ROOT / "benchmarks"))
        try:
            report = load(ROOT / "benchmarks" / "report.py")
        finally:
            sys.path.remove(str(ROOT / "benchmarks"))
        text = (ROOT / "README.md").read_text()
        assert "<!-- paper: begin -->" in text
        assert "<!-- summary: begin -->\n|" in text
        marked = 0
        for name in report.PAGES:
            page = (ROOT / name).read_text()
            assert report.render(page) == page, name
            marked += len(re.findall(r"^<!-- ([\w-]+): begin -->\n[^<]", page, re.M))
        extra = len(("paper", "summary", "devices", "mosaic", "scale"))
        assert marked == len(report.TABLES) + extra

    def test_the_files_it_names_exist(self):
        text = (ROOT / "README.md").read_text()
        table = text.partition("<!-- paper: begin -->")[2].partition("<!-- paper: end -->")[0]
        tests = re.findall(r"`(tests/[\w/.]+)`", table)
        assert len(tests) > 8
        assert all((ROOT / name).exists() for name in tests)
        for row in re.findall(r"^\| .+ \| `.+` \| `.+` \| ([\d, ]+) \|", table, re.M):
            for number in row.split(", "):
                assert list((ROOT / "notebooks").glob(f"{number}_*.py")), number
        for name in re.findall(r"^\| `(\d\d_\w+)` \|", text, re.M):
            assert (ROOT / "notebooks" / f"{name}.py").exists(), name


def blocks(page, language):
    return re.findall(rf"^```{language}\n(.*?)^```", (DOCS / page).read_text(), re.M | re.S)


@pytest.fixture
def compiled_quickly():
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.mark.full
def test_snippets_for_users_of_scann_and_faiss(compiled_quickly):
    scope = {}
    found = blocks("coming_from.md", "python")
    assert len(found) > 4
    for block in found:
        exec(compile(block, "coming_from.md", "exec"), scope)
    index, x, found = scope["index"], scope["x"], scope["found"]
    assert (scope["mask"][found.ids]).all()
    assert (scope["ids"] >= 2**40).all()
    # The gradient of the best score by the query is the row that was found.
    slope = np.asarray(scope["slope"])
    assert abs(x - slope).sum(axis=1).min() < 1e-3
    assert index.num_leaves == 40


def test_examples_of_errors(compiled_quickly):
    pages = blocks("errors.md", "pycon")
    assert pages
    test = doctest.DocTestParser().get_doctest("\n".join(pages), {}, "errors.md", "errors.md", 0)
    flags = doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS
    result = doctest.DocTestRunner(optionflags=flags).run(test)
    assert result.failed == 0
    assert result.attempted > 15


@pytest.mark.parametrize(
    "page", ["coming_from.md", "errors.md", "index.md", "notebooks.md", "serving.md"]
)
def test_names_and_links_exist(page):
    import avq_jax

    text = (DOCS / page).read_text()
    for link in re.findall(r"\]\((?!http)([^)#]+)\)", text):
        # The site's build copies the notebooks and writes the reference.
        target = (ROOT if link.startswith("notebooks/") else DOCS) / link
        assert target.exists() or link.startswith("api/"), link
    for name in re.findall(r"avq_jax\.([a-z_]+)\(", text):
        assert name in avq_jax.__all__, name
