"""Modules of this package that run in a process of their own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any


def run_module(name: str, *arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run a module as `python -m` does, from where this package lies, with what it prints caught as text.

    `options` are those of `subprocess.run`; `input` is what it reads, by default nothing.
    """
    root = str(Path(__file__).resolve().parents[1])
    paths = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
    return subprocess.run([sys.executable, "-P", "-m", name, *arguments], capture_output=True, text=True, check=False,
                          errors="replace", env=os.environ | {"PYTHONPATH": paths},
                          **{"input": "", **options})  # fmt: skip
