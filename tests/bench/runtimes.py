"""Which runtimes other than ONNX Runtime take the files of which target, and what OpenVINO makes of a norm.

python -m tests.bench.runtimes [--out FILE.json] [--latency [--only NAME ...] [--seconds 6]]

With what is installed of OpenVINO, tract and TVM. `families`: the exports of all families at opset 18 and at 23, as
they are and as each target without runtime writes them. A number is the largest distance of an output to ONNX Runtime's
of the input, in parts of the largest element; a text is what the runtime raised. `spellings`: how many of the older
exporter's spellings at opset 17 OpenVINO compiles to its own operator for a norm (RMS, or MVN for LayerNorm) and how
many to parts, as they are and as target `standard` writes them.
--latency, which wants a machine with nothing else running, measures instead the wide models of tests.bench.latency in
float32, at opset 18, in OpenVINO and in ONNX Runtime: target `standard` in parts of the input, in turns, with new
sessions each of six times, as there.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import os
import tempfile
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime as ort
import torch

import normfuse
from normfuse.bench import turns
from normfuse.config import Target
from tests.bench import latency
from tests.bench.common import ROOT, environment, save, table
from tests.bench.contenders import Job, session
from tests.families import FAMILIES, cached_export
from tests.spelling_files import exported
from tests.spellings import CANNOT_EXPORT, SPELLINGS

RESULT = ROOT / "tests/bench/results/runtimes.json"
TARGETS: tuple[Target, ...] = ("onnx", "standard", "normfuse")
Arrays = dict[str, npt.NDArray[Any]]
Run = Callable[[Path, Arrays], npt.NDArray[Any]]
OURS = "normfuse standard"


def openvino(path: Path, feeds: Arrays) -> npt.NDArray[Any]:
    """In float32, whatever the processor has."""
    import openvino as ov

    compiled = ov.Core().compile_model(str(path), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return np.asarray(compiled(feeds)[0])


def tract(path: Path, feeds: Arrays) -> npt.NDArray[Any]:
    """As its Python package loads ONNX."""
    import tract

    model = tract.onnx().load(str(path))
    names = [model.input_name(i) for i in range(model.input_count())]
    for i, name in enumerate(names):
        sizes = ",".join(map(str, feeds[name].shape))
        model.set_input_fact(i, f"{sizes},{'i64' if feeds[name].dtype == np.int64 else 'f32'}")
    return np.asarray(model.into_model().into_runnable().run([feeds[n] for n in names])[0].to_numpy())


def tvm(path: Path, feeds: Arrays) -> npt.NDArray[Any]:
    """Relax, compiled by LLVM."""
    import tvm
    from tvm.relax.frontend.onnx import from_onnx

    module = tvm.relax.transform.LegalizeOps()(from_onnx(onnx.load(path)))
    machine = tvm.relax.VirtualMachine(tvm.compile(module, "llvm"), tvm.cpu())
    result = machine["main"](*[tvm.runtime.tensor(v) for v in feeds.values()])
    return np.asarray((result if hasattr(result, "numpy") else result[0]).numpy())


RUNTIMES: dict[str, tuple[Run, str]] = {
    "openvino": (openvino, "openvino"), "tract": (tract, "tract"), "tvm": (tvm, "apache-tvm"),
}  # fmt: skip


def outcome(run: Run, path: Path, feeds: Arrays, wanted: npt.NDArray[Any]) -> float | str:
    """The error of a file in a runtime, or why it does not run."""
    try:
        found = run(path, feeds)
    except Exception as why:
        lines = [line.strip() for line in str(why).splitlines() if line.strip()]
        told = [line for line in lines if "normfuse." in line or "_norm" in line]
        return (told or lines or [type(why).__name__])[0][:160]
    return float(f"{np.abs(found - wanted).max() / np.abs(wanted).max():.1e}")


def family(name: str, opset: int, runs: dict[str, Run], folder: Path) -> dict[str, Any]:
    """Each file of a family in each runtime."""
    source = cached_export(name, opset)
    session = ort.InferenceSession(str(source), providers=["CPUExecutionProvider"])
    args = FAMILIES[name].args()
    feeds = {i.name: a.numpy() for i, a in zip(session.get_inputs(), args, strict=True)}
    wanted = session.run(None, feeds)[0]
    files = {"input": source}
    for target in TARGETS:
        files[target] = folder / f"{name}-{opset}-{target}.onnx"
        normfuse.rewrite(source, files[target], normfuse.Config(target=target))
    rows = {r: {which: outcome(run, path, feeds, wanted) for which, path in files.items()} for r, run in runs.items()}
    return {"family": name, "opset": opset, **rows}


def norm_of(path: Path) -> str:
    """What OpenVINO makes of a model of one norm: "RMS", "MVN", or "parts"."""
    import openvino as ov

    compiled = ov.Core().compile_model(str(path), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    kinds = {op.get_rt_info()["layerType"].astype(str) for op in compiled.get_runtime_model().get_ops()}
    return next((kind for kind in ("RMS", "MVN") if kind in kinds), "parts")


def spellings(folder: Path) -> dict[str, dict[str, int]]:
    """How often a spelling becomes one operator, before and after."""
    found: dict[str, Counter[str]] = {"input": Counter(), "standard": Counter()}
    for name in SPELLINGS:
        if name in CANNOT_EXPORT.get(("torchscript", 17), ()):
            continue
        source, target = exported("torchscript", 17, torch.float32, name), folder / f"{name}.onnx"
        normfuse.rewrite(source, target, normfuse.Config(target="standard"))
        found["input"][norm_of(source)] += 1
        found["standard"][norm_of(target)] += 1
    return {which: dict(sorted(counts.items())) for which, counts in found.items()}


def opened(runtime: str, path: Path, threads: int) -> Callable[[Arrays], object]:
    """A new session of a file; what it gives is not looked at."""
    if runtime == "onnxruntime":
        return partial(session(path, threads, "cpu", False).run, None)
    import openvino as ov

    how = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY"}
    compiled: Callable[[Arrays], object] = ov.Core().compile_model(str(path), "CPU", how)
    return compiled


def latencies(job: Job, files: dict[str, Path], runtime: str, threads: int,
              seconds: float) -> list[dict[str, Any]]:  # fmt: skip
    """Each input of a model: both files in turns, with new sessions each time, each first as often."""
    runs: dict[str, list[latency.Times]] = {label: [] for label in job.inputs}
    for start in range(latency.RESTARTS):
        order = sorted(files, reverse=bool(start % 2))
        sessions = {name: opened(runtime, files[name], threads) for name in order}
        for label, feeds in job.inputs.items():
            tasks = [partial(one, feeds) for one in sessions.values()]
            begun = perf_counter()
            for task in tasks:
                task()
            rounds = round(seconds / latency.RESTARTS / (perf_counter() - begun))
            times = turns(tasks, max(3, min(rounds, 200)), warm_up=1)
            runs[label].append(dict(zip(sessions, times, strict=True)))
    rows = []
    for label, each in runs.items():
        ratios, intervals = latency.against_best(each)
        ms = {name: round(median(t for run in each for t in run[name]), 4) for name in files}
        rows.append({"model": job.name, "runtime": runtime, "tokens": label, "threads": threads, "ms": ms,
                     "ratio": ratios[OURS], "interval": intervals[OURS]})  # fmt: skip
    return rows


def measure(only: list[str], seconds: float, folder: Path) -> list[dict[str, Any]]:
    """Both runtimes with one thread and two."""
    rows: list[dict[str, Any]] = []
    for job in latency.jobs(only, ["fp32"]):
        files = {"input": job.path, OURS: folder / f"{job.name}.onnx"}
        normfuse.rewrite(job.path, files[OURS], normfuse.Config(target="standard"))
        for runtime in ("openvino", "onnxruntime"):
            for threads in (1, 2):
                rows += (found := latencies(job, files, runtime, threads, seconds))
                for row in found:
                    print(*(value for key, value in row.items() if key != "ms"), flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=RESULT)
    parser.add_argument("--latency", action="store_true")
    parser.add_argument("--only", nargs="+", default=[], choices=FAMILIES)
    parser.add_argument("--seconds", type=float, default=6)
    given = parser.parse_args()
    out: Path = given.out
    here = {name: run for name, (run, _) in RUNTIMES.items() if importlib.util.find_spec(name)}
    result: dict[str, Any] = {"versions": {n: importlib.metadata.version(RUNTIMES[n][1]) for n in here}}
    kept = json.loads(out.read_text()) if out.exists() else {}
    if any(kept.get(name) != now for name, now in {**result, "environment": environment()}.items()):
        kept = {}  # measured with others
    if given.latency:
        with tempfile.TemporaryDirectory() as temporary:
            rows = measure(given.only, given.seconds, Path(temporary))
        there = {(row["model"], row["runtime"]) for row in rows}
        rows = [row for row in kept.get("latency", []) if (row["model"], row["runtime"]) not in there] + rows
        save(out, kept | {"latency": rows})
        return
    os.environ.setdefault("RUST_BACKTRACE", "0")  # tract's message is all of it
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        result["families"] = [family(n, opset, here, folder) for n in FAMILIES for opset in (18, 23)]
        if "openvino" in here:
            result["spellings"] = spellings(folder)
    files = ("input", *TARGETS)
    counts = []
    for runtime in here:
        for opset in (18, 23):
            each = [row[runtime] for row in result["families"] if row["opset"] == opset]
            counts.append([runtime, opset, *(sum(isinstance(e[f], float) for e in each) for f in files), len(each)])
    print(table(["runtime", "opset", *files, "of"], counts))
    print(result.get("spellings", ""))
    save(out, kept | result)


if __name__ == "__main__":
    main()
