"""Hostile ONNX models, made by code: what each tries, and what has to come of it.

An attack is built in a folder `inside`, next to a folder `outside` with files that must be neither read nor changed.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from tests.cli_tools import EVIL, norm_model, wrap

SECRET = b"canary!!" * 32
"""Fits the weight of `norm_model`, which has 64 elements of four bytes."""
Build = Callable[[Path, Path], onnx.ModelProto | bytes]


@dataclass(frozen=True)
class Attack:
    """`refused`: whether it is bad input; the others are odd, but models, and may be rewritten."""

    name: str
    build: Build
    refused: bool = True


ATTACKS: dict[str, Attack] = {}


def attack(build: Build) -> Build:
    """Register an attack that has to be refused."""
    ATTACKS[build.__name__] = Attack(build.__name__, build)
    return build


def harmless(build: Build) -> Build:
    """Register what looks like an attack and is a model."""
    ATTACKS[build.__name__] = Attack(build.__name__, build, refused=False)
    return build


def outer(tensor: TensorProto, location: str, **more: object) -> TensorProto:
    """Have a tensor lie in a file."""
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in {"location": location, **more}.items():
        tensor.external_data.add(key=key, value=str(value))
    return tensor


def weight(location: str, **more: object) -> onnx.ModelProto:
    """A model whose weight lies in a file."""
    model = norm_model()
    outer(model.graph.initializer[1], location, **more)
    return model


# --- where a location leads ---------------------------------------------------------------------------------

PLACES = {
    "parent": "../outside/secret", "parent_in_the_middle": "sub/../../outside/secret",
    "dot_parent": "./../outside/secret", "many_parents": "../" * 40 + "etc/passwd",
    "backslash": "..\\outside\\secret", "drive": "C:\\secret", "share": "\\\\host\\share\\secret",
    "empty": "", "dot": ".", "two_dots": "..", "slashes": "//", "nul": "weights\0.bin", "url": "file:///etc/passwd",
    "home": "~/secret", "percent": "%2e%2e/outside/secret", "one_dot_leader": "․․/outside/secret",
    "long": "a" * 5000, "long_path": "a/" * 5000 + "b", "escape": EVIL,
    "environment": "$HOME/secret", "proc": "/proc/self/environ", "model_itself": "model.onnx",
}  # fmt: skip


def _place(name: str, location: str) -> None:
    def build(inside: Path, outside: Path) -> onnx.ModelProto:
        (inside / "sub").mkdir()
        (inside / "weights.bin").write_bytes(bytes(256))
        return weight(location)

    ATTACKS[f"location_{name}"] = Attack(f"location_{name}", build)


for _name, _location in PLACES.items():
    _place(_name, _location)


@attack
def absolute(inside: Path, outside: Path) -> onnx.ModelProto:
    return weight(str(outside / "secret"))


@attack
def link(inside: Path, outside: Path) -> onnx.ModelProto:
    (inside / "weights.bin").symlink_to(outside / "secret")
    return weight("weights.bin")


@attack
def relative_link(inside: Path, outside: Path) -> onnx.ModelProto:
    (inside / "weights.bin").symlink_to("../outside/secret")
    return weight("weights.bin")


@attack
def link_of_a_link(inside: Path, outside: Path) -> onnx.ModelProto:
    (inside / "one").symlink_to(outside / "secret")
    (inside / "weights.bin").symlink_to("one")
    return weight("weights.bin")


@attack
def link_in_a_parent(inside: Path, outside: Path) -> onnx.ModelProto:
    (inside / "sub").symlink_to(outside)
    return weight("sub/secret")


@attack
def dangling_link(inside: Path, outside: Path) -> onnx.ModelProto:
    (inside / "weights.bin").symlink_to(outside / "nothing")
    return weight("weights.bin")


@attack
def ring_of_links(inside: Path, outside: Path) -> onnx.ModelProto:
    (inside / "weights.bin").symlink_to("other")
    (inside / "other").symlink_to("weights.bin")
    return weight("weights.bin")


@attack
def link_to_a_device(inside: Path, outside: Path) -> onnx.ModelProto:
    (inside / "weights.bin").symlink_to("/dev/zero")
    return weight("weights.bin")


@attack
def link_to_the_process(inside: Path, outside: Path) -> onnx.ModelProto:
    (inside / "weights.bin").symlink_to("/proc/self/mem")
    return weight("weights.bin")


@attack
def hard_link(inside: Path, outside: Path) -> onnx.ModelProto:
    os.link(outside / "secret", inside / "weights.bin")
    return weight("weights.bin")


@attack
def fifo(inside: Path, outside: Path) -> onnx.ModelProto:
    os.mkfifo(inside / "weights.bin")
    return weight("weights.bin")


@attack
def unix_socket(inside: Path, outside: Path) -> onnx.ModelProto:
    here = os.getcwd()
    os.chdir(inside)  # the name of a socket may not be long
    try:
        with socket.socket(socket.AF_UNIX) as made:
            made.bind("weights.bin")
    finally:
        os.chdir(here)
    return weight("weights.bin")


@attack
def directory(inside: Path, outside: Path) -> onnx.ModelProto:
    (inside / "weights.bin").mkdir()
    return weight("weights.bin")


# --- which tensor it is -------------------------------------------------------------------------------------


@attack
def constant_node(inside: Path, outside: Path) -> onnx.ModelProto:
    model = norm_model()
    value = model.graph.initializer[1]
    model.graph.node.insert(0, helper.make_node("Constant", [], ["w"], value=outer(TensorProto.FromString(
        value.SerializeToString()), "../outside/secret")))  # fmt: skip
    del model.graph.initializer[1]
    return model


def _branch() -> onnx.GraphProto:
    tensor = outer(numpy_helper.from_array(np.ones(64, "f4"), "inner"), "../outside/secret")
    out = helper.make_tensor_value_info("t", TensorProto.FLOAT, [64])
    return helper.make_graph([helper.make_node("Identity", ["inner"], ["t"])], "branch", [], [out], [tensor])


@attack
def initializer_of_a_branch_in_a_function(inside: Path, outside: Path) -> onnx.ModelProto:
    """Which the model calls."""
    model = norm_model()
    choice = helper.make_node("If", ["p"], ["q"], then_branch=_branch(), else_branch=_branch())
    model.functions.append(helper.make_function("own", "F", ["p"], ["q"], [choice], [helper.make_opsetid("", 17)]))
    model.opset_import.append(helper.make_opsetid("own", 1))
    model.graph.input.append(helper.make_tensor_value_info("yes", TensorProto.BOOL, []))
    model.graph.node.append(helper.make_node("F", ["yes"], ["z"], domain="own"))
    model.graph.output.append(helper.make_tensor_value_info("z", TensorProto.FLOAT, [64]))
    return model


@attack
def initializer_of_a_branch(inside: Path, outside: Path) -> onnx.ModelProto:
    model = norm_model()
    model.graph.initializer.append(numpy_helper.from_array(np.array(True), "yes"))
    model.graph.node.append(helper.make_node("If", ["yes"], ["z"], then_branch=_branch(), else_branch=_branch()))
    return model


@attack
def constant_of_a_function(inside: Path, outside: Path) -> onnx.ModelProto:
    model = norm_model()
    tensor = outer(numpy_helper.from_array(np.ones(64, "f4"), "inner"), "../outside/secret")
    body = [helper.make_node("Constant", [], ["c"], value=tensor), helper.make_node("Add", ["a", "c"], ["b"])]
    model.functions.append(helper.make_function("acme", "F", ["a"], ["b"], body, [helper.make_opsetid("", 17)]))
    model.graph.node.append(helper.make_node("F", ["y"], ["z"], domain="acme"))
    return model


@attack
def sparse_tensor(inside: Path, outside: Path) -> onnx.ModelProto:
    model = norm_model()
    values = outer(numpy_helper.from_array(np.ones(64, "f4"), "sparse"), "../outside/secret")
    indices = numpy_helper.from_array(np.arange(64), "indices")
    model.graph.sparse_initializer.append(helper.make_sparse_tensor(values, indices, [64]))
    return model


@attack
def list_of_tensors(inside: Path, outside: Path) -> onnx.ModelProto:
    model = norm_model()
    tensor = outer(numpy_helper.from_array(np.ones(64, "f4"), "inner"), "../outside/secret")
    node = helper.make_node("Gadget", ["y"], ["z"], domain="acme")
    node.attribute.append(onnx.AttributeProto(name="list", type=onnx.AttributeProto.TENSORS, tensors=[tensor]))
    model.graph.node.append(node)
    return model


@attack
def training_graph(inside: Path, outside: Path) -> onnx.ModelProto:
    model = norm_model()
    model.training_info.add().algorithm.CopyFrom(_branch())
    return model


# --- what it says of its data -------------------------------------------------------------------------------

SAYINGS: dict[str, dict[str, object]] = {
    "negative_offset": {"offset": -8}, "huge_offset": {"offset": 2**63}, "huger_offset": {"offset": 2**200},
    "offset_of_words": {"offset": "many"}, "offset_of_digits": {"offset": "9" * 5000},
    "offset_in_hex": {"offset": "0x10"},
    "offset_at_the_end": {"offset": 256}, "negative_length": {"length": -256}, "huge_length": {"length": 2**63},
    "short_length": {"length": 255}, "length_of_zero": {"length": 0}, "length_with_exponent": {"length": "2.56e2"},
    "unknown_key": {"base_dir": "/"}, "key_of_python": {"__class__": "str"}, "key_of_a_method": {"read": "1"},
}  # fmt: skip


def _saying(name: str, more: dict[str, object]) -> None:
    def build(inside: Path, outside: Path) -> onnx.ModelProto:
        (inside / "weights.bin").write_bytes(np.ones(64, "f4").tobytes())
        return weight("weights.bin", **more)

    ATTACKS[name] = Attack(name, build)


for _name, _more in SAYINGS.items():
    _saying(_name, _more)


@attack
def two_locations(inside: Path, outside: Path) -> onnx.ModelProto:
    (inside / "weights.bin").write_bytes(bytes(256))
    model = weight("weights.bin")
    model.graph.initializer[1].external_data.add(key="location", value="../outside/secret")
    return model


@attack
def data_in_the_model_and_outside(inside: Path, outside: Path) -> onnx.ModelProto:
    (inside / "weights.bin").write_bytes(bytes(256))
    model = weight("weights.bin")
    model.graph.initializer[1].raw_data = bytes(256)
    return model


@harmless
def sparse_file_of_a_tebibyte(inside: Path, outside: Path) -> onnx.ModelProto:
    with (inside / "weights.bin").open("wb") as f:
        f.truncate(2**40)
    return weight("weights.bin", offset=2**40 - 256)


@attack
def data_in_two_fields(inside: Path, outside: Path) -> onnx.ModelProto:
    model = norm_model()
    model.graph.initializer[1].float_data.extend([1.0] * 64)
    return model


@attack
def sizes_whose_product_overflows(inside: Path, outside: Path) -> onnx.ModelProto:
    model = norm_model()
    model.graph.initializer[1].dims[:] = [2**32, 2**32, 64]
    return model


@attack
def outside_sizes_whose_product_overflows(inside: Path, outside: Path) -> onnx.ModelProto:
    (inside / "weights.bin").write_bytes(bytes(256))
    model = weight("weights.bin")
    model.graph.initializer[1].dims[:] = [2**62, 4, 64]
    return model


@attack
def negative_sizes(inside: Path, outside: Path) -> onnx.ModelProto:
    (inside / "weights.bin").write_bytes(bytes(256))
    model = weight("weights.bin")
    model.graph.initializer[1].dims[:] = [-8, -8]
    return model


@attack
def too_few_bytes(inside: Path, outside: Path) -> onnx.ModelProto:
    model = norm_model()
    model.graph.initializer[1].raw_data = bytes(8)
    return model


@attack
def unknown_type(inside: Path, outside: Path) -> onnx.ModelProto:
    model = norm_model()
    model.graph.initializer[1].data_type = 999
    return model


@attack
def strings_outside(inside: Path, outside: Path) -> onnx.ModelProto:
    (inside / "weights.bin").write_bytes(bytes(256))
    model = weight("weights.bin")
    model.graph.initializer[1].data_type = TensorProto.STRING
    return model


@attack
def key_that_is_not_utf8(inside: Path, outside: Path) -> bytes:
    (inside / "weights.bin").write_bytes(bytes(256))
    data: bytes = weight("weights.bin", offset=0).SerializeToString()
    return data.replace(b"offset", b"\xff\xfeset!")


@attack
def location_that_is_not_utf8(inside: Path, outside: Path) -> bytes:
    data: bytes = weight("weights.bin").SerializeToString()
    return data.replace(b"weights.bin", b"\xff\xfe/weight.")


@attack
def device_without_a_configuration(inside: Path, outside: Path) -> onnx.ModelProto:
    model = norm_model()
    model.ir_version = 11
    model.graph.node[0].device_configurations.add()
    return model


# --- graphs that are none -----------------------------------------------------------------------------------


@attack
def two_initializers_of_one_name(inside: Path, outside: Path) -> onnx.ModelProto:
    model = norm_model()
    model.graph.initializer.append(numpy_helper.from_array(np.zeros(64, "f4"), "w"))
    return model


@attack
def value_written_twice(inside: Path, outside: Path) -> onnx.ModelProto:
    model = norm_model()
    model.graph.node.insert(1, helper.make_node("Neg", ["x"], ["square"]))
    return model


@attack
def value_named_as_an_initializer(inside: Path, outside: Path) -> onnx.ModelProto:
    model = norm_model()
    model.graph.node.insert(0, helper.make_node("Identity", ["x"], ["w"]))
    return model


@attack
def two_inputs_of_one_name(inside: Path, outside: Path) -> onnx.ModelProto:
    model = norm_model()
    model.graph.input.append(model.graph.input[0])
    return model


@attack
def output_that_nothing_computes(inside: Path, outside: Path) -> onnx.ModelProto:
    model = norm_model()
    model.graph.output[0].name = "nothing"
    return model


@attack
def input_that_nothing_computes(inside: Path, outside: Path) -> onnx.ModelProto:
    model = norm_model()
    model.graph.node[-1].input[1] = "nothing"
    return model


@attack
def ring_of_nodes(inside: Path, outside: Path) -> onnx.ModelProto:
    return wrap([helper.make_node("Add", ["x", "b"], ["a"]), helper.make_node("Relu", ["a"], ["b"]),
                 helper.make_node("Mul", ["a", "b"], ["y"])], [], [2, 4])  # fmt: skip


@attack
def node_that_reads_itself(inside: Path, outside: Path) -> onnx.ModelProto:
    return wrap([helper.make_node("Add", ["x", "y"], ["y"])], [], [2, 4])


@attack
def cast_to_nothing(inside: Path, outside: Path) -> onnx.ModelProto:
    return wrap([onnx.NodeProto(op_type="Cast", input=["x"], output=["y"])], [], [2, 4])


@attack
def cast_to_no_type(inside: Path, outside: Path) -> onnx.ModelProto:
    return wrap([helper.make_node("Cast", ["x"], ["y"], to=-(2**31))], [], [2, 4])


@attack
def external_tensor_without_a_type(inside: Path, outside: Path) -> onnx.ModelProto:
    (inside / "weights.bin").write_bytes(bytes(64))
    tensor = TensorProto(name="w", dims=[8], data_location=TensorProto.EXTERNAL)
    tensor.external_data.add(key="location", value="weights.bin")
    return wrap([helper.make_node("Mul", ["x", "w"], ["y"])], [tensor], [2, 8])


@attack
def tensor_of_155_axes(inside: Path, outside: Path) -> onnx.ModelProto:
    tensor = TensorProto(name="w", dims=[1] * 155, data_type=TensorProto.FLOAT, float_data=[1.0])
    return wrap([helper.make_node("Mul", ["x", "w"], ["y"])], [tensor], [2, 4])


def _field(number: int, content: bytes) -> bytes:
    """A length-delimited field of the wire format."""
    size, out = len(content), bytearray([number << 3 | 2])
    while size >= 128:
        out.append(size & 127 | 128)
        size >>= 7
    return bytes(out) + bytes([size]) + content


@attack
def sub_graphs_10000_deep(inside: Path, outside: Path) -> bytes:
    graph = _field(1, _field(4, b"Relu"))
    for _ in range(10_000):
        graph = _field(1, _field(4, b"If") + _field(5, _field(1, b"then_branch") + _field(6, graph) + b"\xa0\x01\x05"))
    return _field(7, graph) + _field(8, b"\x10\x11")


@harmless
def sub_graphs_20_deep(inside: Path, outside: Path) -> onnx.ModelProto:
    model = norm_model()
    yes = numpy_helper.from_array(np.array(True), "yes")
    model.graph.initializer.append(yes)
    out = [helper.make_tensor_value_info("t", TensorProto.FLOAT, None)]
    graph = helper.make_graph([helper.make_node("Neg", ["y"], ["t"])], "g", [], out)
    for _ in range(20):
        node = helper.make_node("If", ["yes"], ["t"], then_branch=graph, else_branch=graph.__class__.FromString(
            helper.make_graph([helper.make_node("Abs", ["y"], ["t"])], "g", [], out).SerializeToString()))  # fmt: skip
        graph = helper.make_graph([node], "g", [], out)
    model.graph.node.append(helper.make_node("If", ["yes"], ["z"], then_branch=graph, else_branch=graph))
    return model


def _functions(bodies: dict[str, list[str]]) -> onnx.ModelProto:
    """Functions by the functions that they call, one after the other."""
    model = norm_model()
    for name, calls in bodies.items():
        body = [helper.make_node(f, [f"v{i}"], [f"v{i + 1}"], domain="acme" if f in bodies else "")
                for i, f in enumerate(calls)]  # fmt: skip
        imports = [helper.make_opsetid("", 17), helper.make_opsetid("acme", 1)]
        model.functions.append(helper.make_function("acme", name, ["v0"], [f"v{len(calls)}"], body, imports))
    model.graph.node.append(helper.make_node(next(iter(bodies)), ["y"], ["z"], domain="acme"))
    return model


@attack
def function_that_calls_itself(inside: Path, outside: Path) -> onnx.ModelProto:
    return _functions({"F": ["F"]})


@attack
def functions_that_call_each_other(inside: Path, outside: Path) -> onnx.ModelProto:
    return _functions({"F": ["G"], "G": ["Neg", "F"]})


@attack
def functions_that_double(inside: Path, outside: Path) -> onnx.ModelProto:
    """Forty functions, each of which calls the next one twice: a million million nodes."""
    return _functions({f"F{i}": [f"F{i + 1}"] * 2 for i in range(40)} | {"F40": ["Neg"]})


@attack
def two_functions_of_one_name(inside: Path, outside: Path) -> onnx.ModelProto:
    model = _functions({"F": ["Neg"]})
    model.functions.append(model.functions[0])
    return model


@attack
def repeated_graphs(inside: Path, outside: Path) -> bytes:
    """A message of a million empty nodes, in two million bytes."""
    return _field(7, b"\x0a\x00" * 1_000_000) + _field(8, b"\x10\x11")


@attack
def not_utf8(inside: Path, outside: Path) -> bytes:
    data: bytes = norm_model().SerializeToString()
    return data.replace(b"Mul_square", b"Mul\xff\xfequare")


# --- sizes that nobody can hold -----------------------------------------------------------------------------


def _sized(op: str, *arguments: np.ndarray[Any, Any]) -> onnx.ModelProto:
    model = norm_model()
    names = [f"argument{i}" for i in range(len(arguments))]
    model.graph.initializer.extend(map(numpy_helper.from_array, arguments, names))
    model.graph.node.append(helper.make_node(op, names, ["huge"]))
    model.graph.node.append(helper.make_node("Add", ["huge", "huge"], ["z"]))
    return model


@harmless
def constant_of_a_huge_shape(inside: Path, outside: Path) -> onnx.ModelProto:
    return _sized("ConstantOfShape", np.array([2**20, 2**20]))


@harmless
def constant_of_a_negative_shape(inside: Path, outside: Path) -> onnx.ModelProto:
    return _sized("ConstantOfShape", np.array([-1]))


@harmless
def huge_range(inside: Path, outside: Path) -> onnx.ModelProto:
    return _sized("Range", np.array(0), np.array(2**50), np.array(1))


@harmless
def endless_range(inside: Path, outside: Path) -> onnx.ModelProto:
    return _sized("Range", np.array(0), np.array(2**50), np.array(0))


@harmless
def huge_expand(inside: Path, outside: Path) -> onnx.ModelProto:
    return _sized("Expand", np.ones(1, "f4"), np.array([2**20, 2**20]))


@harmless
def huge_tile(inside: Path, outside: Path) -> onnx.ModelProto:
    return _sized("Tile", np.ones(1, "f4"), np.array([2**40]))


@harmless
def huge_one_hot(inside: Path, outside: Path) -> onnx.ModelProto:
    return _sized("OneHot", np.ones(1000, "i8"), np.array(2**40), np.zeros(2, "f4"))


@harmless
def huge_rows(inside: Path, outside: Path) -> onnx.ModelProto:
    model = norm_model()
    for value in (model.graph.input[0], model.graph.output[0]):
        value.type.tensor_type.shape.dim[0].dim_value = 2**40
    return model


@harmless
def huge_axis(inside: Path, outside: Path) -> onnx.ModelProto:
    model = norm_model()
    for value in (model.graph.input[0], model.graph.output[0]):
        value.type.tensor_type.shape.dim[2].dim_value = 2**40
    del model.graph.node[-1]
    model.graph.node[-1].output[0] = "y"
    return model


@harmless
def axis_of_a_billion(inside: Path, outside: Path) -> onnx.ModelProto:
    model = huge_axis(inside, outside)
    assert isinstance(model, onnx.ModelProto)
    for value in (model.graph.input[0], model.graph.output[0]):
        value.type.tensor_type.shape.dim[2].dim_value = 2**30
    return model


# --- names --------------------------------------------------------------------------------------------------


@harmless
def names_with_escapes(inside: Path, outside: Path) -> onnx.ModelProto:
    return norm_model(EVIL)


@harmless
def names_of_html(inside: Path, outside: Path) -> onnx.ModelProto:
    return norm_model("<script>alert(1)</script><img src=x onerror=alert(1)>\"'&")


@harmless
def names_of_paths(inside: Path, outside: Path) -> onnx.ModelProto:
    model = norm_model("../../outside/secret")
    model.graph.name = model.producer_name = model.domain = "../../outside/secret"
    return model


@harmless
def names_of_a_megabyte(inside: Path, outside: Path) -> onnx.ModelProto:
    return norm_model("long" * 2**18)
