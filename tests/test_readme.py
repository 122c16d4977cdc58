"""The README shows what the program prints."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

from tests.families import cached_export

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")


def without_time(text: str) -> list[str]:
    return [re.sub(r"\d+\.\d\d s$", "s", line.rstrip()) for line in text.strip().splitlines()]


def test_the_first_screen_is_what_rewrite_prints(tmp_path: Path) -> None:
    found = re.search(r"<!-- output: (.*?) -->\n```\n(.*?)```", README, re.DOTALL)
    assert found is not None
    shutil.copy(cached_export("gemma3", 18), tmp_path / "gemma3.onnx")
    command = [sys.executable, "-m", "normfuse", *found[1].split()]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert without_time(done.stdout) == without_time(found[2])


def test_the_two_commands_are_there() -> None:
    assert "make demo" in README and "make test" in README
