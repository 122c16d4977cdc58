"""One graph of a .pt2 archive: from its JSON to an FX graph that is read and never run.

The names, arguments and metas are those of the loaded program, in the order of the file. An operator is looked up by
its exact name among those registered in this process, a symbolic size is its own text, a tensor is a `TensorInfo`.
"""

from __future__ import annotations

import keyword
import math
import operator
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NoReturn

import torch
import torch._higher_order_ops  # registers the operators that call graphs
import torch.export
from torch import fx, nn
from torch._ops import HigherOrderOperator, OpOverload

import normfuse.ops  # noqa: F401 - registers the operators of a program that was rewritten
from normfuse.frontends import fx_effects
from normfuse.frontends.fx_meta import Symbol, TensorInfo

NESTED, NAME, TEXT = 16, 1000, 2**16
"""How deep graphs and arguments may lie in one another, and how long a name or an expression may be."""
LARGEST = 2**63 - 1

DTYPES: dict[int, torch.dtype] = {
    1: torch.uint8, 2: torch.int8, 3: torch.int16, 4: torch.int32, 5: torch.int64, 6: torch.float16, 7: torch.float32,
    8: torch.float64, 9: torch.complex32, 10: torch.complex64, 11: torch.complex128, 12: torch.bool,
    13: torch.bfloat16, 28: torch.uint16, 29: torch.float8_e4m3fn, 30: torch.float8_e5m2, 31: torch.float8_e4m3fnuz,
    32: torch.float8_e5m2fnuz, 33: torch.float8_e8m0fnu, 34: torch.uint32, 35: torch.uint64,
}  # fmt: skip
LAYOUTS: dict[int, torch.layout] = {
    1: torch.sparse_coo, 2: torch.sparse_csr, 3: torch.sparse_csc, 4: torch.sparse_bsr, 5: torch.sparse_bsc,
    6: torch._mkldnn, 7: torch.strided,  # type: ignore[attr-defined]
}  # fmt: skip
MEMORY_FORMATS: dict[int, torch.memory_format] = {
    1: torch.contiguous_format, 2: torch.channels_last, 3: torch.channels_last_3d, 4: torch.preserve_format,
}  # fmt: skip

_OPERATOR = re.compile(r"torch\.ops\.(\w+)\.(\w+)\.(\w+)", re.ASCII)
_HIGHER = "torch.ops.higher_order."
_SPECIAL = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}
_POSITIONAL = 1


class Unknown:
    """A function that is not registered in this process: opaque, and never called."""

    def __init__(self, name: str) -> None:
        self.__name__ = self.name = name

    def __str__(self) -> str:
        return self.name

    def __call__(self, *_: object, **__: object) -> NoReturn:
        raise RuntimeError(f"{self.name} is not known here")


class Described(fx.GraphModule):
    """A graph from a file: no code is made for it, since names in the file would stand in that code."""

    def __new__(cls, graph: fx.Graph, graphs: Mapping[str, Described]) -> Described:
        return object.__new__(cls)

    def __init__(self, graph: fx.Graph, graphs: Mapping[str, Described]) -> None:
        nn.Module.__init__(self)
        self._graph = graph
        graph.owning_module = self
        for name, inner in graphs.items():
            self.add_module(name, inner)

    def recompile(self) -> NoReturn:
        raise RuntimeError("a graph from a file is not run")


class Malformed(Exception):
    """The JSON is not a program of torch.export; the message says where."""


# -- JSON --------------------------------------------------------------------------------------------------------------


def field(data: Any, key: str, kind: type[Any]) -> Any:
    """A required field of an object, of a JSON type."""
    found = data.get(key) if isinstance(data, dict) else None
    if not isinstance(found, kind) or (kind is int and isinstance(found, bool)):
        raise Malformed(f"{key!r} is missing, or no {kind.__name__}")
    if kind is str and len(found) > (TEXT if key in ("expr_str", "as_string") else NAME):
        raise Malformed(f"{key!r} is longer than any that torch.export writes")
    return found


def one(data: Any) -> tuple[str, Any]:
    """The kind and the value of a union: an object with one field."""
    if not isinstance(data, dict) or len(data) != 1:
        raise Malformed("an object with one field was expected")
    return next(iter(data.items()))


def coded(table: Mapping[int, Any], code: Any, what: str) -> Any:
    """What a number stands for."""
    if type(code) is not int or code not in table:
        raise Malformed(f"no {what} has number {str(code)[:40]}")
    return table[code]


def tensor_info(data: Any) -> TensorInfo:
    """A tensor's type, sizes and device; its strides do not matter to anything that is only read."""
    shape = tuple(size(d) for d in field(data, "sizes", list))
    if math.prod(d for d in shape if isinstance(d, int)) > LARGEST:
        raise Malformed("a tensor has more elements than 63 bits count")
    device = field(data, "device", dict)
    index = device.get("index")
    place = field(device, "type", str) + (f":{index}" if type(index) is int else "")
    return TensorInfo(shape, coded(DTYPES, data.get("dtype"), "type"), place, data.get("requires_grad") is True,
                      coded(LAYOUTS, data.get("layout"), "layout"))  # fmt: skip


def size(data: Any) -> int | Symbol:
    """A size: a number, or the text of an expression."""
    kind, value = one(data)
    if kind == "as_expr":
        return Symbol(field(value, "expr_str", str))
    if kind != "as_int" or type(value) is not int or not 0 <= value <= LARGEST:
        raise Malformed(f"{str(value)[:40]} is no size")
    return value


def scalar(data: Any) -> Any:
    """A size, float or flag that a node gives: its value if it is known, else its expression."""
    kind, value = one(data)
    if kind == "as_expr":
        return Symbol(field(value, "expr_str", str))
    return real(value) if kind == "as_float" else integer(value) if kind == "as_int" else value is True


def integer(value: Any) -> int:
    if type(value) is not int or abs(value) > LARGEST:
        raise Malformed(f"{str(value)[:40]} is no integer of 63 bits")
    return value


def real(value: Any) -> float:
    if isinstance(value, str) and value in _SPECIAL:
        return _SPECIAL[value]
    if isinstance(value, float):
        return value
    return float(integer(value))


# -- operators ---------------------------------------------------------------------------------------------------------


def function(target: str) -> Callable[..., Any]:
    """What a node calls, by its exact name among what is registered already; anything else is `Unknown`."""
    found = _OPERATOR.fullmatch(target)
    if found is not None:
        space, name, overload = found.groups()
        known = {s.overload_name or "default" for s in torch._C._jit_get_schemas_for_operator(f"{space}::{name}")}
        made = getattr(getattr(getattr(torch.ops, space), name), overload) if overload in known else None
        return made if isinstance(made, OpOverload) else Unknown(target)
    if target.startswith(_HIGHER):
        higher: Mapping[str, Callable[..., Any]] = torch._ops._higher_order_ops
        return higher.get(target.removeprefix(_HIGHER)) or Unknown(target)
    plain = _plain().get(target)
    return Unknown(target) if plain is None or plain is operator.getitem else plain  # getitem is never written


def _plain() -> dict[str, Callable[..., Any]]:
    """torch's and Python's functions by the names that torch.export writes."""
    if not _PLAIN:
        for found in fx_effects.functions():
            _PLAIN.setdefault(f"{getattr(found, '__module__', '')}.{getattr(found, '__name__', '')}", found)
    return _PLAIN


_PLAIN: dict[str, Callable[..., Any]] = {}


# -- graphs ------------------------------------------------------------------------------------------------------------


class Reader:
    """One graph of the file being read; those inside it have readers of their own."""

    def __init__(self, specs: list[tuple[str, Any]], depth: int = 0) -> None:
        if depth > NESTED:
            raise Malformed(f"graphs lie in one another more than {NESTED} deep")
        self.specs, self.depth = specs, depth
        self.graph = fx.Graph()
        self.nodes: dict[str, fx.Node] = {}
        self.metas: dict[str, Any] = {}
        self.graphs: dict[str, Described] = {}
        self.paths: dict[str, str] = {}
        self.functions: dict[str, Callable[..., Any]] = {}

    def module(self, data: dict[str, Any]) -> Described:
        """The whole graph."""
        self.metas = {k: tensor_info(v) for k, v in field(data, "tensor_values", dict).items()}
        for kind in ("sym_int_values", "sym_float_values", "sym_bool_values"):
            found = {k: scalar(v) for k, v in field({kind: {}} | data, kind, dict).items()}
            # a flag is plain text: no arithmetic is done with it
            self.metas |= {k: str(v) if kind[4] == "b" and isinstance(v, Symbol) else v for k, v in found.items()}
        objects = field({"custom_obj_values": {}} | data, "custom_obj_values", dict)
        self.metas |= {k: field(v, "class_fqn", str) for k, v in objects.items()}
        for i, item in enumerate(field(data, "inputs", list)):
            self._input(i, *one(item))
        for item in field(data, "nodes", list):
            self._node(item)
        outputs = tuple(self.argument(item) for item in field(data, "outputs", list))
        self.graph.output(outputs[0] if data.get("is_single_tensor_return") is True and outputs else outputs)
        return Described(self.graph, self.graphs)

    def _input(self, i: int, kind: str, value: Any) -> None:
        if kind in ("as_tensor", "as_custom_obj"):
            name = field(value, "name", str)
            self._name(self.graph.placeholder("x"), name)
        elif kind == "as_sym_int":
            self._name(self.graph.placeholder("x"), field(value, "as_name", str))
        else:
            given = self.specs[i][1] if i < len(self.specs) and isinstance(self.specs[i][1], dict) else {}
            name = given.get("name")
            node = self.graph.placeholder(name if isinstance(name, str) and len(name) <= NAME else f"arg{i}")
            node.meta["val"] = self._value(kind, value)

    def _name(self, node: fx.Node, name: str) -> None:
        """Let a node be what later arguments call by this name."""
        if name in self.nodes:
            raise Malformed(f"two values are named {name[:99]!r}")
        if name not in self.metas:
            raise Malformed(f"nothing is said of the value {name[:99]!r}")
        node.name = name
        self.nodes[name] = node
        node.meta["val"] = self.metas[name]

    def _find(self, data: Any, key: str = "name") -> fx.Node:
        name = field(data, key, str)
        if name not in self.nodes:
            raise Malformed(f"the value {name[:99]!r} is read before anything computes it")
        return self.nodes[name]

    # -- nodes ----------------------------------------------------------------------------------------------------

    def _node(self, data: Any) -> None:
        target = field(data, "target", str)
        called = self.functions.get(target)
        if called is None:
            called = self.functions[target] = function(target)
        args, kwargs = self._arguments(called, field(data, "inputs", list))
        outputs = [one(o) for o in field(data, "outputs", list)]
        name = data.get("name")
        if not isinstance(name, str) or not name or len(name) > NAME:
            name = None
        if name is None and len(outputs) == 1 and isinstance(outputs[0][1], dict):  # as older files have it
            inner = outputs[0][1]
            name = next((v for v in (inner.get("name"), inner.get("as_name")) if isinstance(v, str) and v), None)
        node = self.graph.create_node("call_function", called, args, kwargs, name)
        stack = _module_stack(data.get("metadata"))
        if stack:
            node.meta["nn_module_stack"] = stack
        self._outputs(node, outputs, data.get("is_hop_single_tensor_return") is False and target.startswith(_HIGHER))

    def _outputs(self, node: fx.Node, outputs: list[tuple[str, Any]], packed: bool) -> None:
        if len(outputs) == 1:
            kind, value = outputs[0]
            if kind == "as_none":
                node.meta["val"] = None
                return
            if kind == "as_tensor" and not packed:
                return self._name(node, field(value, "name", str))
            if kind in _SYMBOLS and not packed:
                return self._name(node, field(value, "as_name", str))
            if kind == "as_tensors":
                outputs = [("as_tensor", item) for item in listed(value)]
        if outputs:
            node.meta["val"] = tuple(self._items(node, outputs))

    def _items(self, node: fx.Node, outputs: list[tuple[str, Any]]) -> Iterator[Any]:
        """A node for each element of what another gives."""
        for i, (kind, value) in enumerate(outputs):
            item = self.graph.create_node("call_function", operator.getitem, (node, i), {}, "getitem")
            if "nn_module_stack" in node.meta:
                item.meta["nn_module_stack"] = node.meta["nn_module_stack"]
            if kind == "as_none":
                item.meta["val"] = None
            elif kind == "as_tensors":
                item.meta["val"] = list(self._items(item, [("as_tensor", v) for v in listed(value)]))
            else:
                self._name(item, field(value, "name" if kind == "as_tensor" else "as_name", str))
            yield item.meta["val"]

    def _arguments(self, called: Callable[..., Any], inputs: list[Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """By position and by name, as the file or else the operator's schema says."""
        given: dict[str, tuple[Any, Any]] = {}
        args: list[Any] = []
        kwargs: dict[str, Any] = {}
        schema = called._schema.arguments if isinstance(called, OpOverload) else None
        plain = not isinstance(called, (OpOverload, HigherOrderOperator, Unknown))
        for item in inputs:
            name, value = field(item, "name", str), self.argument(field(item, "arg", dict))
            if schema is not None:
                given[name] = (value, item.get("kind"))
            elif item.get("kind") == _POSITIONAL or not name or plain:
                args.append(value)
            else:
                kwargs[name] = value
        gap = False  # behind an argument that is left out, none can be given by its position
        for argument in schema or ():
            if argument.name not in given:
                if not argument.has_default_value():
                    raise Malformed(f"{called} lacks its argument {argument.name!r}")
                gap = True
                continue
            value, kind = given.pop(argument.name)
            required = not argument.has_default_value() and not argument.kwarg_only
            if not gap and (kind == _POSITIONAL or keyword.iskeyword(argument.name) or (kind is None and required)):
                args.append(value)
            else:
                kwargs[argument.name] = value
        if given:
            raise Malformed(f"{called} has no argument {next(iter(given))[:99]!r}")
        return tuple(args), kwargs

    # -- arguments ------------------------------------------------------------------------------------------------

    def argument(self, data: Any, depth: int = 0) -> Any:
        """A node, a number, a list of them, a type, a graph and so on."""
        return self._value(*one(data), depth)

    def _value(self, kind: str, value: Any, depth: int = 0) -> Any:
        if depth > NESTED:
            raise Malformed(f"arguments lie in one another more than {NESTED} deep")
        if kind == "as_none":
            return None
        if kind == "as_tensor":
            return self._find(value)
        if kind in _SYMBOLS:
            found, known = one(value)
            return self._find(value, "as_name") if found == "as_name" else scalar({found: known})
        if kind == "as_graph":
            return self._graph(value)
        if kind == "as_device":
            return str(field(value, "type", str))
        if kind == "as_string":
            return field({kind: value}, kind, str)
        if kind == "as_complex":
            return complex(*(real(field(value, part, object)) for part in ("real", "imag")))
        if kind == "as_operator":
            return function(field({kind: value}, kind, str))
        if kind == "as_custom_obj":
            return self.nodes.get(field(value, "name", str), field(value, "name", str))
        if kind == "as_string_to_argument":
            return {str(k): self.argument(v, depth + 1) for k, v in field({kind: value}, kind, dict).items()}
        if kind == "as_optional_tensor":
            return self.argument(value, depth + 1)
        if kind in _LISTS:
            return [self._value(_LISTS[kind], v, depth + 1) if _LISTS[kind] else self.argument(v, depth + 1)
                    for v in listed(value)]  # fmt: skip
        if kind in _ATOMS:
            return _ATOMS[kind](value)
        raise Malformed(f"an argument of kind {kind[:40]!r} is not known")

    def _graph(self, value: Any) -> fx.Node:
        name = field(value, "name", str)
        path = self.paths.setdefault(name, f"graph_{len(self.paths)}")
        self.graphs[path] = Reader(self.specs, self.depth + 1).module(field(value, "graph", dict))
        node = self.graph.create_node("get_attr", path)
        node.name = name
        return node


_SYMBOLS = ("as_sym_int", "as_sym_float", "as_sym_bool")
_LISTS = {
    "as_tensors": "as_tensor", "as_ints": "as_int", "as_floats": "as_float", "as_bools": "as_bool",
    "as_strings": "as_string", "as_sym_ints": "as_sym_int", "as_sym_floats": "as_sym_float",
    "as_sym_bools": "as_sym_bool", "as_nested_tensors": "as_tensors", "as_int_lists": "as_ints",
    "as_float_lists": "as_floats", "as_optional_tensors": "",
}  # fmt: skip
"""The kinds of lists -> the kind of their elements; "" where each says its own."""
_ATOMS: dict[str, Callable[[Any], Any]] = {
    "as_int": integer,
    "as_float": real,
    "as_bool": lambda v: v is True,
    "as_scalar_type": lambda v: coded(DTYPES, v, "type"),
    "as_memory_format": lambda v: coded(MEMORY_FORMATS, v, "memory format"),
    "as_layout": lambda v: coded(LAYOUTS, v, "layout"),
}


def listed(value: Any) -> list[Any]:
    """A list, or `Malformed`."""
    if not isinstance(value, list):
        raise Malformed("a list was expected")
    return value


def _module_stack(metadata: Any) -> dict[str, tuple[str, str]]:
    """The modules that a node stands in: "key,path,class" with semicolons; commas in brackets do not count."""
    text = metadata.get("nn_module_stack") if isinstance(metadata, dict) else None
    out: dict[str, tuple[str, str]] = {}
    for entry in text.split(";") if isinstance(text, str) and len(text) <= TEXT else ():
        parts = entry.split(",")
        if len(parts) > 3:
            parts, level = [""], 0
            for c in entry:
                level += (c in "[(") - (c in ")]")
                if c == "," and level == 0:
                    parts.append("")
                else:
                    parts[-1] += c
        if len(parts) == 3:
            out[parts[0]] = (parts[1][:NAME], parts[2])
    return out
