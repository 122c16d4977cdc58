"""What the command line does to its process while a command runs: signals end it cleanly, libraries are quiet, and one
that is slow to load waits until it is needed."""

from __future__ import annotations

import contextlib
import logging
import signal
import sys
import threading
import warnings
from collections.abc import Iterator, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from importlib.util import LazyLoader
from types import ModuleType
from typing import NoReturn

from normfuse import process


class Ended(KeyboardInterrupt):
    """A signal that asks the process to end, which it does as at Ctrl-C: with nothing half done."""

    def __init__(self, number: signal.Signals) -> None:
        super().__init__()
        self.number = number


@contextlib.contextmanager
def ending() -> Iterator[None]:
    """Clean up before a signal ends the process, unless whoever started it has settled what is to happen.

    What a signal raises may get lost in a callback, so that it is noted, too (`normfuse.process.demand_going`).
    """
    def stop(number: int, _: object) -> NoReturn:
        why = KeyboardInterrupt() if number == signal.SIGINT else Ended(signal.Signals(number))
        process.end(why)
        raise why

    names = ("SIGINT", "SIGTERM", "SIGHUP") if threading.current_thread() is threading.main_thread() else ()
    numbers = [getattr(signal, name) for name in names if hasattr(signal, name)]
    usual = (signal.SIG_DFL, signal.default_int_handler)
    before = {number: signal.signal(number, stop) for number in numbers if signal.getsignal(number) in usual}
    try:
        yield
    finally:
        process.end(None)
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def quiet(verbose: bool) -> Iterator[None]:
    """Keep what libraries print away from stdout, and their warnings away altogether unless asked for."""
    disabled = logging.root.manager.disable
    with warnings.catch_warnings(), contextlib.redirect_stdout(sys.stderr):
        if not verbose:
            warnings.simplefilter("ignore")
            logging.disable(logging.WARNING)
        try:
            yield
        finally:
            logging.disable(disabled)


SLOW = frozenset({"sympy", "onnx_ir._symbolic_shapes"})
"""onnx_ir computes with symbolic sizes by sympy, which hardly any model needs, and which takes as long to load as all
else of a command together."""


class _Waiting(MetaPathFinder):
    """Python's own finder of modules, but that those of `SLOW` are loaded when something of them is first used."""

    def find_spec(self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None,
                  ) -> ModuleSpec | None:  # fmt: skip
        spec = PathFinder.find_spec(fullname, path, target) if fullname in SLOW else None
        if spec is not None and spec.loader is not None:
            spec.loader = LazyLoader(spec.loader)
        return spec


@contextlib.contextmanager
def waiting() -> Iterator[None]:
    """Let what is slow to load wait."""
    finder = _Waiting()
    sys.meta_path.insert(0, finder)
    try:
        yield
    finally:
        sys.meta_path.remove(finder)
