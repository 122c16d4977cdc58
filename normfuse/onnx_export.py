"""From a torch module to an optimised ONNX file in one call."""

from __future__ import annotations

import contextlib
import logging
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from normfuse.config import Config, config_of, demand_use
from normfuse.errors import InputError, NormFuseError, UnsupportedError, path_of
from normfuse.ort_values import Array
from normfuse.process import tidy
from normfuse.report import Report
from normfuse.sessions import Given

if TYPE_CHECKING:
    import onnx_ir as ir

    from normfuse.bench import How

EXPERTS = "batched_mm"
"""The implementation of transformers' experts that torch's exporter takes; others loop over what the data chooses."""
OURS = {
    "f": "give the file as the argument path",
    "dynamo": "NormFuse exports by torch.export; the old exporter is torch.onnx.export(..., dynamo=False), whose file "
              "normfuse.rewrite takes",
    "external_data": "weights go beside the file where they are large",
    "export_params": "the weights are always part of the model",
}  # fmt: skip


LIBRARIES = ("torch", "onnxscript", "onnx_ir")
"""Whose loggers are silent while torch exports."""
EXPORTING = threading.Lock()
"""One export or trace at a time: torch's loggers, the warnings, and a module's mode are there once in a process."""
DROPS = "torch.onnx.export's optimizer drops additions of 1e-8 and less"
USUAL = {"dynamo": True, "external_data": True, "export_params": True}
"""What may be said of these all the same: it is what is done."""


@tidy
def export(module: Any, args: tuple[Any, ...] | None, path: str | Path, config: Config | None = None, *,
           overwrite: bool = False, calibration: Any = None, progress: Callable[[str, float], None] | None = None,
           how: How | None = None, **options: Any) -> Report:  # fmt: skip
    """Export a module by `torch.onnx.export(module, args, dynamo=True, **options)`, fuse its norms, check, and save.

    `module`: a `torch.nn.Module`, `torch.export.ExportedProgram`, or a `torch.onnx.ONNXProgram` that was made before
    (then `args` are only used to verify, and there are no `options`). `options` are those of `torch.onnx.export`, such
    as `kwargs`, `dynamic_shapes`, `opset_version`, `input_names`. The module is left as it is: its mode, and the
    implementation of its experts, which torch's exporter takes in one form only. One thread exports at a time, and
    meanwhile warnings and what torch logs are off in the whole process.

    `calibration` is for `layernorm_to_rmsnorm="approximate"`: dicts of arrays by the input names of the ONNX model.
    `how` (`normfuse.bench.How`) has sizes and inputs to run models on, where they do not run on `args` or random ones,
    and `threads` for `first="fastest"`.

    Weights of more than 256 MiB are saved beside `path`, in a file named by its content. With
    `Config(verify="model")` the result is compared with the export as it was, in ONNX Runtime, on `args`.

    Raises `InputError` for what is no module, options that contradict this, or an output that may not be written,
    `UnsupportedError` where torch's exporter does not take the module, `VerificationError` where the results differ;
    then nothing is written.
    """
    from normfuse import first
    from normfuse.api import _kind, _rewrite_ir, _untouched
    from normfuse.frontends.onnx_open import demand_given
    from normfuse.io import files

    config, target, started = config_of(config), path_of(path, "the output"), time.perf_counter()
    demand_use(config, calibration)
    if target.suffix in (".pt2", ".ort"):
        raise InputError(f"{target}: normfuse.export writes ONNX; give an output that ends in .onnx")
    for name, why in OURS.items():
        if options.pop(name, USUAL.get(name)) is not USUAL.get(name):
            raise InputError(f"normfuse.export takes no option {name!r}: {why}")
    put = files.check_target(None, target, overwrite, False)
    first.check(config, how)
    said = Given() if how is None else how.given()
    program = module
    if not any(f"{t.__module__}.{t.__name__}".endswith(".ONNXProgram") for t in type(module).__mro__):
        program = _exported(module, args, options)
    elif options:
        raise InputError(f"the program is exported already; {next(iter(options))!r} has no effect")
    eps_note: list[str] = []
    if program is not module and "optimize" not in options and (lost := _lost_eps(program)):
        with contextlib.suppress(UnsupportedError):  # then the first is what there is
            again = _exported(module, args, options | {"optimize": False})
            if not _lost_eps(again):
                program = again
                eps_note = [f"exported with optimize=False: {DROPS}, here the eps of {lost}"]
    exported = time.perf_counter()
    assert _kind(program) == "program"
    with tempfile.TemporaryDirectory(prefix="normfuse-") as folder:
        model, made = program.model.clone(), first.Made(Path(folder) / "export.onnx")
        demand_given(model, said)
        own = said
        if config.runs and not (said.inputs or said.sizes):
            own = Given(_arguments(program, args, options.get("kwargs")))
        if config.first:
            files.write_new(model, made.path)
            try:
                made = first.run(made.path, config, Path(folder), progress, how, own)
            except InputError as why:
                raise InputError(str(why).replace(str(made.path), f"{target}: the export")) from why
            model, config = files.read_onnx(made.path)[0], replace(config, first=made.first)
        if made.stays:
            report = _untouched(model)
        else:
            model, report, *_ = _rewrite_ir(model, config, progress, calibration, own)
        made.tell(report)
        if config.verify == "model":
            report.model_check = _compare(program.model, model, own, target, config.converts)
        if progress is not None:
            progress("saving", 0.9)
        planned = time.perf_counter()
        size = files.write_new(model, target, put)
        done = time.perf_counter()
    if not eps_note and any(refusal.code == "NF103" for refusal in report.refusals) and (lost := _lost_eps(program)):
        eps_note = [f"NF103: {DROPS}, here the eps of {lost}, so that a row of zeros gives NaN; with optimize=False it "
                    "stays"]  # fmt: skip
    report.notes += eps_note
    report.notes.append(f"exported by torch.onnx.export at opset {report.opset}; {size / 2**20:.1f} MiB of weights")
    if options.get("opset_version") not in (None, report.opset):
        report.notes.append(f"opset {options['opset_version']} was asked for: torch.onnx.export does not convert this "
                            "model to it")  # fmt: skip
    report.seconds |= {"export": exported - started, "save": done - planned, "total": done - started}
    report.seconds = {k: round(v, 4) for k, v in report.seconds.items()}
    return report


def _lost_eps(program: Any) -> str:
    """How many norms of a program lost their eps on the way to ONNX, in words; nothing for none."""
    from normfuse.api import inspect

    def lacking(one: Any) -> int:
        return sum(refusal.code == "NF103" for refusal in inspect(one).refusals)

    exported = program.exported_program
    count = 0 if exported is None else lacking(program)
    try:
        count -= lacking(exported) if count else 0
    except NormFuseError:
        return ""  # nobody can tell
    return f"{count} norm{'s' if count > 1 else ''}" if count > 0 else ""


def _exported(module: Any, args: tuple[Any, ...] | None, options: dict[str, Any]) -> Any:
    """The ONNXProgram of a module."""
    import torch

    if not isinstance(module, (torch.nn.Module, torch.export.ExportedProgram)):
        raise InputError(f"a {type(module).__name__} cannot be exported; give a torch.nn.Module, ExportedProgram or "
                         "ONNXProgram")  # fmt: skip
    if not isinstance(args, tuple):
        raise InputError(f"args is a {type(args).__name__}; give the positional arguments of the module as a tuple")
    options = _with_operators(module, options)
    with EXPORTING:
        training = [m for m in module.modules() if m.training] if isinstance(module, torch.nn.Module) else []
        try:
            with _experts(module), silent(), torch.no_grad():
                return torch.onnx.export(module, args, dynamo=True, **{"verbose": False, **options})
        except Exception as why:
            if isinstance(why, TypeError) and "unexpected keyword" in str(why):
                raise InputError(f"torch.onnx.export: {why}") from why
            raise UnsupportedError(_failed(module, why)) from why
        finally:
            for part in training:
                part.training = True


def _with_operators(module: Any, options: dict[str, Any]) -> dict[str, Any]:
    """The options with what our operators mean in ONNX, where a program has some already; the norms are found anew."""
    import torch

    root = getattr(module, "graph_module", module)
    parts = [part for part in root.modules() if isinstance(part, torch.fx.GraphModule)]
    if not any(getattr(node.target, "namespace", "") == "normfuse" for part in parts for node in part.graph.nodes):
        return options
    from normfuse.ops.to_onnx import translations

    return options | {"custom_translation_table": translations() | (options.get("custom_translation_table") or {})}


def _failed(module: Any, why: BaseException) -> str:
    reason = why.__cause__ or why
    line = next((text.strip() for text in str(reason).splitlines() if text.strip()), type(reason).__name__)
    return (f"torch.onnx.export does not take this {type(module).__name__}: {type(reason).__name__}: {line[:300]}; "
            "see whether torch.export.export(module, args) takes it, and give dynamic_shapes for sizes that vary")


@contextlib.contextmanager
def _experts(module: Any) -> Iterator[None]:
    """Let transformers' mixtures of experts compute all experts at once, as long as this lasts."""
    before: dict[int, tuple[Any, Any]] = {}
    try:
        for part in module.modules() if hasattr(module, "modules") else ():
            config: Any = getattr(part, "config", None)
            can = getattr(part, "_can_set_experts_implementation", None)
            if can is not None and can() and hasattr(config, "_experts_implementation_internal"):
                before.setdefault(id(config), (config, config._experts_implementation_internal))
                part.set_experts_implementation(EXPERTS)
        yield
    finally:
        for config, implementation in before.values():
            config._experts_implementation_internal = implementation


class _Others:
    """An output of the process for everybody but the thread that makes it."""

    def __init__(self, stream: Any) -> None:
        self.stream, self.thread = stream, threading.get_ident()

    def write(self, text: str) -> int:
        """Drop what the thread itself writes."""
        return len(text) if threading.get_ident() == self.thread else int(self.stream.write(text))

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


@contextlib.contextmanager
def silent() -> Iterator[None]:
    """What the exporter logs on its way, and the graphs that it prints where it fails, are for its own developers;
    others of the process go on printing and logging."""
    loggers = [logging.getLogger(name) for name in LIBRARIES]
    loggers += [logging.getLogger(name) for name in list(logging.root.manager.loggerDict)
                if name.startswith(tuple(f"{library}." for library in LIBRARIES))]  # fmt: skip
    levels = {logger: logger.level for logger in loggers if logger.level or logger.name in LIBRARIES}
    try:
        for logger in levels:
            logger.setLevel(logging.CRITICAL)
        with warnings.catch_warnings(), contextlib.redirect_stderr(_Others(sys.stderr)):
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in levels.items():
            logger.setLevel(level)


def _arguments(program: Any, args: tuple[Any, ...] | None, kwargs: Mapping[str, Any] | None) -> dict[str, Array]:
    """The arguments of a module by the inputs of its export, bfloat16 in float32, as numpy has none; nothing where they
    are not these one by one, or have no elements at hand."""
    import torch
    from torch.export._tree_utils import reorder_kwargs
    from torch.utils import _pytree

    from normfuse.frontends.onnx_open import demand_given

    model, exported = program.model, program.exported_program
    try:
        named = dict(kwargs or {})  # in the order of the program, which may have been made before
        named = reorder_kwargs(named, exported.call_spec.in_spec) if named and exported is not None else named
        given = [v for v in _pytree.tree_leaves((args, named)) if isinstance(v, torch.Tensor)]
        names = [str(v.name) for v in model.graph.inputs]
        if len(given) != len(names):
            return {}
        wide = [v.float() if v.dtype == torch.bfloat16 else v for v in given]
        found = {name: v.numpy(force=True) for name, v in zip(names, wide, strict=True)}
        demand_given(model, Given(found))
    except Exception:  # torch raises anything for tensors without elements, of float8, and sparse ones
        return {}
    return found


def _compare(before: ir.Model, after: ir.Model, given: Given, target: Path, converted: bool) -> dict[str, Any]:
    """Run the export and the result in ONNX Runtime."""
    from normfuse.frontends.onnx_wide import compare_rewritten
    from normfuse.io import files
    from normfuse.verify import demand_equal, roundings_for

    with tempfile.TemporaryDirectory(prefix="normfuse-") as folder:
        one, two = Path(folder) / "before.onnx", Path(folder) / "after.onnx"
        files.write_new(before.clone(), one)
        files.write_new(after.clone(), two)
        try:
            found = compare_rewritten(one, two, roundings=roundings_for(converted), inputs=given.inputs,
                                      sizes=given.sizes)  # fmt: skip
        except InputError as why:
            text = str(why).replace(f"{one}: ", "").replace(f"{two}: ", "after the rewrite, ")
            raise InputError(f"{target}: verify='model': {text}; use verify='sites'") from why
    demand_equal(found, target)
    return found
