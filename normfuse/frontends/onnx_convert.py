"""LayerNorm to RMSNorm in an ONNX model: plan on its main graph, edit it, and keep that only if it is certified."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import onnx_ir as ir

from normfuse.centring import Centre
from normfuse.config import Config
from normfuse.conversion import Conversion, Means, rms
from normfuse.convert import Certificate, Edits, Overflow, Record, changes, with_copies
from normfuse.errors import InputError
from normfuse.folding import Folder, fold, folds_note
from normfuse.frontends import onnx_channels as table
from normfuse.frontends.onnx import Lowering
from normfuse.frontends.onnx_branches import homes, is_if
from normfuse.frontends.onnx_certify import certify
from normfuse.frontends.onnx_emit import Emitter, unique
from normfuse.frontends.onnx_infer import DTYPES
from normfuse.frontends.onnx_model import OnnxModel
from normfuse.frontends.onnx_region import gives_more, own_sum
from normfuse.frontends.onnx_skip import with_sum
from normfuse.graph import FLOATS, Node, Value
from normfuse.norm import Site, end_of
from normfuse.ort_values import Array
from normfuse.passes.layernorm_to_rmsnorm import convert
from normfuse.passes.remove_dead import RemoveDead
from normfuse.plan import Replace
from normfuse.sessions import Given
from normfuse.targets import Table

AXES_INPUT = 18
"""From this opset on ReduceMean takes its axes as an input."""


def convert_model(one: OnnxModel, config: Config, given: Given) -> tuple[ir.Model, list[Record], list[str]]:
    """Convert the LayerNorms of a model in place for which it is proved; the model then, what was done, notes on it.

    Where the certificate fails, the model is another object, as it was before; it is made on what is `given` where it
    cannot be on random inputs. Raises `InputError` where a weight to be edited holds NaN or infinity.
    """
    sites = [site for other in one.plans[1:] for site in other.found.sites]
    if any(is_if(node) for node in one.model.graph) and sites:
        one.read(flat=True)
    paths = one.paths()
    records = [Record.kept(site, "NF301", "it stands in a sub-graph of the model") for other in one.plans[1:]
               for site in other.found.sites if site.norm.kind == "layer_norm"]  # fmt: skip
    done = _converted(one, config, given)
    for record in (*records, *done.records):
        record.path = paths[record.site]
    if done.failed and one.lowerings[0].flat:  # a branch may be what is in the way
        records += [record for record in done.records if record.path]
        one.model = done.model
        one.read()
        done = _converted(one, config, given)
    return done.model, records + done.records, done.notes


@dataclass(slots=True)
class _Done:
    """What came of a plan: the model, records, notes, and whether it was given up as a whole."""

    model: ir.Model
    records: list[Record]
    notes: list[str] = field(default_factory=list)
    failed: bool = False


def _converted(one: OnnxModel, config: Config, given: Given) -> _Done:
    """Convert the norms of the main graph."""
    low, plan, records = one.lowerings[0], one.plans[0], list[Record]()
    why = table.hazard(low)
    if why is not None:
        kept = [Record.kept(site, "NF305", why) for site in plan.found.sites if site.norm.kind == "layer_norm"]
        return _Done(one.model, kept, failed=True)
    means = _Means(one, low, config)
    asked = means.means()
    sites = plan.found.sites
    found = convert(low.graph, plan.found, asked) if config.layernorm_to_rmsnorm != "off" else Conversion()
    Folder(low.graph, found, lambda node, v, axis: table.linear(low, node, v, axis, asked.channels), asked.channels,
           asked.twins, means.full).run(sites, config.fold_scale)  # fmt: skip
    notes = folds_note(found)
    if found.sites or found.folds:
        before = one.model.clone()
        for value in (*found.constants(), *found.numbers()):
            means.settle(value)
        original = one.model.clone()
        editor = Editor(one, low, found, means)
        try:
            editor.run()
            check = certify(original, one.model, editor, config, given)
        except Overflow as why:
            check = Certificate(False, message=str(why))
        if check is not None and not check.ok:
            records = [Record.kept(site, "NF304", check.message) for site in found.changed()]
            records += [Record.kept(s, r.code, r.message) for s, r in found.kept.items()]
            return _Done(before, records, failed=True)
        records = changes(found, check, editor.results)
        if check is not None and check.any_of:
            notes.append(f"the certificate computes no {', '.join(check.any_of)}: it holds whatever that is")
    records += [Record.kept(s, r.code, r.message) for s, r in found.kept.items()]
    return _Done(one.model, records, notes)


class _Means:
    """What the planner asks of an ONNX graph."""

    def __init__(self, one: OnnxModel, low: Lowering, config: Config) -> None:
        self.one, self.low, self.config = one, low, config
        self.known: dict[Value, bool] = {}
        self.locks: dict[Value, str | None] = {}
        self.emitter, self.table = Emitter(one.opset, fold=False, inline=one.emitter.inline), Table(config)
        self.used = one.names()

    def means(self) -> Means:
        low = self.low
        return Means(
            channels=lambda node, out, want: table.channels(low, node, out, want),
            span=lambda node, out, axis: table.span(low, node, out, axis),
            uniform=self.uniform,
            locked=self.locked,
            place=lambda value: value.dtype in FLOATS,
            blind=lambda node, value, want: table.blind(low, node, value, want),
            fits=self.fits,
            untie=self.config.untie,
        )

    def array(self, value: Value) -> Array | None:
        """The elements of a constant of the model."""
        native = value.native
        if not isinstance(native, ir.Value):
            return None
        if native.const_value is not None:
            return np.asarray(native.const_value.numpy())
        node = native.producer()
        if node is not None and node.op_type == "Constant" and "value" in node.attributes:
            return np.asarray(node.attributes["value"].as_tensor().numpy())
        return self.low.arrays.get(native)

    def full(self, value: Value, number: int) -> bool:
        """Whether a constant is this number all over."""
        array = self.array(value)
        return array is not None and bool((array == number).all())

    def settle(self, value: Value) -> None:
        """Make an initializer of a constant that nodes of the model compute, such as a class token that is repeated, or
        that a branch has."""
        native: ir.Value = value.native
        if native.is_initializer() and native.graph is self.low.source:
            return
        if native.is_initializer() and native.graph is not None and not native.is_graph_output():
            del native.graph.initializers[native.name or ""]
        array, dtype = self.array(value), DTYPES[value.dtype or ""]
        assert array is not None
        name = unique(f"{native.name}_folded", self.used)
        tensor = ir.Tensor(array.astype(dtype.numpy()), dtype=dtype, name=name)
        value.native = ir.Value(name=name, shape=ir.Shape(array.shape), type=ir.TensorType(dtype), const_value=tensor)
        self.low.source.register_initializer(value.native)
        for node, i in list(native.uses()):
            node.replace_input_with(i, value.native)

    def uniform(self, value: Value) -> bool:
        if value not in self.known:
            array = self.array(value) if value.leaf and value.fixed and not value.overridable else None
            self.known[value] = array is not None and array.size > 0 and bool((array == array.flat[0]).all())
        return self.known[value]

    def locked(self, value: Value) -> str | None:
        if value not in self.locks:  # asked again for each norm, and elements may have to be read from a file
            self.locks[value] = self._locked(value)
        return self.locks[value]

    def _locked(self, value: Value) -> str | None:
        if value.native is None or value.dtype not in FLOATS:
            return f"{value.name or 'a constant'} cannot be edited"
        if value.overridable:
            return f"{value.name} may be replaced by the caller: it is an input of the graph too"
        if self.array(value) is None:
            return f"the elements of {value.name} are not in the file"
        return None

    def fits(self, site: Site, inner: Site) -> tuple[str, str] | None:
        row = self.table.row(inner.norm, "conversion")
        if row is not None and row.form == "leave" and not self.config.force:
            return "NF306", f"{self.table.name}: {row.evidence}"
        if with_sum(site) or own_sum(inner):
            return "NF301", f"an operator of the model computes it and the sum ahead, and stays ({self.table.name})"
        if gives_more(site) or gives_more(inner):
            return "NF301", "its operator has other results that are read, so that it stays"
        found = self.emitter.expressible(rms(inner.norm), inner.value)
        return None if found is None else ("NF301", found[1])


class Editor:
    """Carries a conversion out on the model that it was planned on."""

    def __init__(self, one: OnnxModel, low: Lowering, plan: Conversion, means: _Means) -> None:
        self.one, self.low, self.plan, self.means = one, low, plan, means
        self.edits = Edits()
        self.results: dict[Site, tuple[str, str]] = {}
        self.used = means.used
        self.copies: dict[Value, Value] = {}
        self.natives: dict[str, ir.Value] = {}
        self.homes = homes(low.source) if low.flat else {}

    def names(self, branch: str) -> dict[Value, str]:
        """What the values of the model are called where a branch of each If is `taken`."""
        inside = ((v, self.homes.get(native)) for native, v in self.low.values.items())
        return {v: home.name(v.name) if home else v.name for v, home in inside if not home or home.branch == branch}

    def run(self) -> None:
        """Make all edits."""
        self.one.emitter = self.means.emitter
        for value, want in self.plan.edits.items():
            name = self._copy(value, self.plan.copies[value]) if value in self.plan.copies else self.name(value)
            self.edits.centre(name, want, [self.name(g) for g in want.scales], self.name(value))
        fold(self.plan, self.edits, self.name)
        self._store()
        centred = {key: self._operator(*key) for key in self.plan.operators}
        for (value, want), readers in self.plan.operators.items():
            new = centred[value, want]
            for by in readers:
                if not isinstance(by, Site):
                    _reroute(by[0].native, value.native, new)
        for node in self.plan.scaled:
            self._bypass(node)
        self._norms({by: centred[key] for key, found in self.plan.operators.items() for by in found
                     if isinstance(by, Site)})  # fmt: skip

    def name(self, value: Value) -> str:
        """The name of a constant."""
        native: ir.Value = value.native
        self.natives[native.name or ""] = native
        return native.name or ""

    def _copy(self, value: Value, readers: list[Node]) -> str:
        """A constant again, for some of its readers."""
        native: ir.Value = value.native
        name = unique(f"{native.name}_centred", self.used)
        fresh = ir.Value(name=name, shape=native.shape, type=native.type, const_value=native.const_value)
        self.low.source.register_initializer(fresh)
        self.natives[name] = fresh
        self.copies[value] = Value(name, value.shape, value.dtype, native=fresh, index=value.index, fixed=True)
        for reader in readers:
            _reroute(reader.native, native, fresh)
        return name

    def _store(self) -> None:
        """Compute the edited constants in float64, and round them once."""

        def give(name: str) -> Array:
            tensor = self.natives[name].const_value
            assert tensor is not None
            return np.asarray(tensor.numpy()).astype(np.float64)

        made = {name: self._rounded(name, self.edits.get(name, give)) for name in self.edits.made}
        for name, array in made.items():
            native = self.natives[name]
            native.const_value = ir.Tensor(array, dtype=native.dtype, name=name)

    def _rounded(self, name: str, array: Array) -> Array:
        """An edited constant in its type."""
        dtype = self.natives[name].dtype
        if not np.isfinite(array).all():
            raise InputError(f"{name}: holds NaN or infinity; a weight with those has no mean to take away")
        assert dtype is not None
        with np.errstate(over="ignore"):
            rounded: Array = array.astype(dtype.numpy())
        if not np.isfinite(rounded.astype(np.float64)).all():
            raise Overflow(f"{name} would hold {np.abs(array).max():.3g}, more than its type does")
        return rounded

    def _operator(self, value: Value, want: Centre) -> ir.Value:
        """x - mean(x) behind a value, in float32 for half types."""
        native: ir.Value = value.native
        name = unique(f"{native.name}_centred", self.used)
        nodes: list[ir.Node] = []

        def op(kind: str, inputs: list[ir.Value], *attrs: ir.Attr) -> ir.Value:
            nodes.append(ir.Node("", kind, inputs, attrs, name=unique(f"{name}/{kind.lower()}", self.used)))
            nodes[-1].outputs[0].name = unique(f"{name}_{len(nodes)}", self.used)
            return nodes[-1].outputs[0]

        half, axis = value.dtype in ("float16", "bfloat16"), want.axis - (value.rank or 0)
        x = op("Cast", [native], ir.AttrInt64("to", ir.DataType.FLOAT.value)) if half else native
        if self.one.opset >= AXES_INPUT:
            axes = self.means.emitter.constant(np.array([axis]), "int64", "axes")
            mean = op("ReduceMean", [x, axes])
        else:
            mean = op("ReduceMean", [x], ir.AttrInt64s("axes", [axis if self.one.opset > 10 else want.axis]))
        out = op("Sub", [x, mean])
        if half:
            out = op("Cast", [out], ir.AttrInt64("to", DTYPES[value.dtype or ""].value))
        out.name, out.shape, out.type = name, native.shape, native.type
        producer, graph = native.producer(), native.graph
        assert graph is not None
        if producer is not None:
            graph.insert_after(producer, nodes)
        else:
            graph.insert_before(graph[0], nodes)
        return out

    def _bypass(self, node: Node) -> None:
        """Take a multiplication out whose factor is in the constants now."""
        a, b = node.inputs
        data: ir.Value = (b if self.plan.factor(node) is a else a).native
        node.outputs[0].native.replace_all_uses_with(data)

    def _norms(self, centred: dict[Any, ir.Value]) -> None:
        one, plan = self.one, self.one.plans[0]
        labels = {}
        for site in self.plan.changed():
            inner = self.plan.folded.get(site) or self.plan.inner.get(site, site)
            norm = rms(with_copies(self.plan, inner, self.copies), self.plan.unscaled(inner.norm.x))
            if site in centred:
                x = norm.x
                norm = rms(norm, Value(x.name, x.shape, x.dtype, native=centred[site], index=x.index))
            edit = Replace(replace(inner, norm=norm, is_op=False))
            labels[site] = edit
            plan.replace.append(edit)
        RemoveDead()(plan)
        one.apply()
        for site, edit in labels.items():
            native = one._now(end_of(edit.site.value))
            self.results[site] = native.name or "", one.label(edit)


def _reroute(node: ir.Node, old: ir.Value, new: ir.Value) -> None:
    for i, operand in enumerate(node.inputs):
        if operand is old:
            node.replace_input_with(i, new)
