"""A whole torch graph on its way through a rewrite: plan, check, apply. The graph given is never changed."""

from __future__ import annotations

import copy
import operator
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import fx
from torch.export.graph_signature import InputKind
from torch.utils._python_dispatch import _disable_current_modes

from normfuse.config import Config
from normfuse.convert import Record, names_of, tell
from normfuse.errors import UnsupportedError
from normfuse.facts import ONE
from normfuse.field import Prover
from normfuse.frontends import fx_effects, fx_inplace
from normfuse.frontends.fx import Lowering
from normfuse.frontends.fx_check import Checker
from normfuse.frontends.fx_emit import Emitter, emitted, level_of
from normfuse.frontends.fx_fused import FusedEmitter
from normfuse.frontends.fx_graph import (
    alike,
    copied,
    duplicate,
    gives_tuple,
    house,
    infer,
    operators,
    scattered,
    sort,
    take_out,
)
from normfuse.frontends.fx_meta import is_tensor, meta_of, module_of, order_of
from normfuse.graph import Node, Value
from normfuse.norm import Norm, Refusal, Site, region
from normfuse.passes.remove_dead import live
from normfuse.passmanager import fuse, plan
from normfuse.plan import Abilities, Edit, Fused, Plan
from normfuse.records import build_report
from normfuse.report import NormRecord, Report
from normfuse.transfer import identity_layout
from normfuse.verify import Check

Leave = Callable[[Site, bool], str | None]
_OWN_META = ("val", "example_value", "tensor_meta", "original_aten")
MORE_ROUNDS = 4
"""How often a graph that was changed is read again."""
_DONE = ("fact", "weight", "bias", "cast", "action", "emitted", "reason", "verified", "proved", "error_before",
         "error_after")  # fmt: skip


def run(model: Any, config: Config, rewrite: bool, leave: Leave | None = None, calibration: Any = None,
        eager: bool = True) -> tuple[Any, Report]:  # fmt: skip
    """Find the norms of a GraphModule or ExportedProgram and, for a rewrite, fuse them in a copy.

    `leave` says of a norm without a neighbour, or of one of a pair, why it had better stay, or None; `eager` that
    autograd sees the operators, and not AOTAutograd all of the graph. Gives (a model of the same type, the report).
    Raises `UnsupportedError` for verify="model".
    """
    with _disable_current_modes():  # a backend is called under the tracer's fake mode
        return _run(model, config, rewrite, leave, calibration, eager)


def _run(model: Any, config: Config, rewrite: bool, leave: Leave | None, calibration: Any,
         eager: bool) -> tuple[Any, Report]:  # fmt: skip
    if config.verify == "model":
        raise UnsupportedError("verify='model' needs files to run; use verify='sites'")
    exported, records, cost, original = not isinstance(model, fx.GraphModule), list[Record](), None, model
    notes: list[str] = []
    if rewrite and config.converts:
        from normfuse.frontends import fx_convert

        convert = fx_convert.convert_program if exported else fx_convert.convert_module
        model, found = convert(model, config)
        records, notes = found.records, found.notes
        if config.layernorm_to_rmsnorm == "approximate":
            from normfuse.frontends.fx_approximate import approximate_program

            if not exported:
                raise UnsupportedError("approximate conversion takes an exported program or an nn.Module, not a "
                                       "GraphModule")  # fmt: skip
            records = [r for r in records if r.verdict != "kept"]
            model, more, cost = approximate_program(model, config, calibration, records)
            records += more.records
    source = model.graph_module if exported else model
    state = _state(model) if exported else None
    level = {"ATEN": "core", "TRAINING": "aten"}.get(model.dialect) if exported else None
    whole = last = _Module(source, config, rewrite, state, level, leave, eager)
    later: list[_Module] = []
    if rewrite:
        changed = whole.carry_out()
        while last.may_show_more() and len(later) < MORE_ROUNDS:
            last = _Module(changed, config, True, state, level, leave, eager)
            changed = last.carry_out()
            later.append(last)
        if exported and (lost := _lost_calls(model, changed)):
            where = ", ".join(lost)
            notes = [*notes, f"not preserved: the call signatures of {where}, of which a value is in an operator now"]
        model = _program(model, changed) if exported else changed
    report = whole.report()
    report.approximation = cost
    report.notes += notes
    known = {names_of(site)[0]: norm for site, norm in zip(whole.sites(), report.norms, strict=True)}
    tell(report, whole.sites(), records)
    for part in later:
        _resume(report, known, part)
    report.format = "exported" if exported else "fx"
    if report.converted:
        state = _state(original) if exported else None
        report.recall(_Module(original.graph_module if exported else original, config, False, state).report())
    return model, report


def _resume(report: Report, known: dict[str, NormRecord], part: _Module) -> None:
    """Put what a later round has done into the report on the first, whose norms are `known` by their results."""
    more = part.report()
    for site, new in zip(part.sites(), more.norms, strict=True):
        old = next((known[name] for name in names_of(site) if name in known), None)
        if new.action != "fused" or (old is not None and old.conversion is not None):
            continue
        if old is None:
            report.norms.append(new)
            continue
        if old.action == "refused":
            report.refusals = [r for r in report.refusals if r.node != old.name]
        for name in _DONE:
            setattr(old, name, getattr(new, name))
    report.operators_after, report.nodes_after = more.operators_after, more.nodes_after
    report.seconds = {name: report.seconds.get(name, 0.0) + s for name, s in more.seconds.items()}


def report_on(program: Any, config: Config) -> tuple[Report, list[Site]]:
    """The report on an exported program that is left as it is, and the norms in its order."""
    return report_on_graph(program.graph_module, _state(program), config)


def report_on_graph(module: fx.GraphModule, state: Mapping[str, torch.Tensor | None],
                    config: Config) -> tuple[Report, list[Site]]:  # fmt: skip
    """The same for the graph of an exported program and its `state`, as `Lowering` takes it."""
    whole = _Module(module, config, False, state)
    return whole.report(), whole.sites()


def _state(program: Any) -> dict[str, torch.Tensor | None]:
    """The placeholders of an exported program that are the same in every run; for a constant, its tensor."""
    out: dict[str, torch.Tensor | None] = {}
    mutated = set(program.graph_signature.buffers_to_mutate.values())
    for spec in program.graph_signature.input_specs:
        if spec.kind == InputKind.CONSTANT_TENSOR:
            out[spec.arg.name] = program.constants.get(spec.target)
        elif spec.kind in (InputKind.PARAMETER, InputKind.BUFFER) and spec.target not in mutated:
            out[spec.arg.name] = None
    return out


def _program(program: Any, changed: fx.GraphModule, **others: Any) -> Any:
    """A new exported program with another graph, and other parts where given."""
    parts = {"graph_signature": copy.deepcopy(program.graph_signature), "state_dict": program.state_dict,
             "constants": program.constants, **others}  # fmt: skip
    calls = duplicate(program.module_call_graph)
    for call in _lost_calls(program, changed):
        next(c for c in calls if c.fqn == call).signature = None
    return torch.export.ExportedProgram(
        root=changed, graph=changed.graph, range_constraints=dict(program.range_constraints),
        module_call_graph=calls, example_inputs=program.example_inputs, verifiers=program.verifiers, **parts,
    )  # fmt: skip


def _lost_calls(program: Any, changed: fx.GraphModule) -> list[str]:
    """The modules whose call signature, that `torch.export` was told to preserve, names what is not there any more, or
    what stands outside of them now."""
    calls = [c for c in program.module_call_graph if c.fqn and c.signature is not None]
    if not calls:
        return []

    def modules(node: fx.Node) -> set[str]:
        return {entry[0] for entry in (node.meta.get("nn_module_stack") or {}).values()}

    old, new = ({n.name: modules(n) for n in graph.nodes} for graph in (program.graph, changed.graph))

    def lost(call: Any) -> bool:
        gives, reads = ({a.name for a in arguments if isinstance(getattr(a, "name", None), str)}
                        for arguments in (call.signature.outputs, call.signature.inputs))  # fmt: skip
        left = any(call.fqn in old.get(name, ()) and call.fqn not in new.get(name, ()) for name in gives)
        return left or not gives | reads <= new.keys()

    return [c.fqn for c in calls if lost(c)]


class _Module:
    """One graph module and those inside it."""

    def __init__(self, source: fx.GraphModule, config: Config, rewrite: bool,
                 state: Mapping[str, torch.Tensor | None] | None = None, level: str | None = None,
                 leave: Leave | None = None, eager: bool = True, autocast: int = 0) -> None:  # fmt: skip
        started = time.perf_counter()
        self.source, self.config, self.rewrite, self.compiling = source, config, rewrite, leave is not None
        self.exported = state is not None
        self.graph = copied(source) if rewrite or fx_inplace.writes(source.graph) else source.graph
        self.operators_before = operators(source.graph)
        self.written = fx_inplace.read_as_pure(self.graph, self.exported)
        self.old = frozenset(self.graph.nodes if self.written else ())
        self.aliases = frozenset(fx_inplace.name_settled(self.graph, self.exported))
        self.low = Lowering(source, self.graph, state, autocast)
        self.emitter = Emitter(level or level_of(self.graph), config.numerics)
        self.fused = FusedEmitter(self.emitter.level, config.numerics, eager,
                                  any(map(fx_effects.written, source.graph.nodes)))
        self.can = Abilities(lambda norm, value: self.emitter.expressible(self.low, norm, value),
                             operator=lambda edit: self.fused.unfit(self.low, edit), leave=leave,
                             done=self._done)  # fmt: skip
        self.plan: Plan = plan(self.low.graph, config, self.can, rewrite=False)
        for site in self.plan.found.sites:
            site.norm = self._within(site)
            x, y = site.norm.x.native, site.value.native
            if isinstance(x, fx.Node) and isinstance(y, fx.Node) and is_tensor(meta_of(y)):
                self.fused.layouts.follow(y, x)
        if rewrite:
            fuse(self.plan, config, self.can)
        self.checks: dict[Site, Check] = {}
        self.emitted: dict[Site, str] = {}
        self.moved: dict[fx.Node, fx.Node] = {}
        self.spent: set[fx.Node] = set()  # casts of parameters that nobody may need any more
        self.loose: set[fx.Node] = set()  # what may lie in memory in another way than the model says
        self.seconds = {"recognise": time.perf_counter() - started}
        self.inner: dict[str, _Module] = {}
        for path in self.low.subgraphs:
            part = source.get_submodule(path)
            if path not in self.inner and isinstance(part, fx.GraphModule):
                self.inner[path] = _Module(part, config, rewrite, None, self.emitter.level, leave, eager,
                                           self.low.autocast(path))  # fmt: skip

    def _within(self, site: Site) -> Norm:
        """A norm of what copies give that stand ahead of a switch of a mode, and not of what they copy: without
        gradients a copy is another tensor to autograd."""
        norm, root = site.norm, site.fact.root
        nodes, copies, layout = region(site.value, norm), set[Node](), identity_layout(root.value)
        for node in nodes:
            value = node.outputs[0]
            fact = self.plan.found.facts.get(value.index, {}).get(root.key())
            if fact is None or value.dtype != norm.x.dtype or "cast" in dict(fact.trace) or fact.absolute:
                continue
            if (fact.kappa, fact.alpha, fact.beta, fact.layout) == ({}, {ONE: 1.0}, {}, layout):
                copies.add(node)
        mode = self.low.segment.get(site.value.native)
        read = {v for n in nodes if n not in copies for v in n.inputs if v is norm.x or v.producer in copies}
        if len(read) != 1 or all(self.low.segment.get(n.native) == mode for n in copies):
            return norm
        return replace(norm, x=read.pop())

    def _done(self, site: Site) -> bool:
        """Whether a norm stands there already in the several nodes that it would get, or in casts and an operator that
        takes a weight by channel, as no other does."""
        norm, value = site.norm, site.value
        if any(v.native is None for v in norm.parameters()):  # the operator makes it
            return True
        written = any(node.kind in ("rms_norm", "layer_norm") for node in region(value, norm))
        if site.is_op or not written or self.emitter.expressible(self.low, norm, value) is not None:
            return False
        scratch, olds, news = fx.Graph(), dict[fx.Node, Any](), dict[Any, fx.Node]()

        def operand(value: Value) -> fx.Node:
            if value.native not in news:
                news[value.native] = scratch.placeholder("operand")
                olds[news[value.native]] = value.native
            return news[value.native]

        made = self.emitter.emit(scratch, norm, operand(norm.x), operand, order_of(meta_of(value.native)))
        return alike(made[-1], value.native, olds)

    def parts(self) -> list[_Module]:
        """This graph and those inside it, at any depth."""
        return [self, *(one for part in self.inner.values() for one in part.parts())]

    def sites(self) -> list[Site]:
        """The norms of this graph and of those inside it."""
        return [site for part in self.parts() for site in part.plan.found.sites]

    def may_show_more(self) -> bool:
        """Whether the changed graph may be read otherwise: with other roundings, more of it is an operator's."""
        edits = any(part.plan.edits() for part in self.parts())
        return edits and self.config.numerics == "fast"

    def carry_out(self) -> fx.GraphModule:
        """Check the edits, make them, and give the new module."""
        if self.config.verify != "off":
            self.check()
        return self.apply()

    def check(self) -> None:
        """Compare every replaced region with its replacement; roll back those that differ, and try what is left."""
        started = time.perf_counter()
        checker, prover = Checker(self.emitter, self.fused, self.config.numerics), Prover()
        while True:
            failed = False
            for edit in self.plan.edits():
                result = prover.judge(edit, checker.check(self.low, edit))
                self.checks |= dict.fromkeys(edit.sites, result)
                if not result.ok:
                    failed = True
                    code = "NF202" if result.same else "NF201"  # less exact, or another function
                    self.plan.fail(edit, Refusal(code, edit.sites[0].label, result.message))
            if not failed:
                break
            fuse(self.plan, self.config, self.can)
        for part in self.inner.values():
            part.check()
        self.seconds["verify"] = time.perf_counter() - started

    def apply(self) -> fx.GraphModule:
        """Make the edits and give the new module."""
        started = time.perf_counter()
        edits = self.plan.edits()
        self.loose = set(self.fused.layouts.ways)
        for edit in edits:
            self._replace(edit)
        if edits:
            sort(self.graph)
            self._remove()
            for node in self.graph.nodes:
                if node in self.loose:
                    infer(node, node)
            if self.exported:
                take_out(self.graph, scattered(self.graph) - scattered(self.source.graph))
        fx_inplace.unname(self.graph, self.aliases)
        fx_inplace.write_again(self.graph, self.written, self.exported, self.old)
        self.graph.lint()
        made = fx.GraphModule(self.source, self.graph, type(self.source).__name__)
        made.meta = dict(self.source.meta)
        for path, part in self.inner.items():
            parent, _, name = path.rpartition(".")
            setattr(made.get_submodule(parent), name, part.apply())
        self.seconds["rewrite"] = time.perf_counter() - started
        return made

    def _replace(self, edit: Edit) -> None:
        olds: list[fx.Node] = [v.native for v in edit.outputs]
        first = min(olds)
        attributes: dict[str, fx.Node] = {}

        def operand(value: Value) -> fx.Node:
            if isinstance(value.native, str):
                if value.native not in attributes:
                    attributes[value.native] = self.graph.get_attr(value.native)
                return attributes[value.native]
            return self._now(value.native)

        with self.graph.inserting_before(first):
            if isinstance(edit, Fused):
                nodes, news = self.fused.emit(self.graph, edit, operand)
            else:
                order = order_of(meta_of(first))
                nodes = self.emitter.emit(self.graph, edit.site.norm, operand(edit.site.norm.x), operand, order)
                news = nodes[-1:]
        made = (v for v in edit.parameters() if v.producer is not None and v.producer.kind in ("cast", "add"))
        self.spent |= {v.native for v in made}
        self.emitted |= dict.fromkeys(edit.sites, emitted(nodes))
        for node in nodes:
            node.meta = {k: v for k, v in olds[0].meta.items() if k not in _OWN_META}
            if node not in news and not (len(news) == 2 and gives_tuple(node, news, olds)):
                infer(node, olds[0])
        for old, new in zip(olds, news, strict=True):
            new.meta = dict(old.meta)
        if any(old in self.loose for old in olds):
            self.loose |= set(nodes)
        if len(olds) > 1:
            house(nodes, olds)
        for old, new in zip(olds, news, strict=True):
            old.replace_all_uses_with(new)
            self.moved[old] = new

    def _now(self, node: fx.Node) -> fx.Node:
        while node in self.moved:
            node = self.moved[node]
        return node

    def _remove(self) -> None:
        """Erase the nodes that are dead now, then checks, sizes and constants that only they used."""
        alive = live(self.low.graph, self.plan.edits())
        by_native: dict[fx.Node, list[Node]] = {}
        for node in self.low.graph.nodes:
            by_native.setdefault(node.native, []).append(node)
        gone = {n.native for n in self.plan.remove if not any(other in alive for other in by_native[n.native])}
        gone |= self.spent
        while True:
            before = len(self.graph.nodes)
            for old in reversed(list(self.graph.nodes)):
                if old.op in ("placeholder", "output") or old.users:
                    continue
                check = fx_effects.is_assert(old) and all(
                    n in gone and all(fx_effects.is_assert(u) for u in n.users) for n in old.all_input_nodes
                )
                # a trace takes every result of an operator, read or not
                unread = old.target is operator.getitem and not gone.isdisjoint(old.all_input_nodes)
                if old in gone or check or unread:
                    # what is no node of the neutral graph is a constant, a size or an element of a tuple
                    gone.update(n for n in old.all_input_nodes if n not in by_native)
                    self.graph.erase_node(old)
            if len(self.graph.nodes) == before:
                break
        left = set(self.graph.nodes)
        for old, new in self.moved.items():
            if old not in left and new in left:
                new.name = old.name

    def report(self) -> Report:
        """The report on this graph and those inside it."""
        parts = self.parts()
        checks = {site: check for part in parts for site, check in part.checks.items()}
        out = build_report([part.plan for part in parts], checks, self.rewrite, lambda edit: "",
                           None if self.compiling else module_of)  # fmt: skip
        sites = [(part, site) for part in parts for site in part.plan.found.sites]
        for (part, site), record in zip(sites, out.norms, strict=True):
            record.emitted = part.emitted.get(site, "")
        out.operators_before = dict(sum((part.operators_before for part in parts), Counter()))
        out.operators_after = dict(sum((operators(part.graph) for part in parts), Counter()))
        out.nodes_before = sum(out.operators_before.values())
        out.nodes_after = sum(out.operators_after.values())
        out.seconds = dict(self.seconds)
        return out
