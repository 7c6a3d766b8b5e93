"""The documentation is right: its code runs, and it names everything there is.

The blocks of a page run in order, in one namespace and an empty directory:
``python`` runs; ``pycon`` is a doctest; ``python raises`` must raise a ValueError or a
TypeError whose message contains the ``text`` block after it, line breaks aside.
"""

import doctest
import inspect
import re
from itertools import pairwise
from pathlib import Path

import jax
import pytest

import jaxcomp as jc


ROOT = Path(__file__).parents[1]
PAGES = sorted((ROOT / "docs").glob("*.md"))
TEXT = "\n".join(page.read_text() for page in PAGES)
PAPERS = (ROOT / "docs" / "papers.md").read_text()
FENCE = re.compile(r"^```([^\n`]*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
FLAGS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE


def run_python(source, line, page, names):
    padded = "\n" * line + source  # so that a traceback has the page's line numbers
    exec(compile(padded, page, "exec"), names)


def run_doctest(source, line, page, names):
    test = doctest.DocTestParser().get_doctest(source, names, page, page, line)
    said = []
    doctest.DocTestRunner(verbose=False, optionflags=FLAGS).run(
        test, out=said.append, clear_globs=False
    )
    assert not said, "".join(said)
    names.update(test.globs)


def run_page(page):
    text = page.read_text()
    blocks = [(m[1], m[2], text.count("\n", 0, m.end(1))) for m in FENCE.finditer(text)]
    names = {"__name__": "__main__"}
    for (kind, source, line), (after, message, _) in pairwise([*blocks, ("", "", 0)]):
        place = f"{page.name}:{line + 1}"
        if kind == "python":
            run_python(source, line, place, names)
        elif kind == "pycon":
            run_doctest(source, line, place, names)
        elif kind == "python raises":
            assert after == "text", f"{place} shows no message"
            with pytest.raises((ValueError, TypeError)) as caught:
                run_python(source, line, place, names)
            assert " ".join(message.split()) in " ".join(str(caught.value).split())


def public(module, whole):
    """Names and values of what a module defines for its users."""
    return {
        name: value
        for name, value in vars(module).items()
        if not name.startswith("_") and not inspect.ismodule(value)
        if whole or getattr(value, "__module__", "") == module.__name__
    }


ROOMS = {
    jc: True,
    jc.distill: True,
    jc.prune: True,
    jc.quant: True,
    jc.share: True,
    jc.program: True,
    jc.testing: False,
}
PUBLIC = {n: f for room, deep in ROOMS.items() for n, f in public(room, deep).items()}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_code_on_a_page_runs(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with jax.numpy_rank_promotion("allow"):  # as a reader of the page has it
        run_page(page)


@pytest.mark.slow
def test_code_in_the_readme_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with jax.numpy_rank_promotion("allow"):
        run_page(ROOT / "README.md")


@pytest.mark.parametrize("name", PUBLIC)
def test_a_public_name_is_in_the_docs(name):
    assert re.search(rf"[`.]{name}\b", TEXT)


@pytest.mark.parametrize(
    "name", [n for n, f in PUBLIC.items() if inspect.isfunction(f)]
)
def test_a_public_function_has_a_row_among_the_papers(name):
    assert re.search(rf"^\| [^|]*[`.]{name}`", PAPERS, re.MULTILINE)
    cited = re.findall(r"arXiv:([\d.]+\d)", inspect.getdoc(PUBLIC[name]))
    assert [paper for paper in cited if paper not in PAPERS] == []
