"""Rewriting a .pt2 archive: loaded by torch, which the caller has to allow, fused, checked and saved whole or not."""

from __future__ import annotations

import io
import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.export

from normfuse.config import OF_TORCH, Config
from normfuse.errors import InputError, NormFuseError, UnsupportedError, first_line
from normfuse.frontends import fx_model, pt2_run
from normfuse.io import files
from normfuse.io.pt2 import Archive
from normfuse.io.write import Put, write
from normfuse.report import Report
from normfuse.verify import demand_equal, roundings_for

OPERATORS = "the result calls operators of torch.ops.normfuse: where it is loaded, `import normfuse.ops` comes first"


def rewrite(source: Path, target: Path, config: Config, *, dry_run: bool, overwrite: bool, in_place: bool,
            refer: bool, calibration: Any, progress: Callable[[str, float], None] | None, trust: bool,
            ) -> Report:  # fmt: skip
    """`normfuse.rewrite` of a .pt2; raises `UnsafeModelError` unless it is trusted, before anything of it is loaded."""
    with Archive(source) as archive:
        archive.model()
    _check_options(source, target, config, refer)
    pt2_run.demand_trust(source, trust)
    put = None if dry_run else files.check_target(source, target, overwrite, in_place)
    tell = progress or (lambda what, share: None)
    started = time.perf_counter()
    tell("loading", 0.0)
    program = pt2_run.load(source)
    if isinstance(calibration, (str, Path)):
        calibration = pt2_run.batches(program, calibration)
    loaded = time.perf_counter()
    tell("fusing", 0.3)
    sites = replace(config, verify="sites") if config.verify == "model" else config
    result, report = fx_model.run(program, sites, rewrite=True, calibration=calibration)
    changed = bool(report.fused or report.converted or report.notes)
    if any("normfuse." in norm.emitted for norm in report.norms):
        report.notes.append(OPERATORS)
    if config.verify == "model" and changed:
        tell("running both programs", 0.6)
        report.model_check = pt2_run.compare(source, program, result, roundings_for(config.converts))
        demand_equal(report.model_check, source)
    planned = time.perf_counter()
    if put is None:
        report.notes += files.rehearse(source, target, overwrite, in_place)
    else:
        tell("saving", 0.8)
        if changed:
            _save(result, source, target, put)
        elif not (target.exists() and target.samefile(source)):
            with source.open("rb") as original:
                _write(source, target, lambda f: shutil.copyfileobj(original, f, files.CHUNK), put)
    done = time.perf_counter()
    report.seconds |= {"load": loaded - started, "save": done - planned, "total": done - started}
    report.seconds = {k: round(v, 4) for k, v in report.seconds.items()}
    report.source, report.target = str(source), "" if dry_run else str(target)
    report.replay = f"normfuse.rewrite({str(source)!r}, {str(target)!r}, normfuse.{config!r}, trust=True)"
    return report


def _check_options(source: Path, target: Path, config: Config, refer: bool) -> None:
    if target.suffix == ".onnx":
        raise InputError(f"{target}: a .pt2 becomes a .pt2; for ONNX give the program that torch.export.load makes of "
                         f"{source.name} to normfuse.export")  # fmt: skip
    if target.suffix != ".pt2" and target != source:
        raise InputError(f"{target}: a .pt2 becomes a .pt2; give an output that ends in .pt2")
    if config.target not in OF_TORCH or config.ort_version:
        given = f"target={config.target!r}" + f" and ort_version={config.ort_version!r}" * bool(config.ort_version)
        raise InputError(f"{source}: torch runs a .pt2, and target {config.target!r} is for ONNX models; leave "
                         f"{given} out, or make an ONNX model by normfuse.export")  # fmt: skip
    if refer:
        raise InputError(f"{source}: a .pt2 holds its weights itself; leave external_data='reference' out")


def _save(program: torch.export.ExportedProgram, source: Path, target: Path, put: Put) -> None:
    try:
        _write(source, target, lambda f: torch.export.save(program, f), put)
    except NormFuseError:
        raise
    except Exception as why:
        raise UnsupportedError(f"{target}: torch.export.save does not save the result: {first_line(why)}") from why


def _write(source: Path, target: Path, fill: Callable[[Any], object], put: Put) -> None:
    """Write a file whole or not at all."""

    def filled(handle: int) -> None:
        with _Taking(handle, "w+b", closefd=False) as f:
            fill(f)
            if f.error is not None:
                raise f.error

    write(target, filled, like=source, put=put)


class _Taking(io.FileIO):
    """A file that takes all that is written, and keeps the first error: torch's writer ends the process at one."""

    error: OSError | None = None

    def write(self, data: Any) -> int:
        """Give back the size of the data, written or not."""
        rest = memoryview(data).cast("B")
        size = len(rest)
        try:
            while rest and self.error is None:
                rest = rest[super().write(rest) or 0 :]
        except OSError as why:
            self.error = why
        return size
