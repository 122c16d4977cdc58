"""Every refusal code in the sources is explained, and nothing else is."""

from __future__ import annotations

import re
from pathlib import Path

from normfuse.codes import CODES

ROOT = Path(__file__).parents[1]


def used() -> set[str]:
    files = [f for folder in ("normfuse", "passes") for f in (ROOT / folder).rglob("*.py") if f.name != "codes.py"]
    return {code for f in files for code in re.findall(r"\bNF\d{3}\b", f.read_text(encoding="utf-8"))}


def test_every_code_is_explained_and_used() -> None:
    assert used() == set(CODES)


def test_explanations_are_complete() -> None:
    for code, entry in CODES.items():
        assert re.fullmatch(r"NF[123]\d\d", code)
        assert all(text and text == text.strip() for text in entry)
        assert entry.text.endswith(".")
        assert entry.fix.endswith(".")
        assert not entry.title.endswith(".")
    assert list(CODES) == sorted(CODES)
