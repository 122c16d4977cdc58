"""docs/extending.md: its changes apply to the source, and with them, not without, its programs print what it says."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "docs/extending.md").read_text(encoding="utf-8")
SECTIONS = dict(re.findall(r"^## (An? .*?)\n(.*?)(?=^## |\Z)", TEXT, re.DOTALL | re.MULTILINE))


def blocks(section: str, language: str) -> list[str]:
    """The fenced blocks of a language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", SECTIONS[section], re.DOTALL | re.MULTILINE)


def copied(folder: Path) -> Path:
    for name in ("normfuse", "passes"):
        shutil.copytree(ROOT / name, folder / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    return folder


def run(program: str, folder: Path) -> subprocess.CompletedProcess[str]:
    (folder / "program.py").write_text(program, encoding="utf-8")
    return subprocess.run([sys.executable, "program.py"], cwd=folder, capture_output=True, text=True)


@pytest.mark.parametrize("section", SECTIONS)
def test_what_the_page_says_is_done(section: str, tmp_path: Path) -> None:
    (change,), (program,) = blocks(section, "diff"), blocks(section, "python")
    (printed,) = re.findall(r"^```\n```\n(.*?)^```$", SECTIONS[section], re.DOTALL | re.MULTILINE)
    folder = copied(tmp_path)
    without = run(program, folder)
    assert without.stdout != printed
    done = subprocess.run(["git", "apply", "-"], cwd=folder, input=change, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    done = run(program, folder)
    assert done.returncode == 0, done.stderr
    assert done.stdout == printed


def test_the_sections() -> None:
    assert list(SECTIONS) == ["An operator", "A pass", "A target"]
