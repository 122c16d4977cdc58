"""`inspect`, `rewrite` and `optimize`: the three things to do with a model."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from normfuse.config import Config, config_of, demand_torch, demand_use
from normfuse.convert import Record, tell
from normfuse.errors import InputError, UnsafeModelError, UnsupportedError, VerificationError, path_of
from normfuse.process import tidy
from normfuse.records import build_report
from normfuse.report import Report
from normfuse.sessions import Given

if TYPE_CHECKING:
    import onnx
    import onnx_ir as ir

    from normfuse.bench import How
    from normfuse.frontends.onnx_model import OnnxModel
    from normfuse.io.files import Source

Progress = Callable[[str, float], None]


@tidy
def inspect(model: Any) -> Report:
    """Find the norms of a model and change nothing.

    `model`: a path to an .onnx or .pt2 file, of which nothing is run, `onnx.ModelProto`, `onnx_ir.Model`,
    `torch.onnx.ONNXProgram`, `torch.export.ExportedProgram` or `torch.fx.GraphModule`. Raises `InputError` for what is
    none of these.
    """
    if isinstance(model, (str, os.PathLike)):
        model = path_of(model, "the input")
        if _is_pt2(model):
            from normfuse.frontends import pt2

            report = pt2.inspect(model)
        else:
            report = _inspect_ir(_read(model)[0], own=True)
        report.source = str(model)
        return report
    kind = _kind(model)
    if kind == "module":
        raise InputError(f"a {type(model).__name__} is an nn.Module, whose norms are seen once it is traced: give "
                         "torch.export.export(module, args)")  # fmt: skip
    if kind in ("fx", "exported"):
        from normfuse.frontends import fx_model

        return fx_model.run(model, Config(verify="off"), rewrite=False)[1]
    return _inspect_ir(_as_ir(model, kind))


@tidy
def rewrite(src_path: str | Path, dst_path: str | Path, config: Config | None = None, *, dry_run: bool = False,
            overwrite: bool = False, in_place: bool = False, external_data: str = "copy", calibration: Any = None,
            progress: Progress | None = None, trust: bool = False, how: How | None = None) -> Report:  # fmt: skip
    """Read an ONNX model or .pt2 program, fuse its norms, check the result and save it; the input is never changed.

    `dry_run` writes nothing, and notes what would keep the output from being written. `overwrite` allows to replace an
    existing output, `in_place` that it is the input.
    `progress(what, share)` is called as the work goes on. A model with nothing to do is copied byte by byte.
    External data is copied, by the file system and under a name made from its content, or, with
    `external_data="reference"`, stays where it is, which has to be in the folder of the output or below. `calibration`
    is for `layernorm_to_rmsnorm="approximate"`: an .npz file, a folder of them, or dicts of arrays by input name; for
    a .pt2, a file, a folder, or tuples of inputs. A .pt2 becomes a .pt2: loading one can run code in it, so it has to
    be allowed by `trust`. `how` (`normfuse.bench.How`) has sizes and inputs for what runs an ONNX model:
    `verify="model"`, `first`, and the certificate of a conversion, for which inputs are drawn where that will do; and
    `threads` for `first="fastest"`.

    Raises `InputError`, `UnsafeModelError` or `UnsupportedError` before anything is written, and `VerificationError`
    when `verify="model"` finds that the results differ; then nothing is written either.
    """
    import onnx_ir as ir

    from normfuse import first
    from normfuse.frontends.onnx_open import demand_given
    from normfuse.io import files

    config = config_of(config)
    demand_use(config, calibration)
    if external_data not in ("copy", "reference"):
        raise InputError(f"external_data={external_data!r} is not known; choose 'copy' or 'reference'")
    refer = external_data == "reference"
    source = path_of(src_path, "the input", "; normfuse.optimize takes models in memory")
    given = target = path_of(dst_path, "the output")
    if in_place:
        target = files.through(source, given)
    if _is_pt2(source):
        from normfuse.frontends import pt2_rewrite

        if config.first or how is not None:
            what = f"first={config.first!r}" if config.first else "how="
            raise InputError(f"{source}: {what} is for ONNX models; leave it out")
        source = target if target != given else source
        return pt2_rewrite.rewrite(source, target, config, dry_run=dry_run, overwrite=overwrite, in_place=in_place,
                                   refer=refer, calibration=calibration, progress=progress, trust=trust)  # fmt: skip
    if target.suffix == ".pt2":
        raise InputError(f"{target}: an ONNX model cannot become a .pt2; give an output that ends in .onnx")
    if target.suffix == ".ort":
        raise InputError(f"{target}: ONNX Runtime takes such a name for its own format, which this is not; give an "
                         "output that ends in .onnx")  # fmt: skip
    if config.first and refer:
        raise InputError(f"first={config.first!r} writes the weights anew; leave external_data='reference' out")
    started = time.perf_counter()
    needed = config.first or (dry_run and config.verify == "model")
    with tempfile.TemporaryDirectory(prefix="normfuse-") if needed else nullcontext("") as folder:
        model, original = _read(source)
        first.check(config, how)
        said = Given() if how is None else how.given()
        demand_given(model, said)
        put = None if dry_run else files.check_target(source, target, overwrite, in_place)
        if original.external and target.parent != given.parent.resolve() and target != given:
            raise InputError(f"{given}: is a link, and its weights would go beside {target}, where runtimes do not "
                             "look for them; give that path, or another output")  # fmt: skip
        loaded = time.perf_counter()
        made = first.run(source, config, Path(folder), progress, how, said)
        config = replace(config, first=made.first)
        if made.path != source:
            model, original = _read(made.path)
        tried = time.perf_counter()
        changed, plain = False, True
        if made.stays:
            report = _untouched(model)
        else:
            model, report, changed, plain = _rewrite_ir(model, config, progress, calibration, said)
        planned = time.perf_counter()
        check = partial(_check_file, source, report, config, said) if config.verify == "model" and changed else None
        if check is not None and put is None:
            files.write_onnx(model, Path(folder) / "candidate.onnx", original, check=check, edited=not plain)
        if put is None:
            report.notes += files.rehearse(source, target, overwrite, in_place)
        else:
            if progress is not None:
                progress("saving", 0.9)
            copied = None if progress is None else partial(_copied, progress)
            if changed:
                left = files.write_onnx(model, target, original, refer, copied, check, source, not plain, put)
                if made.path == source and target.samefile(source):
                    report.notes += [f"the weights are copied under a name made from their content; {old} is not read "
                                     "by the model any more" for old in left]  # fmt: skip
            elif not (target.exists() and target.samefile(made.path)):
                files.copy_onnx(model, made.path, target, refer, copied, put)
    done = time.perf_counter()
    made.tell(report)
    if made.notes:
        report.seconds["first"] = tried - loaded
    report.seconds |= {"load": loaded - started, "save": done - planned, "total": done - started}
    report.seconds = {k: round(v, 4) for k, v in report.seconds.items()}
    assert isinstance(model, ir.Model)
    report.source, report.target = str(source), "" if dry_run else str(given)
    more = ", in_place=True" if in_place else ", overwrite=True" if overwrite else ""
    more += f", external_data={external_data!r}" * (external_data != "copy")
    more += ", calibration=..." * (calibration is not None)
    more += f", how=normfuse.bench.{how!r}" * (config.runs and bool(said.inputs or said.sizes))
    report.replay = f"normfuse.rewrite({str(source)!r}, {str(given)!r}, normfuse.{config!r}{more})"
    return report


def _copied(progress: Progress, done: int, total: int) -> None:
    progress(f"copying weights, {done / 2**30:.1f} of {total / 2**30:.1f} GiB", 0.9 + 0.1 * done / max(total, 1))


@tidy
def optimize(model: Any, config: Config | None = None, *, args: Sequence[Any] | None = (),
             kwargs: Mapping[str, Any] | None = None, calibration: Any = None,
             how: How | None = None) -> tuple[Any, Report]:  # fmt: skip
    """Fuse the norms of a model in memory and give back (the same type of model, the report).

    Takes what `inspect` takes; for a path it gives back an `onnx_ir.Model`. The model given is not changed. An
    `nn.Module` is taken for `layernorm_to_rmsnorm="exact"`, with `args` and `kwargs` to trace it with: its LayerNorms
    become RMSNorms in a copy, which is an ordinary module. `calibration`: as for `rewrite`; for torch, tuples of
    inputs. `how`: as for `rewrite`, for the certificate of an ONNX model's conversion.
    """
    config = config_of(config)
    demand_use(config, calibration)
    kind = "path" if isinstance(model, (str, os.PathLike)) else _kind(model)
    if kind in ("module", "fx", "exported"):
        demand_torch(config)
        if how is not None:
            raise InputError("how= is for ONNX models; leave it out")
    if kind == "module":
        from normfuse.frontends.module_convert import convert_module

        return convert_module(model, config, () if args is None else args, kwargs, calibration)
    if not (kwargs is None or kwargs == {}) or not (args is None or (isinstance(args, (tuple, list)) and not args)):
        raise InputError("args and kwargs are to trace an nn.Module with, and this is none; leave them out")
    if config.first:
        raise UnsupportedError("first needs files to run; use normfuse.rewrite or normfuse.export")
    from normfuse.first import check
    from normfuse.frontends.onnx_open import demand_given

    check(config, how)
    given = Given() if how is None else how.given()
    whole = "verify='model' needs files to run; use normfuse.rewrite, or verify='sites'"
    if kind == "path":
        model = path_of(model, "the input")
        if config.verify == "model":
            raise UnsupportedError(whole)
        if _is_pt2(model):
            raise UnsafeModelError(f"{model}: loading a .pt2 can run code in it; give what torch.export.load makes of "
                                   "it, or use normfuse.rewrite(..., trust=True)")  # fmt: skip
        read = _read(model)[0]
        demand_given(read, given)
        return _rewrite_ir(read, config, None, calibration, given, shown=True)[:2]
    if kind in ("fx", "exported"):
        from normfuse.frontends import fx_model

        return fx_model.run(model, config, rewrite=True, calibration=calibration)
    from normfuse.io.data import secure
    from normfuse.io.files import to_proto

    if config.verify == "model":
        raise UnsupportedError(whole)
    read = _as_ir(model, kind)
    demand_given(read, given)
    if kind == "proto":
        done, report = _rewrite_ir(read, config, None, calibration, given, shown=True)[:2]
        return to_proto(done), report
    copy = read.clone()
    secure(copy)
    copy, report = _rewrite_ir(copy, config, None, calibration, given, shown=True)[:2]
    if kind == "program":
        import torch

        return torch.onnx.ONNXProgram(copy, model.exported_program), report
    return copy, report


def _kind(model: Any) -> str:
    """Which front end takes a model, without importing what it is not made of."""
    names = {f"{t.__module__}.{t.__name__}" for t in type(model).__mro__}
    if any(n.endswith(".GraphModule") and n.startswith("torch.fx") for n in names):
        return "fx"
    if any(n.endswith(".ExportedProgram") for n in names):
        return "exported"
    if any(n.endswith(".ONNXProgram") for n in names):
        return "program"
    if any(n.endswith(".ModelProto") for n in names):
        return "proto"
    if any(n.startswith("onnx_ir") and n.endswith(".Model") for n in names):
        return "ir"
    if "torch.nn.modules.module.Module" in names:
        return "module"
    raise InputError(f"a {type(model).__name__} is not a model that NormFuse reads; give a path, onnx.ModelProto, "
                     "onnx_ir.Model, ONNXProgram, ExportedProgram or GraphModule")  # fmt: skip


def _of_proto(proto: onnx.ModelProto) -> ir.Model:
    from normfuse.io import files

    return files.from_proto(proto, Path("the ModelProto"))[0]


def _as_ir(model: Any, kind: str) -> ir.Model:
    from normfuse.frontends.onnx_repair import in_order

    if kind == "proto":
        return _of_proto(model)
    found: ir.Model = model.model if kind == "program" else model
    if not in_order(found):
        raise InputError("the nodes of the model are not in topological order: model.graph.sort() puts them into it")
    return found


def _is_pt2(path: Path) -> bool:
    from normfuse.io.pt2 import is_zip

    return path.suffix == ".pt2" or is_zip(path)


def _read(path: Path) -> tuple[ir.Model, Source]:
    from normfuse.io import files

    return files.read_onnx(path)


def _inspect_ir(model: ir.Model, own: bool = False) -> Report:
    from normfuse.frontends.onnx_model import OnnxModel

    return _onnx_report(OnnxModel(model, Config(), rewrite=False, own=own), rewritten=False)


def _rewrite_ir(model: ir.Model, config: Config, progress: Progress | None, calibration: Any, given: Given,
                shown: bool = False) -> tuple[ir.Model, Report, bool, bool]:  # fmt: skip
    """The model that came of it, the report, whether anything changed, and whether only nodes of the main graph did.

    `shown`: with all that a page shows of the model before, which nobody can read again.
    """
    from normfuse.frontends import onnx_model

    started = time.perf_counter()
    records: list[Record] = []
    notes: list[str] = []
    first = before = approximation = None
    if config.converts:
        from normfuse.frontends.onnx_convert import convert_model

        if progress is not None:
            progress("converting LayerNorms", 0.0)
        first = onnx_model.OnnxModel(model, config, rewrite=False)
        before = _onnx_report(first, rewritten=False) if shown else None
        model, records, notes = convert_model(first, config, given)
        if config.layernorm_to_rmsnorm == "approximate":
            from normfuse.frontends.onnx_approximate import approximate_model

            if progress is not None:
                progress("calibrating", 0.1)
            alone = replace(config, target="onnx") if config.functions else config  # without neighbours
            again = onnx_model.OnnxModel(model, alone, rewrite=False)
            records = [r for r in records if r.verdict != "kept"]
            more, approximation = approximate_model(again, config, calibration, records)
            records += more
    converted = time.perf_counter()
    one = onnx_model.OnnxModel(model, config, rewrite=True, progress=progress)
    if first is not None:
        one.respelled += first.respelled
        one.merged, one.laid = one.merged + first.merged, one.laid + first.laid
        one.sorted = one.sorted or first.sorted  # what was converted and put back is a copy
    planned = time.perf_counter()
    if config.verify != "off":
        one.check()
    checked = time.perf_counter()
    paths = one.paths() if first is not None else {}  # before the nodes go
    changed = one.apply()
    report = _onnx_report(one, rewritten=True, shown=shown)
    report.operators_after = onnx_model.operators(model)
    report.nodes_after = sum(report.operators_after.values())
    report.seconds |= {"recognise": planned - converted, "verify": checked - planned,
                       "rewrite": time.perf_counter() - checked}  # fmt: skip
    report.approximation = approximation
    if first is not None:
        report.operators_before, report.nodes_before = first.operators_before, first.nodes_before
        report.seconds["convert"] = converted - started
        tell(report, [site for p in one.plans for site in p.found.sites], records, paths)
        report.notes += notes
    if before is not None:
        report.recall(before)
    other = any(r.verdict != "kept" for r in records) or bool(notes)
    inner = one.edited_inside() or (one.sorted and len(one.plans) > 1)
    plain = not (one.inlined or one.merged or one.laid or inner or other)
    plain = plain and not (first and (first.inlined or first.edited_inside()))
    return model, report, changed or other, plain


def _check_file(source: Path, report: Report, config: Config, given: Given, candidate: Path) -> None:
    """Run the input and the result in ONNX Runtime before the result gets its name."""
    from normfuse.frontends.onnx_wide import compare_rewritten
    from normfuse.verify import demand_equal, roundings_for

    try:
        found = compare_rewritten(source, candidate, roundings=roundings_for(config.converts), inputs=given.inputs,
                                  sizes=given.sizes)  # fmt: skip
    except UnsupportedError as why:
        raise UnsupportedError(f"{source}: verify='model': {why}; use verify='sites'") from why
    except InputError as why:
        if not (told := str(why)).startswith(f"{candidate}: "):
            raise
        raise VerificationError(f"{source}: verify='model': the result, which was not saved: "
                                f"{told.removeprefix(f'{candidate}: ')}; choose another target, and see what "
                                "`normfuse reduce` makes of the model") from why  # fmt: skip
    demand_equal(found, source)
    report.model_check = found


# -- the report -------------------------------------------------------------------------------------------------------


def _onnx_report(one: OnnxModel, rewritten: bool, shown: bool = False) -> Report:
    from normfuse.frontends.onnx_model import module_of

    report = build_report(one.plans, one.checks, rewritten, one.label, None if rewritten and not shown else module_of)
    report.operators_before = one.operators_before
    report.format, report.opset, report.nodes_before = "onnx", one.opset or None, one.nodes_before
    report.notes += one.notes_on_reading()
    if rewritten:
        report.notes += one.notes()
    return report


def _untouched(model: ir.Model) -> Report:
    """The report on a model that stays as it is, since nothing made of it was faster."""
    report = _inspect_ir(model)
    report.rewritten = True
    report.operators_after, report.nodes_after = report.operators_before, report.nodes_before
    for norm in report.norms:
        norm.action, norm.reason = "left", "the model is faster as it is"
    return report
