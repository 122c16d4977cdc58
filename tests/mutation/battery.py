"""The cases that a mutant has to pass: the project's own test functions, called without pytest.

What is slow in them and no part of the core, an export or a capture by Dynamo, is done once: `Tape` gives its result
again. Coverage: which lines of which file of the core each case runs.
"""

from __future__ import annotations

import importlib
import inspect
import itertools
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType, ModuleType
from typing import Any
from unittest import mock

import pytest
import torch

from tests.mutation.mutants import ROOT

MODULES = ("test_recognise", "test_facts", "test_layouts", "test_transfer", "test_norm", "test_recognise_roots",
           "test_recognise_rules", "test_recognise_unknown", "test_recognise_misses", "test_recognise_sites",
           "test_recognise_roundings", "test_residual", "test_passes", "test_passes_add_norm", "test_passes_single",
           "test_plan", "test_placement", "test_placement_walks", "test_placement_names", "test_centring_rules",
           "test_folding_rules", "test_conversion_plan", "test_conversion_rules", "test_neutral", "test_near_misses",
           "test_fusions", "test_qk_norm", "test_onnx_fusions", "test_centring", "test_layernorm_to_rmsnorm",
           "test_parts", "test_two_layouts")  # fmt: skip
SLOW = 1.0
"""Seconds that a case may take; another part of the tests has to do what slower ones do."""
LEFT_OUT = ("test_mutation", "is_linear", "stays_linear", "torch_is_not", "compiled", "compiles", "real_model",
            "leaving_out", "between_transposes", "copied_table", "folded_on", "stays_tied", "ordinary_module",
            "command_line", "looks_up", "test_onnx_fusions.test_family")  # fmt: skip
CORE = "transfer norm facts recognise sites residual placement plan passmanager centring conversion"
FILES = [ROOT / "normfuse" / f"{name}.py" for name in CORE.split()]
FILES += sorted(f for f in (ROOT / "passes").glob("*.py") if f.name != "__init__.py")


@dataclass
class Case:
    """A test function with its arguments; `lines` are (file, line) that it runs."""

    name: str
    run: Callable[[], None]
    seconds: float = 0.0
    lines: set[tuple[str, int]] = field(default_factory=set)


class Tape:
    """Stands in for slow functions of torch: the nth call of a case gives again what it gave the first time."""

    def __init__(self) -> None:
        self.case, self.count = "", 0
        self.kept: dict[tuple[str, int], Any] = {}
        self.export, self.compile = torch.export.export, torch.compile

    def _again(self, make: Callable[[], Any]) -> Any:
        key = self.case, self.count
        self.count += 1
        if key not in self.kept:
            self.kept[key] = make()
        return self.kept[key]

    def exported(self, *args: Any, **kwargs: Any) -> Any:
        """In place of `torch.export.export`."""
        return self._again(lambda: self.export(*args, **kwargs))

    def compiled(self, function: Any, *, backend: Any = None, **kwargs: Any) -> Any:
        """In place of `torch.compile`, where the backend is a function that is given one graph."""
        if not callable(backend):
            return self.compile(function, backend=backend, **kwargs)

        def call(*args: Any) -> Any:
            def capture() -> list[Any]:
                found: list[Any] = []

                def keep(graph: Any, inputs: list[Any]) -> Any:
                    found.append((graph, [t.clone() for t in inputs]))
                    return graph.forward

                torch._dynamo.reset()
                self.compile(function, backend=keep, **kwargs)(*args)  # type: ignore[no-untyped-call]
                return found

            for graph, inputs in self._again(capture):
                out = backend(graph, inputs)(*inputs)
            return out

        return call

    def run(self, case: Case) -> None:
        """Call a case."""
        self.case, self.count = case.name, 0
        with mock.patch("torch.export.export", self.exported), mock.patch("torch.compile", self.compiled):
            case.run()


def cases(modules: tuple[str, ...] = MODULES) -> Iterator[Case]:
    """All cases of these test modules."""
    for name in modules:
        if not (ROOT / "tests" / f"{name}.py").exists():
            continue
        module = importlib.import_module(f"tests.{name}")
        for key, function in vars(module).items():
            if key.startswith("test_") and inspect.isfunction(function) and function.__module__ == module.__name__:
                yield from _expanded(module, function)


def _expanded(module: ModuleType, function: Callable[..., None]) -> Iterator[Case]:
    """A test function with each combination of its parameters."""
    choices: list[list[dict[str, Any]]] = []
    for mark in getattr(function, "pytestmark", ()):
        if mark.name != "parametrize":
            return
        names, values = mark.args
        names = [n.strip() for n in names.split(",")] if isinstance(names, str) else list(names)
        values = [v.values if hasattr(v, "values") and hasattr(v, "marks") else v if len(names) > 1 else (v,)
                  for v in values if not getattr(v, "marks", ())]  # fmt: skip
        choices.append([dict(zip(names, v, strict=True)) for v in values])
    wanted = set(inspect.signature(function).parameters)
    for i, combination in enumerate(itertools.product(*choices)):
        given = {k: v for one in combination for k, v in one.items()}
        if wanted - set(given) <= {"tmp_path", "monkeypatch"} and not any(
                w in f"{module.__name__}.{function.__name__}" for w in LEFT_OUT):
            yield Case(f"{module.__name__}.{function.__name__}[{i}]", _call(function, given, wanted - set(given)))


def _call(function: Callable[..., None], given: dict[str, Any], fixtures: set[str]) -> Callable[[], None]:
    def run() -> None:
        with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
            more = {"tmp_path": Path(folder), "monkeypatch": patch}
            function(**given, **{name: more[name] for name in fixtures})

    return run


def record(found: list[Case], tape: Tape) -> tuple[list[Case], list[str]]:
    """Run each case three times: to fill caches, to measure, to see its lines. Those that may be used, fastest first,
    and the names of those that are too slow."""
    core = {str(f): f.relative_to(ROOT).as_posix() for f in FILES}
    core |= {str(ROOT / "normfuse" / f.relative_to(ROOT)): f.relative_to(ROOT).as_posix() for f in FILES}
    used, slow = [], []
    for case in found:
        started = time.perf_counter()
        tape.run(case)
        first = time.perf_counter() - started
        started = time.perf_counter()
        if first > 0.05:
            tape.run(case)
        case.seconds = time.perf_counter() - started if first > 0.05 else first
        if case.seconds > SLOW:
            slow.append(case.name)
            continue

        def local(frame: FrameType, event: str, arg: object, lines: set[tuple[str, int]] = case.lines) -> Any:
            lines.add((core[frame.f_code.co_filename], frame.f_lineno))
            return local

        def enter(frame: FrameType, event: str, arg: object) -> Any:
            return local(frame, event, arg) if frame.f_code.co_filename in core else None

        old = sys.gettrace()
        sys.settrace(enter)
        try:
            tape.run(case)
        finally:
            sys.settrace(old)
        used.append(case)
    return sorted(used, key=lambda case: case.seconds), slow


def by_line(found: list[Case]) -> dict[tuple[str, int], list[int]]:
    """Line of the core -> the cases that run it, by number."""
    out: dict[tuple[str, int], list[int]] = defaultdict(list)
    for i, case in enumerate(found):
        for line in case.lines:
            out[line].append(i)
    return out
