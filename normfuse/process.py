"""Modules of this package that run in a process of their own, and the memory of processes."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")
LARGE = 2**28
"""By how many bytes the peak of the process may grow before the garbage of our work is collected."""


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


def peak() -> int:
    """The most bytes that this process had in memory, for which no file is read; 0 where the system does not tell."""
    try:
        import resource
    except ImportError:  # on Windows
        return 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def available() -> int:
    """The bytes of memory that can be had without swapping; very many where the system does not tell."""
    try:
        return _entry("/proc/meminfo", "MemAvailable")
    except OSError:
        return 2**62


def _entry(path: str, key: str) -> int:
    lines = Path(path).read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{key}:")) * 1024


def end(why: BaseException | None) -> None:
    """Note that a signal ends the process, or that none does any more; see `demand_going`."""
    global _ended
    _ended = why


def demand_going() -> None:
    """Raise again what a signal has raised, where that got lost: in a callback of the interpreter, nobody sees it."""
    if _ended is not None:
        raise _ended


_ended: BaseException | None = None


def tidy(work: Callable[P, T]) -> Callable[P, T]:
    """Hold the cyclic garbage collector for as long as a function runs: a graph is a million objects, none of them
    garbage yet. Afterwards they are, with the weights that they hold, and are collected where that is much."""

    @wraps(work)
    def call(*args: P.args, **kwargs: P.kwargs) -> T:
        global _mark
        on, _mark = gc.isenabled(), _mark or peak()
        gc.disable()
        try:
            return work(*args, **kwargs)
        finally:
            if peak() - _mark > LARGE:
                gc.collect()
                _mark = peak()
            elif gc.get_freeze_count() == 0:  # call the new objects old, or a pass over all of them follows at once
                gc.freeze()
                gc.unfreeze()
            if on:
                gc.enable()

    return call


_mark = 0
"""What the process had in memory at most before the first of our work, or until the last collection."""
