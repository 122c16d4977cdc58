"""Latency, memory and share of norms of one ONNX model, or of two in turns, in ONNX Runtime.

Each round runs every model once, in rotating order and in one process, so that a busy machine disturbs all alike; the
ratio of two models is told with the quartiles of its value round by round. Threads of a session stop between turns:
spinning ones would take a core from the next model. A time includes copying inputs to the device and outputs back.
"""

from __future__ import annotations

import gc
import json
import math
import operator
import os
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from normfuse.bench_norms import profile
from normfuse.errors import InputError, first_line, path_of
from normfuse.ort_values import Array, onnx_runtime
from normfuse.process import available, run_module, status
from normfuse.sessions import (
    OPEN,
    PROVIDERS,
    Given,
    calls_ours,
    feeds_for,
    open_session,
    options_for,
    run_random,
    shapes_for,
)

SCHEMA = 1
WARM_UP, LEAST, MOST, SECONDS = 3, 11, 2000, 5.0
"""Rounds that do not count; without a given number, as many rounds as take so long, within these bounds."""
MOST_THREADS = 64
"""The most threads on a machine with fewer processors: they wait for each other, and hundreds of them do not end."""
DRAWN = 12
"""Bytes that it takes to draw an element at random and to hold it."""

clock = time.perf_counter


@dataclass(frozen=True, slots=True)
class How:
    """How models are run: `threads` 0 is what ONNX Runtime takes; `sizes` by symbol, 2 where none is given.

    `inputs` is an .npz file of arrays by name, in place of random ones. `library`: load our operators for models that
    have functions of domain normfuse. Raises `InputError` for a value that is none of these.
    """

    threads: int = 0
    rounds: int | None = None
    sizes: Mapping[str, int] = field(default_factory=dict)
    inputs: str | Path | None = None
    library: bool = True

    def __post_init__(self) -> None:
        def hold(name: str, value: Any) -> None:
            object.__setattr__(self, name, value)

        hold("threads", _whole("threads", self.threads))
        hold("rounds", None if self.rounds is None else _whole("rounds", self.rounds))
        hold("inputs", None if self.inputs is None else str(path_of(self.inputs, "inputs", ": give an .npz file")))
        given: Any = self.sizes
        if not isinstance(given, Mapping) or not all(isinstance(name, str) for name in given):
            raise InputError(f"sizes={given!r}: give a dict of sizes by name, such as {{'batch': 4}}")
        hold("sizes", {name: _whole(f"sizes[{name!r}]", n) for name, n in given.items()})
        for name, n in self.sizes.items():
            if not 1 <= n < 2**63:
                raise InputError(f"sizes[{name!r}]={n}: give a number from 1 to 2^63 - 1")
        if self.library not in (True, False):
            raise InputError(f"library={self.library!r} is not True or False")
        if self.rounds is not None and self.rounds < 3:
            raise InputError(f"rounds={self.rounds}: it takes 3 rounds to tell a median from chance")
        most = max(MOST_THREADS, os.cpu_count() or 1)
        if not 0 <= self.threads <= most:
            raise InputError(f"threads={self.threads}: give 1 to {most}, or 0 for what ONNX Runtime takes")

    def given(self) -> Given:
        """The sizes, and the inputs read. Raises `InputError` for a file that is no .npz."""
        from normfuse.calibrate import load

        return Given({} if self.inputs is None else load(self.inputs), self.sizes)


def _whole(name: str, value: Any) -> int:
    """A whole number, of whatever type."""
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise InputError(f"{name}={value!r} is not a whole number")
    return operator.index(value)


def bench(paths: Sequence[str | os.PathLike[str]], how: How,
          progress: Callable[[str, float], None] | None = None) -> dict[str, Any]:  # fmt: skip
    """Measure one model, or two against each other, on each provider that this machine has.

    Returns {"schema", "onnxruntime", "threads", "inputs", "models", "ratio", "copy_gb_per_s", "notes"}; of each model
    by provider milliseconds {"min", "q1", "median", "q3"}, `norm_share`, `norm_gb_per_s` (see `bench_norms`) and
    `memory_bytes`, each None where it is not known. `copy_gb_per_s` is what one thread reaches that copies as many
    bytes as a norm moves. Raises `InputError` for models and inputs that do not go together, `UnsupportedError`
    without ONNX Runtime, and `UnsafeModelError`.
    """
    from normfuse.cli_env import sessions_have
    from normfuse.io.files import read_onnx

    runtime = onnx_runtime()
    if isinstance(paths, (str, os.PathLike)) or not 1 <= len(paths) <= 2:
        raise InputError("give a list of one model, or of two to measure against each other")
    demand_how(how)
    files = [str(path_of(path, "a model")) for path in paths]
    for path in files:
        check(path)
        read_onnx(path)
    tell = progress or (lambda stage, share: None)
    ours = [calls_ours(path) if how.library else False for path in files]
    feeds, notes = _feeds(files, ours, how)
    models: list[dict[str, Any]] = [{"path": p, "operators": o, "providers": {}}
                                    for p, o in zip(files, ours, strict=True)]  # fmt: skip
    ratio: dict[str, Any] = {}
    there = sessions_have()
    for name in (name for name, provider in PROVIDERS.items() if provider in there):
        sessions = [open_session(p, name, how.threads, o) for p, o in zip(files, ours, strict=True)]
        if any(s.get_providers()[0] != PROVIDERS[name] for s in sessions):
            notes.append(f"{name}: ONNX Runtime does not run it there")
            continue
        jobs = [_job(path, session, feeds, how.inputs) for path, session in zip(files, sessions, strict=True)]
        times = turns(jobs, how.rounds, stage=partial(tell, f"measuring on {name}"))
        del sessions, jobs
        for model, one in zip(models, times, strict=True):
            model["providers"][name] = {"milliseconds": spread(one), "rounds": len(one), "norm_share": None,
                                        "norm_gb_per_s": None, "memory_bytes": None}  # fmt: skip
        if len(files) == 2:
            ratio[name] = compare(*times)
    moved = 0
    for i, (model, own) in enumerate(zip(models, ours, strict=True)):
        tell("profiling", i / len(models))
        norms, run = profile(model["path"], feeds, how.threads, own), model["providers"]["cpu"]
        run |= {"norm_share": norms.share, "norm_gb_per_s": norms.rate}
        moved = moved or norms.moved
        tell("measuring memory", (i + 0.5) / len(models))
        run["memory_bytes"] = memory(model["path"], replace(how, library=own))
    inputs = {name: {"shape": list(a.shape), "dtype": str(a.dtype)} for name, a in feeds.items()}
    return {"schema": SCHEMA, "onnxruntime": runtime.__version__, "threads": how.threads, "inputs": inputs,
            "models": models, "ratio": ratio or None, "copy_gb_per_s": copy_rate(moved) if moved else None,
            "notes": notes}  # fmt: skip


# -- time ----------------------------------------------------------------------------------------------------------


def turns(jobs: Sequence[Callable[[], object]], rounds: int | None = None, seconds: float = SECONDS,
          stage: Callable[[float], None] = lambda share: None,
          warm_up: int = WARM_UP) -> list[list[float]]:  # fmt: skip
    """Milliseconds of each job round by round, each round beginning with another job.

    Without a number of rounds, as many as take so many seconds, but at least 11. `warm_up` rounds do not count.
    """
    times: list[list[float]] = [[] for _ in jobs]
    order = list(range(len(jobs)))
    for job in [*jobs] * warm_up:
        job()
    on = gc.isenabled()
    gc.collect()
    gc.disable()
    start = clock()
    try:
        while (done := len(times[0])) < (rounds or LEAST) or (not rounds and done < MOST and clock() - start < seconds):
            for i in order:
                begun = clock()
                jobs[i]()
                times[i].append((clock() - begun) * 1e3)
            order = order[1:] + order[:1]
            stage((done + 1) / rounds if rounds else min((clock() - start) / seconds, 1.0))
    finally:
        if on:
            gc.enable()
    return times


def spread(times: Sequence[float]) -> dict[str, float]:
    """Least, quartiles and median."""
    low, middle, high = statistics.quantiles(times, n=4, method="inclusive")
    return {"min": min(times), "q1": low, "median": middle, "q3": high}


def compare(a: Sequence[float], b: Sequence[float]) -> dict[str, Any]:
    """The median and the quartiles of the ratio round by round, and whether 1 lies between those."""
    low, middle, high = statistics.quantiles([y / x for x, y in zip(a, b, strict=True)], n=4, method="inclusive")
    return {"median": middle, "q1": low, "q3": high, "within_noise": low <= 1.0 <= high}


def copy_rate(moved: int, seconds: float = 0.05) -> float:
    """GB/s of one thread that reads half of so many bytes and writes the other half: the fastest of some copies."""
    source = np.ones(max(moved // 2, 1), np.uint8)
    target = np.zeros_like(source)
    best, end = float("inf"), clock() + seconds
    for _ in range(MOST):
        begun = clock()
        np.copyto(target, source)
        best = min(best, clock() - begun)
        if clock() > end:
            break
    return 2 * source.size / max(best, 1e-9) / 1e9


# -- sessions and inputs -------------------------------------------------------------------------------------------


def demand_how(how: Any) -> None:
    """Raise `InputError` for what does not say how to measure."""
    if not isinstance(how, How):
        raise InputError(f"how is a {type(how).__name__}; give normfuse.bench.How(...)")


def check(path: str) -> None:
    """Raise `InputError` for a file that is no ONNX model, `UnsupportedError` without ONNX Runtime."""
    from normfuse.io.pt2 import Archive, foreign, is_zip

    onnx_runtime()
    path_of(path, "a model")
    if is_zip(Path(path)):
        with Archive(path) as archive:  # which says what other archives are
            archive.model()
        raise InputError(f"{path}: bench runs ONNX models, and this is a .pt2; export it with torch.onnx.export")
    other = foreign(Path(path))
    if other is not None:
        raise InputError(f"{path}: {other}")


def _job(path: str, session: Any, feeds: dict[str, Array], given: Any = None) -> Callable[[], object]:
    """A run of a session, which was tried once."""
    try:
        session.run(None, feeds)
    except Exception as why:
        if given:
            raise InputError(f"{path} does not run with --inputs {given}: {first_line(why)}") from why
        sizes = {d: n for i in session.get_inputs() for d, n in zip(i.shape, feeds[i.name].shape, strict=False)
                 if isinstance(d, str)}  # fmt: skip
        taken = ", ".join(f"{name}={n}" for name, n in sizes.items())
        advice = f"with {taken}: give other sizes with --size NAME=N" if sizes else "on these: give --inputs"
        raise InputError(f"{path} does not run {advice}; {first_line(why)}") from why
    return lambda: session.run(None, feeds)


def _feeds(paths: Sequence[str], ours: Sequence[bool], how: How) -> tuple[dict[str, Array], list[str]]:
    """Inputs that all models take, and what to say about them."""
    from normfuse.frontends.onnx_open import demand_given
    from normfuse.io.files import read_onnx

    sessions = [open_session(p, "cpu", how.threads, o) for p, o in zip(paths, ours, strict=True)]
    first = sessions[0]
    names = [[i.name for i in s.get_inputs()] for s in sessions]
    if sorted(names[0]) != sorted(names[-1]):
        raise InputError(f"the models have other inputs: {names[0]} and {names[-1]}")
    types = [{i.name: i.type for i in s.get_inputs()} for s in sessions]
    for name in names[0]:
        if types[0][name] != types[-1][name]:
            raise InputError(f"the models have no inputs in common: {name!r} is {types[0][name]} in {paths[0]}, and "
                             f"{types[-1][name]} in {paths[-1]}")  # fmt: skip
    said = how.given()
    feeds = make_feeds(first, paths[0], said)
    demand_given(read_onnx(paths[-1])[0], Given(said.inputs))  # sizes may be open in the first alone
    dims = [d for i in first.get_inputs() for d in i.shape]
    notes = []
    left = {d: n for i in first.get_inputs() for d, n in zip(i.shape, feeds[i.name].shape, strict=False)
            if isinstance(d, str) and d not in how.sizes}  # fmt: skip
    if left and not how.inputs:
        notes.append(f"sizes not given: {', '.join(f'{d} {n}' for d, n in left.items())}; give them with --size NAME=N")
    if None in dims and not how.inputs:
        notes.append("sizes without a name are 2; give inputs with --inputs FILE.npz")
    flags = [name for name, array in feeds.items() if array.dtype == bool and array.size == 1]
    if flags and not how.inputs:
        notes.append(f"{', '.join(flags)}: true; where a model does something else with false, give --inputs FILE.npz")
    return feeds, notes


def make_feeds(session: Any, path: str | Path, said: Given) -> dict[str, Array]:
    """The inputs that are given, and random ones.

    Sizes that are open are the first of `possible_sizes` and `OPEN` with which the model runs, or else the first.
    Raises `InputError` for what is given and not the model's, and where memory has no room.
    """
    from normfuse.frontends.onnx_open import demand_given, possible_sizes
    from normfuse.io.files import read_onnx

    model = read_onnx(path)[0]
    demand_given(model, said)
    given, choices = said.inputs, [sizes | dict(said.sizes) for sizes in possible_sizes(model)]
    sizes = choices[0]
    shapes = {name: shape for name, shape in shapes_for(session, sizes, OPEN[0]).items() if name not in given}
    if (needed := DRAWN * sum(map(math.prod, shapes.values()))) > available():
        name = max(shapes, key=lambda n: math.prod(shapes[n]))
        shape = "x".join(map(str, shapes[name]))
        raise InputError(f"there is no memory to draw inputs of {path}: {name!r} is {shape}, and it takes "
                         f"{needed / 2**30:.3g} GiB; give smaller sizes with --size NAME=N")  # fmt: skip
    if shapes and any(not isinstance(d, int) for i in session.get_inputs() for d in i.shape):
        with suppress(Exception):  # it runs with none, which is told where it is measured
            drawn: dict[str, Array] = run_random(session, None, 0, given, choices)[0]
            return drawn
    return feeds_for(session, sizes=sizes, given=given)


# -- memory --------------------------------------------------------------------------------------------------------


def memory(path: str, how: How) -> int | None:
    """By how many bytes a fresh process grows at its peak, in resident memory, as it loads the model and runs it.

    None where the system does not tell (anything but Linux) or the process fails.
    """
    done = run_module("normfuse.bench", input=json.dumps({"path": path, "how": asdict(how)}))
    found = done.stdout.split()
    return int(found[-1]) if done.returncode == 0 and found and found[-1].isdigit() else None


def _child(asked: Mapping[str, Any]) -> None:
    """Load and run a model, and print the growth."""
    from normfuse.cli_env import sessions_have
    from normfuse.frontends.onnx_open import possible_sizes
    from normfuse.io.files import read_onnx

    how = How(**asked["how"])
    sessions_have()  # the code of ONNX Runtime itself does not count, nor what reads the model for its inputs below
    possible_sizes(read_onnx(asked["path"])[0])
    options = options_for(asked["path"], "cpu", how.threads, how.library)
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the peak starts anew
    before = status("VmRSS")
    session = open_session(asked["path"], "cpu", how.threads, how.library, options)
    feeds = make_feeds(session, asked["path"], how.given())
    for _ in range(WARM_UP):
        session.run(None, feeds)
    print(max(status("VmHWM") - before, 0))


if __name__ == "__main__":
    _child(json.load(sys.stdin))
