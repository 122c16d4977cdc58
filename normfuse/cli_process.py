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
