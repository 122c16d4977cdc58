"""The operators of `normfuse.ops` in FX graphs: which of them can stand for a fusion, and making the call.

They say by attributes what a call of torch's own norm cannot: where the result is rounded back, a weight offset, a
weight of another type than x. Results lie in memory as ``torch.empty_like`` of the first input.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

import normfuse.ops  # noqa: F401 - registers the operators
from normfuse.frontends.fx import Lowering
from normfuse.frontends.fx_effects import MODES, given, is_assert, name_of, written
from normfuse.frontends.fx_emit import Maker, Operands, early_factor, lossless, shape_of_expr, width
from normfuse.frontends.fx_layout import Layouts, key
from normfuse.frontends.fx_meta import is_tensor, meta_of
from normfuse.graph import PRECISION, Value
from normfuse.norm import Expr, Norm, plain, region
from normfuse.plan import Fused, Reason


@dataclass(frozen=True, slots=True)
class Attributes:
    """What the norms of one operator have in common."""

    kind: str
    eps: float
    offset: float
    cast: str
    dtype: str | None


APART = "its result would lie in memory in another way than the model's"


class Unfit(Exception):
    """No operator of the family is this norm; the message says why."""


def attributes(norm: Norm, numerics: str, narrow: str | None) -> Attributes:
    """The attributes of a norm, of x or of the unrounded sum of tensors of type `narrow`; raises `Unfit`."""
    x = narrow or "?"
    half = PRECISION.get(x, 0) < 24
    if norm.compute != ("float64" if x == "float64" else "float32") and not (half and numerics == "fast"):
        raise Unfit(f"it is computed in {norm.compute}, and the operator computes in float32")
    if norm.cast == "mixed" and numerics == "exact":
        raise Unfit("no operator has this order of roundings")
    if norm.cast == "first" and norm.narrow != x:
        raise Unfit(f"it is cast to {norm.narrow} before the weight, and the operator casts to {x}")
    cast = "first" if norm.cast == "first" else "last"
    offset = 0.0
    if norm.weight is not None:
        offset = _offset(norm)[1]
        if early_factor(norm) != 1.0:
            raise Unfit("a constant factor is applied before the cast back, and the weight after it")
    if norm.axes != (len(norm.x.shape or ()) - 1,):
        raise Unfit("the operators normalise the last axis")
    for expr in (norm.weight, norm.bias):
        shape = () if expr is None else shape_of_expr(expr)
        if shape is None or (expr is not None and (not shape or any(d != 1 for d in shape[:-1]))):
            raise Unfit("the weight or bias is not one row")
        if expr is not None and shape[-1] != 1 and shape != width(norm) and norm.size is None:
            raise Unfit("a weight that has to be reshaped to a size known only at run time")
        if any(PRECISION.get(v.dtype or "", 99) > PRECISION.get(norm.compute, 0) for _, f in expr or () for v, _ in f):
            raise Unfit("a weight or bias is of a wider type than the arithmetic")
    promoted = x
    if cast == "first":
        for v in norm.parameters():
            promoted = max(promoted, v.dtype or "?", key=lambda t: PRECISION.get(t, 0))
    return Attributes(norm.kind, norm.eps, offset, cast, None if norm.dtype == promoted else norm.dtype)


def _offset(norm: Norm) -> tuple[Value | None, float]:
    """(w, c) where the weight is c + w, added in the type of the arithmetic, as Gemma writes it."""
    assert norm.weight is not None
    if not plain(norm.weight):
        return None, 0.0
    value = norm.weight[0][1][0][0]
    node = value.producer
    if norm.cast == "first" or node is None or node.kind != "add" or value.dtype != norm.compute or value.tainted:
        return value, 0.0
    a, b = node.inputs
    c, w = (a, b) if a.number is not None else (b, a)
    if c.number is None or w.number is not None or w.shape != value.shape or w.native is None or w.tainted:
        return value, 0.0
    return w, c.number


class FusedEmitter:
    """What can be made at one level, and the making; `eager` where autograd sees the operators themselves."""

    def __init__(self, level: str, numerics: str, eager: bool = False, writes: bool = True) -> None:
        self.level, self.numerics, self.eager = level, numerics, eager
        self.layouts = Layouts(writes)

    def unfit(self, low: Lowering, edit: Fused) -> Reason | None:
        """Why an edit has no operator here, as (code, message), or None."""
        try:
            self._check(low, edit)
        except Unfit as why:
            return "NF202", str(why)
        return None

    def _check(self, low: Lowering, edit: Fused) -> None:
        if edit.x_bias is not None:
            raise Unfit("a bias is added by the linear layer")
        if len(set(self._attributes(edit))) > 1:
            raise Unfit("the norms are not alike")
        values = [*edit.inputs, *edit.outputs, *edit.parameters()]
        # a summand is read where the model reads it, so that writes to it before do no harm
        late = edit.inputs if edit.op == "add_norm" else edit.inputs[1:] if "add" in edit.op else ()
        late = late if edit.round_sum else ()  # but not a cast of it
        if any(v.tainted for v in values if v not in late):
            raise Unfit("one of its tensors is written in place")
        for v in (*edit.inputs, *edit.outputs):
            if not isinstance(v.native, fx.Node) or v.shape is None or v.dtype not in PRECISION or not is_tensor(
                    meta_of(v.native)):  # fmt: skip
                raise Unfit("one of its tensors is no tensor of the graph, or of unknown shape")
        if edit.view is not None and edit.view.native.args[:1] != (edit.outputs[1].native,):
            raise Unfit("between the sum and the norm stands more than a view")
        makers = {v.producer.native for v in edit.outputs if v.producer is not None}
        if len(makers) == 1 and (name_of(next(iter(makers))) or "").startswith("normfuse::"):
            raise Unfit("it is that operator already")
        natives = {n.native for site in edit.sites for n in region(site.value, site.norm)}
        natives |= {v.native for v in edit.outputs}
        modes = {low.segment.get(n) for n in natives}
        if len(modes) > 1:
            raise Unfit("grad mode or autocast is switched inside it")
        metas = [meta_of(v.native) for v in values if isinstance(v.native, fx.Node)]
        if len({str(m.device) for m in metas if isinstance(m, torch.Tensor)}) > 1:
            raise Unfit("its operands are on several devices")
        if self.eager and "add_norm" in edit.op and _differentiated(edit.outputs[-1].native):
            raise Unfit("the graph gives the sum, of which the norm would not be a function any more to autograd")
        self._types(edit)
        self._layout(edit)
        self._order(low, edit)

    def _attributes(self, edit: Fused) -> list[Attributes]:
        """Those of each of its norms."""
        return [attributes(site.norm, self.numerics, site.norm.x.dtype if edit.round_sum else edit.inputs[0].dtype)
                for site in edit.sites]  # fmt: skip

    def _types(self, edit: Fused) -> None:
        """The additions promote as the operator does."""
        if edit.op in ("add_norm", "norm_add", "norm_add_norm"):
            first = edit.inputs[0].dtype if edit.op == "add_norm" else edit.sites[0].norm.dtype
            both = torch.promote_types(getattr(torch, first or ""), getattr(torch, edit.inputs[1].dtype or ""))
            if both != getattr(torch, edit.outputs[-1].dtype or ""):
                raise Unfit("the residual sum is of another type than its summands give")

    def _layout(self, edit: Fused) -> None:
        """The results lie as the model's do, or contiguous where nobody who reads them minds."""
        layouts, pairs = self.layouts, list[tuple[fx.Node, fx.Node]]()
        for i, out in enumerate(edit.outputs):
            like = edit.inputs[i if edit.op == "qk_norm" else 0]
            if edit.view is not None and i == 0:
                continue  # the model's own view, of a result that lies as the sum does
            try:
                own, wanted = (layouts.plain(meta_of(v.native)) for v in (like, out))
            except RuntimeError as why:  # a size below zero, of the numbers that symbols stand for
                raise Unfit(APART) from why
            promised = torch.empty_like(own, dtype=wanted.dtype)
            moved = edit.view is not None and not layouts.fix(like.native)
            if moved or (key(promised) != key(wanted) and (edit.view is not None or not promised.is_contiguous())):
                raise Unfit(APART)
            pairs.append((out.native, like.native))
        if not layouts.allow(pairs):
            raise Unfit(APART)

    def _order(self, low: Lowering, edit: Fused) -> None:
        """No input depends on a result, and what has to wait for the operator may."""
        outputs = {v.native for v in edit.outputs}
        inputs = {v.native for v in (*edit.inputs, *edit.parameters()) if isinstance(v.native, fx.Node)}
        start, end = min(outputs), max(inputs)
        waiting, node = set(outputs), start
        while node < end or node is end:
            if node not in outputs and any(n in waiting for n in node.all_input_nodes):
                waiting.add(node)
                if node in inputs:
                    raise Unfit("an input of it depends on a result")
            if node is not start and node not in outputs and (written(node) or name_of(node) in MODES):
                raise Unfit("something is written or a mode is switched between its inputs")
            if node in waiting and node not in outputs and not low.pure(node) and not is_assert(node):
                raise Unfit(f"{node.name} would have to wait for it")
            node = node.next

    def emit(self, graph: fx.Graph, edit: Fused, operand: Operands, size: Callable[[fx.Node], Any] = lambda n: n,
             ) -> tuple[list[fx.Node], list[fx.Node]]:  # fmt: skip
        """(all new nodes in order, the nodes that give the edit's outputs).

        `operand` gives the node for a value, `size` that for a node of the model which is a size.
        """
        norms = [site.norm for site in edit.sites]
        how = self._attributes(edit)[0]
        made: list[fx.Node] = []
        arguments: list[Any] = [operand(v) for v in edit.inputs]
        for norm in norms:
            maker = Maker(self.level, graph, norm)
            arguments += [self._row(maker, norm.weight, operand, how, True), self._row(maker, norm.bias, operand, how)]
            made += maker.nodes
        arguments += [how.eps, how.offset, how.cast, None if how.dtype is None else getattr(torch, how.dtype)]
        if edit.op in ("norm_add", "norm_add_norm", "qk_norm"):
            arguments.append(how.kind)
        elif not edit.round_sum:
            arguments.append(False)
        call = graph.call_function(getattr(torch.ops.normfuse, edit.name).default, tuple(arguments))
        made.append(call)
        if edit.op in ("norm", "norm_add"):
            return made, [call]
        parts = [graph.call_function(operator.getitem, (call, i)) for i in range(2)]
        made += parts
        if edit.view is not None:
            model = edit.view.native
            y = parts[0]
            parts[0] = graph.node_copy(model, lambda n: y if n is model.args[0] else size(n))
            made.append(parts[0])
        return made, parts

    def _row(self, maker: Maker, expr: Expr | None, operand: Operands, how: Attributes, weight: bool = False) -> Any:
        """A weight or bias of shape (N,), in the narrowest type that holds it."""
        if expr is None:
            return None
        value = expr[0][1][0][0] if plain(expr) else None
        if value is not None and weight and how.offset:
            value = _offset(maker.spec)[0]
        if value is None or value.shape != width(maker.spec):
            if value is not None:
                expr = ((1.0, ((value, 1),)),)
            dtype = maker.spec.dtype if how.cast == "first" else maker.spec.compute
            return maker.weight(expr, dtype, operand)
        return operand(value if how.cast == "first" else _base(value))


def _differentiated(node: fx.Node) -> bool:
    """Whether a graph gives a value at which somebody may take a gradient, a view of it included."""
    return bool(getattr(meta_of(node), "requires_grad", False)) and given(node)


def _base(value: Value) -> Value:
    """What a parameter was widened from, if it was."""
    current = value
    while (node := current.producer) is not None and node.kind == "cast" and node.inputs[0].native is not None:
        source = node.inputs[0]
        if lossless(current, source.dtype) is not source:
            break
        current = source
    return current
