"""Which optimisers go first, if any, by measuring a model as it is, and what comes of it after each choice of them.

Sessions are made anew several times, since where the weights of one come to lie makes it faster or slower for as long
as it lives; each time all take turns. One file is called faster than another where it is so in all of these but one.
"""

from __future__ import annotations

import filecmp
import importlib.util
import math
import statistics
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import Any

import onnx

from normfuse.bench import How, clock, make_feeds, turns
from normfuse.config import FASTEST, OPTIMISERS, Config
from normfuse.errors import InputError, first_line
from normfuse.first import OUT, Made, after
from normfuse.frontends.onnx_open import possible_sizes
from normfuse.io.files import read_onnx
from normfuse.ort_values import Array
from normfuse.sessions import PROVIDERS, Given, calls_ours, longest, open_session

RESTARTS, SECONDS, ROUNDS = 7, 1.5, (3, 200)
"""How often with new sessions, and how long each time for each inputs, within these numbers of rounds. Of two files
that are equally fast, a given one is called faster once in 16."""
SIZES = ((1,), (33, 130, 512))
"""The inputs where sizes are open: 1 of all, and of all but the first the last of these with which the model runs and
its files have room in memory."""
MOST_FILES = 1 + 2 ** len(OPTIMISERS)
AS_IS = "as it is"
Progress = Callable[[str, float], None]


@dataclass(slots=True)
class _File:
    """One to measure, the optimisers that went first, None for the model as it is, and its times by inputs and turn.

    `same`: of the model as it is, that nothing in it is to be fused.
    """

    path: Path
    first: str | None
    same: bool = False
    medians: list[list[float]] = field(default_factory=list)

    @property
    def name(self) -> str:
        return AS_IS if self.first is None else f"rewritten after {self.first}" if self.first else "rewritten"

    def score(self, turn: int) -> float:
        """Of several inputs, the mean of the logarithms."""
        return statistics.fmean(math.log(times[turn]) for times in self.medians)

    def faster(self, other: _File) -> bool:
        """In all turns but one."""
        return sum(self.score(turn) < other.score(turn) for turn in range(RESTARTS)) >= max(1, RESTARTS - 1)


def choose(source: Path, config: Config, folder: Path, how: How | None, given: Given, progress: Progress | None
           ) -> Made:  # fmt: skip
    """Rewrite a model after every choice of the optimisers that are installed and its target can have, and measure.

    What the optimisers make is left in `folder`. `how`: on which inputs, and with how many threads; without sizes or
    inputs of its own, on one token and on many. Raises `InputError` where the model does not run on these, or the
    machine has not what the target asks for.
    """
    from normfuse.api import rewrite

    how, tell = how or How(), progress or (lambda what, share: None)
    provider = _provider(config)
    sites = replace(config, first="", verify="sites" if config.verify == "model" else config.verify)
    tools = [t for t in OPTIMISERS if config.takes(t) and importlib.util.find_spec(t) is not None]
    choices = [c for n in range(len(tools) + 1) for c in combinations(tools, n)]
    made: dict[tuple[str, ...], Made] = {(): Made(source)}
    with tempfile.TemporaryDirectory(prefix="normfuse-") as rewritten:
        inputs = _inputs(source, how, given, provider)
        files, notes = [_File(source, None)], list[str]()
        for i, choice in enumerate(choices):
            file = _File(Path(rewritten) / f"{i}.onnx", ",".join(choice))
            tell(file.name, i / len(choices))
            optimised = after(choice, made, folder, given, progress)
            notes += [note for note in optimised.notes if OUT in note and note not in notes]
            rewrite(optimised.path, file.path, sites, how=how if sites.runs and (how.sizes or how.inputs) else None)
            equal = next((f for f in files if filecmp.cmp(file.path, f.path, shallow=False)), None)
            if equal is not None:  # nothing to fuse, or an optimiser that was left out
                equal.same = equal.same or not choice
                continue
            try:
                why = _wrong(_session(file, how, provider), inputs)
            except InputError as error:
                why = str(error)
            if why:
                notes.append(f"{file.name}, it does not run: {why}")
            else:
                files.append(file)
        _measure(files, inputs, how, provider, tell)
    stays = config.functions or not onnx.load(source, load_external_data=False).functions
    chosen = _fastest(files if stays else files[1:] or files)
    told = f"of {len(files)} files, the fastest on {provider} is the model {chosen.name}"
    found = {"provider": provider, "threads": how.threads, **_table(files, inputs, chosen)}
    if chosen.first is None and not chosen.same:
        return Made(source, config.first, notes=[told, *notes], fastest=found, stays=True)
    final = replace(config, first=chosen.first or "")
    best = made[final.optimisers]
    notes += [note for note in best.notes if note not in notes]
    return replace(best, first=final.first, notes=[told, *notes], fastest=found)


def _session(file: _File, how: How, provider: str) -> Any:
    return open_session(file.path, provider, how.threads, how.library and calls_ours(file.path))


def _provider(config: Config) -> str:
    from normfuse.cli_env import sessions_have

    cuda = PROVIDERS["cuda"] in sessions_have()
    if config.target == "ort-cuda" and not cuda:
        raise InputError(f"first={FASTEST!r} measures as the target runs, and ONNX Runtime has no CUDA here; do it "
                         "where it has, or name the optimisers")  # fmt: skip
    return "cuda" if cuda and config.target != "ort-cpu" else "cpu"


def _inputs(source: Path, how: How, given: Given, provider: str) -> list[dict[str, Array]]:
    """What the models are run on; what is `given` by others than `how`, where they run on nothing else. Raises
    `InputError` where the model as it is does not run."""
    session, known = _session(_File(source, None), how, provider), possible_sizes(read_onnx(source)[0])
    found: list[dict[str, Array]] = []
    if any(not isinstance(d, int) for i in session.get_inputs() for d in i.shape) and not (how.sizes or how.inputs):
        tried = ([longest(session, sizes, MOST_FILES, one) for sizes in SIZES] for one in known)
        found = next(([feeds for feeds in some if feeds is not None] for some in tried if any(some)), [])
    found = found or [make_feeds(session, source, how.given())]
    why = _wrong(session, found)
    if why and given.inputs and not how.inputs:
        found = [make_feeds(session, source, given)]
        why = _wrong(session, found)
    if why and how.inputs:
        raise InputError(f"{source} does not run on {how.inputs}: {why}")
    if why:
        sizes = "".join(f", {name}={n}" for name, n in how.sizes.items())
        raise InputError(f"{source} does not run on random inputs{sizes}: {why}; give sizes, by --size NAME=N or "
                         "How(sizes=), or inputs, by --inputs FILE.npz or How(inputs=)")  # fmt: skip
    return found


def _wrong(session: Any, inputs: Sequence[dict[str, Array]]) -> str:
    """Why a session does not run, or nothing."""
    try:
        for feeds in inputs:
            session.run(None, feeds)
    except Exception as why:
        return first_line(why)
    return ""


def _measure(files: Sequence[_File], inputs: Sequence[dict[str, Array]], how: How, provider: str,
             tell: Progress) -> None:  # fmt: skip
    """Median milliseconds of each file, for each inputs, in each turn of sessions."""
    for file in files:
        file.medians = [[] for _ in inputs]
    for turn in range(RESTARTS):
        tell("measuring", turn / RESTARTS)
        _turn([files[(i + turn) % len(files)] for i in range(len(files))], inputs, how, provider)


def _turn(files: Sequence[_File], inputs: Sequence[dict[str, Array]], how: How, provider: str) -> None:
    """One of them. The sessions end with it: there is memory for one of each file."""
    sessions = [_session(file, how, provider) for file in files]
    for i, feeds in enumerate(inputs):
        jobs = [partial(session.run, None, feeds) for session in sessions]
        begun = clock()
        for job in jobs:  # which warms them up, too
            job()
        rounds = how.rounds or max(ROUNDS[0], min(ROUNDS[1], round(SECONDS / (clock() - begun))))
        for file, times in zip(files, turns(jobs, rounds, warm_up=0), strict=True):
            file.medians[i].append(statistics.median(times))


def _fastest(files: Sequence[_File]) -> _File:
    """Optimisers go first where that is faster than without, and the model stays where that is faster than all."""
    original, plain = files[0], next((f for f in files if f.first == ""), files[0])
    better = [f for f in files if f.first and f.faster(plain)]
    chosen = min(better, key=lambda f: statistics.fmean(map(f.score, range(RESTARTS))), default=plain)
    return original if original.faster(chosen) else chosen


def _table(files: Sequence[_File], inputs: Sequence[dict[str, Array]], chosen: _File) -> dict[str, Any]:
    """What was measured on which inputs: medians, and their ratios to those of the model as it is, the first file."""
    rows = []
    for file in files:
        times = [statistics.median(t) for t in file.medians]
        base = [statistics.median(t) for t in files[0].medians]
        rows.append({"name": file.name, "first": file.first, "milliseconds": [round(t, 4) for t in times],
                     "ratio": [round(t / b, 4) for t, b in zip(times, base, strict=True)],
                     "chosen": file is chosen})  # fmt: skip
    return {"inputs": [{name: list(array.shape) for name, array in feeds.items()} for feeds in inputs], "files": rows}
