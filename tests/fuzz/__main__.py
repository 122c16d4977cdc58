"""Random graphs on trial: `python -m tests.fuzz graphs --count 2000 --seed 0 --jobs 2`, `--replay SEED` for one.

Every failure is a line with its seed, and is saved, reduced where that can be done, in the folder of `--save`. Exit
codes: 0 nothing failed, 1 something did.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from tests.fuzz import runner


def main() -> int:
    if sys.argv[1:] == ["--worker"]:
        runner.work()
        return 0
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    commands = parser.add_subparsers(required=True)
    graphs = commands.add_parser("graphs", help="judge random graphs")
    graphs.add_argument("--count", type=int, default=2000, help="how many (2000)")
    graphs.add_argument("--seed", type=int, default=0, help="the first seed (0)")
    graphs.add_argument("--jobs", type=int, default=1, help="processes at a time (1)")
    graphs.add_argument("--budget", type=float, default=float("inf"), help="begin nothing after so many seconds")
    graphs.add_argument("--replay", type=int, metavar="SEED", help="show one graph and what becomes of it")
    graphs.add_argument("--save", type=Path, default=Path("build/fuzz"), help="where failures go (build/fuzz)")
    graphs.add_argument("--json", type=Path, metavar="FILE", help="write the sum-up there")
    args = parser.parse_args()
    return replay(args.replay) if args.replay is not None else judge(args)


def judge(args: argparse.Namespace) -> int:
    """The run of `graphs`."""


    def told(failure: dict[str, Any]) -> None:
        print("seed {seed}: {front}: {kind}: {message}".format(**failure), flush=True)

    tally = runner.run(args.count, args.seed, args.jobs, args.budget, told)
    from tests.fuzz.save import save

    for seed in dict.fromkeys(f["seed"] for f in tally.failures[:50]):
        print(f"seed {seed}: {save(seed, args.save)}")
    data = tally.to_dict()
    print(table(data))
    if args.json is not None:
        args.json.write_text(json.dumps(data, indent=2) + "\n")
    return 1 if tally.failures else 0


def table(data: dict[str, Any]) -> str:
    """The sum-up for people."""
    graphs, seconds = max(data["graphs"], 1), data["seconds"]
    rows = [
        ("graphs", f"{data['graphs']}, {data['with_near_miss'] / graphs:.0%} of them with a near miss"),
        ("runs", ", ".join(f"{name} {n}" for name, n in data["runs"].items())),
        ("true norms found", f"{data['found']} of {data['norms']} ({data['found'] / max(data['norms'], 1):.4%})"),
        ("fused", str(data["fused"])),
        ("near misses", str(data["near_misses"])),
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
    config = check.config(random.Random(seed * 2 + 1))
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


if __name__ == "__main__":
    sys.exit(main())
