"""LayerNorm to RMSNorm in an exported program, approximately: the norms that cannot be converted exactly, each with a
calibrated bias, which takes the place of its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import compress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import fx
from torch.utils._pytree import tree_flatten

from normfuse.calibrate import Approximation, Hook, Layer, calibrate, each, matching
from normfuse.config import Config
from normfuse.conversion import operator_of, rms
from normfuse.convert import Record, still
from normfuse.errors import InputError, NormFuseError, first_line
from normfuse.frontends import fx_channels as table
from normfuse.frontends.fx_certify import run_all
from normfuse.frontends.fx_convert import Converted, Numbers, Unfit, Weights, key_of, rebuilt, tensors_of
from normfuse.frontends.fx_emit import Emitter
from normfuse.frontends.fx_meta import dtype_of, is_tensor, meta_of, shape_of
from normfuse.frontends.fx_model import _Module, _state
from normfuse.graph import Value
from normfuse.norm import Site
from normfuse.passes.remove_dead import RemoveDead
from normfuse.plan import Replace


def approximate_program(program: Any, config: Config, given: Any, done: Sequence[Record] = (),
                        unfit: Unfit | None = None) -> tuple[Any, Converted, Approximation | None]:  # fmt: skip
    """Approximate the LayerNorms of an exported program, but those that are `done`: a new program, what was done, and
    what it costs.

    `given`: tuples of inputs, or dicts by name. Raises `InputError` for inputs that do not fit or a pattern that takes
    no norm, and `VerificationError` beyond the tolerance.
    """
    source, tensors = program.graph_module, tensors_of(program)
    plain = replace(config, layernorm_to_rmsnorm="off", target="onnx")
    whole = _Module(source, plain, True, _state(program), {"ATEN": "core", "TRAINING": "aten"}.get(program.dialect))
    whole.plan.clear()
    whole.plan.refused.clear()
    sites = still(whole.plan.found.sites, done)
    batches = _batches(given, program)
    found = Converted(source)
    if not sites:
        return program, found, None
    if (why := table.hazard(whole.graph, source)) is not None:
        found.records = [Record.kept(site, "NF305", why) for site in sites]
        return program, found, None
    numbers, emitter = Numbers(Weights(source, tensors)), Emitter(whole.emitter.level, "fast")
    layers: dict[Site, tuple[Layer, Value]] = {}
    for site in compress(sites, matching([s.label for s in sites], config.norms, [r.site.label for r in done])):
        inner = operator_of(site)
        bias = _bias(inner)
        veto = emitter.expressible(whole.low, rms(inner.norm), inner.value)
        why = veto[1] if veto is not None else unfit(site, inner) if unfit is not None else None
        if len(inner.norm.axes) != 1 or bias is None:
            why = "it has no bias of its own to put the correction into, or several axes"
        if why is not None or bias is None:
            found.records.append(Record.kept(site, "NF301", why or ""))
            continue
        old = numbers.array(bias)
        assert old is not None
        x: fx.Node = inner.norm.x.native
        axis = inner.norm.axes[0] - (inner.norm.x.rank or 0)
        layer = Layer(site.label, x.name, inner.value.native.name, "", axis, old.reshape(-1))
        whole.plan.replace.append(Replace(replace(inner, norm=rms(inner.norm), is_op=False)))
        layers[site] = layer, bias
    if not layers:
        return program, found, None
    edits = dict(zip(layers, whole.plan.replace, strict=True))
    whole.emitter = emitter
    RemoveDead()(whole.plan)
    module = whole.apply()
    for site, (layer, _) in layers.items():
        layer.new = whole._now(edits[site].site.value.native).name
    zero = {key_of(bias.native): torch.zeros_like(tensors[key_of(bias.native)]) for _, bias in layers.values()}

    def runner(graph: fx.GraphModule, constants: Mapping[str, torch.Tensor], wide: bool) -> Any:
        def run(some: Sequence[Any], watch: Mapping[str, Hook]) -> list[list[Any]]:
            try:
                got = run_all(graph, some, constants, lambda name: constants[name], wide, watch)
            except NormFuseError:
                raise
            except Exception as why:  # operators raise anything
                raise InputError(f"the model does not run on the calibration inputs: {first_line(why)}") from why
            return [[v.numpy() for v in outputs] for outputs in got]

        return run

    attributes = {str(n.target): t for n in source.graph.nodes if n.op == "get_attr"
                  and isinstance(t := getattr(source, str(n.target), None), torch.Tensor)}  # fmt: skip
    own = attributes | tensors
    cost = calibrate(runner(source, own, False), runner(module, own | zero, False), runner(source, own, True),
                     [layer for layer, _ in layers.values()], batches, config.tolerance)  # fmt: skip
    for site, (layer, bias) in layers.items():
        old_bias = tensors[key_of(bias.native)]
        new = torch.from_numpy(np.ascontiguousarray(layer.bias)).reshape(old_bias.shape)
        found.tensors[key_of(bias.native)] = new.to(old_bias)
        found.records.append(Record.approximated(site, layer, whole.emitted[edits[site].site]))
        found.approximated[site] = operator_of(site)
    found.module = module
    return rebuilt(program, found), found, cost


def _bias(site: Site) -> Value | None:
    """The constant that a norm has as its bias, read by nothing else."""
    expr = site.norm.bias
    if expr is None or len(expr) != 1 or expr[0][0] != 1.0 or len(expr[0][1]) != 1:
        return None
    value = expr[0][1][0][0]
    return value if value.leaf and value.fixed and len(value.uses) == 1 and isinstance(value.native, fx.Node) else None


def _batches(given: Any, program: Any) -> list[list[Any]]:
    """The inputs of a program, flat, checked against its placeholders."""
    if given is None or isinstance(given, str | Path):
        raise InputError("layernorm_to_rmsnorm='approximate' needs calibration inputs: an iterable of tuples of "
                         "tensors, or for a .pt2 an .npz file or a folder of them")  # fmt: skip
    skip = tensors_of(program)
    inputs = [node for node in program.graph.nodes if node.op == "placeholder" and node.name not in skip]
    out = []
    names, words = [node.name for node in inputs], "tuples of tensors, or dicts by the names of inputs"
    for i, batch in enumerate(each(given, (Mapping, list, tuple), words)):
        if isinstance(batch, Mapping):
            if set(batch) != set(names):
                raise InputError(f"calibration set {i} has inputs named {', '.join(map(str, batch))}; the program "
                                 f"takes {', '.join(names)}")  # fmt: skip
            batch = [batch[name] for name in names]
        flat = tree_flatten(tuple(batch))[0]
        if len(flat) != len(inputs):
            raise InputError(f"calibration set {i}: {len(flat)} inputs, the program takes {len(inputs)} "
                             f"({', '.join(node.name for node in inputs)})")  # fmt: skip
        for node, value in zip(inputs, flat, strict=True):
            meta = meta_of(node)
            if is_tensor(meta) and not _fits(meta, value):
                wanted = "x".join(map(str, shape_of(meta) or ()))
                got = f"a {type(value).__name__}"
                if isinstance(value, torch.Tensor):
                    got = "x".join(map(str, value.shape)) + f" of {str(value.dtype).removeprefix('torch.')}"
                raise InputError(f"calibration set {i}: input {node.name} is {got}, the program takes {wanted} of "
                                 f"{dtype_of(meta)}")  # fmt: skip
        out.append(flat)
    return out


def _fits(meta: Any, value: Any) -> bool:
    shape = shape_of(meta)
    if not isinstance(value, torch.Tensor) or shape is None or len(shape) != value.dim():
        return False
    same = all(not isinstance(d, int) or d == n for d, n in zip(shape, value.shape, strict=True))
    return same and str(value.dtype) == f"torch.{dtype_of(meta)}"
