"""LayerNorm to RMSNorm in an ONNX model, approximately: the norms that cannot be converted exactly, each with a
calibrated bias."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import compress
from typing import Any

import numpy as np
import onnx_ir as ir

from normfuse.calibrate import Approximation, Hook, Layer, calibrate, matching, named_batches
from normfuse.config import Config
from normfuse.conversion import operator_of, rms
from normfuse.convert import Record, still
from normfuse.errors import InputError, NormFuseError, first_line
from normfuse.frontends import onnx_channels as table
from normfuse.frontends.onnx_certify import Program
from normfuse.frontends.onnx_emit import Emitter, unique
from normfuse.frontends.onnx_infer import DTYPE_NAMES, DTYPES
from normfuse.frontends.onnx_model import OnnxModel
from normfuse.frontends.onnx_region import gives_more, own_sum, target_of
from normfuse.graph import Value
from normfuse.norm import Site
from normfuse.ort_values import Array
from normfuse.passes.fold_affine import constants, elements
from normfuse.passes.remove_dead import RemoveDead, live
from normfuse.plan import Replace


def approximate_model(one: OnnxModel, config: Config, given: Any,
                      done: Sequence[Record] = ()) -> tuple[list[Record], Approximation | None]:  # fmt: skip
    """Approximate the LayerNorms of a model in place, but those that are `done`; what was done, and what it costs.

    Raises `InputError` for calibration inputs that do not fit the model or a pattern that takes no norm, and
    `VerificationError` beyond the tolerance; the model is to be thrown away then.
    """
    low, plan = one.lowerings[0], one.plans[0]
    records = _inside(one, done)
    sites = still(plan.found.sites, [record for record in done if not record.path])
    batches = named_batches(given, _inputs(one.model))
    if not sites:
        return records, None
    if (why := table.hazard(low)) is not None:
        return records + [Record.kept(site, "NF305", why) for site in sites], None
    on = matching([s.label for s in sites], config.norms, [record.site.label for record in done])
    taken = list(compress(sites, on))
    editor, alive = _Editor(one), live(low.graph)
    for site in taken:
        inner = operator_of(site)
        why = editor.unfit(inner) if site.value.producer in alive else "no output of the graph depends on it"
        if why is not None:
            records.append(Record.kept(site, "NF301", why))
        else:
            editor.add(site, inner)
    if not editor.layers:
        return records, None
    original = one.model.clone()
    editor.run()
    first, wide, last = Program(original, False), Program(original, True), Program(one.model, False)

    def runner(program: Program) -> Any:
        def run(some: Sequence[dict[str, Array]], watch: Mapping[str, Hook]) -> list[list[Array]]:
            try:
                return program.run_all(some, program.own, watch)
            except NormFuseError:
                raise
            except Exception as why:
                raise InputError(f"the model does not run on the calibration inputs: {first_line(why)}") from why

        return run

    layers = list(editor.layers.values())
    found = calibrate(runner(first), runner(last), runner(wide), layers, batches, config.tolerance)
    editor.finish()
    records += [Record.approximated(site, layer, editor.emitted[site]) for site, layer in editor.layers.items()]
    return records, found


def _inputs(model: ir.Model) -> dict[str, tuple[Sequence[Any] | None, Any]]:
    out: dict[str, tuple[Sequence[Any] | None, Any]] = {}
    for value in model.graph.inputs:
        if value.name not in model.graph.initializers:
            dims = value.shape.dims if value.shape is not None else None
            sizes = None if dims is None else [d if isinstance(d, int) else str(d.value) for d in dims]
            out[value.name or ""] = sizes, (value.dtype or ir.DataType.FLOAT).numpy()
    return out


def _inside(one: OnnxModel, done: Sequence[Record]) -> list[Record]:
    """The LayerNorms of sub-graphs, which stay."""
    records = []
    for low, plan in zip(one.lowerings[1:], one.plans[1:], strict=True):
        for site in still(plan.found.sites, [record for record in done if record.path == low.path]):
            kept = Record.kept(site, "NF301", "it stands in a sub-graph of the model, where nothing is measured")
            records.append(replace(kept, path=low.path))
    return records


class _Editor:
    """Puts an RMSNorm with a bias of its own in the place of each norm."""

    def __init__(self, one: OnnxModel) -> None:
        self.one, self.low = one, one.lowerings[0]
        self.emitter = Emitter(one.opset, fold=False, inline=one.emitter.inline)
        self.layers: dict[Site, Layer] = {}
        self.biases: dict[Site, ir.Value] = {}
        self.emitted: dict[Site, str] = {}
        self.used = one.names()

    def unfit(self, site: Site) -> str | None:
        """Why a norm cannot be approximated."""
        norm = site.norm
        if len(norm.axes) != 1 or norm.x.native is None or norm.size is None or own_sum(site):
            return "it normalises over several axes, or its input is a value inside another operator"
        if norm.bias is not None and constants(norm.bias) is None:
            return "its bias is computed at run time"
        if gives_more(site):
            return "its operator has other results that are read, so that it stays"
        found = self.emitter.expressible(rms(norm), site.value)
        return None if found is None else found[1]

    def add(self, site: Site, inner: Site) -> None:
        """Take a norm in."""
        norm, native = inner.norm, target_of(inner).native
        size, rank = norm.size, norm.x.rank or 0
        assert size is not None

        def own(v: Value) -> Array:
            array = self.low.arrays.get(v.native)
            tensor = v.native.const_value
            assert array is not None or tensor is not None
            return np.asarray(tensor.numpy() if array is None else array).astype(np.float64)

        bias_of = constants(norm.bias)
        old = np.zeros(size) if bias_of is None else elements(bias_of, size, own)
        types = [v.dtype for _, factors in (norm.bias or norm.weight or ()) for v, _ in factors]
        dtype = DTYPES[types[0] or norm.dtype] if types else DTYPES[norm.dtype]
        name = unique(f"{native.name}_calibrated", self.used)
        shape = (size, *([1] * (rank - 1 - norm.axes[0])))
        bias = ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(dtype),
                        const_value=ir.Tensor(np.zeros(shape, dtype.numpy()), dtype=dtype, name=name))  # fmt: skip
        self.low.source.register_initializer(bias)
        leaf = Value(name, shape, DTYPE_NAMES[dtype], leaf=True, fixed=True, native=bias)
        changed = replace(rms(norm), bias=((1.0, ((leaf, 1),)),))
        self.one.plans[0].replace.append(Replace(replace(inner, norm=changed, is_op=False)))
        self.layers[site] = Layer(site.label, norm.x.native.name, native.name, native.name, norm.axes[0] - rank, old)
        self.biases[site] = bias

    def run(self) -> None:
        """Make the edits, with biases of zero."""
        self.one.emitter = self.emitter
        for site, edit in zip(self.layers, self.one.plans[0].replace, strict=True):
            self.emitted[site] = self.one.label(edit)
        RemoveDead()(self.one.plans[0])
        self.one.apply()

    def finish(self) -> None:
        """Store the calibrated biases, rounded once."""
        for site, layer in self.layers.items():
            bias = self.biases[site]
            assert bias.dtype is not None and bias.shape is not None
            array = layer.bias.reshape(bias.shape.numpy()).astype(bias.dtype.numpy())
            bias.const_value = ir.Tensor(array, dtype=bias.dtype, name=bias.name)
