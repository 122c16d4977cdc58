"""What the command line does to its process while a command runs: signals end it cleanly, and libraries are quiet."""

from __future__ import annotations

import contextlib
import logging
import signal
import sys
import threading
import warnings
from collections.abc import Iterator
from typing import NoReturn


class Ended(KeyboardInterrupt):
    """A signal that asks the process to end, which it does as at Ctrl-C: with nothing half done."""

    def __init__(self, number: signal.Signals) -> None:
        super().__init__()
        self.number = number


@contextlib.contextmanager
def ending() -> Iterator[None]:
    """Clean up before a signal ends the process, unless whoever started it has settled what is to happen."""
    def end(number: int, _: object) -> NoReturn:
        raise Ended(signal.Signals(number))

    names = ("SIGTERM", "SIGHUP") if threading.current_thread() is threading.main_thread() else ()
    numbers = [getattr(signal, name) for name in names if hasattr(signal, name)]
    before = {number: signal.signal(number, end) for number in numbers if signal.getsignal(number) is signal.SIG_DFL}
    try:
        yield
    finally:
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
