"""What the documentation shows runs; every public name is on a page of the reference."""

import doctest
import re
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"


def blocks(page, language):
    return re.findall(rf"^```{language}\n(.*?)^```", (DOCS / page).read_text(), re.M | re.S)


@pytest.mark.full
def test_snippets_for_users_of_scann_and_faiss():
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


@pytest.mark.full
def test_examples_of_errors():
    pages = blocks("errors.md", "pycon")
    assert pages
    test = doctest.DocTestParser().get_doctest("\n".join(pages), {}, "errors.md", "errors.md", 0)
    flags = doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS
    result = doctest.DocTestRunner(optionflags=flags).run(test)
    assert result.failed == 0
    assert result.attempted > 15


@pytest.mark.parametrize("page", ["coming_from.md", "errors.md", "index.md", "notebooks.md"])
def test_names_and_links_exist(page):
    import avq_jax

    text = (DOCS / page).read_text()
    for link in re.findall(r"\]\((?!http)([^)#]+)\)", text):
        target = DOCS / link
        assert target.exists() or link.startswith("api/"), link
    for name in re.findall(r"avq_jax\.([a-z_]+)\(", text):
        assert name in avq_jax.__all__, name
