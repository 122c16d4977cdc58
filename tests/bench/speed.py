"""Seconds for reading, rewriting and writing Llamas of growing depth, in turns with what others take.

python -m tests.bench.speed [--layers 8 32 80] [--repeats 5] [--peers] [--out FILE.json]
"""

from __future__ import annotations

import argparse
import gc
import logging
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir
import onnxruntime as ort

import normfuse
from normfuse.report import Report
from tests.bench.common import ROOT, save, summary, table, turns
from tests.bench.llama_layers import DEPTHS, cached_llama

IR, IR_QUIET, ORT = "onnx_ir load+save", "onnx_ir load+save, gc off", "onnxruntime optimise+save"
OFF, SITES = "normfuse, verify off", "normfuse, verify sites"
PEERS = {"onnxsim": "onnxsim simplify", "onnxscript": "onnxscript optimize"}
PEER_LIMIT = 120.0


def load_and_save(source: Path, target: Path) -> None:
    """What reading and writing costs without doing anything."""
    ir.save(ir.load(source), target)


def load_and_save_quiet(source: Path, target: Path) -> None:
    """The same with the cyclic collector held, as NormFuse holds it."""
    gc.disable()
    try:
        load_and_save(source, target)
    finally:
        gc.enable()


def runtime(source: Path, target: Path) -> None:
    """ONNX Runtime's full optimisation, saved."""
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.optimized_model_filepath = str(target)
    ort.InferenceSession(str(source), options, providers=["CPUExecutionProvider"])


def fuse(source: Path, target: Path, verify: Any) -> Report:
    """NormFuse from file to file."""
    return normfuse.rewrite(source, target, normfuse.Config(verify=verify), overwrite=True)


def peer(tool: str, source: Path, target: Path) -> float:
    """Seconds of another tool from file to file, imports excluded; runs in a process of its own."""
    if tool == "onnxsim":
        import onnxsim

        started = time.perf_counter()
        onnx.save(onnxsim.simplify(onnx.load(source))[0], target)
    else:
        from onnxscript import optimizer

        started = time.perf_counter()
        model = ir.load(source)
        optimizer.optimize(model)
        ir.save(model, target)
    return time.perf_counter() - started


def timed_peer(tool: str, source: Path, target: Path) -> float | str:
    """What `peer` takes in a process with a time limit, or why there is no number."""
    command = [sys.executable, "-W", "ignore", "-m", "tests.bench.speed", "--child", tool, str(source), str(target)]
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=PEER_LIMIT, check=True)
    except subprocess.TimeoutExpired:
        return f"> {PEER_LIMIT:.0f}"
    except subprocess.CalledProcessError:
        return "failed"
    return float(done.stdout.split()[-1])


def measure(layers: int, repeats: int, peers: bool, folder: Path) -> dict[str, Any]:
    """All tools on one depth."""
    source, target = cached_llama(layers).resolve(), folder / "out.onnx"
    reports: dict[str, Report] = {}

    def fused(name: str, verify: str) -> Callable[[], None]:
        return lambda: reports.__setitem__(name, fuse(source, target, verify))

    jobs = {
        IR: lambda: load_and_save(source, target),
        IR_QUIET: lambda: load_and_save_quiet(source, target),
        ORT: lambda: runtime(source, target),
        OFF: fused(OFF, "off"),
        SITES: fused(SITES, "sites"),
    }
    if layers == min(DEPTHS):
        turns(jobs, 1)  # imports and first calls
    tools: dict[str, dict[str, Any]] = {name: dict(summary(s)) for name, s in turns(jobs, repeats).items()}
    for name, report in reports.items():
        tools[name] |= {"norms": len(report.norms), "fused": report.fused, "parts": report.seconds}
    for tool, name in PEERS.items() if peers else ():
        once = timed_peer(tool, source, target)
        tools[name] = {"min": round(once, 4), "median": round(once, 4)} if isinstance(once, float) else {"no": once}
    nodes = len(onnx.load(source).graph.node)
    return {"layers": layers, "nodes": nodes, "bytes": source.stat().st_size, "repeats": repeats, "tools": tools}


def show(result: dict[str, Any]) -> str:
    """The table of one depth."""
    tools = result["tools"]
    rows = []
    for name, found in tools.items():
        if "no" in found:
            rows.append([name, found["no"], "", "", "", ""])
            continue
        ratios = [f"{found['min'] / tools[base]['min']:.2f}" for base in (ORT, IR)]
        rows.append([name, f"{found['min']:.3f}", f"{found['median']:.3f}", *ratios, found.get("fused", "")])
    title = f"{result['layers']} layers, {result['nodes']} nodes, {result['bytes'] / 1e6:.1f} MB"
    return f"{title}\n" + table(["tool", "min s", "median s", "x ort", "x onnx_ir", "fused"], rows)


def growth(results: list[dict[str, Any]]) -> list[str]:
    """How time grows from the least depth to the greatest, by the least times."""
    first, last = results[0], results[-1]
    lines = []
    for name in (OFF, SITES, ORT, IR):
        times = last["tools"][name]["min"] / first["tools"][name]["min"]
        lines.append(f"{last['layers']} layers / {first['layers']} layers = {times:.2f}  ({name})")
    return lines


def main() -> None:
    """Measure, print, and write the result if asked."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--layers", type=int, nargs="+", default=list(DEPTHS))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--peers", action="store_true", help=f"also onnxsim and onnxscript, {PEER_LIMIT:.0f} s each")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    if given.child:
        tool, source, target = given.child
        print(peer(tool, Path(source), Path(target)))
        return
    results = []
    with tempfile.TemporaryDirectory() as folder:
        for layers in sorted(given.layers):
            results.append(measure(layers, given.repeats, given.peers, Path(folder)))
            print(show(results[-1]), end="\n\n", flush=True)
    lines = growth(results) if len(results) > 1 else []
    print("\n".join(lines))
    save(given.out, {"depths": results, "growth": lines})


if __name__ == "__main__":
    main()
