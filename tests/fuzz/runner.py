"""Runs many seeds: long-lived worker processes take blocks of seeds; some blocks run again under another hash seed.

The digest of a block covers every rewritten model and every report of it, so that equal digests mean equal bytes.
"""

from __future__ import annotations

import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tests.fuzz.check import Verdict

BLOCK = 50
LIMIT = 60.0
"""Seconds of processor time for one graph; one takes a twentieth of a second."""
TWICE = 10
"""One block in so many runs again, in a process with another PYTHONHASHSEED."""


@dataclass(slots=True)
class Tally:
    """What came of a run."""

    graphs: int = 0
    norms: int = 0
    found: int = 0
    fused: int = 0
    with_miss: int = 0
    misses: int = 0
    compared: int = 0
    blind: int = 0
    runs: Counter[str] = field(default_factory=Counter)
    failures: list[dict[str, Any]] = field(default_factory=list)
    blocks_twice: int = 0
    digest: str = ""
    seconds: float = 0.0

    def add(self, block: dict[str, Any]) -> None:
        for name in ("graphs", "norms", "found", "fused", "with_miss", "misses", "compared", "blind"):
            setattr(self, name, getattr(self, name) + block[name])
        self.runs.update(block["runs"])
        self.failures += block["failures"]

    def to_dict(self) -> dict[str, Any]:
        """A plain dict, ready for JSON."""
        kinds = Counter(f"{f['front']} {f['kind']}" for f in self.failures)
        return {
            "graphs": self.graphs, "norms": self.norms, "found": self.found, "fused": self.fused,
            "with_near_miss": self.with_miss, "near_misses": self.misses, "compared": self.compared,
            "blind": self.blind, "runs": dict(sorted(self.runs.items())),
            "failed": dict(sorted(kinds.items())), "failures": self.failures, "blocks_twice": self.blocks_twice,
            "digest": self.digest, "seconds": round(self.seconds, 1),
        }  # fmt: skip


class Hang(BaseException):
    """A graph took longer than LIMIT: no Exception, which somebody might catch."""


def limited(judge: Callable[[int], Verdict], seed: int, limit: float = LIMIT) -> Verdict:
    """The verdict on a seed, or that there was none in time."""
    from tests.fuzz.check import Verdict

    def late(_signal: int, _frame: object) -> None:
        raise Hang

    old = signal.signal(signal.SIGPROF, late)
    signal.setitimer(signal.ITIMER_PROF, limit)
    try:
        return judge(seed)
    except Hang:
        return Verdict(seed, failures=[("all", "hang", f"not done within {limit:g} s")])
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, old)


def work() -> None:
    """A worker: a line with the first seed and the number of seeds comes in, a line of JSON goes out."""
    import gc
    import hashlib
    import logging

    from tests.fuzz.check import judge

    logging.disable(logging.WARNING)
    gc.freeze()
    for line in sys.stdin:
        first, count = map(int, line.split())
        tally, digest = Tally(), hashlib.sha256()
        for seed in range(first, first + count):
            verdict = limited(judge, seed)
            digest.update(verdict.digest)
            tally.add({
                "graphs": 1, "norms": verdict.norms, "found": verdict.found, "fused": verdict.fused,
                "with_miss": int(verdict.misses > 0), "misses": verdict.misses, "compared": verdict.compared,
                "blind": verdict.blind, "runs": verdict.runs,
                "failures": [{"seed": seed, "front": front, "kind": kind, "message": message}
                             for front, kind, message in verdict.failures],
            })  # fmt: skip
        record = tally.to_dict() | {"misses": tally.misses, "with_miss": tally.with_miss, "digest": digest.hexdigest()}
        print(json.dumps(record), flush=True)


class _Worker:
    """A process that judges blocks."""

    def __init__(self, hash_seed: int) -> None:
        env = os.environ | {"PYTHONHASHSEED": str(hash_seed), "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen([sys.executable, "-m", "tests.fuzz", "--worker"], env=env, text=True,
                                        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                        start_new_session=True)  # fmt: skip # Ctrl-C is for the one who counts

    def run(self, first: int, count: int) -> dict[str, Any]:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(f"{first} {count}\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"a worker died on the seeds from {first} to {first + count - 1}")
        found: dict[str, Any] = json.loads(line)
        return found

    def close(self) -> None:
        with self.process:  # closes both ends and waits
            pass


def _blocks(count: int, seed: int, deadline: float) -> Iterator[tuple[int, int, int]]:
    for i, first in enumerate(range(seed, seed + count, BLOCK)):
        if time.monotonic() > deadline:
            return
        yield i, first, min(BLOCK, seed + count - first)


def run(count: int, seed: int, jobs: int, budget: float = float("inf"),
        told: Callable[[dict[str, Any]], None] = lambda failure: None) -> Tally:  # fmt: skip
    """Judge seeds from `seed` on, in `jobs` processes at a time; after `budget` seconds, or Ctrl-C, no block is begun.

    `told` is called with each failure as it is met.
    """
    import hashlib

    started = time.monotonic()
    blocks, lock = _blocks(count, seed, started + budget), threading.Lock()
    tally, digests = Tally(), dict[int, str]()
    errors: queue.Queue[BaseException] = queue.Queue()
    ended = threading.Event()

    def serve(number: int) -> None:
        workers: dict[int, _Worker] = {}

        def judged(which: int, first: int, size: int) -> dict[str, Any]:
            if which not in workers:
                workers[which] = _Worker(2 * number + which + 1)
            return workers[which].run(first, size)

        try:
            while errors.empty() and not ended.is_set():
                with lock:
                    block = next(blocks, None)
                if block is None:
                    break
                i, first, size = block
                record = judged(0, first, size)
                again = judged(1, first, size) if i % TWICE == 0 else None
                if again is not None and again["digest"] != record["digest"]:
                    record["failures"].append({"seed": first, "front": "all", "kind": "hash seed", "message":
                                               f"seeds {first} to {first + size - 1}: other bytes under another "
                                               "PYTHONHASHSEED"})  # fmt: skip
                with lock:
                    tally.add(record)
                    tally.blocks_twice += again is not None
                    digests[i] = record["digest"]
                    for failure in record["failures"]:
                        told(failure)
        except BaseException as why:
            errors.put(why)
        finally:
            for worker in workers.values():
                worker.close()

    threads = [threading.Thread(target=serve, args=(k,)) for k in range(jobs)]
    for thread in threads:
        thread.start()
    for thread in threads:
        while thread.is_alive():
            try:
                thread.join()
            except KeyboardInterrupt:
                ended.set()
    if not errors.empty():
        raise errors.get()
    tally.digest = hashlib.sha256("".join(digests[i] for i in sorted(digests)).encode()).hexdigest()
    tally.seconds = time.monotonic() - started
    tally.failures.sort(key=lambda f: (f["seed"], f["front"], f["kind"]))
    return tally
