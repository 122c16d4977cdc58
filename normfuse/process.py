"""Modules of this package that run in a process of their own, and the memory of processes."""

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


def status(key: str) -> int:
    """A line of the status of this process, in bytes. Raises `OSError` where there is none: on anything but Linux."""
    return _entry("/proc/self/status", key)


def resident() -> int:
    """The bytes of this process in memory; 0 where the system does not tell."""
    try:
        return status("VmRSS")
    except OSError:
        return 0


def available() -> int:
    """The bytes of memory that can be had without swapping; very many where the system does not tell."""
    try:
        return _entry("/proc/meminfo", "MemAvailable")
    except OSError:
        return 2**62


def _entry(path: str, key: str) -> int:
    lines = Path(path).read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{key}:")) * 1024
