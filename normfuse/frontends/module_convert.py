"""LayerNorm to RMSNorm in an `nn.Module`: traced and planned as a graph, then carried out on a copy of the module.

The copy is an ordinary module: parameters keep their names, LayerNorms are replaced by `normfuse.nn.RMSNorm`, and where
an operator has to stand, the module whose output it follows has a forward hook. It trains, saves and loads.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from normfuse.config import Config
from normfuse.conversion import Conversion
from normfuse.convert import Record, tell
from normfuse.errors import InputError, UnsupportedError, first_line
from normfuse.frontends.fx_approximate import approximate_program
from normfuse.frontends.fx_certify import with_own_state
from normfuse.frontends.fx_convert import Converted, convert_program
from normfuse.frontends.module_places import NormModule, Places, offset_of
from normfuse.frontends.module_trial import Trial, apart, outputs_of, own_inputs
from normfuse.graph import Node
from normfuse.nn import Centre, RMSNorm
from normfuse.report import Report

TOLERANCE = 64
"""How far module and converted graph may differ, in roundings of the output's type."""
OTHERWISE = 1e-4
"""How far they may differ where the graph rounds otherwise than the module that it was traced from: the converted
module is then compared with that. A graph that is further away is another model's, and nothing is proved of this."""


def convert_module(module: nn.Module, config: Config, args: Sequence[Any], kwargs: Mapping[str, Any] | None = None,
                   calibration: Any = None) -> tuple[nn.Module, Report]:  # fmt: skip
    """A copy of a module with its LayerNorms converted where that is proved, and the report.

    `args` and `kwargs` are inputs to trace it with, `calibration` tuples of inputs for the approximate mode. Raises
    `InputError` where it cannot be traced with these, or where a weight to be edited holds NaN or infinity.
    """
    started = time.perf_counter()
    if not isinstance(args, (tuple, list)):
        raise InputError(f"args is a {type(args).__name__}; give the positional arguments of the module as a tuple")
    if config.layernorm_to_rmsnorm == "off":
        raise UnsupportedError("an nn.Module is taken for layernorm_to_rmsnorm='exact' only; to fuse its norms, use "
                               "torch.compile(module, backend='normfuse'), or give an exported program")  # fmt: skip
    try:
        out = copy.deepcopy(module)  # which is not run, since that may change it
        traced = with_own_state(module).eval()
    except Exception as why:  # what a module holds raises anything: old weight norms, once called, keep such a tensor
        raise InputError(f"{type(module).__name__} cannot be copied: {first_line(why)}") from why
    program = _trace(traced, *own_inputs(args, kwargs))
    places = Places(program, out, Trial(module, program, args, kwargs))
    new_program, found = convert_program(program, config, places)
    while found.plan is not None and places.misses(value for value, _ in found.plan.operators):
        new_program, found = convert_program(program, config, places)
    cost = None
    if config.layernorm_to_rmsnorm == "approximate":
        exact = [r for r in found.records if r.verdict != "kept"]
        new_program, more, cost = approximate_program(new_program, config, calibration, exact,
                                                       places.unfit_approximated)
        found.records = exact + more.records
        found.approximated, found.tensors = more.approximated, found.tensors | more.tensors
    if found.plan is not None or found.approximated:
        try:
            _edit(out, found, places)
            try:
                got, want = (_run(m, args, kwargs) for m in (out, new_program.module()))
            except Exception as why:
                raise _Unfit(f"the converted module does not run: {first_line(why)}") from why
            gap = apart(want, got)
            allowed = TOLERANCE * max((torch.finfo(v.dtype).eps for v in want), default=0.0)
            if not gap <= allowed and not (gap <= OTHERWISE and apart(_run(traced, args, kwargs), got) <= allowed):
                raise _Unfit(f"the converted module differs from the converted graph by {gap:.2g}")
            failed = ""
        except _Unfit as why:
            failed = str(why)
        if failed:
            found.records = [Record.kept(r.site, "NF304", failed) if r.verdict != "kept" else r for r in found.records]
            new_program, out, cost = program, copy.deepcopy(module), None
    report = _report(program, new_program, config, found)
    report.approximation = cost
    if report.converted:
        report.notes.append("proved for calls that take the way through the module that the example inputs take: "
                            "hidden states that are asked for, or embeddings that are given, are others")  # fmt: skip
    if report.converted and any(_drops(m) for m in out.modules()):
        report.notes.append("values that dropout sets to zero give the rows a mean again: the converted module is "
                            "exact in evaluation mode, and in training with a dropout of 0")  # fmt: skip
    if fast := len(_fast_layers(out)):
        report.notes.append(f"in evaluation without gradients torch computes {fast} nn.TransformerEncoderLayer by an "
                            "operator of its own, with LayerNorms, which gives the same; "
                            "torch.backends.mha.set_fastpath_enabled(False) makes it take the RMSNorms")  # fmt: skip
    modes = {name: m.training for name, m in module.named_modules()}
    for name, m in out.named_modules():
        m.training = modes.get(name, module.training)
    report.seconds = {"total": round(time.perf_counter() - started, 4)}
    return out, report


def _drops(module: nn.Module) -> bool:
    p = getattr(module, "p" if isinstance(module, nn.modules.dropout._DropoutNd) else "dropout", 0.0)
    return isinstance(p, float) and p > 0


class _Unfit(Exception):
    """The plan has no form in the module; the message says why."""


def _trace(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    from normfuse.onnx_export import EXPORTING, silent

    try:
        with EXPORTING, silent(), torch.no_grad():
            return torch.export.export(module, args, kwargs, strict=False)
    except Exception as why:  # the tracer raises anything
        told = first_line(why)
        if " in output, which is not a known type" in told:
            told = f"{told.partition('. ')[0]}; let it give tensors alone (in transformers, config.use_cache=False)"
        raise InputError(f"{type(module).__name__} cannot be traced with these inputs: {told}") from why


def _run(module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any] | None) -> list[torch.Tensor]:
    own, (args, kwargs) = with_own_state(module), own_inputs(args, kwargs)
    for part in own.modules():  # an unlifted program refuses `eval`
        part.training = False
    with torch.no_grad():
        return [v for v in outputs_of(own(*args, **kwargs)) if v.is_floating_point()]


def _report(before: Any, program: Any, config: Config, found: Converted) -> Report:
    from dataclasses import replace

    from normfuse.frontends.fx_model import report_on

    plain = replace(config, layernorm_to_rmsnorm="off")
    report, sites = report_on(program, plain)
    tell(report, sites, found.records)
    report.recall(report_on(before, plain)[0])
    report.format, report.rewritten = "module", True
    for norm in report.norms:
        if norm.action == "found":
            norm.action = "kept"
        if norm.action == "converted":
            norm.emitted = "normfuse.nn.RMSNorm"
    return report


def _edit(module: nn.Module, found: Converted, places: Places) -> None:
    plan, targets = found.plan or Conversion(), places.targets
    copied = {v.native.name: (places.owners(v, [n.native for n in nodes]), _get(module, targets[v.native.name]))
              for v, nodes in plan.copies.items()}  # fmt: skip
    with torch.no_grad():
        factors = [_factor(node, plan, targets) for node in plan.scaled]
        for factor in factors:
            if why := places.elsewhere(factor):
                raise _Unfit(why)
        for name, tensor in found.tensors.items():
            source = found.copies.get(name)
            if source is None:
                if why := places.elsewhere(targets[name]):
                    raise _Unfit(why)
                _get(module, targets[name]).copy_(tensor)
                continue
            owners, old = copied[source]
            assert owners is not None  # `can_copy` has seen to it
            fresh = nn.Parameter(tensor, old.requires_grad)
            for path, attribute in owners.items():
                setattr(module.get_submodule(path), attribute, fresh)
        for factor in factors:
            _get(module, factor).fill_(1.0)
    norms = {site: plan.inner.get(site, site) for site in plan.sites} | found.approximated
    made = set[nn.Module]()
    for site, inner in norms.items():
        known = places.norm_module(site, inner)
        assert known is not None and isinstance(inner.norm.size, int)  # `unfit` has seen to it
        offset = offset_of(known.weight)
        assert offset is not None
        old_norm = module.get_submodule(known.path)
        if old_norm in made:  # by the first of its calls
            continue
        new = RMSNorm.of(old_norm, inner.norm.size, inner.norm.eps, known.axis, offset)
        made.add(new)
        for path in [path for path, part in module.named_modules(remove_duplicate=False) if part is old_norm]:
            above, _, last = path.rpartition(".")
            setattr(module.get_submodule(above), last, new)
    _leave_fast_path(module, {places.norm_module(site, inner) for site, inner in found.approximated.items()})
    for value, want in plan.operators:
        hook = places.hook_of(value.native)
        assert hook is not None  # the plan asked for it
        owner, centre = module.get_submodule(hook[0]), Centre(want.axis - (value.rank or 0))
        if hook[1]:
            owner.register_forward_pre_hook(centre)
        else:
            owner.register_forward_hook(centre)


def _leave_fast_path(module: nn.Module, approximated: Collection[NormModule | None]) -> None:
    """In evaluation without gradients torch computes an encoder layer by an operator of its own, from the parameters
    of LayerNorms, which approximated ones are not. It does so where the layer says which activation it has."""
    changed = {module.get_submodule(known.path) for known in approximated if known is not None}
    for layer in _fast_layers(module):
        if not changed.isdisjoint((layer.norm1, layer.norm2)):
            layer.activation_relu_or_gelu = 0
    for encoder in module.modules():
        if isinstance(encoder, nn.TransformerEncoder) and not all(
                getattr(layer, "activation_relu_or_gelu", True) for layer in encoder.layers):
            encoder.use_nested_tensor = False  # which only that operator takes


def _fast_layers(module: nn.Module) -> list[Any]:
    """The encoder layers of torch that may be computed so, and have norms that were replaced."""
    layers: list[Any] = [part for part in module.modules() if isinstance(part, nn.TransformerEncoderLayer)]
    return [layer for layer in layers if layer.activation_relu_or_gelu and
            any(isinstance(norm, RMSNorm) for norm in (layer.norm1, layer.norm2))]  # fmt: skip


def _factor(node: Node, plan: Conversion, targets: Mapping[str, str]) -> str:
    """The path of the constant behind the factor of a multiplication, which nothing but such ones reads."""
    value = plan.factor(node)
    once = all(use in plan.scaled and plan.factor(use) is value for use in value.uses)
    while value.producer is not None:
        value = value.producer.inputs[0]
        once = once and len(value.uses) == 1
    if not once:
        raise _Unfit(f"{targets[value.native.name]} is read in several places")
    return targets[value.native.name]


def _get(module: nn.Module, path: str) -> torch.Tensor:
    owner, _, name = path.rpartition(".")
    found = getattr(module.get_submodule(owner), name)
    assert isinstance(found, torch.Tensor)
    return found
