"""How many spellings of the norms each tool recovers, and how many of those it gets wrong.

python -m tests.bench.peers [--out FILE.json]

Recovered: the main graph holds a norm operator (or a call of NormFuse's function) and no reduction. Wrong: what the
recovered model gives is further than 1e-3 of the largest element from torch's float64 on one of three inputs, or it
does not run. `input` is the export as it is: exporters write some norms as operators themselves. `sees` is where
NormFuse reports exactly one norm, fused or refused: the node tests of LayerNormalization also return the deviation,
and there it refuses.
"""

from __future__ import annotations

import argparse
import logging
import multiprocessing
import os
import sys
import tempfile
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir
import onnxruntime as ort
import torch

import normfuse
from tests.bench.common import save, table
from tests.node_cases import Arrays, expanded_cases
from tests.spellings import CANNOT_EXPORT, LOSES_EPS, SPELLINGS, Exporter, hostile_inputs, parameters, reference
from tests.spelling_files import EXPORTERS, REDUCTIONS, exported, session

NORMS = {
    "LayerNormalization", "RMSNormalization", "SimplifiedLayerNormalization", "SkipLayerNormalization",
    "SkipSimplifiedLayerNormalization",
}  # fmt: skip
LIMIT, SECONDS = 1e-3, 120
Runs = list[tuple[Arrays, list[npt.NDArray[Any]]]]


@dataclass(frozen=True)
class Case:
    """One model with the inputs to run it on and what it should give."""

    name: str
    source: Path
    runs: Runs
    needs_reductions: bool = False
    """Whether other outputs keep a reduction alive, whatever becomes of the norm."""


def as_is(source: Path, target: Path) -> None:
    """The exporter's own work."""
    onnx.save(onnx.load(source), target)


def runtime(source: Path, target: Path) -> None:
    """ONNX Runtime's optimiser, as a session runs it."""
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    options.optimized_model_filepath = str(target)
    ort.InferenceSession(str(source), options, providers=["CPUExecutionProvider"])


def runtime_tool(model_type: str) -> Callable[[Path, Path], None]:
    """ONNX Runtime's Python tool for one kind of model."""

    def run(source: Path, target: Path) -> None:
        from onnxruntime.transformers.optimizer import optimize_model

        optimize_model(str(source), model_type=model_type).save_model_to_file(str(target))

    return run


def onnxsim(source: Path, target: Path) -> None:
    """onnxsim, with what it does by default."""
    from onnxsim import simplify

    onnx.save(simplify(onnx.load(source))[0], target)


def onnxscript(source: Path, target: Path) -> None:
    """The optimiser that torch's exporter runs."""
    from onnxscript import optimizer

    model = ir.load(source)
    optimizer.optimize(model)
    ir.save(model, target)


def onnxscript_ort(source: Path, target: Path) -> None:
    """onnxscript's fusions for ONNX Runtime."""
    from onnxscript.rewriter.ort_fusions import optimize_for_ort

    ir.save(optimize_for_ort(ir.load(source))[0], target)


def fuse(source: Path, target: Path) -> None:
    """NormFuse, with what it does by default."""
    normfuse.rewrite(source, target, overwrite=True)


TOOLS: dict[str, tuple[Callable[[Path, Path], None], ...]] = {
    "input": (as_is,),
    "onnxruntime": (runtime,),
    "ort python tool": (runtime_tool("bert"), runtime_tool("gpt2")),
    "onnxsim": (onnxsim,),
    "onnxscript": (onnxscript,),
    "onnxscript for ort": (onnxscript_ort,),
    "normfuse": (fuse,),
}
"""Each tool in its variants, of which the best counts, case by case."""


def silence() -> None:
    """Neither warnings nor what libraries print, even from C++."""
    warnings.simplefilter("ignore")
    logging.disable(logging.CRITICAL)
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    os.dup2(null, 2)
    torch.set_num_threads(1)


def attempt(tool: str, variant: int, case: Case) -> int:
    """-1: the tool failed. 0: not recovered. 1: recovered, and wrong. 2: recovered, and right."""
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "out.onnx"
        try:
            TOOLS[tool][variant](case.source, target)
            nodes = [(n.domain, n.op_type) for n in onnx.load(target).graph.node]
        except Exception:
            return -1
        if not any(op in NORMS or domain == "normfuse" for domain, op in nodes):
            return 0
        if not case.needs_reductions and any(op in REDUCTIONS for _, op in nodes):
            return 0
        try:
            return 2 if all(right(target, feeds, want) for feeds, want in case.runs) else 1
        except Exception:
            return 1


def right(path: Path, feeds: Arrays, want: Sequence[npt.NDArray[Any]]) -> bool:
    """Whether every output is within the limit, measured by its largest element."""
    one = session(path)
    names = [i.name for i in one.get_inputs()]
    got = one.run(None, dict(zip(names, feeds.values(), strict=True)))
    pairs = [(g.astype(np.float64), w) for g, w in zip(got, want, strict=True)]
    return all(g.shape == w.shape and np.abs(g - w).max() <= LIMIT * np.abs(w).max() for g, w in pairs)  # NaN: no


def spelling_cases(exporter: Exporter, opset: int) -> list[Case]:
    """All spellings that an exporter can write and that are norms once written, in float32."""
    cases = []
    for name, spelling in SPELLINGS.items():
        if name in CANNOT_EXPORT[exporter, opset] or name in LOSES_EPS[exporter]:
            continue
        inputs = hostile_inputs(spelling.shape, torch.float32)
        runs: Runs = []
        for key in ("normal", "offset", "tiny"):
            want = reference(spelling, inputs[key], *parameters()).numpy()
            runs.append(({"x": inputs[key].numpy()}, [want]))
        cases.append(Case(name, exported(exporter, opset, torch.float32, name), runs))
    return cases


def node_cases(folder: Path) -> list[Case]:
    """ONNX's expanded node tests; those of LayerNormalization also give the mean and the inverse deviation."""
    cases = []
    for name, model, inputs, outputs in expanded_cases():
        onnx.save(model, folder / f"{name}.onnx")
        want = [o.astype(np.float64) for o in outputs.values()]
        cases.append(Case(name, folder / f"{name}.onnx", [(inputs, want)], len(outputs) > 1))
    return cases


def count(tool: str, cases: list[Case]) -> dict[str, Any]:
    """What a tool does with all cases, in a process of its own that may crash."""

    def pool() -> ProcessPoolExecutor:
        return ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), silence)

    worker, best = pool(), dict.fromkeys((c.name for c in cases), -1)
    for case in cases:
        for variant in range(len(TOOLS[tool])):
            try:
                found = worker.submit(attempt, tool, variant, case).result(SECONDS)
            except (BrokenProcessPool, TimeoutError):
                for process in list(getattr(worker, "_processes", {}).values()):
                    process.kill()
                worker.shutdown(wait=False, cancel_futures=True)
                worker, found = pool(), -1
            best[case.name] = max(best[case.name], found)
    worker.shutdown()
    return {
        "found": sum(b > 0 for b in best.values()),
        "wrong": [name for name, b in best.items() if b == 1],
        "failed": [name for name, b in best.items() if b < 0],
        "missed": [name for name, b in best.items() if b == 0] if tool == "normfuse" else [],
    }


def main() -> None:
    """Count, print, and write the result if asked."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.disable(logging.CRITICAL)
    rows: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(os.cpu_count() or 1) as threads:
        sets = {f"{exporter} {opset}": spelling_cases(exporter, opset) for exporter, opset in EXPORTERS}
        sets["onnx node tests, expanded"] = node_cases(Path(folder))
        for row, cases in sets.items():
            jobs = {tool: threads.submit(count, tool, cases) for tool in TOOLS}
            rows[row] = {"cases": len(cases), **{tool: job.result() for tool, job in jobs.items()}}
            rows[row]["sees"] = sum(len(normfuse.inspect(case.source).norms) == 1 for case in cases)
            print(f"{row}: done", file=sys.stderr, flush=True)
    lines = []
    for row, found in rows.items():
        tools = [found[tool] for tool in TOOLS]
        cells = [f"{t['found']} ({len(t['wrong'])})" if t["wrong"] else t["found"] for t in tools]
        lines.append([row, found["cases"], *cells, found["sees"]])
    print("recovered (of these wrong)\n" + table(["exporter, opset", "cases", *TOOLS, "sees"], lines))
    for row, found in rows.items():
        print(f"failed on {row}:", {tool: len(found[tool]["failed"]) for tool in TOOLS if found[tool]["failed"]})
    save(given.out, {"limit": LIMIT, "rows": rows})


if __name__ == "__main__":
    main()
