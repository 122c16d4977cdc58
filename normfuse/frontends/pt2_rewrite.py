"""Rewriting a .pt2 archive: loaded by torch, which the caller has to allow, fused, checked and saved whole or not."""

from __future__ import annotations

import copy
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.export
from torch.utils._pytree import tree_leaves

from normfuse.config import Config
from normfuse.errors import InputError, NormFuseError, UnsafeModelError, UnsupportedError, first_line
from normfuse.frontends import fx_model, pt2
from normfuse.frontends.pt2_graph import Described, Unknown
from normfuse.io import files
from normfuse.io.pt2 import Archive
from normfuse.io.write import write
from normfuse.report import Report
from normfuse.verify import CONVERTED, ROUNDINGS, compare_outputs, demand_equal

OPERATORS = "the result calls operators of torch.ops.normfuse: where it is loaded, `import normfuse.ops` comes first"


def rewrite(source: Path, target: Path, config: Config, *, dry_run: bool, overwrite: bool, in_place: bool,
            refer: bool, calibration: Any, progress: Callable[[str, float], None] | None, trust: bool,
            ) -> Report:  # fmt: skip
    """`normfuse.rewrite` of a .pt2; raises `UnsafeModelError` unless it is trusted, before anything of it is loaded."""
    with Archive(source) as archive:
        archive.model()
    _check_options(source, target, config, refer, calibration)
    if not trust:
        raise UnsafeModelError(f"{source}: loading a .pt2 can run code in it; if you trust its origin, allow it with "
                               "--trust (trust=True in Python)")  # fmt: skip
    if not dry_run:
        files.check_target(source, target, overwrite, in_place)
    tell = progress or (lambda what, share: None)
    started = time.perf_counter()
    tell("loading", 0.0)
    program = _load(source)
    loaded = time.perf_counter()
    tell("fusing", 0.3)
    sites = replace(config, verify="sites") if config.verify == "model" else config
    result, report = fx_model.run(program, sites, rewrite=True, calibration=calibration)
    changed = bool(report.fused or report.converted or report.notes)
    if any("normfuse." in norm.emitted for norm in report.norms):
        report.notes.append(OPERATORS)
    if config.verify == "model" and changed:
        tell("running both programs", 0.6)
        report.model_check = _compare(source, program, result, CONVERTED if config.converts else ROUNDINGS)
    planned = time.perf_counter()
    if not dry_run:
        tell("saving", 0.8)
        if changed:
            _save(result, target)
        elif not (target.exists() and target.samefile(source)):
            with source.open("rb") as original:
                _write(target, lambda f: shutil.copyfileobj(original, f, files.CHUNK))
    done = time.perf_counter()
    report.seconds |= {"load": loaded - started, "save": done - planned, "total": done - started}
    report.seconds = {k: round(v, 4) for k, v in report.seconds.items()}
    report.source, report.target = str(source), "" if dry_run else str(target)
    report.replay = f"normfuse.rewrite({str(source)!r}, {str(target)!r}, normfuse.{config!r}, trust=True)"
    return report


def _check_options(source: Path, target: Path, config: Config, refer: bool, calibration: Any) -> None:
    if target.suffix == ".onnx":
        raise InputError(f"{target}: a .pt2 becomes a .pt2; for ONNX give the program that torch.export.load makes of "
                         f"{source.name} to normfuse.export")  # fmt: skip
    if target.suffix != ".pt2" and target != source:
        raise InputError(f"{target}: a .pt2 becomes a .pt2; give an output that ends in .pt2")
    if config.target in ("ort-cpu", "ort-cuda") or config.ort_version:
        raise InputError(f"{source}: ONNX Runtime does not run a .pt2; leave --target and --ort-version out, or make "
                         "an ONNX model by normfuse.export")  # fmt: skip
    if refer:
        raise InputError(f"{source}: a .pt2 holds its weights itself; leave --external-data out")
    if isinstance(calibration, (str, Path)):
        raise InputError(f"{source}: a .pt2 is calibrated from Python: normfuse.rewrite(..., calibration=) with tuples "
                         "of tensors")  # fmt: skip


def _load(source: Path) -> torch.export.ExportedProgram:
    try:
        return torch.export.load(source)
    except Exception as why:
        unknown = _unknown(source)
        text = f"it calls {unknown}, which no library registers that is imported here" if unknown else first_line(why)
        raise InputError(f"{source}: torch.export.load does not load it: {text}") from why


def _unknown(source: Path) -> str:
    """An operator of the program that is not known in this process."""
    try:
        with Archive(source) as archive:
            program = pt2.Program(archive, archive.json(f"models/{archive.model()}.json"), archive.model())
    except NormFuseError:
        return ""
    modules = [m for m in program.graph_module.modules() if isinstance(m, Described)]
    return next((str(n.target) for m in modules for n in m.graph.nodes if isinstance(n.target, Unknown)), "")


def _compare(source: Path, program: Any, result: Any, roundings: float) -> dict[str, Any]:
    """Both programs on the example inputs that were saved with it; raises `VerificationError` where they differ."""
    if program.example_inputs is None:
        raise InputError(f"{source}: no example inputs are saved with the program to run it on; use --verify sites")
    outputs = []
    for one in (program, result):
        args, kwargs = copy.deepcopy(program.example_inputs)
        try:
            with torch.random.fork_rng(devices=[]), torch.no_grad():
                torch.manual_seed(0)
                outputs.append([_array(v) for v in tree_leaves(one.module()(*args, **kwargs))])
        except Exception as why:
            raise InputError(f"{source}: the program does not run on its example inputs: {first_line(why)}") from why
    names = [str(name) for name in program.graph_signature.user_outputs]
    if len(names) != len(outputs[0]):
        names = [f"output {i}" for i in range(len(outputs[0]))]
    found = compare_outputs(names, outputs[0], outputs[1], roundings, "torch")
    demand_equal(found, source)
    return found


def _array(value: Any) -> Any:
    if not isinstance(value, torch.Tensor):
        return value
    value = value.detach().cpu()
    if value.dtype == torch.bfloat16:
        import ml_dtypes

        return value.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    try:
        return value.numpy()
    except TypeError:  # what numpy has no type for
        return value.to(torch.float64).numpy().astype(np.float32)


def _save(program: torch.export.ExportedProgram, target: Path) -> None:
    try:
        _write(target, lambda f: torch.export.save(program, f))
    except NormFuseError:
        raise
    except Exception as why:
        raise UnsupportedError(f"{target}: torch.export.save does not save the result: {first_line(why)}") from why


def _write(target: Path, fill: Callable[[Any], object]) -> None:
    """Write a file whole or not at all."""

    def filled(handle: int) -> None:
        with os.fdopen(handle, "w+b", closefd=False) as f:
            fill(f)

    write(target, filled)
