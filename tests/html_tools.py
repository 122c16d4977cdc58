"""What the tests of pages share: a reader that fails on whatever a page could load, run or leave open."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path


from normfuse.html import page
from tests.cli_tools import EVIL

ATTACKS = ["<script>alert(1)</script>", '"><img src=x onerror=alert(1)>', "</title></style><svg onload=alert(1)>",
           "javascript:alert(1)", "&lt;b&gt;", "</bdi><a href=http://example.org>", EVIL, "\ud800", "\x00",
           "]]><!--", "'onclick=alert(1) x='"]  # fmt: skip
HOSTILE = "".join(ATTACKS[:6])
VOID = {"meta", "br", "rect", "line", "polyline", "polygon", "circle"}
TAGS = VOID | set("""html head title style body main header section article nav h1 h2 h3 p a code pre span bdi strong b
    div table thead tbody tr th td dl dt dd details summary figure figcaption sup svg text""".split())
ATTRIBUTES = set("""lang charset name content http-equiv id class href tabindex role aria-label aria-labelledby
    aria-hidden open scope data-label width height viewbox x y x1 y1 x2 y2 rx r cx cy points""".split())


class Page(HTMLParser):
    """Reads a page as a browser would, and fails on whatever it could load, run or leave open."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.words: list[str] = []
        self.ids: set[str] = set()
        self.heads: list[str] = []
        self.links: set[str] = set()
        assert source.startswith(page.START)
        self.feed(source)
        self.close()
        assert self.open == []
        assert self.links <= self.ids
        self.text = " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag in TAGS, tag
        for key, value in attrs:
            assert key in ATTRIBUTES, (tag, key)
            if key == "href":
                assert value is not None and value.startswith("#")
                self.links.add(value[1:])
            if key == "id":
                assert value not in self.ids
                self.ids.add(value or "")
        if tag not in VOID:
            self.open.append(tag)
        if re.fullmatch(r"h\d", tag):
            self.heads.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag in VOID
        self.handle_starttag(tag, attrs)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open[-1:] == ["style"]:
            assert not re.search(r"url\(|@import|expression|http", data)
        else:
            assert not any(not c.isprintable() and c not in "\n " for c in data)
            self.words.append(data)

    def handle_comment(self, data: str) -> None:
        raise AssertionError(data)

    def handle_pi(self, data: str) -> None:
        raise AssertionError(data)


def read(path: Path) -> Page:
    source = path.read_text(encoding="utf-8")
    assert f'<meta http-equiv="Content-Security-Policy" content="{page.POLICY}">' in source
    assert page.POLICY == "default-src 'none'; style-src 'unsafe-inline'"
    found = Page(source)
    assert found.heads[0] == "h1" and found.heads.count("h1") == 1
    assert all(b <= f"h{int(a[1]) + 1}" for a, b in pairwise(found.heads))
    return found
