"""The fused operators in ONNX: model-local functions of the same names in domain "normfuse".

    normfuse.ops.to_onnx.export(program, opset_version=23)

The body of a function is the meaning of the operator in standard operators of opset 18 or later, so every runtime runs
the model. A body knows the types that it computes in, so one operator can have several functions, `rms_norm`,
`rms_norm_2` and so on: ONNX Runtime before 1.27 and the reference evaluator do not tell overloads apart. The doc string
of each says what it is for; eps and offset are attributes of the call. Floats in ONNX are float32, and so are these
where x is float64. The backward operators have no translation.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import onnx_ir as ir
import torch

from normfuse.ops import meaning
from normfuse.ops.checks import KINDS

DOMAIN = "normfuse"
_TYPES = {ir.DataType.FLOAT16: torch.float16, ir.DataType.BFLOAT16: torch.bfloat16, ir.DataType.FLOAT: torch.float32,
          ir.DataType.DOUBLE: torch.float64}  # fmt: skip
Functions = dict[ir.OperatorIdentifier, ir.Function]
_ONNX = {torch_type: onnx_type for onnx_type, torch_type in _TYPES.items()}


class Typed(NamedTuple):
    """A value in a body, and its type."""

    value: ir.Value
    dtype: torch.dtype


class Body:
    """The nodes of a function; each method mirrors a line of `normfuse.ops.meaning`."""

    def __init__(self) -> None:
        self.nodes: list[ir.Node] = []

    def op(self, name: str, *args: Typed, dtype: torch.dtype | None = None, **attributes: Any) -> Typed:
        """A node; its result has the type of the first argument, or `dtype`."""
        attrs = [a if isinstance(a, ir.Attr) else ir.convenience.convert_attribute(k, a) for k, a in attributes.items()]
        node = ir.Node("", name, [a.value for a in args], attrs, name=f"n{len(self.nodes)}")
        node.outputs[0].name = f"v{len(self.nodes)}"
        self.nodes.append(node)
        return Typed(node.outputs[0], dtype or args[0].dtype)

    def cast(self, v: Typed, dtype: torch.dtype) -> Typed:
        return v if v.dtype == dtype else self.op("Cast", v, dtype=dtype, to=_ONNX[dtype])

    def attribute(self, name: str, dtype: torch.dtype) -> Typed:
        """A float attribute of the call."""
        given = ir.RefAttr("value_float", name, ir.AttributeType.FLOAT)
        return self.cast(self.op("Constant", dtype=torch.float32, value_float=given), dtype)

    def mean(self, v: Typed) -> Typed:
        axis = self.op("Constant", dtype=torch.int64, value_ints=[-1])
        return self.op("ReduceMean", v, axis, keepdims=1)

    def add(self, a: Typed, b: Typed) -> Typed:
        dtype = torch.promote_types(a.dtype, b.dtype)
        return self.op("Add", self.cast(a, dtype), self.cast(b, dtype))

    def norm(self, how: dict[str, Any], x: Typed, weight: Any, bias: Any, narrow: torch.dtype | None = None) -> Typed:
        narrow, c = narrow or x.dtype, meaning.compute_type(x.dtype)
        h = self.cast(x, c)
        if how["kind"] == "layer_norm":
            h = self.op("Sub", h, self.mean(h))
        variance = self.op("Add", self.mean(self.op("Mul", h, h)), self.attribute("eps", c))
        n = self.op("Div", h, self.op("Sqrt", variance))
        applied = meaning.affine_type(narrow, weight, bias, how["cast"])
        n = self.cast(self.cast(n, narrow) if how["cast"] == "first" else n, applied)
        if weight is not None:
            w = self.cast(weight, applied)
            n = self.op("Mul", n, self.op("Add", w, self.attribute("offset", applied)) if how["offset"] else w)
        if bias is not None:
            n = self.op("Add", n, self.cast(bias, applied))
        return self.cast(n, how["dtype"] or (applied if how["cast"] == "first" else narrow))

    def add_norm(self, how: dict[str, Any], x: Typed, residual: Typed, weight: Any, bias: Any) -> list[Typed]:
        s = self.add(x, residual)
        if how["round_sum"]:
            return [self.norm(how, s, weight, bias), s]
        c = meaning.compute_type(s.dtype)
        return [self.norm(how, self.add(self.cast(x, c), self.cast(residual, c)), weight, bias, s.dtype), s]

    def results(self, name: str, how: dict[str, Any], x: Typed, *rest: Any) -> list[Typed]:
        """What an operator returns, given its tensors in the order of its schema."""
        if name in KINDS:
            return [self.norm(how, x, *rest)]
        if name.startswith("add_"):
            return self.add_norm(how, x, *rest)
        second, weight1, bias1, *last = rest
        if name == "qk_norm":
            return [self.norm(how, x, weight1, bias1), self.norm(how, second, *last)]
        s = self.add(second, self.norm(how, x, weight1, bias1))
        return [self.norm(how, s, *last), s] if last else [s]


def _function(name: str, what: str, tensors: dict[str, Any], how: dict[str, Any], known: Functions) -> ir.Function:
    body = Body()
    typed: list[Any] = [v if v is None else Typed(ir.Value(name=k), _TYPES[v.dtype]) for k, v in tensors.items()]
    inputs, outputs = [t.value for t in typed if t], [t.value for t in body.results(name, how, *typed)]
    attributes = [ir.Attr(k, ir.AttributeType.FLOAT, None) for k in ("eps", "offset")]
    called, number = name, 1
    while (other := known.get((DOMAIN, called, ""))) is not None and other.doc_string != what:
        number += 1
        called = f"{name}_{number}"
    graph = ir.Graph(inputs, outputs, nodes=body.nodes, name=called, doc_string=what)
    return known.setdefault((DOMAIN, called, ""), ir.Function(DOMAIN, called, graph=graph, attributes=attributes))


def _translate(op: Any, functions: Functions, inside: bool, *args: Any, **kwargs: Any) -> Any:
    """A call of a fused operator: a node, and the function of its types in `functions`, and inside of the model."""
    from onnxscript import evaluator

    recorder: Any = evaluator.default()
    name, schema = op._schema.name.removeprefix("normfuse::"), op._schema.arguments
    given = {a.name: a.default_value for a in schema if a.has_default_value()}
    given |= dict(zip((a.name for a in schema), args, strict=False)) | kwargs
    tensors = {a.name: given[a.name] for a in schema if "Tensor" in str(a.type)}
    how = {"kind": name.removeprefix("add_")} | {k: v for k, v in given.items() if k not in tensors}
    how["dtype"] = None if how["dtype"] in (None, -1) else _TYPES[ir.DataType(how["dtype"])]
    types = [v.dtype.name if v is not None else "none" for v in tensors.values()]
    rest = [how["kind"], how["cast"], *(["offset"] if how["offset"] else []),
            *([] if how.get("round_sum", True) else ["unrounded"]),
            *(["to", str(how["dtype"]).removeprefix("torch.")] if how["dtype"] else [])]  # fmt: skip
    function = _function(name, " ".join([*types, *rest]).lower(), tensors, how, functions)
    if inside:
        recorder.functions[function.identifier()] = function
    floats = ir.convenience.convert_attributes({"eps": float(how["eps"]), "offset": float(how["offset"])})
    node = ir.Node(DOMAIN, function.name, [v for v in tensors.values() if v is not None], floats,
                   num_outputs=len(op._schema.returns))  # fmt: skip
    recorder.nodes.append(node)
    return node.outputs[0] if len(node.outputs) == 1 else node.outputs


def translations(functions: Functions | None = None) -> dict[Any, Callable[..., Any]]:
    """The `custom_translation_table` of `torch.onnx.export`, for the forward operators.

    The bodies go into `functions`, or into the model, where torch's exporter inlines every call of them.
    """
    import normfuse.ops.register

    known: Functions = {} if functions is None else functions

    def translation(op: Any) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            return _translate(op, known, functions is None, *args, **kwargs)

        return call

    return {op: translation(op) for op in normfuse.ops.register.DECOMPOSITIONS if "backward" not in op._schema.name}


def export(program: Any, *args: Any, **options: Any) -> Any:
    """``torch.onnx.export(program, ...)`` with the fused operators as calls of model-local functions."""
    functions: Functions = {}
    table = translations(functions) | options.pop("custom_translation_table", {})
    exported: Any = torch.onnx.export(program, *args, dynamo=True, custom_translation_table=table, **options)
    imports = exported.model.opset_imports
    for identifier, function in functions.items():
        function.opset_imports[""] = imports[""] = imports.get("", options.get("opset_version") or 18)
        exported.model.functions[identifier] = function
    if functions:
        imports[DOMAIN] = 1
    return exported
