"""A whole ONNX model on its way through a rewrite: plan, check, apply."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from dataclasses import replace

import onnx
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedFunctionsPass
from onnx_ir.traversal import RecursiveGraphIterator

from normfuse.config import Config
from normfuse.field import Prover
from normfuse.frontends.onnx import SORTED, Lowering, lower
from normfuse.frontends.onnx_check import MOST, Checker
from normfuse.frontends.onnx_conv import take_in
from normfuse.frontends.onnx_emit import (
    DOMAIN,
    Emitter,
    discard,
    evaluate,
    register_functions,
    spread,
    unique,
)
from normfuse.frontends.onnx_fused import FusedEmitter, fused_already
from normfuse.frontends.onnx_half import scale, widen
from normfuse.frontends.onnx_layout import Turned, lay, turned
from normfuse.frontends.onnx_ops import GROUP_NORMS
from normfuse.frontends.onnx_read import make_readable, names_in, safe_to_read
from normfuse.frontends.onnx_repair import repair
from normfuse.frontends.onnx_skip import SkipEmitter, take_apart, with_sum
from normfuse.frontends.onnx_region import as_function, rest_of, results_of
from normfuse.frontends.onnx_softmax import outline, softmaxes
from normfuse.frontends.onnx_sum import summed
from normfuse.frontends.onnx_twins import merge, twins
from normfuse.graph import Node, Value
from normfuse.passmanager import Abilities, fuse, plan
from normfuse.passes.remove_dead import live
from normfuse.plan import Edit, Fused, Plan, Reason, Replace
from normfuse.norm import VIEWS, Norm, Refusal, Site, region
from normfuse.targets import PROVIDERS, Row, Table
from normfuse.verify import Check

SLIM = 2**15
"""How many elements a row may have for its weight by channel to be spread over it in exchange for an
InstanceNormalization, which is nearly as fast."""
SIMPLIFIED = "SimplifiedLayerNormalization"
ROUNDS = 8
"""How often at most a graph is read again for norms in two layouts."""
Progress = Callable[[str, float], None]


class OnnxModel:
    """Plans and edits one `onnx_ir.Model` in place.

    Raises `InputError` where the graph is not one (cycles, no opset), `UnsupportedError` below opset 9.
    """

    def __init__(self, model: ir.Model, config: Config, rewrite: bool, progress: Progress | None = None,
                 own: bool = True) -> None:  # fmt: skip
        model = model if own else safe_to_read(model)
        self.model, self.config, self.own = model, config, own
        self.progress = progress or (lambda what, share: None)
        self.opset, self.inlined = make_readable(model, (DOMAIN,) if config.functions else ())
        self.emitter = Emitter(self.opset, inline=not config.functions)
        self.emitter.portable = config.target not in PROVIDERS
        self.progress("reading", 0.0)
        self.operators_before = operators(self.model)
        self.nodes_before = sum(self.operators_before.values())
        self.lowerings = lower(model)
        self._inside = {low.source: tuple(low.source) for low in self.lowerings if low.source is not model.graph}
        self.repaired = repair(self.lowerings, self.opset) if rewrite else 0
        if self.repaired:
            self.lowerings = lower(model)
        self.sorted = SORTED in model.meta
        self.table = Table(config)
        changes = (rewrite or config.converts) and self.opset > 0  # no operators of ONNX where none are imported
        self.respelled = Counter[Row]()
        for step in (take_apart, widen, scale, take_in) if changes else ():
            rows = step(self.lowerings, self.table, self.opset)
            self.respelled += rows
            if any(row.form != "leave" for row in rows):
                self.lowerings = lower(model)
        self.emitter.unseen = any(_narrows(node) for low in self.lowerings for node in low.graph.nodes)
        self.progress("recognising", 0.2)
        self.fused = (SkipEmitter(self.emitter, self.table) if config.target in PROVIDERS else
                      FusedEmitter(self.emitter, config.numerics == "exact"))  # fmt: skip
        self._plan(rewrite)
        self.merged = self._merge(rewrite)
        self.laid = self._lay(rewrite)
        self.softmaxes = softmaxes(self.lowerings, self.table, self.opset) if rewrite else []
        self.checks: dict[Site, Check] = {}
        self.moved: dict[ir.Value, ir.Value] = {}
        self.written: dict[Site, tuple[ir.Function, list[Value]]] = {}
        self.spelled: set[ir.Node] = set()  # nodes of norms, but for the last ones

    def _plan(self, rewrite: bool) -> None:
        self.plans = [plan(low.graph, self.config, self._abilities(low), rewrite) for low in self.lowerings]

    def read(self, rewrite: bool = False, flat: bool = False) -> None:
        """Read the model again; `flat`, the branches of the main graph's Ifs as parts of it."""
        self.lowerings = lower(self.model, flat)
        self._plan(rewrite)

    def paths(self) -> dict[Site, tuple[str, ...]]:
        """The place of the graph that each norm stands in, as `Lowering.path`."""
        paths = {part.source: part.path for low in self.lowerings for part in low.parts()}
        sites = (site for one in self.plans for site in one.found.sites)
        return {site: paths[site.value.producer.native.graph] for site in sites if site.value.producer}

    def _take(self) -> bool:
        """Take a copy of a model that is not to be changed; True if it was."""
        if self.own:
            return False
        self.model, self.own = self.model.clone(), True
        self.read()
        return True

    def _merge(self, rewrite: bool) -> int:
        """Merge nodes that compute the same twice, where a norm may be missed for them; how many."""
        found = twins(self.model) if self._misses() else {}
        if found and self._take():
            found = twins(self.model)
        if count := merge(found):
            self.read(rewrite)
        return count

    def _misses(self) -> bool:
        return any(one.found.refusals for one in self.plans)

    def _lay(self, rewrite: bool) -> int:
        """Write norms that are in two layouts in one, until there are none: two may share a node; how many."""
        count = 0
        for _ in range(ROUNDS):
            found = self._turned()
            if found and self._take():
                found = self._turned()
            used = self.names() if found else set()
            laid = sum(lay(low, one.found, norms, self.opset, used) for low, one, norms in found)
            if not laid:
                break
            count += laid
            self.read(rewrite)
        return count

    def _turned(self) -> list[tuple[Lowering, Plan, list[Turned]]]:
        each = ((low, one, turned(low, one.found)) for low, one in zip(self.lowerings, self.plans, strict=True))
        return [(low, one, norms) for low, one, norms in each if norms]

    def names(self) -> set[str | None]:
        """All that has a name in the model, its sub-graphs included."""
        return names_in(self.model)

    def _abilities(self, low: Lowering) -> Abilities:
        can = Abilities(self._expressible, functions=True, statistics=self.emitter.gives_statistics, leave=self._leave,
                        done=self._done)  # fmt: skip
        if self.emitter.inline:
            return replace(can, functions=False, foreign=_foreign)
        if low.mapped:
            return replace(can, expressible=self._expressible_mapped, functions=False)
        wide = self.config.target == "normfuse" or self.config.target in PROVIDERS
        return replace(can, operator=lambda edit: self.fused.unfit(low, edit)) if wide else can

    def _expressible(self, norm: Norm, value: Value) -> Reason | None:
        if (norm.size or 0) > MOST:
            return "NF202", f"it normalises {norm.size} elements at once, more than {MOST}"
        row = self.table.row(norm)
        if row is not None and row.form == "refuse":
            return "NF203", (f"{self.table.name} has no {norm.kind} of its type ({row.evidence}); use target "
                             "'normfuse', whose library has one, or convert to float32 or float16")
        return self.emitter.expressible(norm, value)

    def _expressible_mapped(self, norm: Norm, value: Value) -> Reason | None:
        if not self.emitter.native(norm):
            return "NF202", ("it would get a function, and ONNX Runtime does not load calls of functions in the "
                             "body of a SequenceMap; ONNX has an operator for most types, since opset 17 (LayerNorm) "
                             "and 23 (RMSNorm)")
        return self._expressible(norm, value)

    def _done(self, site: Site) -> bool:
        """Whether a norm stands there already in the several nodes that it would get, or around an operator of the
        standard, behind a view or copy of x."""
        if site.is_op or site.value.native is None:
            return False
        seen, natives = {site.norm.x}, dict[ir.Node | None, bool]()
        for node in reversed(region(site.value, site.norm)):
            if not seen.isdisjoint(node.inputs):
                seen.update(node.outputs)
                natives[node.native] = natives.get(node.native, True) and node.kind in (*VIEWS, "identity")
        found = [None if node is None else self.emitter.name_of(node) for node in natives]
        form = self.emitter.form(site.norm)
        if self.emitter.has(site.norm.kind) and found[-len(form) :] != form:
            form = self.emitter.form(site.norm, native=True)
        if self.config.target != "normfuse":  # its function takes the casts in
            ours = next((name for name in form if name.endswith(("RMSNormalization", ".rms_norm"))), None)
            if not self.emitter.inline:
                found = [ours if name == SIMPLIFIED else name for name in found]  # ONNX Runtime's own name for it
        return found[-len(form):] == form and all(list(natives.values())[:-len(form)])

    def _leave(self, site: Site, pair: bool) -> str | None:
        if pair:
            return None
        row = self.table.row(site.norm)
        if row is not None and row.form == "leave" and not site.is_op:
            return f"{self.table.name}: {row.evidence}"
        if not site.is_op and with_sum(site):
            return "an operator of the model computes it and the sum ahead"
        terms = site.norm.weight or ()
        weight = evaluate(terms, site.norm) if len(terms) > 1 else None
        if weight is not None and not weight.any():  # norms that cancel, which only their constants tell
            return "its weight is zero"
        worse = "a function of several would be slower" if not self.emitter.native(site.norm) else (
            "its weight by channel would become many times as large" if spread(site.norm, SLIM) else "")  # fmt: skip
        if worse and any(node.op in GROUP_NORMS for node in region(site.value, site.norm)):
            return f"an operator of the model computes it, and {worse}"
        return fused_already(site)

    def label(self, edit: Edit) -> str:
        """What an edit puts into the graph, for the report."""
        if isinstance(edit, Fused):
            return self.fused.label(edit)
        norm = edit.site.norm
        return f"function {DOMAIN}.{norm.kind}_as_written" if edit.as_written else ", ".join(self.emitter.form(norm))

    def edited_inside(self) -> bool:
        """Whether nodes of sub-graphs were edited."""
        return any(tuple(graph) != nodes for graph, nodes in self._inside.items())

    def notes_on_reading(self) -> list[str]:
        """What to know about how the model was read."""
        found = ["model-local functions were inlined"] if self.inlined else []
        defaults = set(self.model.graph.inputs) & set(self.model.graph.initializers.values())
        if defaults:
            found.append(f"{len(defaults)} initializers are inputs as well: a caller may replace them, so they are no "
                         "constants; python -m onnxruntime.tools.remove_initializer_from_input takes them off")
        calls = {node.op_identifier() for node in RecursiveGraphIterator(self.model.graph) if node.domain == DOMAIN}
        if lost := sorted(f"{DOMAIN}.{call[1]}" for call in calls - set(self.model.functions)):
            found.append(f"the file calls {', '.join(lost)} and does not define it: it runs at most where "
                         "normfuse.ort.register has loaded our operators, and its norms there are not read; some tools "
                         "drop functions, such as onnx.version_converter: run them before NormFuse")
        return found

    def notes(self) -> list[str]:
        """What else was done, and which rows of the target's table were used, and how often."""
        found = []
        if self.repaired:
            found.append(f"{_many(self.repaired, 'norm operator', 'norm operators')} of mixed types, which no runtime "
                         "takes: given a Cast")
        if self.merged:
            found.append(f"{_many(self.merged, 'node', 'nodes')} computed what others before do, and a mean is taken "
                         "of it: merged")
        if self.laid:
            found.append(f"{_many(self.laid, 'norm', 'norms')} took statistics in another layout than the result's: "
                         "written in one")
        if self.sorted:
            found.append("the nodes were not in topological order, which ONNX demands: sorted")
        own = sum(isinstance(edit, Replace) and edit.as_written for one in self.plans for edit in one.edits())
        if own and self.config.target == "normfuse":
            which = _many(own, "norm rounds in an order of its own", "norms round in an order of their own")
            found.append(f"{which}, for which the library has no kernel, so that the bodies of functions run "
                         "(..._as_written); numerics='fast' makes operators of most")
        calls = sum(node.domain == DOMAIN for node in RecursiveGraphIterator(self.model.graph))
        if calls and self.config.target == "onnx":
            found.append(f"{_many(calls, 'operator is a function', 'operators are functions')} of the "
                         "model; for runtimes that take none (OpenVINO, TVM, "
                         "tract) there is target 'standard'")
        others = {node.op_type for node in RecursiveGraphIterator(self.model.graph) if not _standard(node)}
        if others and self.emitter.inline:
            found.append(f"{', '.join(sorted(others))}: no operators of the standard, and no norms that can be spelled "
                         "out; what wrote them, an optimiser perhaps, is to run after NormFuse, or not at all")
        used = Counter(self.respelled)
        for one in self.plans:
            sites = {site: edit for edit in one.edits() for site in edit.sites}
            for site in one.found.sites:
                edit = sites.get(site)
                row = self.table.row(site.norm, edit.op if isinstance(edit, Fused) else "norm")
                if row is not None and (edit is not None or not (site.is_op or row.form == "operator")):
                    used[row] += 1
        return found + self.table.lines(used)

    def check(self) -> None:
        """Compare every replaced region with its replacement; roll back those that differ, and try what is left."""
        checker, self.prover = Checker(self.opset, self.config.numerics, self.emitter.inline), Prover()
        for low, one in zip(self.lowerings, self.plans, strict=True):
            while not self._check(checker, low, one):
                self._again(low, one)

    def _again(self, low: Lowering, one: Plan) -> None:
        """Plan anew after a failure; what keeps the model's own arithmetic does so again."""
        written = {edit.site for edit in one.replace if edit.as_written}
        fuse(one, self.config, self._abilities(low))
        one.replace = [Replace(e.site, as_written=True) if e.site in written else e for e in one.replace]

    def _write_out(self, low: Lowering, one: Plan) -> bool:
        """Make the functions of the model's own nodes, as long as these stand unchanged; False where one has none."""
        for edit in one.replace:
            if edit.as_written:
                own = as_function(low, edit.site, self.opset)
                if own is None:
                    message = "the region reads what only a whole run knows"
                    one.fail(edit, Refusal("NF202", edit.site.label, message))
                    return False
                self.written[edit.site] = own
        return True

    def _check(self, checker: Checker, low: Lowering, one: Plan) -> bool:
        """Check the edits of a graph; True if none of them failed."""
        edits, failed = one.edits(), False
        for i, edit in enumerate(edits):
            self.progress("verifying", 0.3 + 0.5 * i / len(edits))
            result = checker.check(low, edit)
            if not result.ok and result.same and isinstance(edit, Replace) and self._abilities(low).functions:
                # the same function, less exact: keep the model's own arithmetic
                written = Replace(edit.site, as_written=True)
                one.replace[one.replace.index(edit)] = edit = written
                result = checker.check(low, edit)
            result = self.prover.judge(edit, result)
            if result.ok or isinstance(edit, Replace):
                self.checks |= dict.fromkeys(edit.sites, result)
            if not result.ok:
                failed = True
                own = result.same and self.emitter.inline  # its roundings, which a function would keep
                one.fail(edit, Refusal("NF117" if own else "NF201", edit.sites[0].label, result.message))
        return not failed

    def apply(self) -> bool:
        """Make the edits; True if there were any."""
        self.progress("rewriting", 0.85)
        for low, one in zip(self.lowerings, self.plans, strict=True):
            while not self._write_out(low, one):
                self._again(low, one)
        edited = self._edit()
        if self.spelled and self.emitter.inline:  # several norms of one value; what the model has stays as it is
            found = twins(self.model)
            merge({node: one for node, one in found.items() if node in self.spelled})
            if self._misses():  # as they are when this is read again
                self.merged += merge({node: one for node, one in found.items() if node not in self.spelled})
        self.respelled += outline(self.model, self.lowerings, self.softmaxes, self.opset)
        self.respelled += summed(self.lowerings, self.table)
        inlined = self.inlined and self.emitter.inline
        return edited or inlined or bool(self.repaired or self.merged or self.laid or self.respelled or self.sorted)

    def _edit(self) -> bool:
        if not any(one.edits() for one in self.plans):
            return False
        used = self.names()
        for low, one in zip(self.lowerings, self.plans, strict=True):
            for edit in one.edits():
                self._replace(low, edit, used)
            if one.fused:
                low.source.sort()  # an operator with several inputs may have to wait for one of them
            self._remove(low, one)
        for value in self.emitter.fresh:
            value.name = unique(value.name or "", used)
            self.model.graph.register_initializer(value)
        register_functions(self.model, list(self.emitter.functions.values()))
        if any(one.fused for one in self.plans):
            RemoveUnusedFunctionsPass()(self.model)  # type: ignore[no-untyped-call]  # those of norms that were alone
        return True

    def _now(self, value: Value) -> ir.Value:
        native: ir.Value = value.native
        while native in self.moved:
            native = self.moved[native]
        return native

    def _replace(self, low: Lowering, edit: Edit, used: set[str | None]) -> None:
        olds: list[ir.Value] = [v.native for v in results_of(edit)]
        old, producer = olds[0], olds[0].producer()
        assert producer is not None and producer.graph is not None
        kind = edit.name if isinstance(edit, Fused) else edit.site.norm.kind
        name = unique(f"{producer.name or old.name}_{kind}", used)
        nodes = self._made(low, edit, name)
        for i, node in enumerate(nodes):
            node.metadata_props.update(producer.metadata_props)
            node.name = name if i == 0 else unique(node.name or name, used)
            if node is not nodes[-1]:
                node.outputs[0].name = unique(f"{old.name}_{i}", used)
        self.spelled.update(nodes[:-1])
        nodes[-1].doc_string = producer.doc_string
        producer.graph.insert_before(producer, nodes)
        if isinstance(edit, Fused):
            for one, new in zip(olds, self.fused.results(edit, nodes), strict=True):
                self._rename(one, new)
            for node in nodes:
                if node.domain:
                    self.model.graph.opset_imports.setdefault(node.domain, 1)
            return
        self._rename(old, nodes[-1].outputs[0])
        core = next((node for node in nodes if node.op_type == "LayerNormalization"), None)
        for slot, value in ((1, edit.mean), (2, edit.rstd)):
            if value is not None:
                assert core is not None
                self._rename(value.native, core.outputs[slot])
        if core is not None and len(core.outputs) > 1:
            for value_ in core.outputs:
                value_.name = value_.name or unique(f"{old.name}_statistic", used)

    def _made(self, low: Lowering, edit: Edit, name: str) -> list[ir.Node]:
        """The nodes of an edit, the last of which gives its results."""
        rest = rest_of(edit.site.value) if isinstance(edit, Replace) else []
        params = {v: self._now(v) for v in edit.parameters()}
        params |= {v: self._now(v) for step in rest for v in step.inputs[1:]}
        for v in list(params):
            base = v.producer
            while base is not None and base.inputs and base.inputs[0].native is not None:
                params.setdefault(base.inputs[0], self._now(base.inputs[0]))
                base = base.inputs[0].producer
        if isinstance(edit, Fused):
            return self.fused.emit(edit, params | {v: self._now(v) for v in edit.inputs}, name)
        if edit.as_written:
            own = self.written[edit.site]
            return self.emitter.call(own[0], [self._now(v) for v in own[1]], name)
        norm, both = edit.site.norm, edit.mean is not None or edit.rstd is not None
        nodes = self.emitter.emit(norm, self._now(norm.x), params, name, statistics=both)
        self.emitter.tail(nodes, rest, params, name)
        return nodes

    def _rename(self, old: ir.Value, new: ir.Value) -> None:
        """Put a value in the place of another, under its name."""
        new.name, new.shape, new.type, new.doc_string = old.name, old.shape, old.type, old.doc_string
        new.metadata_props.update(old.metadata_props)
        old.replace_all_uses_with(new, replace_graph_outputs=True)
        self.moved[old] = new

    def _remove(self, low: Lowering, one: Plan) -> None:
        """Delete the nodes that are dead now, then constants and initializers that only they read."""
        dead = set(one.remove)
        by_native: dict[ir.Node, list[Node]] = {}
        for node in low.graph.nodes:
            by_native.setdefault(node.native, []).append(node)
        gone = [rest_of(edit.site.value)[-1].native for edit in one.replace if edit.site.value.native is None]
        gone += [native for native, nodes in by_native.items() if all(node in dead for node in nodes)]
        lowered = {node.native for node in live(low.graph)} - set(gone)  # not the making of shapes, which views read
        params = [v.native.producer() for edit in one.edits() for v in edit.parameters()]
        # a view of a parameter may have been seen through
        discard([*reversed(gone), *(node for node in params if node is not None)], lowered)


def operators(model: ir.Model) -> dict[str, int]:
    """The nodes of a model by operator, with its domain where that is not ONNX's own; those of sub-graphs included."""
    found = Counter((node.domain, node.op_type) for node in ir.traversal.RecursiveGraphIterator(model.graph))
    return {op if domain in ("", "ai.onnx") else f"{domain}.{op}": n for (domain, op), n in found.items()}


def _many(n: int, one: str, more: str) -> str:
    return f"{n} {one if n == 1 else more}"


def _standard(node: ir.Node) -> bool:
    """Whether the standard has an operator."""
    return node.domain in ("", "ai.onnx") and bool(onnx.defs.has(node.op_type))


def _foreign(site: Site) -> bool:
    """Whether operators compute a norm that the standard has not."""
    return not all(_standard(node.native) for node in region(site.value, site.norm))


def _narrows(node: Node) -> bool:
    """A tensor of float64 is cast to float32."""
    if node.kind != "cast" or node.inputs[0].dtype != "float64" or node.outputs[0].dtype != "float32":
        return False
    return node.outputs[0].rank is None or node.outputs[0].rank > 1


def module_of(node: ir.Node) -> str:
    """The path of the torch module that a node comes from, where the exporter kept it."""
    scopes = node.metadata_props.get("pkg.torch.onnx.name_scopes", "")
    found = re.findall(r"'((?:[^'\\]|\\.)*)'", scopes[:100_000])
    if len(found) > 1:
        return str(found[-2])
    places = node.metadata_props.get("namespace", "")[:100_000].split("/")
    return places[-2].partition(":")[0] if len(places) > 1 else ""
