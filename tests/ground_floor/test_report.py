from __future__ import annotations

from html.parser import HTMLParser

from cxrgaze.report import (
    Bullets,
    Figure,
    Heading,
    Paragraph,
    Table,
    html_page,
    markdown_page,
)

BLOCKS = [
    Heading("Heads & <tails>"),
    Paragraph("a < b"),
    Bullets(["one", "<script>alert(1)</script>"]),
    Table(("name", "value"), [("a|b", 1), ("<i>", 2.5)]),
    Figure("plot.svg", b"<svg/>", 'a "figure"'),
    Figure("map.png", b"\x89PNG", "a map"),
]


class _Tags(HTMLParser):
    void = {"meta", "img"}

    def __init__(self):
        super().__init__()
        self.open, self.seen = [], []

    def handle_starttag(self, tag, attrs):
        self.seen.append((tag, dict(attrs)))
        if tag not in self.void:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_html_is_whole_self_contained_and_escaped():
    page = html_page("T & <t>", BLOCKS)
    tags = _Tags()
    tags.feed(page)
    assert not tags.open
    assert "script" not in {tag for tag, _ in tags.seen}
    assert all(a["src"].startswith("data:image/") for tag, a in tags.seen if tag == "img")
    assert "http" not in page
    assert "<td>a|b</td><td>1</td>" in page and "&lt;i&gt;" in page


def test_markdown_keeps_tables_whole():
    page = markdown_page("T", BLOCKS)
    assert "| a\\|b | 1 |" in page and "![a map](map.png)" in page
    assert "\\n" not in Table(("a",), [("x\ny <script>",)]).markdown().splitlines()[2]
    assert "| x y &lt;script> |" in Table(("a",), [("x\ny <script>",)]).markdown()
    assert page.startswith("# T\n\n## Heads & <tails>\n\na < b\n\n- one\n")


def test_both_pages_are_the_same_twice():
    assert html_page("T", BLOCKS) == html_page("T", BLOCKS)
    assert markdown_page("T", BLOCKS) == markdown_page("T", BLOCKS)
