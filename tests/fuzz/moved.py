"""A model as the optimisers of others leave it: steps in another layout, transposes that cancel, nodes twice."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import onnx
from onnx import ModelProto, NodeProto, helper, numpy_helper

ELEMENTWISE = frozenset("Add Sub Mul Div Pow Neg Abs Sqrt Reciprocal Max Min Relu Tanh Sigmoid Cast Identity".split())
TWICE, TURNED, CANCELLED = 0.15, 0.35, 0.9


def move(model: ModelProto, rng: random.Random) -> ModelProto:
    """The same function; what is kept, and where, follows from the numbers drawn."""
    out = ModelProto()
    out.CopyFrom(model)
    shapes = _shapes(model)
    nodes: list[NodeProto] = []
    turned: dict[tuple[str, tuple[int, ...]], str] = {}
    first: dict[str, str] = {}
    count = 0

    def fresh() -> str:
        nonlocal count
        count += 1
        return f"moved{count}"

    def add(op: str, inputs: list[str], name: str = "", **attrs: Any) -> str:
        nodes.append(helper.make_node(op, inputs, [name or fresh()], **attrs))
        return str(nodes[-1].output[0])

    perms = {rank: _perm(rank, rng) for rank in range(2, 6)}
    for node in model.graph.node:
        node_ = NodeProto()
        node_.CopyFrom(node)
        for i, name in enumerate(node_.input):  # another reader of an operator that is there already
            maker = first.get(name)
            if maker is not None and rng.random() < TWICE:
                copy = NodeProto()
                copy.CopyFrom(next(n for n in nodes if maker in n.output))
                copy.name, copy.output[0] = "", fresh()
                nodes.append(copy)
                node_.input[i] = copy.output[0]
        shape = shapes.get(node.output[0]) if node.output else None
        perm = perms.get(len(shape or ()))
        operands = [shapes.get(name) for name in node.input]
        plain = node.op_type in ELEMENTWISE and node.domain == "" and perm is not None
        if plain and shape and all(s is not None and (s == shape or set(s) <= {1}) for s in operands) and (
                any(s == shape for s in operands) and rng.random() < TURNED):
            assert perm is not None
            inputs = []
            for name, s in zip(node_.input, operands, strict=True):
                if s != shape:
                    inputs.append(name)
                elif (name, perm) in turned and rng.random() < CANCELLED:
                    inputs.append(turned[name, perm])
                else:
                    inputs.append(add("Transpose", [name], perm=perm))
                    turned.setdefault((name, perm), inputs[-1])
            result = add(node.op_type, inputs, **{a.name: helper.get_attribute_value(a) for a in node.attribute})
            turned[node.output[0], perm] = result
            add("Transpose", [result], node.output[0], perm=[int(i) for i in np.argsort(perm)])
            continue
        nodes.append(node_)
        if node.op_type in ELEMENTWISE and len(node.output) == 1 and node.domain == "":
            first[node.output[0]] = node.output[0]
    del out.graph.node[:]
    out.graph.node.extend(_needed(nodes, {v.name for v in model.graph.output}))
    return out


def _perm(rank: int, rng: random.Random) -> tuple[int, ...]:
    found = list(range(rank))
    rng.shuffle(found)
    return tuple(found)


def _needed(nodes: list[NodeProto], outputs: set[str]) -> list[NodeProto]:
    """Without transposes that nobody reads."""
    read, kept = set(outputs), []
    for node in reversed(nodes):
        if node.op_type != "Transpose" or read.intersection(node.output):
            kept.append(node)
            read.update(_reads(node))
    return kept[::-1]


def _reads(node: NodeProto) -> list[str]:
    inner = [name for a in node.attribute if a.type == onnx.AttributeProto.GRAPH
             for n in a.g.node for name in _reads(n)]  # fmt: skip
    bodies = [o.name for a in node.attribute if a.type == onnx.AttributeProto.GRAPH for o in a.g.output]
    return [*node.input, *inner, *bodies]


def _shapes(model: ModelProto) -> dict[str, tuple[int, ...]]:
    graph = onnx.shape_inference.infer_shapes(model, data_prop=True).graph
    found = {t.name: tuple(t.dims) for t in graph.initializer}
    for info in (*graph.input, *graph.value_info, *graph.output):
        dims = info.type.tensor_type.shape.dim
        if info.type.tensor_type.HasField("shape") and all(d.HasField("dim_value") for d in dims):
            found[info.name] = tuple(d.dim_value for d in dims)
    for node in graph.node:
        if node.op_type == "Constant":
            value = next((a.t for a in node.attribute if a.name == "value"), None)
            if value is not None:
                found[node.output[0]] = tuple(numpy_helper.to_array(value).shape)
    return found
