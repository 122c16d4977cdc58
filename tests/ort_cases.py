"""Calls of the functions that `normfuse rewrite` can write, as models of one node, and the meaning of each in torch."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import torch
from torch import Tensor

from normfuse.frontends.onnx_emit import Emitter, register_functions
from normfuse.frontends.onnx_functions import function_for
from normfuse.frontends.onnx_fused import FusedEmitter, function_name
from normfuse.frontends.onnx_infer import DTYPES
from normfuse.graph import PRECISION, Value
from normfuse.norm import Expr, Norm, Site
from normfuse.plan import Fused

EPS = 1e-5
SUMS = ("add_norm", "bias_add_norm", "add_norm_unrounded", "bias_add_norm_unrounded")
OPS = ("norm", *SUMS, "norm_add", "norm_add_norm", "qk_norm")
KINDS = ("rms_norm", "layer_norm")
NARROW = ("float16", "bfloat16")
TWO = ("norm_add_norm", "qk_norm")
FLAGS = tuple(itertools.product((True, False), repeat=2))


@dataclass(frozen=True)
class Types:
    """Where a norm rounds: the types of x, of its arithmetic and of the result, and the place of the cast back."""

    x: str = "float32"
    compute: str = "float32"
    cast: str = "none"
    result: str = "float32"

    @property
    def first(self) -> bool:
        return self.cast == "first"

    @property
    def affine(self) -> str:
        """The type of weight and bias."""
        return self.result if self.first else self.compute

    def __str__(self) -> str:
        return "-".join((self.x, self.compute, self.cast, self.result))


def types() -> Iterator[Types]:
    """Every combination that `normfuse.norm.precision` and the recognition let through, without float64.

    Nothing is narrowed before it is normalised, so the arithmetic is in the type of x or in float32. A weight may be
    wider than x after the cast back. "mixed" comes with numerics="fast", in float32.
    """
    floats = ("float32", *NARROW)
    for x, result in itertools.product(floats, repeat=2):
        for compute in dict.fromkeys((x, "float32")):
            if result == compute:
                yield Types(x, compute, "none", result)
            else:
                yield Types(x, compute, "last", result)
            if compute != x and (result == x or PRECISION[result] > PRECISION[x]):
                yield Types(x, compute, "first", result)
            if compute == "float32" and (x, result) != ("float32", "float32"):
                yield Types(x, compute, "mixed", result)


Roles = tuple[tuple[bool, bool], ...]
"""(weight, bias) of each norm."""


def roles(op: str) -> Iterator[Roles]:
    """Which norms of an operator may have a weight and a bias."""
    yield from itertools.product(FLAGS, repeat=2 if op in TWO else 1)


def usual(op: str, kind: str) -> Roles:
    """The roles that a name does not tell."""
    return ((True, kind == "layer_norm"),) * (2 if op in TWO else 1)


def alone(op: str, kind: str, how: Types, role: Roles) -> bool:
    """Whether the norm has a function of its own, with `axes`: the cases that `Emitter.single` lets through."""
    return op == "norm" and how.cast == "none" and how.compute == how.x and (kind == "layer_norm" or not role[0][1])


def there(op: str, how: Types) -> bool:
    """A sandwich's two norms are alike; only a sum in a wider type than its summands can be rounded after the norm."""
    return not (op == "norm_add_norm" and how.result != how.x) and not (
        op.endswith("_unrounded") and how.compute == how.x)  # fmt: skip


def edit(op: str, kind: str, how: Types, role: Roles, sizes: Sequence[int] = (8, 8),
         lead: Sequence[int] = (2,)) -> Fused:  # fmt: skip
    """The fusion of a model that has this operator; `sizes` those of q and k."""
    floats = [how.x, how.result] if op.startswith("norm_add") else [how.x, how.x]
    inputs = [Value(n, (*lead, s), d, leaf=True) for n, s, d in zip("xr", sizes, floats, strict=True)]
    outputs = [Value(n, (*lead, s), how.result) for n, s in zip("ys", sizes, strict=True)]
    kept, wide = op.removeprefix("bias_").removesuffix("_unrounded"), Value("wide", (*lead, sizes[0]), how.compute)
    if kept == "add_norm":
        outputs[1].dtype = how.x
    x_bias = Value("x_bias", (sizes[0],), how.x, leaf=True, fixed=True) if op.startswith("bias_") else None
    sites = []
    for i, (weighted, biased) in enumerate(role):
        second = {"norm_add_norm": (inputs[0], outputs[1])[i], "qk_norm": inputs[i]}
        x = (wide if op.endswith("_unrounded") else outputs[1]) if op in SUMS else second.get(op, inputs[0])
        size = sizes[i if op == "qk_norm" else 0]

        def row(name: str, there: bool, size: int = size) -> Expr | None:
            return ((1.0, ((Value(name, (size,), how.affine, leaf=True, fixed=True), 1),)),) if there else None

        norm = Norm(kind, x, (len(lead),), size, EPS, row(f"w{i}", weighted), row(f"b{i}", biased), how.compute,
                    how.cast, how.result, how.x if how.first else "")  # fmt: skip
        sites.append(Site(outputs[i], norm, None, False))  # type: ignore[arg-type]
    given = inputs[:1] if op == "norm" else inputs
    results = {"norm": outputs[:1], "norm_add": outputs[1:]}.get(op, outputs)
    return Fused(kept, tuple(sites), tuple(given), tuple(results), not op.endswith("_unrounded"), x_bias)


def name(op: str, kind: str, how: Types, role: Roles) -> str:
    """The name of the function."""
    return function_name(edit(op, kind, how, role), 18)


def call(op: str, kind: str, how: Types, role: Roles, sizes: Sequence[int], lead: Sequence[int] = (2, 3),
         opset: int = 18) -> onnx.ModelProto:  # fmt: skip
    """A model of one call. Its inputs and outputs are float32 with casts beside the call: numpy has no bfloat16."""
    fused = edit(op, kind, how, role, sizes, lead)
    natives = {v: _value(v) for v in (*fused.inputs, *fused.parameters())}
    for v, native in natives.items():
        v.native = native
    emitter = Emitter(opset)
    nodes = FusedEmitter(emitter).emit(fused, natives, "call")
    return _model(nodes, list(natives.values()), [v.dtype or "" for v in fused.outputs], emitter, opset)


def lone(kind: str, inner: str, stash: str, weighted: bool, biased: bool, shape: Sequence[int], axes: Sequence[int],
         weight: Sequence[int], opset: int = 18) -> onnx.ModelProto:  # fmt: skip
    """A model of one call of a norm's own function."""
    function = function_for(kind, weighted, biased, inner, stash, opset, EPS)
    values = [Value("x", tuple(shape), inner)]
    values += [Value(n, tuple(weight), inner) for n, on in (("w", weighted), ("b", biased)) if on]
    natives = [_value(v) for v in values]
    emitter = Emitter(opset)
    emitter.functions[function.identifier()] = function
    attributes = [ir.AttrInt64s("axes", axes), ir.AttrFloat32("epsilon", EPS)]
    return _model([ir.Node("normfuse", function.name, natives, attributes)], natives, [inner], emitter, opset)


def _value(v: Value) -> ir.Value:
    return ir.Value(name=v.name, type=ir.TensorType(DTYPES[v.dtype or ""]), shape=ir.Shape(v.shape or ()))


def _model(nodes: list[ir.Node], inputs: list[ir.Value], results: list[str], emitter: Emitter,
           opset: int) -> onnx.ModelProto:  # fmt: skip
    wide, before, after, outputs = [], [], [], []
    for v in inputs:
        wide.append(ir.Value(name=f"{v.name}_f32", type=ir.TensorType(ir.DataType.FLOAT), shape=v.shape))
        cast = ir.Node("", "Cast", [wide[-1]], [ir.AttrInt64("to", v.dtype.value if v.dtype else 0)], outputs=[v])
        before.append(cast)
    for i, (v, dtype) in enumerate(zip(nodes[-1].outputs, results, strict=True)):
        v.name, v.type = f"out{i}", ir.TensorType(DTYPES[dtype])
        after.append(ir.Node("", "Cast", [v], [ir.AttrInt64("to", ir.DataType.FLOAT.value)]))
        outputs.append(after[-1].outputs[0])
        outputs[-1].name, outputs[-1].type = f"out{i}_f32", ir.TensorType(ir.DataType.FLOAT)
    graph = ir.Graph(wide, outputs, nodes=[*before, *nodes, *after], opset_imports={"": opset}, name="g")
    model = ir.Model(graph, ir_version=9)
    register_functions(model, list(emitter.functions.values()))
    return ir.to_proto(model)


# -- the meaning -------------------------------------------------------------------------------------------------------


def _norm(kind: str, how: Types, axes: Sequence[int], x: Tensor, w: Tensor | None, b: Tensor | None, exact: bool,
          sums: bool) -> Tensor:  # fmt: skip
    """A norm as the body of its function spells it, each step in its type; in float64 if `exact`.

    With `sums` only what comes before the first rounding that a model asks for is in float64: the means.
    """

    def t(dtype: str) -> torch.dtype:
        return torch.float64 if exact else getattr(torch, dtype)

    wide = torch.float64 if sums and how.compute == "float32" else t(how.compute)
    h = x.to(wide)
    if kind == "layer_norm":
        h = h - h.mean(list(axes), keepdim=True)
    n = h / torch.sqrt((h * h).mean(list(axes), keepdim=True) + torch.tensor(np.float32(EPS)).to(wide))
    n = n.to(t(how.compute)) if not how.first else n
    if how.first:
        n = n.to(t(how.x)).to(t(how.result))
    n = n if w is None else n * w.to(n.dtype)
    n = n if b is None else n + b.to(n.dtype)
    return n.to(t(how.result))


def meaning(op: str, kind: str, how: Types, role: Roles, feeds: dict[str, Any], exact: bool = False,
            axes: Sequence[int] = (-1,), sums: bool = False) -> list[np.ndarray[Any, Any]]:  # fmt: skip
    """The results of a call in float64."""

    def tensor(label: str, dtype: str) -> Tensor | None:
        array = feeds.get(f"{label}_f32")
        return None if array is None else torch.from_numpy(array).to(torch.float64 if exact else getattr(torch, dtype))

    def norm(i: int, x: Tensor) -> Tensor:
        return _norm(kind, how, axes, x, tensor(f"w{i}", how.affine), tensor(f"b{i}", how.affine), exact,
                     sums)  # fmt: skip

    x, r = tensor("x", how.x), tensor("r", how.result if op.startswith("norm_add") else how.x)
    assert x is not None
    if op == "norm":
        found = [norm(0, x)]
    elif r is None:
        raise ValueError(op)
    elif op in SUMS:
        bias, whole = tensor("x_bias", how.x), op.endswith("_unrounded")
        x = x.to(torch.float64 if exact else torch.float32) if whole else x
        s = (x if bias is None else x + bias) + r
        found = [norm(0, s), s.to(r.dtype)]
    elif op == "qk_norm":
        found = [norm(0, x), norm(1, r)]
    else:
        s = r + norm(0, x)
        found = [s] if op == "norm_add" else [norm(1, s), s]
    return [v.to(torch.float64).numpy() for v in found]
