"""Proof that the guards guard: break the core in thousands of small ways and see that the tests tell.

    python -m tests.mutation [--file facts.py] [--jobs 2] [--sample 60] [--budget SECONDS] [--seed 1] [--json FILE]

mutmut, cosmic-ray and mutatest start a pytest session for each mutant, or fork one and collect in it: torch and
the cases of four exporters take longer to import and to collect than a mutant takes to die here. So this
runner imports and exports once, calls the tests' own functions, records which lines of the core each case runs, and
forks a child for each mutant that puts one changed code object in place and calls only the cases that run it.

What cannot be told apart is listed in explained.toml with the reason; an entry that is none any more is an error.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import random
import sys
import time
import tomllib
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

from tests.mutation.battery import FILES, MODULES, Tape, cases, record
from tests.mutation.mutants import Mutant, Source
from tests.mutation.runner import KILLED, NOT_COVERED, SURVIVED, TIMEOUT, Runner

EXPLAINED = Path(__file__).with_name("explained.toml")
Result = dict[str, Any]


def explained() -> dict[str, str]:
    """Key of a mutant -> why no test can tell it."""
    found = tomllib.loads(EXPLAINED.read_text(encoding="utf-8"))
    return {key: why for why, keys in found.items() for key in keys}


def warm(modules: tuple[str, ...] = MODULES) -> Runner:
    """Record the cases."""
    import torch

    warnings.simplefilter("ignore")
    logging.disable(logging.CRITICAL)
    torch.set_num_threads(1)
    tape = Tape()
    found, slow = record(list(cases(modules)), tape)
    seconds = sum(c.seconds for c in found)
    print(f"{len(found)} cases, {seconds:.0f} s; too slow: {len(slow)}", file=sys.stderr, flush=True)
    return Runner(found, tape)


def work(runner: Runner, todo: list[tuple[Source, Mutant]], until: float, loud: bool = True) -> list[Result]:
    """Run mutants one after the other, and begin none later than `until`."""
    out: list[Result] = []
    for i, (source, mutant) in enumerate(todo):
        if time.perf_counter() > until:
            break
        what, by = runner.run(source, mutant)
        out.append({"key": mutant.key, "file": mutant.file, "line": mutant.line, "before": mutant.before,
                    "after": mutant.after, "result": what, "by": runner.cases[by].name if by >= 0 else ""})  # fmt: skip
        if loud and i % 50 == 49:
            print(f"{i + 1}/{len(todo)}", file=sys.stderr, flush=True)
    return out


def spread(runner: Runner, todo: list[tuple[Source, Mutant]], jobs: int, until: float) -> list[Result]:
    """The same in several processes; in the order of the files."""
    pipes = []
    for job in range(1, jobs):
        read, write = os.pipe()
        if os.fork() == 0:
            with os.fdopen(write, "w") as pipe:
                json.dump(work(runner, todo[job::jobs], until, loud=False), pipe)
            os._exit(0)
        os.close(write)
        pipes.append(read)
    out = work(runner, todo[::jobs], until)
    for read in pipes:
        with os.fdopen(read) as pipe:
            out += json.load(pipe)
    return sorted(out, key=lambda result: (result["file"], result["line"]))


def choose(files: list[Path], sample: int, seed: int) -> list[tuple[Source, Mutant]]:
    """The mutants of these files, or some of them, in a random order: what a budget leaves is a sample, too."""
    todo = [(source, mutant) for source in map(Source, files) for mutant in source.mutants()]
    return random.Random(seed).sample(todo, min(sample or len(todo), len(todo)))


def table(results: list[Result], why: dict[str, str]) -> tuple[str, float]:
    """A line for each file, the survivors, and the share of the mutants without explanation that were killed."""
    lines = [f"{'file':36}{'mutants':>8}{'killed':>8}{'timeout':>8}{'survived':>9}{'explained':>10}{'share':>8}"]
    total: Counter[str] = Counter()
    for file in dict.fromkeys(sorted(r["file"] for r in results)):
        count = Counter("explained" if r["key"] in why and r["result"] not in (KILLED, TIMEOUT) else r["result"]
                        for r in results if r["file"] == file)  # fmt: skip
        total += count
        lines.append(_row(file, count))
    lines.append(_row("all", total))
    for r in results:
        if r["result"] in (SURVIVED, NOT_COVERED) and r["key"] not in why:
            lines.append(f"{r['file']}:{r['line']}  {r['before']} -> {r['after']}  ({r['result']})")
        elif r["result"] in (KILLED, TIMEOUT) and r["key"] in why and not any(
                o["key"] == r["key"] and o["result"] in (SURVIVED, NOT_COVERED) for o in results):  # fmt: skip
            lines.append(f"explained, and yet killed by {r['by']}: {r['key']}")
    return "\n".join(lines), _share(total)


def _share(count: Counter[str]) -> float:
    dead = count[KILLED] + count[TIMEOUT]
    return dead / max(dead + count[SURVIVED] + count[NOT_COVERED], 1)


def _row(name: str, count: Counter[str]) -> str:
    left = count[SURVIVED] + count[NOT_COVERED]
    return (f"{name:36}{sum(count.values()):8}{count[KILLED]:8}{count[TIMEOUT]:8}{left:9}{count['explained']:10}"
            f"{_share(count):8.1%}")  # fmt: skip


def stale(why: dict[str, str]) -> list[str]:
    """Explained mutants that there are none of any more."""
    keys = {mutant.key for source in map(Source, FILES) for mutant in source.mutants()}
    return sorted(set(why) - keys)


def main() -> int:
    """Exit code 1: too few mutants were killed, or the list of explained ones is not current."""
    parser = argparse.ArgumentParser(prog="python -m tests.mutation", description=__doc__.partition("\n")[0])
    parser.add_argument("--file", action="append", help="only these files, by the end of the path")
    parser.add_argument("--tests", help="only these test modules, with commas")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--sample", type=int, default=0)
    parser.add_argument("--budget", type=float, default=float("inf"), help="begin no mutant after so many seconds")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--share", type=float, default=0.95, help="what share has to be killed")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    files = [f for f in FILES if not given.file or any(str(f).endswith("/" + end) for end in given.file)]
    why, started = explained(), time.perf_counter()
    if gone := stale(why):
        print("explained.toml names mutants that there are none of:", *gone, sep="\n")
        return 1
    runner = warm(tuple(given.tests.split(",")) if given.tests else MODULES)
    results = spread(runner, choose(files, given.sample, given.seed), given.jobs, time.perf_counter() + given.budget)
    text, share = table(results, why)
    print(text, f"{time.perf_counter() - started:.0f} s", sep="\n")
    if given.json:
        given.json.write_text(json.dumps(results, indent=1), encoding="utf-8")
    return 0 if share >= given.share else 1


if __name__ == "__main__":
    sys.exit(main())
