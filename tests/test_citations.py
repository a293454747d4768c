"""What code and pages cite exists: pages, anchors, and nothing outside of the repository."""

from __future__ import annotations

import posixpath
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
WRITTEN = {"report.md", "parity.md", "summary.md", "card.md", "NAME.card.md", "saliency.md"}
"""Pages that commands write for their user."""

_URL = re.compile(r"\w+://\S+")
_FENCE = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)
_MENTION = re.compile(r"(?P<path>[\w./-]*[\w-]\.md)\b(?:#(?P<anchor>[\w-]+))?")
_NUMBERED = re.compile(r"[\w-]+\.md,? (?:sections? )?\d[\d.-]*")
_LINK = re.compile(r"\]\((?P<path>[\w./-]*\.md)?(?:#(?P<anchor>[\w-]+))?\)")


def _mentions(text):
    """Path and anchor of every page that a text names, addresses in the web left out."""
    return {match.group("path", "anchor") for match in _MENTION.finditer(_URL.sub("", text))}


def _links(name, text):
    """Page and anchor of every relative link of a Markdown page; its own page without a path."""
    found = _LINK.finditer(_URL.sub("", text)) if name.endswith(".md") else ()
    return {(_beside(name, m["path"]) if m["path"] else name, m["anchor"]) for m in found}


def _beside(name, path):
    return posixpath.normpath(posixpath.join(posixpath.dirname(name), path))


def _meant(name, path, pages):
    """Pages that a path may mean: from the root, beside the file, or by the bare name."""
    bare = {page for page in pages if "/" not in path and posixpath.basename(page) == path}
    return {path, _beside(name, path)} & set(pages) or bare


def anchors(page):
    """Anchors of a Markdown page: `<a id="...">`, and its headings as GitHub names them."""
    titles = re.findall(r"^#+ +(.+?) *$", _FENCE.sub("", page), re.MULTILINE)
    slugs = {re.sub(r"[^\w -]", "", title).lower().replace(" ", "-") for title in titles}
    return {*_given(page), *slugs}


def _given(page):
    return re.findall(r'<a id="([^"]+)">', page)


def missing_pages(name, text, pages):
    cited = {path for path, _ in _mentions(text) if path.startswith("docs/")}
    return cited.union(page for page, _ in _links(name, text)) - set(pages)


def missing_anchors(name, text, pages):
    cited = {(page, a) for path, a in _mentions(text) for page in _meant(name, path, pages)}
    known = {(page, a) for page, a in cited | _links(name, text) if a and page in pages}
    return {f"{page}#{a}" for page, a in known if a not in pages[page]}


def foreign_pages(name, text, pages):
    cited = {path for path, _ in _mentions(text) if posixpath.basename(path) not in WRITTEN}
    return {path for path in cited if not _meant(name, path, pages)}


def shared_named(name, text, pages):
    return set() if name.startswith("tests/") else set(re.findall(r"\.\./shared[\w/]*", text))


def numbered_sections(name, text, pages):
    return set(_NUMBERED.findall(text))


CHECKS = (missing_pages, missing_anchors, foreign_pages, shared_named, numbered_sections)


@pytest.fixture(scope="module")
def texts():
    """Every tracked text, by path, but this file, which makes some up."""
    command = ["git", "ls-files"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    paths = [Path(line) for line in listed.stdout.splitlines()]
    kept = [p for p in paths if p.suffix in (".py", ".toml", ".md") or p.name == "Makefile"]
    files = {p.as_posix(): ROOT / p for p in kept if ROOT / p != Path(__file__)}
    return {name: file.read_text("utf-8") for name, file in files.items() if file.is_file()}


@pytest.mark.parametrize("check", CHECKS)
def test_what_is_cited_exists(check, texts):
    pages = {name: anchors(text) for name, text in texts.items() if name.endswith(".md")}
    found = {name: check(name, text, pages) for name, text in texts.items()}
    assert {name: cited for name, cited in found.items() if cited} == {}


def test_an_anchor_stands_once_on_its_page(texts):
    for name, text in texts.items():
        assert not name.endswith(".md") or len(_given(text)) == len(set(_given(text))), name


METHOD = """
<a id="phantom"></a>
## The `phantom`, drawn
```
# no title
```
"""
PAGES = {"README.md": set(), "docs/method.md": anchors(METHOD)}


def test_anchors_are_those_given_and_those_of_headings():
    assert PAGES["docs/method.md"] == {"phantom", "the-phantom-drawn"}


@pytest.mark.parametrize(
    ("check", "name", "text", "found"),
    [
        (missing_pages, "a.py", "see docs/methods.md", "docs/methods.md"),
        (missing_pages, "docs/method.md", "[top](README.md)", "docs/README.md"),
        (missing_pages, "README.md", "[m](docs/no.md#x)", "docs/no.md"),
        (missing_anchors, "a.py", "# docs/method.md#no-such", "docs/method.md#no-such"),
        (missing_anchors, "docs/method.md", "[x](#no-such)", "docs/method.md#no-such"),
        (missing_anchors, "a.toml", "method.md#no-such", "docs/method.md#no-such"),
        (foreign_pages, "a.py", "Source: plan.md section 4", "plan.md"),
        (foreign_pages, "CHANGELOG.md", "as other/README.md says", "other/README.md"),
        (numbered_sections, "a.py", "see method.md section 4", "method.md section 4"),
        (numbered_sections, "a.toml", "(method.md 1.9-3)", "method.md 1.9-3"),
        (shared_named, "README.md", "films of `../shared/cxr`", "../shared/cxr"),
    ],
)
def test_each_check_fails_where_it_should(check, name, text, found):
    assert check(name, text, PAGES) == {found}


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.py", "docs/method.md#phantom, docs/method.md#the-phantom-drawn, README.md, report.md"),
        ("docs/method.md", "[a](../README.md), [b](#phantom), [c](method.md#phantom)"),
        ("a.py", "https://example.org/plan.md#no-such, a *.md, a suffix .md, plan.mdx"),
        ("tests/a.py", "needs ../shared"),
    ],
)
def test_what_is_there_passes(name, text):
    assert not set().union(*(check(name, text, PAGES) for check in CHECKS))
