"""Norms of ONNX whose statistics, and what is made of them, stand in several layouts, as the transpose optimisers of
tf2onnx and ONNX Runtime leave them."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import numpy_helper

import normfuse
from normfuse.frontends.onnx import lower
from normfuse.frontends.onnx_emit import Emitter
from normfuse.frontends.onnx_fused import FusedEmitter
from normfuse.io.files import from_proto
from normfuse.sessions import session

SIZES = {"B": 2, "C": 16, "H": 3, "W": 5}
FIRST, LAST = "BCHW", "BHWC"


class Net:
    """Writes a model in which each value is asked for in some layout, by a Transpose where it stands in the other."""

    def __init__(self, opset: int, dtype: str, open_batch: bool) -> None:
        self.opset, self.dtype, self.open = opset, dtype, open_batch
        self.lines: list[str] = []
        self.arrays: dict[str, Any] = {}
        self.known: dict[tuple[str, str], str] = {}
        self.single: set[str] = set()
        self.views = 0

    def held(self, array: Any) -> str:
        name = f"c{len(self.arrays)}"
        self.arrays[name] = np.asarray(array)
        return name

    def new(self, name: str, layout: str, line: str) -> str:
        self.lines.append(f"{name} = {line}")
        self.known[name, layout] = name
        return name

    def at(self, name: str, layout: str, reshape: bool = False) -> str:
        """A value in a layout."""
        if (name, layout) not in self.known:
            (other,) = (way for n, way in self.known if n == name)
            source, self.views = self.known[name, other], self.views + 1
            if reshape and name in self.single:
                target = [1 if axis == "C" else 0 if axis == "B" else SIZES[axis] for axis in layout]
                line = f"Reshape({source}, {self.held(np.array(target))})"
            else:
                line = f"Transpose<perm = {[other.index(axis) for axis in layout]}>({source})"
            self.lines.append(f"{name}_{layout} = {line}")
            self.known[name, layout] = f"{name}_{layout}"
        return self.known[name, layout]

    def row(self, array: Any, layout: str) -> str:
        """A weight of the channels."""
        return self.held(array.reshape(-1, 1, 1) if layout == FIRST else array)

    def mean(self, name: str, source: str, layout: str) -> None:
        axis = layout.index("C")
        if self.opset >= 18:
            self.new(name, layout, f"ReduceMean<keepdims = 1>({source}, {self.held(np.array([axis]))})")
        else:
            self.new(name, layout, f"ReduceMean<keepdims = 1, axes = [{axis}]>({source})")
        self.single.add(name)

    def model(self, result: str, layout: str, more: str = "") -> onnx.ModelProto:
        kind = {"f4": "float", "f2": "float16"}[self.dtype]

        def shape(way: str) -> str:
            return ", ".join("B" if axis == "B" and self.open else str(SIZES[axis]) for axis in way)

        made = onnx.parser.parse_model(f'''<ir_version: 8, opset_import: ["": {self.opset}]>
            g ({kind}[{shape(FIRST)}] x) => ({kind}[{shape(layout)}] {self.known[result, layout]}{more})
            {{ {" ".join(self.lines)} }}''')
        made.graph.initializer.extend(numpy_helper.from_array(np.asarray(a), name) for name, a in self.arrays.items())
        onnx.checker.check_model(made, full_check=True)
        return made


def norm(way: Callable[[], str], kind: str, opset: int = 18, dtype: str = "f4", one_pass: bool = False,
         open_batch: bool = False, reshape: bool = False, affine: bool = True) -> tuple[Net, str, str]:  # fmt: skip
    """A norm of x over its channels; `way` gives the layout of each step in turn. The model, its result, the layout."""
    net, rng = Net(opset, dtype, open_batch), np.random.default_rng(0)
    net.known["x", FIRST] = "x"
    eps, two = net.held(np.asarray(1e-5 if dtype == "f4" else 1e-3, dtype)), net.held(np.asarray(2, dtype))

    def binary(name: str, op: str, a: str, b: str) -> None:
        layout = way()
        net.new(name, layout, f"{op}({net.at(a, layout, reshape)}, {net.at(b, layout, reshape)})")

    def unary(name: str, line: str, a: str) -> None:
        layout = way()
        net.new(name, layout, line.format(net.at(a, layout, reshape)))
        if a in net.single:
            net.single.add(name)

    def mean(name: str, a: str) -> None:
        layout = way()
        net.mean(name, net.at(a, layout), layout)

    centred = "x"
    if kind == "layer_norm":
        mean("m", "x")
        binary("d", "Sub", "x", "m")
        centred = "d"
    if one_pass and kind == "layer_norm":
        binary("q", "Mul", "x", "x")
        mean("p", "q")
        binary("mm", "Mul", "m", "m")
        binary("v", "Sub", "p", "mm")
        net.single |= {"mm", "v"}
    else:
        unary("q", f"Pow({{}}, {two})", centred)
        mean("v", "q")
    unary("e", f"Add({{}}, {eps})", "v")
    unary("r", "Sqrt({})", "e")
    binary("n", "Div", centred, "r")
    result = "n"
    for name, op in (("s", "Mul"), ("y", "Add")) if affine else ():
        layout, row = way(), rng.random(SIZES["C"]).astype(dtype)
        net.new(name, layout, f"{op}({net.at(result, layout)}, {net.row(row, layout)})")
        result = name
    return net, result, next(layout for name, layout in net.known if name == result)


def equal(one: onnx.ModelProto, other: onnx.ModelProto, dtype: str = "f4") -> bool:
    x = (np.random.default_rng(1).standard_normal([SIZES[axis] for axis in FIRST]) * 3 + 5).astype(dtype)
    results = [session(m.SerializeToString()).run(None, {"x": x}) for m in (one, other)]
    return all(np.abs(a.astype("f8") - b).max() <= (2e-6 if dtype == "f4" else 4e-3) * max(1, np.abs(a).max())
               for a, b in zip(*results, strict=True))  # fmt: skip


@pytest.mark.parametrize("kind", ["layer_norm", "rms_norm"])
@pytest.mark.parametrize("seed", range(24))
def test_each_step_in_some_layout(seed: int, kind: str) -> None:
    rng = np.random.default_rng(seed)
    flags = {name: bool(rng.integers(2)) for name in ("one_pass", "open_batch", "reshape", "affine")}
    opset, dtype = int(rng.choice([13, 17, 18])), "f2" if seed % 4 == 3 and not flags["one_pass"] else "f4"
    net, result, layout = norm(lambda: str(rng.choice([FIRST, LAST])), kind, opset, dtype, **flags)
    given = net.model(result, layout)
    assert [n.kind for n in normfuse.inspect(given).norms] == [kind]
    made, report = normfuse.optimize(given)
    assert report.fused == 1 and not report.refusals and equal(given, made, dtype)
    onnx.checker.check_model(made, full_check=True)
    assert sum(n.op_type == "Transpose" for n in made.graph.node) <= 2
    again, _ = normfuse.optimize(made)
    assert again.SerializeToString() == made.SerializeToString()
    assert unread(made) <= unread(given)


def unread(model: onnx.ModelProto) -> set[str]:
    """The initializers that nobody reads."""
    return {t.name for t in model.graph.initializer} - {name for n in model.graph.node for name in n.input}


def two(*ways: str) -> Callable[[], str]:
    """The first for so many steps, then the last."""
    steps = iter(ways)
    return lambda: next(steps, ways[-1])


def statistics_first() -> Callable[[], str]:
    return two(*[FIRST] * 6, LAST)


def test_a_norm_in_two_layouts_is_one_operator() -> None:
    net, result, layout = norm(statistics_first(), "layer_norm")
    given = net.model(result, layout)
    before = given.SerializeToString()
    read, _ = from_proto(given, Path("m"))
    (found,) = normfuse.inspect(read).norms
    assert (found.kind, found.axes, found.name) == ("layer_norm", [-1], given.graph.node[-1].name or found.name)
    assert len(list(read.graph)) == len(given.graph.node)  # what is inspected stays as it is
    made, report = normfuse.optimize(given)
    assert [n.op_type for n in made.graph.node] == ["Transpose", "LayerNormalization"]
    assert any("another layout" in note for note in report.notes) and given.SerializeToString() == before
    exact, told = normfuse.optimize(given, normfuse.Config(numerics="fast", target="normfuse"))
    assert told.fused == 1 and equal(given, exact)


@pytest.mark.parametrize("read", ["d", "m", "q", "n"])
def test_what_is_read_in_the_other_layout_stays(read: str) -> None:
    """Then the reductions would be computed twice."""
    net, result, layout = norm(two(*[FIRST] * 7, LAST), "layer_norm")
    shape = "2, 1, 3, 5" if read == "m" else "2, 16, 3, 5"
    given = net.model(result, layout, f", float[{shape}] {net.known[read, FIRST]}")
    made, _ = normfuse.optimize(given)
    assert equal(given, made) and sum("Reduce" in n.op_type for n in made.graph.node) <= 2
    assert not any("another layout" in note for note in normfuse.optimize(given)[1].notes)


def test_rows_of_other_axes_are_not_mixed_up() -> None:
    """Of a square image each layout has the same shape; the weight belongs to another axis than the statistics."""
    lines = ("m = ReduceMean<keepdims = 1>(x, one) d = Sub(x, m) t = Transpose<perm = [0, 2, 1]>(d) q = Mul(t, t) "
             "v = ReduceMean<keepdims = 1>(q, last) e = Add(v, eps) r = Sqrt(e) n = Div(t, r) y = Mul(n, w)")
    for weight, norms in ((np.arange(1, 5, dtype="f4"), 1), (np.arange(1, 5, dtype="f4").reshape(4, 1), 0)):
        given = onnx.parser.parse_model(f'''<ir_version: 8, opset_import: ["": 18]>
            g (float[4, 4, 4] x) => (float[4, 4, 4] y) {{ {lines} }}''')
        arrays = {"w": weight, "one": np.array([1]), "last": np.array([2]), "eps": np.float32(1e-5)}
        given.graph.initializer.extend(numpy_helper.from_array(np.asarray(a), name) for name, a in arrays.items())
        made, report = normfuse.optimize(given)
        assert len([n for n in report.norms if n.weight]) == norms
        x = np.random.default_rng(0).standard_normal((4, 4, 4)).astype("f4")
        a, b = (session(m.SerializeToString()).run(None, {"x": x})[0] for m in (given, made))
        assert np.abs(a - b).max() < 1e-5


def test_it_is_converted_as_any_other() -> None:
    """LayerNorm to RMSNorm: the request goes through the transpose to the convolution."""
    net, result, layout = norm(statistics_first(), "layer_norm")
    given = net.model(result, layout)
    rng = np.random.default_rng(2)
    for name, shape in (("cw", (16, 16, 1, 1)), ("cb", (16,))):
        given.graph.initializer.append(numpy_helper.from_array(rng.standard_normal(shape).astype("f4"), name))
    for node in given.graph.node:
        node.input[:] = ["h" if v == "x" else v for v in node.input]
    given.graph.node.insert(0, onnx.helper.make_node("Conv", ["x", "cw", "cb"], ["h"], "conv"))
    onnx.checker.check_model(given, full_check=True)
    made, report = normfuse.optimize(given, normfuse.Config(layernorm_to_rmsnorm="exact"))
    assert report.converted == 1 and equal(given, made)


@pytest.mark.parametrize("ways", [[LAST], [FIRST], [LAST] * 9 + [FIRST]])
def test_a_norm_in_one_layout_is_left_there(ways: list[str]) -> None:
    """A norm of a transposed tensor is no norm of the tensor, whose layout is worse."""
    net, result, layout = norm(two(*ways), "layer_norm")
    net.at(result, LAST if layout == FIRST else FIRST)
    given = net.model(result, LAST if layout == FIRST else FIRST)
    made, report = normfuse.optimize(given)
    assert report.fused == 1 and equal(given, made) and not any("another layout" in note for note in report.notes)
    assert [n.name for n in report.norms] == [n.name for n in normfuse.inspect(given).norms]


@pytest.mark.parametrize("given", [True, False])
@pytest.mark.parametrize(("size", "target"), [(5, "onnx"), (2048, "onnx"), (2048, "normfuse")])
def test_a_weight_along_an_inner_axis_is_not_seen_through_its_view(size: int, target: Any, given: bool) -> None:
    """Of as many positions as channels it would be broadcast along these; small constants are folded."""
    more = f", float[{size}] w" if given else ""
    model = onnx.parser.parse_model(f'''<ir_version: 8, opset_import: ["": 18]>
        g (float[2, {size}, {size}] x{more}) => (float[2, {size}, {size}] y) {{ q = Mul(x, x)
        v = ReduceMean<keepdims = 1>(q, one) e = Add(v, eps) r = Sqrt(e) n = Div(x, r) u = Unsqueeze(w, one)
        y = Mul(n, u) }}''')
    rng = np.random.default_rng(0)
    w, x = rng.random(size).astype("f4") + 1, rng.standard_normal((2, size, size)).astype("f4")
    arrays = {"one": np.array([1]), "eps": np.float32(1e-5)} | ({} if given else {"w": w})
    model.graph.initializer.extend(numpy_helper.from_array(np.asarray(a), name) for name, a in arrays.items())
    made, report = normfuse.optimize(model, normfuse.Config(target=target))
    assert report.fused == 1
    feeds = {"x": x} | ({"w": w} if given else {})
    a, b = (session(m.SerializeToString()).run(None, feeds)[0] for m in (model, made))
    assert np.abs(a - b).max() < 1e-5


def test_names_are_those_of_no_other_graph() -> None:
    """A branch may have what the norm's new nodes would be called."""
    net, result, layout = norm(statistics_first(), "layer_norm")
    given = net.model(result, layout)
    lines = f"{result}_0 = Relu({result}) z = Neg({result}_0)"
    body = onnx.parser.parse_graph(f"b () => (float[2, 3, 5, 16] z) {{ {lines} }}")
    given.graph.node.append(onnx.helper.make_node("If", ["t"], ["more"], then_branch=body, else_branch=body))
    given.graph.initializer.append(numpy_helper.from_array(np.array(True), "t"))
    given.graph.output.append(onnx.helper.make_tensor_value_info("more", 1, [2, 3, 5, 16]))
    onnx.checker.check_model(given, full_check=True)
    made, report = normfuse.optimize(given)
    assert any("another layout" in note for note in report.notes)
    onnx.checker.check_model(made, full_check=True)
    assert equal(given, made)


def test_the_last_transpose_is_no_part_of_what_is_compared() -> None:
    """A LayerNorm is not taken for the RMSNorm of what its mean was taken from, for a transpose behind it."""
    net, result, layout = norm(two(FIRST, FIRST, LAST, LAST, LAST, LAST, FIRST), "layer_norm", affine=False)
    net.at(result, LAST if layout == FIRST else FIRST)
    given = net.model(result, LAST if layout == FIRST else FIRST)
    made, report = normfuse.optimize(given)
    assert [n.kind for n in report.norms] == ["layer_norm"] and equal(given, made)


def test_many_of_them_take_linear_time() -> None:
    net, result, layout = norm(statistics_first(), "layer_norm")
    one = net.model(result, layout)

    def seconds(count: int) -> float:
        made = onnx.compose.add_prefix(one, "p0_")
        for i in range(1, count):
            more = onnx.compose.add_prefix(one, f"p{i}_").graph
            for part in ("node", "input", "output", "initializer"):
                getattr(made.graph, part).extend(getattr(more, part))
        began = time.process_time()
        assert len(normfuse.optimize(made, normfuse.Config(verify="off"))[1].norms) == count
        return time.process_time() - began

    gc.disable()  # its full collections grow with all that other tests keep
    try:
        seconds(4)
        few = min(seconds(20) for _ in range(3))
        assert seconds(160) < 8 * few * 3
    finally:
        gc.enable()


def test_an_operator_with_a_neighbour_is_planned_on_what_was_written_anew() -> None:
    """Two norms with a sum behind them, one of them in two layouts, for a target that takes the sums in."""
    lines = """q = Mul(x, x) m = ReduceMean<axes = [-1], keepdims = 1>(q) e = Add(m, eps) i = Sqrt(e) n = Div(x, i)
    v = Mul(n, w) s = Add(v, r) t = Transpose<perm = [0, 2, 1]>(s) c = Tanh(t)
    cm = ReduceMean<axes = [1], keepdims = 1>(c) d = Sub(c, cm) dq = Mul(d, d)
    dm = ReduceMean<axes = [1], keepdims = 1>(dq) de = Add(dm, eps) dr = Sqrt(de) dt = Transpose<perm = [0, 2, 1]>(d)
    rt = Transpose<perm = [0, 2, 1]>(dr) dn = Div(dt, rt) u = Mul(dn, w) y = Add(u, s)"""
    made = onnx.parser.parse_model(f'''<ir_version: 8, opset_import: ["": 17]>
        g (float[2,3,16] x, float[2,3,16] r) => (float[2,3,16] y) {{ {lines} }}''')
    held = {"w": np.random.default_rng(0).standard_normal(16).astype("f4"), "eps": np.float32(1e-5)}
    made.graph.initializer.extend(numpy_helper.from_array(np.asarray(a), name) for name, a in held.items())
    result, report = normfuse.optimize(made, normfuse.Config(target="normfuse"))
    assert report.fused == 2 and any("another layout" in note for note in report.notes)
    assert [n.op_type for n in result.graph.node if "norm" in n.op_type] == ["norm_add", "norm_add_layer_norm_scale"]
    given = {name: np.random.default_rng(1).standard_normal((2, 3, 16)).astype("f4") for name in ("x", "r")}
    a, b = (session(m.SerializeToString()).run(None, given)[0] for m in (made, result))
    np.testing.assert_allclose(b, a, rtol=1e-5, atol=1e-5)


def test_nodes_have_their_places_in_the_graph_as_it_was_read_last() -> None:
    """What comes first is asked of a graph before and after norms are written anew."""
    model, _ = from_proto(onnx.parser.parse_model('''<ir_version: 8, opset_import: ["": 17]>
        g (float[2] x) => (float[2] y) { y = Neg(x) }'''), Path("m"))
    fused = FusedEmitter(Emitter(17))
    for node in (model.graph[0], ir.Node("", "Abs", [model.graph[0].outputs[0]])):
        if node.graph is None:
            model.graph.append(node)
        edit: Any = SimpleNamespace(results=[SimpleNamespace(native=node.outputs[0])])
        (low,) = lower(model)
        assert fused._reaches(low, edit, node.outputs[0]) and not fused._reaches(low, edit, model.graph.inputs[0])


SQUARE = """a = Transpose<perm = [1, 0]>(x) {weight} q = Mul(a, a) m = ReduceMean<axes = [0, 1], keepdims = 1>(q)
e = Add(m, eps) r = Sqrt(e) i = Reciprocal(r) s = Mul(x, u) t = Transpose<perm = [1, 0]>(s) y = Mul(i, t)"""


def square(weight: str, size: int) -> onnx.ModelProto:
    """A norm over both axes, with a weight for each element that is applied in the other layout."""
    made = onnx.parser.parse_model(f'''<ir_version: 8, opset_import: ["": 17]>
        g (float[{size},{size}] x) => (float[{size},{size}] y) {{ {SQUARE.format(weight=weight)} }}''')
    w = np.random.default_rng(0).standard_normal((size, size)).astype("f4")
    held = {"w": w, "eps": np.float32(1e-5)} | ({} if weight else {"u": w})
    made.graph.initializer.extend(numpy_helper.from_array(np.asarray(a), name) for name, a in held.items())
    return made


def same(one: onnx.ModelProto, other: onnx.ModelProto, size: int) -> bool:
    x = np.random.default_rng(1).standard_normal((size, size)).astype("f4") + 2
    a, b = (session(m.SerializeToString()).run(None, {"x": x})[0] for m in (one, other))
    return bool(np.abs(a - b).max() <= 1e-5 * np.abs(a).max())


@pytest.mark.parametrize("weight", ["", "u = Transpose<perm = [1, 0]>(w)", "u = Identity(w)"])
@pytest.mark.parametrize("size", [6, 48])
def test_a_weight_for_each_element_is_turned_with_them(weight: str, size: int) -> None:
    """As many along both axes: its shape does not tell."""
    given = square(weight, size)
    made, report = normfuse.optimize(given)
    assert report.fused == 1 and not report.refusals
    assert same(given, made, size)


def readers(graph: ir.Graph) -> dict[str | None, int]:
    """How many there are of each value, those included that stand in no graph."""
    return {v.name: len(v.uses()) for node in graph for v in (*node.inputs, *node.outputs) if v is not None}


@pytest.mark.parametrize("verify", ["off", "sites"])
def test_what_is_written_anew_is_compared(verify: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("normfuse.frontends.onnx_layout._Writer.operand", lambda self, value, native, beside:
                        self.of(value) if value.index in self.facts else native)  # fmt: skip
    given = square("", 6)
    model, _ = from_proto(given, Path("m"))
    before = readers(model.graph)
    assert readers(normfuse.optimize(model, normfuse.Config(verify=verify))[0].graph) == before
    made, report = normfuse.optimize(given, normfuse.Config(verify=verify))
    assert report.fused == 0 and same(given, made, 6)
    assert {t.name for t in made.graph.initializer} == {t.name for t in given.graph.initializer}


ONE = """{0}q = Mul({1}, {1}) {0}v = ReduceMean<axes = [{2}], keepdims = 1>({0}q) {0}e = Add({0}v, eps)
{0}r = Sqrt({0}e) {0}x = Transpose<perm = [0, 2, 1]>({1}) {0}t = {3}({0}r{4}) {0}n = Div({0}x, {0}t) """


def turns(shape: str, lines: str, **held: Any) -> onnx.ModelProto:
    made = onnx.parser.parse_model(f'''<ir_version: 8, opset_import: ["": 17]>
        g (float[{shape}] x) => (float[a, b, c] {lines.split()[-1]}) {{ {" ".join(lines.split()[:-1])} }}''')
    held["eps"] = np.float32(1e-5)
    made.graph.initializer.extend(numpy_helper.from_array(np.asarray(a), name) for name, a in held.items())
    return made


def equal_on(one: onnx.ModelProto, other: onnx.ModelProto, *shape: int) -> bool:
    x = np.random.default_rng(1).standard_normal(shape).astype("f4") + 2
    a, b = (session(m.SerializeToString()).run(None, {"x": x})[0] for m in (one, other))
    return bool(np.abs(a - b).max() < 1e-5)


def test_a_norm_in_two_layouts_of_another_one() -> None:
    """It reads the result that was written anew."""
    turn = "Transpose<perm = [0, 2, 1]>"
    given = turns("2, 16, 5", ONE.format("a", "x", 1, turn, "") + ONE.format("b", "an", 2, turn, "") + "bn")
    made, report = normfuse.optimize(given)
    assert report.fused == 2 and not report.refusals and equal_on(given, made, 2, 16, 5)


def test_many_rows_are_compared_by_few_where_a_reshape_has_their_number() -> None:
    given = turns("1, 64, 400000", ONE.format("a", "x", 1, "Reshape", ", to") + "an", to=np.array([0, 400000, 1]))
    report = normfuse.optimize(given, normfuse.Config(verify="off"))[1]
    assert report.fused == 1 and not report.refusals


def test_two_of_them_that_share_a_transpose_are_both_written_anew() -> None:
    turn = "Transpose<perm = [0, 2, 1]>"
    other = f"""m = ReduceMean<axes = [1], keepdims = 1>(x) d = Sub(x, m) bq = Mul(d, d) tm = {turn}(m) bd = Sub(ax, tm)
    bv = ReduceMean<axes = [1], keepdims = 1>(bq) be = Add(bv, eps) br = Sqrt(be) bt = {turn}(br) bn = Div(bd, bt) """
    given = turns("2, 16, 5", ONE.format("a", "x", 1, turn, "") + other + "y = Mul(an, bn) y")
    made, report = normfuse.optimize(given)
    assert report.fused == 2 and not report.refusals and equal_on(given, made, 2, 16, 5)


@pytest.mark.parametrize("size", [3, 8])
def test_a_weight_in_the_other_layout_of_a_square(size: int) -> None:
    """Broadcast in the layout of x it would be one for each row: another formula, of which nothing is proved."""
    given = turns(f"1, {size}, {size}", """q = Mul(x, x) v = ReduceMean<axes = [2]>(q) vv = Reshape(v, to)
        e = Add(vv, eps) r = Sqrt(e) n = Div(x, r) t = Transpose<perm = [0, 2, 1]>(n) s = Mul(t, w)
        y = Transpose<perm = [0, 2, 1]>(s) y""", to=np.array([1, size, 1]), w=np.arange(size, dtype="f4")[:, None])
    made, report = normfuse.optimize(given)
    assert report.fused == 1 and not report.refusals and equal_on(given, made, 1, size, size)


@pytest.mark.parametrize("lines", [
    "t = L(d) s = Mul(t, w) u = F(s) y = Div(u, r) y", "t = L(d) s = Mul(t, w) u = F(s) o = Div(u, r) y = Add(o, b) y",
    "i = Reciprocal(r) t = L(i) s = Mul(t, w) u = F(s) y = Mul(d, u) y",
    "t = L(d) s = Mul(t, w) u = F(s) o = Div(u, r) y = L(o) y"])  # fmt: skip
@pytest.mark.parametrize("axis", [1, 2])
def test_a_weight_in_the_other_layout_before_the_division(lines: str, axis: int) -> None:
    lines = lines.replace("L(", "Transpose<perm = [0, 2, 1]>(").replace("F(", "Transpose<perm = [0, 2, 1]>(")
    held = {"w": np.arange(6, dtype="f4")} if axis == 1 else {"w": np.arange(5, dtype="f4")[:, None]}
    held |= {"b": np.ones((6, 1) if axis == 1 else (5,), "f4")} if "b)" in lines else {}
    given = turns("2, 6, 5", f"""m = ReduceMean<axes = [{axis}]>(x) d = Sub(x, m) q = Mul(d, d)
        v = ReduceMean<axes = [{axis}]>(q) e = Add(v, eps) r = Sqrt(e) {lines}""", **held)
    made, report = normfuse.optimize(given)
    assert report.fused == 1 and not report.refusals and equal_on(given, made, 2, 6, 5)
