"""Parts of an ONNX model as models of their own, for `normfuse.reduce`. Each raises where it has nothing to cut."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

import onnx
import onnx.inliner

from normfuse.errors import InputError
from normfuse.io.message import nodes_of


def count(model: onnx.ModelProto) -> int:
    """Nodes, those of sub-graphs and functions too."""
    return sum(1 for body in (model.graph, *model.functions) for _ in nodes_of(body))


def read_by(node: onnx.NodeProto) -> list[str]:
    """The values that a node reads, by its sub-graphs too."""
    names = [name for name in node.input if name]
    for attr in node.attribute:
        if attr.type == onnx.AttributeProto.GRAPH:
            own = {v.name for v in (*attr.g.input, *attr.g.initializer)} | {n for i in attr.g.node for n in i.output}
            inner = [n for i in attr.g.node for n in read_by(i)] + [o.name for o in attr.g.output]
            names += [n for n in inner if n not in own]
    return list(dict.fromkeys(names))


class Cutter:
    """Makes models of some of the nodes of a model."""

    def __init__(self, model: onnx.ModelProto) -> None:
        self.model = model
        self.infos: dict[str, onnx.ValueInfoProto] = {}
        try:
            inferred = onnx.shape_inference.infer_shapes(model, data_prop=True).graph
        except Exception:
            inferred = model.graph
        for graph in (model.graph, inferred):
            self.infos |= {v.name: v for v in (*graph.value_info, *graph.output, *graph.input)}

    def cut(self, keep: Sequence[int]) -> onnx.ModelProto:
        """The model of these nodes: what they read from others is an input, what none of them reads an output."""
        graph = self.model.graph
        nodes = [graph.node[i] for i in keep]
        made = {name: None for node in nodes for name in node.output if name}
        read = {name: None for node in nodes for name in read_by(node)}
        old = {o.name for o in graph.output}
        outputs = [name for name in made if name in old or name not in read]
        return _assembled(self.model, nodes, [n for n in read if n not in made], outputs, self.infos)


def _assembled(model: onnx.ModelProto, nodes: Iterable[onnx.NodeProto], reads: Iterable[str], outputs: Iterable[str],
               infos: dict[str, onnx.ValueInfoProto]) -> onnx.ModelProto:  # fmt: skip
    """A model of nodes with what they need of the old one; raises `InputError` where a type is not known."""
    nodes, graph = list(nodes), model.graph
    tensors = {t.name: t for t in graph.initializer}
    needed = list(dict.fromkeys([*reads, *(n for n in outputs if n in tensors)]))
    wanted = [n for n in needed if n not in tensors or n in {v.name for v in graph.input}]
    missing = [n for n in (*wanted, *outputs) if n not in infos or not infos[n].type.WhichOneof("value")]
    if missing:
        raise InputError(f"the type of {missing[0]} is not known")
    out = onnx.ModelProto()
    out.CopyFrom(model)
    del out.graph.node[:], out.graph.input[:], out.graph.output[:], out.graph.initializer[:], out.graph.value_info[:]
    out.graph.node.extend(nodes)
    out.graph.input.extend(infos[n] for n in wanted)
    out.graph.output.extend(infos[n] for n in outputs)
    out.graph.initializer.extend(tensors[n] for n in needed if n in tensors)
    given = {*wanted, *outputs}
    made = {name for node in nodes for name in node.output}
    out.graph.value_info.extend(v for v in graph.value_info if v.name in made and v.name not in given)
    called = _called(out)
    kept = [f for f in model.functions if (f.domain, f.name) in called]
    del out.functions[:]
    out.functions.extend(kept)
    return out


def _called(model: onnx.ModelProto) -> set[tuple[str, str]]:
    """Every operator that the graph and the functions use."""
    return {(node.domain, node.op_type) for body in (model.graph, *model.functions) for node in nodes_of(body)}


def with_outputs(model: onnx.ModelProto, outputs: list[str]) -> onnx.ModelProto:
    """The model with these outputs only, and the nodes that they depend on."""
    wanted, nodes = set(outputs), []
    for node in reversed(model.graph.node):
        if wanted.intersection(node.output):
            nodes.append(node)
            wanted.update(read_by(node))
    made = {name for node in nodes for name in node.output}
    reads = [v.name for v in (*model.graph.input, *model.graph.initializer) if v.name in wanted - made]
    infos = {v.name: v for v in (*model.graph.input, *model.graph.output)}
    return _assembled(model, reversed(nodes), reads, outputs, infos)


def inlined(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model without functions."""
    if not model.functions:
        raise InputError("there are no functions")
    return onnx.inliner.inline_local_functions(model)


def constants_held(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model with initializers in place of Constant nodes."""
    out = onnx.ModelProto()
    out.CopyFrom(model)
    nodes = []
    for node in model.graph.node:
        value = next((a.t for a in node.attribute if a.name == "value"), None)
        if node.op_type == "Constant" and value is not None:
            held = out.graph.initializer.add()
            held.CopyFrom(value)
            held.name = node.output[0]
        else:
            nodes.append(node)
    if len(nodes) == len(model.graph.node):
        raise InputError("there are no constants")
    del out.graph.node[:]
    out.graph.node.extend(nodes)
    return out


def opened(k: int) -> Callable[[onnx.ModelProto], onnx.ModelProto]:
    """Put the k-th branch of the model's Ifs in the place of its If."""

    def change(model: onnx.ModelProto) -> onnx.ModelProto:
        at, branch = next(b for i, b in enumerate(_branches(model)) if i == k)
        out = onnx.ModelProto()
        out.CopyFrom(model)
        before, after = list(model.graph.node[:at]), list(model.graph.node[at + 1 :])
        renamed = [onnx.helper.make_node("Identity", [inner.name], [name])
                   for inner, name in zip(branch.output, model.graph.node[at].output, strict=True)]  # fmt: skip
        del out.graph.node[:]
        out.graph.node.extend([*before, *branch.node, *renamed, *after])
        out.graph.initializer.extend(branch.initializer)
        return out

    return change


def _branches(model: onnx.ModelProto) -> Iterator[tuple[int, onnx.GraphProto]]:
    for i, node in enumerate(model.graph.node):
        if node.op_type == "If":
            for attr in node.attribute:
                yield i, attr.g
