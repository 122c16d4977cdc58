"""Runs mutants, each in a forked child of a process that has everything imported and cached."""

from __future__ import annotations

import ast
import contextlib
import gc
import importlib
import os
import resource
import signal
import sys
from bisect import bisect
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from itertools import accumulate
from pathlib import Path
from types import CodeType, FunctionType
from typing import Any

from tests.mutation.battery import Case, Tape, by_line
from tests.mutation.mutants import FUNCTIONS, Mutant, Source

KILLED, TIMEOUT, SURVIVED, NOT_COVERED = "killed", "timeout", "survived", "not covered"
BUDGET = 4.0
"""Seconds of cases for one mutant: the hundredth spelling of a norm kills what the first ten do."""
MEMORY = 4 << 30
"""Bytes that a child may take on top of what it starts with: a loop that has lost its end."""


def codes(code: CodeType) -> Iterator[CodeType]:
    """A code object and those inside it."""
    yield code
    for const in code.co_consts:
        if isinstance(const, CodeType):
            yield from codes(const)


class Runner:
    """`found` are the cases, fastest first, with the lines they run."""

    def __init__(self, found: list[Case], tape: Tape) -> None:
        self.cases, self.tape, self.lines = found, tape, by_line(found)
        self.kills: dict[str, Counter[int]] = defaultdict(Counter)  # what has killed mutants of a function before
        self.functions: dict[tuple[str, str, int], list[FunctionType]] = defaultdict(list)
        for one in gc.get_objects():
            if type(one) is FunctionType:
                code = one.__code__
                self.functions[code.co_filename, code.co_name, code.co_firstlineno].append(one)
        sys.stdout.flush()

    def covering(self, mutant: Mutant) -> list[int]:
        """The cases that run a mutant's lines, the likely killers first, for `BUDGET` seconds."""
        if mutant.scope is None:
            hits = {i for (file, _), numbers in self.lines.items() if file == mutant.file for i in numbers}
        else:
            hits = {i for line in mutant.lines for i in self.lines.get((mutant.file, line), ())}
        kills = self.kills[mutant.file + mutant.function]
        out = sorted(hits, key=lambda i: (-kills[i], i))
        spent = list(accumulate(self.cases[i].seconds for i in out))
        return out[: bisect(spent, BUDGET) + 1]

    def run(self, source: Source, mutant: Mutant, hits: Sequence[int] | None = None) -> tuple[str, int]:
        """(what became of a mutant, the number of the case that killed it or -1)."""
        hits = self.covering(mutant) if hits is None else hits
        if not hits:
            return NOT_COVERED, -1
        read, write = os.pipe()
        pid = os.fork()
        if pid == 0:
            self._child(source, mutant, hits, write)
        os.close(write)
        with os.fdopen(read) as pipe:
            text = pipe.read()
        _, status = os.waitpid(pid, 0)
        if text.isdigit():
            self.kills[mutant.file + mutant.function][int(text)] += 1
            return KILLED, int(text)
        if text == SURVIVED:
            return SURVIVED, -1
        return (TIMEOUT if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGPROF else KILLED), -1

    def _child(self, source: Source, mutant: Mutant, hits: Sequence[int], write: int) -> None:
        answer = SURVIVED
        try:
            gc.disable()
            quiet = os.open(os.devnull, os.O_WRONLY)
            os.dup2(quiet, 1)
            os.dup2(quiet, 2)
            size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
            resource.setrlimit(resource.RLIMIT_AS, (size + MEMORY, size + MEMORY))
            signal.signal(signal.SIGPROF, signal.SIG_DFL)
            signal.setitimer(signal.ITIMER_PROF, 5)
            current = hits[0]
            try:
                self.change(source, mutant)
                for current in hits:
                    signal.setitimer(signal.ITIMER_PROF, 1 + 10 * self.cases[current].seconds)
                    self.tape.run(self.cases[current])
            except BaseException:  # whatever it is, a test says that something is wrong
                answer = str(current)
        finally:
            os.write(write, answer.encode())
            os._exit(0)

    def change(self, source: Source, mutant: Mutant) -> None:
        """Put a mutant in place, in every function that runs its code and under every name that holds it."""
        module: Any = importlib.import_module(source.module)
        mutant.apply()
        code = compile(source.tree, module.__file__, "exec")
        scope = mutant.scope
        if scope is not None:
            name = getattr(scope, "name", "<lambda>")
            first = min([scope.lineno, *(d.lineno for d in getattr(scope, "decorator_list", ()))])  # type: ignore[attr-defined]
            assert isinstance(scope, FUNCTIONS)
            new = [c for c in codes(code) if c.co_name == name and c.co_firstlineno == first]
            old = self.functions[module.__file__, name, first]
            assert new and old, f"{name} is not there"
            for function in old:
                function.__code__ = new[0] if len(new) == 1 else next(
                    c for c in new if _at(c) == _at(function.__code__))  # fmt: skip
            return
        fresh: dict[str, Any] = {"__name__": module.__name__, "__file__": module.__file__}
        exec(code, fresh)
        for node in ast.walk(mutant.part):
            if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store) and node.id in fresh:
                was = vars(module)[node.id]
                for name, other in list(sys.modules.items()):
                    if name.startswith(("normfuse", "tests")) and vars(other).get(node.id) is was:
                        setattr(other, node.id, fresh[node.id])
        if isinstance(mutant.part, (ast.ClassDef, ast.FunctionDef)):
            _defaults(vars(module)[mutant.part.name], fresh[mutant.part.name])


def _at(code: CodeType) -> int | None:
    """The column where a lambda's code begins."""
    return next((p[2] for p in code.co_positions() if p[2]), None)


def _defaults(old: Any, new: Any) -> None:
    """Give a function, or the methods of a class, the default arguments of another."""
    if isinstance(old, type):
        for name, one in vars(old).items():
            if name in vars(new) and isinstance(one, (FunctionType, property)):
                _defaults(one, vars(new)[name])
    elif isinstance(old, FunctionType):
        with contextlib.suppress(ValueError):
            old.__defaults__, old.__kwdefaults__ = new.__defaults__, new.__kwdefaults__
