"""Making the torch nodes of a norm: one call of layer_norm or rms_norm, and the casts that keep the meaning.

torch's operators compute half types in float32 and round once, after weight and bias; so a norm of half x that is
rounded before the weight is a call without weight, then the model's own multiplication; one that stays in float32 is a
call on x.to(float32). A norm computed in a half type throughout has no such form.

Three levels: "torch" (Dynamo graphs), "aten" (torch.export), "core" (after AOTAutograd: no composite operators).
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import fx
from torch._ops import OpOverload

from normfuse.frontends import fx_effects
from normfuse.frontends.fx import Lowering
from normfuse.frontends.fx_call import shape_of_pair
from normfuse.frontends.fx_meta import is_tensor, meta_of, order_of
from normfuse.frontends.fx_norms import HALF
from normfuse.graph import PRECISION, Shape, Value
from normfuse.norm import Expr, Norm, plain, region
from normfuse.plan import Reason

aten = torch.ops.aten
Operands = Callable[[Value], fx.Node]

_COMPOSITE = torch._C.DispatchKey.CompositeImplicitAutograd
_EITHER = frozenset({"aten::_fused_rms_norm"})


def level_of(graph: fx.Graph) -> str:
    """The level of a graph, by the functions that it calls."""
    calls = [n for n in graph.nodes if n.op in ("call_function", "call_method", "call_module")]
    ops = [n.target for n in calls if isinstance(n.target, OpOverload)]
    getitem = operator.getitem
    plain = [n for n in calls if is_tensor(meta_of(n)) and n.target is not getitem]
    if not ops or any(not isinstance(n.target, OpOverload) for n in plain):
        return "torch"
    composite = any(op.has_kernel_for_dispatch_key(_COMPOSITE) and op._schema.name not in _EITHER for op in ops)
    return "aten" if composite else "core"


class Emitter:
    """What can be made at one level, and the making."""

    def __init__(self, level: str, numerics: str = "exact") -> None:
        self.level, self.numerics = level, numerics

    # -- what can be expressed ------------------------------------------------------------------------------------

    def expressible(self, low: Lowering, norm: Norm, value: Value) -> Reason | None:
        """Why a norm has no form here, as (code, message), or None."""
        x = norm.x
        if x.shape is None or value.shape is None:
            return "NF115", "the shape of the norm is not known"
        if norm.dtype not in PRECISION or x.dtype not in PRECISION:
            return "NF113", f"the type {norm.dtype} is not a float type"
        if not isinstance(value.native, fx.Node) or not isinstance(x.native, fx.Node):
            return "NF202", "the norm is a part of one operator of the model"
        rank = len(x.shape)
        if norm.axes != tuple(range(rank - len(norm.axes), rank)):
            return "NF202", "torch has no operator for a norm over inner axes without a transpose"
        written = next((v for v in norm.parameters() if v.tainted), None)
        if written is not None:
            return "NF120", f"{written.name} or a view of it is written in place"
        for expr in (norm.weight, norm.bias):
            if expr is not None and shape_of_expr(expr) is None:
                return "NF202", "the shape of the weight is not known"
            if expr is not None and norm.size is None and shape_of_expr(expr) not in ((), width(norm)):
                return "NF202", "a weight that has to be reshaped to a size known only at run time"
            if expr is not None and not (_spreads(expr, norm) or _joined(expr, norm)):
                return "NF202", "the weight runs over several of the normalised axes as one"
        if norm.compute in HALF and self.numerics == "exact":
            return "NF202", f"it is computed in {norm.compute}, and torch's operator computes in float32"
        return self._surroundings(low, norm, value)

    def _surroundings(self, low: Lowering, norm: Norm, value: Value) -> Reason | None:
        """Modes, devices and memory layout between the model's nodes and the one that replaces them."""
        node = value.native
        mode = low.segment.get(node)
        if any(low.segment.get(n.native) != mode for n in region(value, norm)) or (mode is not None and mode[1]):
            return "NF202", "grad mode or autocast is switched inside the norm or around it"
        device = getattr(meta_of(node), "device", torch.device("cpu"))
        if self.level == "torch" and torch.is_autocast_enabled(device.type):
            return "NF202", "autocast is on, and would cast the operator's operands"
        metas = [meta_of(v.native) for v in (norm.x, *norm.parameters()) if isinstance(v.native, fx.Node)]
        devices = {str(m.device) for m in (*metas, meta_of(node)) if isinstance(m, torch.Tensor) and m.dim()}
        if len(devices) > 1:
            return "NF202", f"its operands are on {' and '.join(sorted(devices))}"
        order = order_of(meta_of(node))
        k = len(norm.axes)
        if order is None or order[len(order) - k :] != tuple(range(len(order) - k, len(order))):
            return "NF202", "the result has a memory layout that torch's operator does not give"
        return None

    # -- making it ------------------------------------------------------------------------------------------------

    def emit(self, graph: fx.Graph, norm: Norm, x: fx.Node, operand: Operands,
             order: tuple[int, ...] | None = None) -> list[fx.Node]:  # fmt: skip
        """Nodes that compute the norm of x, in order; the last one is the result.

        `order` permutes x so that it is contiguous, as the model's result is.
        """
        make = Maker(self.level, graph, norm)
        compute = "float32" if norm.compute in HALF else norm.compute
        late = norm.cast == "first"
        wider = late and norm.dtype != norm.narrow
        early = early_factor(norm)
        alike = early == 1.0 and norm.narrow == norm.x.dtype if late else _rounds_alike(norm)
        direct = norm.x.dtype in HALF and compute == "float32" and alike
        stored = norm.narrow if late else norm.x.dtype if direct else compute
        assert stored is not None
        weight, bias, fused_weight, fused_bias = norm.weight, norm.bias, None, None
        if order is not None and order == tuple(range(len(order))):
            order = None
        if order is not None:
            x = make.permute(x, order)
        if not direct and norm.x.dtype != compute:
            x = make.cast(x, compute)
        if not late:
            if weight is not None and shape_of_expr(weight):
                fused_weight = make.weight(weight, stored, operand)
            shifts = norm.kind == "layer_norm" and (fused_weight or weight is None)
            if shifts and bias is not None and shape_of_expr(bias):
                fused_bias = make.weight(bias, stored, operand)
        x = make.norm(x, fused_weight, fused_bias)
        if early != 1.0 and weight is not None:
            x = make.arithmetic("mul", x, early)
            weight = tuple((c / early, factors) for c, factors in weight if factors) or None
        if late and not direct:
            x = make.cast(x, stored)
        if wider and not shape_of_expr(weight if weight is not None else bias or ()):
            x = make.cast(x, norm.dtype)  # a number does not, what torch does for a wider weight
        if late:
            stored = norm.dtype
        if weight is not None and fused_weight is None:
            x = make.arithmetic("mul", x, make.plain(weight, stored, operand))
        if bias is not None and fused_bias is None:
            x = make.arithmetic("add", x, make.plain(bias, stored, operand))
        if norm.dtype != stored:
            x = make.cast(x, norm.dtype)
        if order is not None:
            make.permute(x, tuple(order.index(a) for a in range(len(order))))
        return make.nodes


def early_factor(norm: Norm) -> float:
    """The constant factor to multiply by before the cast back, in the wider type: behind it, it would round."""
    if norm.cast != "first" or norm.dtype != norm.narrow or norm.weight is None or len(norm.weight) != 1:
        return 1.0
    c = norm.weight[0][0]
    return 1.0 if math.frexp(c)[0] in (0.5, -0.5) else c


def _rounds_alike(norm: Norm) -> bool:
    """Whether torch's operator on half x and half parameters rounds as the model does: once, at the end."""
    if norm.dtype != norm.x.dtype or (norm.kind == "rms_norm" and norm.bias is not None):
        return False
    return all(
        expr is None or (plain(expr) and lossless(expr[0][1][0][0], norm.x.dtype) is not None)
        for expr in (norm.weight, norm.bias)
    )


class Maker:
    """Appends nodes at one level."""

    def __init__(self, level: str, graph: fx.Graph, norm: Norm) -> None:
        self.level, self.graph, self.spec = level, graph, norm
        self.nodes: list[fx.Node] = []

    def call(self, function: Any, *args: Any, **kwargs: Any) -> fx.Node:
        """A function call."""
        self.nodes.append(self.graph.call_function(function, args, kwargs))
        return self.nodes[-1]

    def method(self, name: str, *args: Any) -> fx.Node:
        """A method call."""
        self.nodes.append(self.graph.call_method(name, args))
        return self.nodes[-1]

    def cast(self, x: fx.Node, dtype: str) -> fx.Node:
        """x in another type."""
        to = getattr(torch, dtype)
        if self.level == "torch":
            return self.method("to", x, to)
        if self.level == "aten":
            return self.call(aten.to.dtype, x, to)
        return self.call(aten._to_copy.default, x, dtype=to)

    def permute(self, x: fx.Node, order: tuple[int, ...]) -> fx.Node:
        """x with its axes in another order."""
        if self.level == "torch":
            return self.method("permute", x, *order)
        return self.call(aten.permute.default, x, list(order))

    def reshape(self, x: fx.Node, shape: list[Any]) -> fx.Node:
        """x in another shape."""
        if self.level == "torch":
            return self.method("reshape", x, shape)
        return self.call(aten.reshape.default if self.level == "aten" else aten.view.default, x, shape)

    def expand(self, x: fx.Node, shape: list[Any]) -> fx.Node:
        """x spread over a shape."""
        return self.method("expand", x, shape) if self.level == "torch" else self.call(aten.expand.default, x, shape)

    def arithmetic(self, kind: str, a: Any, b: Any) -> fx.Node:
        """a (kind) b."""
        if self.level == "torch":
            return self.call({"mul": operator.mul, "add": operator.add, "div": operator.truediv}[kind], a, b)
        return self.call({"mul": aten.mul.Tensor, "add": aten.add.Tensor, "div": aten.div.Tensor}[kind], a, b)

    def reciprocal(self, a: fx.Node) -> fx.Node:
        """1 / a."""
        return self.call(torch.reciprocal if self.level == "torch" else aten.reciprocal.default, a)

    def norm(self, x: fx.Node, weight: fx.Node | None, bias: fx.Node | None) -> fx.Node:
        """The operator itself."""
        norm = self.spec
        shape: list[Any] = []
        for a in range(-len(norm.axes), 0):
            d = width(norm)[a]
            if isinstance(d, int):
                shape.append(d)
            else:
                shape.append(self.method("size", x, a) if self.level == "torch" else self.call(aten.sym_size.int, x, a))
        layer, fixed = norm.kind == "layer_norm", all(isinstance(d, int) for d in shape)
        if self.level == "torch":
            if layer:
                return self.call(F.layer_norm, x, tuple(shape), weight, bias, norm.eps)
            return self.call(F.rms_norm, x, tuple(shape), weight, norm.eps)
        if self.level == "aten" or not fixed:
            if layer:
                return self.call(aten.layer_norm.default, x, shape, weight, bias, norm.eps)
            return self.call(aten.rms_norm.default, x, shape, weight, norm.eps)
        if layer:
            both = self.call(aten.native_layer_norm.default, x, shape, weight, bias, norm.eps)
        else:
            both = self.call(aten._fused_rms_norm.default, x, shape, weight, norm.eps)
        return self.call(operator.getitem, both, 0)

    def plain(self, expr: Expr, dtype: str, operand: Operands) -> Any:
        """A weight or bias as it stands: a number, or a node that broadcasts to x."""
        if not shape_of_expr(expr) and not any(factors for _, factors in expr):
            return sum(c for c, _ in expr)
        total: Any = None
        for c, factors in expr:
            term: Any = None
            for value, exponent in factors:
                node = self._typed(value, dtype, operand)
                for _ in range(abs(exponent)):
                    if term is None:
                        term = node if exponent > 0 else self.reciprocal(node)
                    else:
                        term = self.arithmetic("mul" if exponent > 0 else "div", term, node)
            term = c if term is None else term if c == 1 else self.arithmetic("mul", term, c)
            if total is None:
                total = term
            else:
                total = self.arithmetic("add", *((total, term) if isinstance(total, fx.Node) else (term, total)))
        rank, shape = len(self.spec.x.shape or ()), shape_of_expr(expr) or ()
        if _joined(expr, self.spec):
            return self.reshape(total, list(width(self.spec)))
        return self.reshape(total, list(shape[len(shape) - rank :])) if len(shape) > rank else total

    def _typed(self, value: Value, dtype: str, operand: Operands) -> fx.Node:
        base = lossless(value, dtype)
        return self.cast(operand(value), dtype) if base is None else operand(base)

    def weight(self, expr: Expr, dtype: str, operand: Operands) -> fx.Node:
        """A weight or bias in the shape and type that the operator wants."""
        node, shape, wide = self.plain(expr, dtype, operand), shape_of_expr(expr), width(self.spec)
        assert isinstance(node, fx.Node) and shape is not None
        if shape == wide or _joined(expr, self.spec):
            return node
        k = len(wide)
        shape = shape[-len(self.spec.x.shape or ()) :]
        last = (1,) * (k - len(shape)) + shape[len(shape) - min(k, len(shape)) :]
        if len(shape) > k:
            node = self.reshape(node, list(last))
        return node if last == wide else self.expand(node, list(wide))


def width(norm: Norm) -> Shape:
    assert norm.x.shape is not None
    return tuple(norm.x.shape[a] for a in norm.axes)


def shape_of_expr(expr: Expr) -> Shape | None:
    """The shape of a weight or bias, by broadcasting; () for a number."""
    found = Value("", ())
    for _, factors in expr:
        for value, _ in factors:
            found = Value("", shape_of_pair(found, value))
    return found.shape


def _spreads(expr: Expr, norm: Norm) -> bool:
    """Whether a weight or bias broadcasts over the normalised axes as it stands."""
    shape, wide = shape_of_expr(expr) or (), width(norm)
    pairs = zip(reversed(shape), (*reversed(wide), *(1 for _ in shape)), strict=False)
    return all(d in (1, n) for d, n in pairs)


def _joined(expr: Expr, norm: Norm) -> bool:
    """Whether a weight or bias has an element for each of the row, in another shape: its norm reads a view of x."""
    shape, wide = shape_of_expr(expr) or (), width(norm)
    known = all(isinstance(d, int) for d in (*shape, *wide))
    return known and not _spreads(expr, norm) and math.prod(shape) == math.prod(wide)  # type: ignore[arg-type]


def lossless(value: Value, dtype: str | None) -> Value | None:
    """The value of this type that a parameter is, or is only a wider copy of."""
    current = value
    while current.dtype != dtype:
        node = current.producer
        if node is None or node.kind != "cast" or node.inputs[0].native is None:
            return None
        source = node.inputs[0]
        if PRECISION.get(source.dtype or "", 99) > PRECISION.get(current.dtype or "", 0) or source.tainted:
            return None
        current = source
    return current


def emitted(nodes: list[fx.Node]) -> str:
    """What was made, for the report."""
    names = [fx_effects.name_of(n) or str(n.target) for n in nodes]
    return ", ".join(n.replace("::", ".") for n in names if n not in ("getitem", "size", "sym_size"))
