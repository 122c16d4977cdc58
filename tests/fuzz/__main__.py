"""NormFuse on trial: random graphs, damaged files, writing that is broken off.

    python -m tests.fuzz graphs [--count 100000] [--replay SEED]     random graphs, by two front ends, against float64
    python -m tests.fuzz onnx|pt2 [--count 50000] [--replay SEED]    damaged files, given to the command line
    python -m tests.fuzz claims [--count 20000] [--replay SEED]      shapes, sizes and constants, against ONNX Runtime
    python -m tests.fuzz kills [--count 1000]                        kill -9, and a fault at every call that writes
    python -m tests.fuzz all [--budget SECONDS] [--json FILE]        all of them, each with its share of the time

Every failure is a line with its seed; of graphs it is saved, reduced where that can be done, in the folder of `--save`.
Exit codes: 0 nothing failed, 1 something did.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections import Counter
from collections.abc import Callable
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

from tests.fuzz import files, kills, runner


def main() -> int:
    if sys.argv[1:] == ["--worker"]:
        runner.work()
        return 0
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("what", choices=(*COUNTS, "all"))
    parser.add_argument("--count", type=int, help=f"how many ({', '.join(f'{k} {n}' for k, n in COUNTS.items())})")
    parser.add_argument("--seed", type=int, default=0, help="the first seed (0)")
    parser.add_argument("--jobs", type=int, default=2, help="processes at a time (2)")
    parser.add_argument("--budget", type=float, default=float("inf"), help="begin nothing after so many seconds")
    parser.add_argument("--replay", type=int, metavar="SEED", help="show one and what becomes of it")
    parser.add_argument("--save", type=Path, default=Path("build/fuzz"), help="where failures go (build/fuzz)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the sum-up there")
    args = parser.parse_args()
    if args.replay is not None:
        own = {"graphs": replay, "claims": replay_claims}.get(args.what)
        return own(args.replay) if own is not None else files.replay(args.replay, args.what)
    found, until = {}, time.monotonic() + args.budget
    shares = SHARES if args.what == "all" else {args.what: 1.0}
    for what, share in shares.items():
        print(f"{what}:", flush=True)
        seconds = min(args.budget * share, until - time.monotonic())
        found[what] = RUNS[what](args, args.count or COUNTS[what], seconds)
    if args.json is not None:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(found | {"date": date.today().isoformat()}, indent=2) + "\n")
    return int(any(part["failures"] for part in found.values()))


def damaged(what: str, args: argparse.Namespace, count: int, seconds: float) -> dict[str, Any]:
    """Damaged files of one kind."""
    began = time.monotonic()
    kinds, wrong = files.fuzz(count, args.seed, args.jobs, kind=what, budget=seconds)
    data = {"files": kinds.total(), "done": kinds["done"], "refused": kinds["refused"],
            "failures": [{"seed": seed, "message": message} for seed, message in wrong],
            "seconds": round(time.monotonic() - began, 1)}  # fmt: skip
    print(f"{data['files']} files in {data['seconds']:.0f} s: {data['done']} done, {data['refused']} refused, "
          f"{len(wrong)} wrong", flush=True)  # fmt: skip
    return data


def broken(args: argparse.Namespace, count: int, seconds: float) -> dict[str, Any]:
    """Writing that is broken off."""
    began, failures = time.monotonic(), []
    calls, found = 0, Counter[str]()
    try:
        calls = sum(len(kills.faults(name)) for name in kills.CASES)
        found = kills.kills(count, args.seed)
    except AssertionError as why:
        failures.append({"message": str(why)})
    data = {"faults": calls, "kills": dict(found), "failures": failures,
            "seconds": round(time.monotonic() - began, 1)}  # fmt: skip
    print(f"a fault at each of {calls} calls that write; killed {count} times: {dict(found)}; "
          f"{len(failures)} failures; {data['seconds']:.0f} s", flush=True)  # fmt: skip
    return data


def claimed(args: argparse.Namespace, count: int, seconds: float) -> dict[str, Any]:
    """What is claimed of random graphs."""
    from tests.fuzz.claims import wrong

    began, failures, done = time.monotonic(), [], 0
    while done < count and time.monotonic() - began < seconds:
        for line in wrong(args.seed + done)[:1]:
            failures.append({"seed": args.seed + done, "message": line})
            print(f"seed {args.seed + done}: {line}", flush=True)
        done += 1
    data = {"graphs": done, "failures": failures, "seconds": round(time.monotonic() - began, 1)}
    print(f"{done} graphs in {data['seconds']:.0f} s: {len(failures)} wrong", flush=True)
    return data


def replay_claims(seed: int) -> int:
    """One graph, and what is claimed of it that is not true."""
    import onnx
    from tests.fuzz.claims import drawn, wrong

    print(onnx.printer.to_text(drawn(seed).whole()[0]), *(found := wrong(seed)), sep="\n")
    return int(bool(found))


def judge(args: argparse.Namespace, count: int, seconds: float) -> dict[str, Any]:
    """Random graphs."""

    def told(failure: dict[str, Any]) -> None:
        print("seed {seed}: {front}: {kind}: {message}".format(**failure), flush=True)

    tally = runner.run(count, args.seed, args.jobs, seconds, told)
    from tests.fuzz.save import save

    for seed in dict.fromkeys(f["seed"] for f in tally.failures[:50] if f["kind"] != "hang"):
        print(f"seed {seed}: {save(seed, args.save)}")
    data = tally.to_dict()
    print(table(data), flush=True)
    return data


def table(data: dict[str, Any]) -> str:
    """The sum-up for people."""
    graphs, seconds = max(data["graphs"], 1), data["seconds"]
    rows = [
        ("graphs", f"{data['graphs']}, {data['with_near_miss'] / graphs:.0%} of them with a near miss"),
        ("runs", ", ".join(f"{name} {n}" for name, n in data["runs"].items())),
        ("true norms found", f"{data['found']} of {data['norms']} ({data['found'] / max(data['norms'], 1):.4%})"),
        ("fused", str(data["fused"])),
        ("near misses", str(data["near_misses"])),
        ("outputs compared", f"{data['compared']}; {data['blind']} of them may be off by a tenth by roundings alone"),
        ("blocks with two hash seeds", str(data["blocks_twice"])),
        ("failures", ", ".join(f"{k} {n}" for k, n in data["failed"].items()) or "none"),
        ("time", f"{seconds:.0f} s, {1000 * seconds / graphs:.1f} ms a graph"),
        ("digest", data["digest"][:16]),
    ]  # fmt: skip
    return "\n".join(f"{name:<28}{text}" for name, text in rows)


def replay(seed: int) -> int:
    """One graph: what it is, what is true of it, what NormFuse says, and what failed."""
    import random

    import normfuse
    from tests.fuzz import check, to_fx, to_onnx
    from tests.fuzz.generator import generate

    program = generate(seed)
    config = check.config(seed, random.Random(seed * 2 + 1))
    print(program, f"target={config.target} numerics={config.numerics} verify={config.verify}", sep="\n\n")
    for name, write in (("onnx", to_onnx.write), ("fx", to_fx.write)):
        print(f"\n{name}:")
        try:
            report = normfuse.optimize(write(program), config)[1]
        except Exception as why:
            print(f"  {type(why).__name__}: {why}")
            continue
        for n in report.norms:
            print(f"  {n.name}: {n.kind} over {n.axes} eps {n.eps:g}, {n.action} {n.emitted}: {n.fact}")
        for r in report.refusals:
            print(f"  {r.code} {r.node}: {r.message}")
    failures = [*check.judge(seed, "onnx").failures, *check.judge(seed, "fx").failures]
    print(*(f"\nfailed: {': '.join(f)}" for f in failures) if failures else ["\nnothing failed"])
    return 1 if failures else 0


COUNTS = {"graphs": 100_000, "onnx": 50_000, "pt2": 5_000, "claims": 20_000, "kills": 1_000}
SHARES = {"kills": 0.1, "pt2": 0.1, "claims": 0.1, "onnx": 0.2, "graphs": 0.5}
"""How much of the time each may take; the cheap ones first."""
RUNS: dict[str, Callable[[argparse.Namespace, int, float], dict[str, Any]]] = {
    "graphs": judge, "onnx": partial(damaged, "onnx"), "pt2": partial(damaged, "pt2"), "kills": broken,
    "claims": claimed,
}  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
