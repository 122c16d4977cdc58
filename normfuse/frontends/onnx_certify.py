"""The test that catches everything: two ONNX models as wholes, in float64, with random constants.

A model as it was initialised hides missing edits: its biases are zero and its norm weights one. So every constant is
replaced by a random one whose mean is not zero, in the result by what the edits make of it, and the outputs have to
agree to 1e-12. The models are run node by node with ONNX's reference operators; a constant is made when it is first
read and dropped after the last node that reads it, so that the largest one decides on the memory.
"""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from itertools import product
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import onnx.inliner
import onnx_ir as ir
from onnx.reference import ReferenceEvaluator

from normfuse.calibrate import Hook
from normfuse.config import Config
from normfuse.convert import LIMIT, SEEN, Certificate, Randomiser, joined
from normfuse.distance import normwise, tells, worst
from normfuse.errors import first_line
from normfuse.frontends.onnx_branches import BRANCHES, taken
from normfuse.frontends.onnx_check import DOUBLE, FLOAT_TYPES, MOST, OPS, _widen
from normfuse.frontends.onnx_kernels import KERNELS
from normfuse.frontends.onnx_open import given_sizes, input_dims, possible_sizes
from normfuse.frontends.onnx_unknown import StandIns
from normfuse.ort_values import Array
from normfuse.sessions import Given, is_float, names_mask, open_shapes
from normfuse.verify import DoesNotRun

if TYPE_CHECKING:
    from normfuse.frontends.onnx_convert import Editor

SETTINGS = {**dict.fromkeys("Resize Upsample Pow Clip Pad OneHot".split(), 1),
            **dict.fromkeys("Range Max Min Equal Greater Less GreaterOrEqual LessOrEqual".split(), 0)}  # fmt: skip
"""Operators whose constants from this operand on are settings and bounds rather than parameters."""
SIZES = (2, 16, 32, 48, 64, 224)
"""What a size that the model leaves open is, behind the first axis, until one is found with which the model runs."""
MAX_ERROR_SIZE = 2**28
"""Elements of weights up to which the models are also run with their own weights."""

Give = Callable[[str], Array]
OPERATORS: list[Any] = [*OPS, *KERNELS]


def certify(original: ir.Model, result: ir.Model, editor: Editor, config: Config, given: Given) -> Certificate | None:
    """Compare a model with its conversion; None where verification is off. Where branches of Ifs were read as parts of
    the main graph, with one branch of each taken, and with the other."""
    if config.verify == "off":
        return None
    if not editor.low.flat:
        return _sized(original, result, editor, given)
    found = []
    for branch in BRANCHES:
        try:
            models = taken(original, branch), taken(result, branch)
        except ValueError as why:
            return Certificate(False, message=f"the certificate's check could not run: {first_line(why)}")
        found.append(_sized(*models, editor, given, branch))
        if not found[-1].ok:
            return found[-1]
    return joined(found)


def _sized(original: ir.Model, result: ir.Model, editor: Editor, given: Given, branch: str = "") -> Certificate:
    """The comparison on the first of the random inputs with which it runs, or else on those given."""
    last = ""
    for inputs, sizes in _stages(original, given):
        runs = False  # the model with a batch of two, so that one of one might hide a mistake
        for batch, shapes in _shapes(original, sizes):
            if runs and batch == 1:
                break
            try:
                found = _certify(original, result, editor, inputs, shapes, branch)
            except Exception as why:  # the reference evaluator raises anything; not certified means not kept
                last = f"the certificate's check could not run: {first_line(why)[:200]}"
                runs = runs or not isinstance(why, DoesNotRun)
                continue
            if found is not None:
                return found
            last = "with random constants the outputs are not finite, or hide the norms"
            break
    return Certificate(False, message=last)


def _stages(model: ir.Model, given: Given) -> list[tuple[Mapping[str, Array], Mapping[str, int]]]:
    """The inputs and sizes that are not drawn: none first, since what is given may hide a mistake, as one token does
    in an attention; then the sizes, the inputs but for floats, and all that is given."""
    sizes = given_sizes(model, given)
    whole = {name: array for name, array in given.inputs.items() if not is_float(array)}
    stages: list[tuple[Mapping[str, Array], Mapping[str, int]]] = [({}, {})]
    stages += [({}, sizes)] if sizes else []
    stages += [(whole, sizes)] if whole else []
    return stages + ([(given.inputs, sizes)] if len(whole) < len(given.inputs) else [])


def _shapes(model: ir.Model, given: Mapping[str, int]) -> Iterator[tuple[int, Mapping[str, tuple[int, ...]]]]:
    """The shapes of a model's inputs, of the likeliest sizes first, and with as many tokens in a cache as there are
    others, or with none, as where a mask has the name of theirs; in a batch of two, and then of one, for which a model
    was made that gives its batch no number but was exported with one."""
    tried = list[Mapping[str, tuple[int, ...]]]()
    *images, known = (sizes | dict(given) for sizes in possible_sizes(model))
    cases = [*product(images, SIZES[:1]), *product([known], SIZES)]
    for batch, (one, n), cache in product((2, 1), cases, (True, False)):
        shapes = input_shapes(model, one, (batch, n, n if cache else 0))
        if shapes not in tried:
            tried.append(shapes)
            yield batch, shapes


def _certify(original: ir.Model, result: ir.Model, editor: Editor, own: Mapping[str, Array],
             shapes: Mapping[str, tuple[int, ...]], branch: str) -> Certificate | None:  # fmt: skip
    """The comparison on a model's `own` inputs and random ones of these shapes; None where its outputs are not finite,
    or hide the norms."""
    called = editor.names(branch)
    stand = StandIns({name: v for v, name in called.items()})
    before, after = Program(original, True, stand), Program(result, True, stand)
    names = [called[v] for v in editor.plan.witnesses() if v in called]
    numbers = _Numbers(original, result, editor)
    read = after.read()
    failed: Exception | None = None
    for attempt in range(4):
        feeds = inputs_for(original, {n: s for n, s in shapes.items() if n not in own}, attempt) | dict(own)
        try:
            want = before.see(feeds, partial(numbers.random, attempt=attempt), names)
        except Exception as why:  # such as an index beyond a table of one row
            failed = failed or why
            continue
        if not all(map(tells, want)):
            continue
        unedited = after.see(feeds, partial(numbers.edited, attempt=attempt, edits=False), names)
        if not (editor.edits.made.keys() & read) - set(numbers.draw.fixed) or worst(want, unedited) > SEEN:
            break
    else:
        if failed is not None:
            raise DoesNotRun(first_line(failed)) from failed
        return None
    gap = worst(want, after.see(feeds, partial(numbers.edited, attempt=attempt), names))
    for other in others(feeds):
        want = []
        with contextlib.suppress(Exception):  # nothing to compare with where the original does not run so
            want = before.see(other, partial(numbers.random, attempt=attempt), names)
        if want:
            gap = max(gap, worst(want, after.see(other, partial(numbers.edited, attempt=attempt), names)))
    if not gap <= LIMIT:
        return Certificate(False, gap, message=f"with random constants the results differ by {gap:.2g} in float64")
    found = Certificate(True, gap, len(numbers.draw.replaced), any_of=sorted(stand.used))
    if not stand.used and sum(v.size for v in before.constants.values()) <= MAX_ERROR_SIZE:
        exact = list(before.run(feeds, before.own).values())
        programs = Program(original, False), Program(result, False)
        found.before, found.after = (normwise(exact, list(p.run(feeds, p.own).values())) for p in programs)
    return found


def others(feeds: dict[str, Array]) -> list[dict[str, Array]]:
    """The inputs again with other masks: what one mask hides another shows."""
    masks = {name: array for name, array in feeds.items() if array.dtype == bool and array.size}
    rng = np.random.default_rng(0)
    drawn: dict[str, Array] = {name: np.less(rng.random(array.shape), 0.5) for name, array in masks.items()}
    turned: dict[str, Array] = {name: np.logical_not(array) for name, array in masks.items()}
    return [feeds | drawn, feeds | turned] if masks else []


def constants_of(model: ir.Model) -> dict[str, ir.TensorProtocol]:
    """The weights of a model by name: its initializers, and what Constant nodes of its main graph hold."""
    out = {v.name or "": v.const_value for v in model.graph.initializers.values() if v.const_value is not None}
    return out | {node.outputs[0].name or "": held for node in model.graph if (held := _held(node)) is not None}


def _held(node: ir.Node) -> ir.TensorProtocol | None:
    """The weight that a Constant node holds."""
    if node.op_type != "Constant" or "value" not in node.attributes:
        return None
    tensor = node.attributes["value"].as_tensor()
    return tensor if tensor.dtype in FLOAT_TYPES and tensor.size > 1 else None


class _Numbers:
    """Random constants in the place of those of a model."""

    def __init__(self, original: ir.Model, result: ir.Model, editor: Editor) -> None:
        self.own, self.result = constants_of(original), constants_of(result)
        self.exact = {v.name or "": array for v, array in editor.means.emitter.exact.items()}
        self.edits = editor.edits
        settings = {v.name or "" for node in original.graph if node.op_type in SETTINGS
                    for v in node.inputs[SETTINGS[node.op_type] :] if v}  # fmt: skip
        settings |= {v.native.name for v in (*editor.plan.zero, *editor.plan.numbers())}
        self.draw = Randomiser({v.native.name for v in editor.plan.uniform if v.native is not None}, settings)

    def random(self, name: str, attempt: int = 0) -> Array:
        """A constant of the original: random if it is a parameter, in float64."""
        tensor = self.own[name]
        array = np.asarray(tensor.numpy())
        if tensor.dtype not in FLOAT_TYPES:
            return array
        return self.draw(name, array.astype(np.float64), attempt)

    def edited(self, name: str, attempt: int = 0, edits: bool = True) -> Array:
        """A constant of the result: made of random ones as it is made of the original's, or without the edits."""
        if name in self.edits.made:
            if not edits:
                return self.random(self.edits.copies.get(name, name), attempt)
            return self.edits.get(name, lambda n: self.random(n, attempt))
        if name in self.own:
            return self.random(name, attempt)
        tensor = self.result[name]
        array = self.exact.get(name, np.asarray(tensor.numpy()))
        return array.astype(np.float64) if tensor.dtype in FLOAT_TYPES else array


class Program:
    """The nodes of a model, to be run one by one; `wide` in float64, otherwise in the model's types.

    `stand` computes something for those that nothing here computes.
    """

    def __init__(self, model: ir.Model, wide: bool, stand: StandIns | None = None) -> None:
        self.model, self.wide, self.stand = model, wide, stand
        copy = model.clone()
        self.constants = constants_of(copy)
        for node in [node for node in copy.graph if _held(node) is not None]:
            old = node.outputs[0]
            new = ir.Value(name=old.name, type=ir.TensorType(self.constants[old.name or ""].dtype))
            old.replace_all_uses_with(new, replace_graph_outputs=True)
            copy.graph.remove(node, safe=True)
            copy.graph.inputs.append(new)
        given = set(copy.graph.inputs)
        for name in list(copy.graph.initializers):
            value = copy.graph.initializers.pop(name)
            value.const_value = None
            if value not in given:
                copy.graph.inputs.append(value)
        for value in (v for inner in copy.graph.subgraphs() for v in inner.initializers.values()):
            if isinstance(value.const_value, ir.ExternalTensor):  # which is found beside the file only
                value.const_value = ir.Tensor(value.const_value.numpy(), name=value.name)
        proto = ir.to_proto(copy)
        if proto.functions:
            proto = onnx.inliner.inline_local_functions(proto)
        proto.graph.ClearField("value_info")
        if wide:
            _widen_graph(proto.graph)
        unknown = stand.operators(proto.graph, OPERATORS) if stand is not None else []
        self.evaluator = ReferenceEvaluator(proto, new_ops=OPERATORS + unknown)
        self.outputs = [o.name for o in proto.graph.output]
        self.last: dict[str, int] = {}
        for i, node in enumerate(self.evaluator.rt_nodes_):
            for name in _reads(node.onnx_node):
                self.last[name] = i

    def read(self) -> set[str]:
        """The names that the outputs depend on."""
        found = set(self.outputs)
        for node in reversed(self.evaluator.rt_nodes_):
            if not found.isdisjoint(node.onnx_node.output):
                found.update(_reads(node.onnx_node))
        return found

    def own(self, name: str) -> Array:
        """A constant as the model has it."""
        tensor = self.constants[name]
        array = np.asarray(tensor.numpy())
        return array.astype(np.float64) if self.wide and tensor.dtype in FLOAT_TYPES else array

    def run(self, feeds: dict[str, Array], give: Give) -> dict[str, Array]:
        """The outputs in float64, given the inputs and a source of constants."""
        return dict(zip(self.outputs, self.run_all([feeds], give)[0], strict=True))

    def see(self, feeds: dict[str, Array], give: Give, names: Sequence[str]) -> list[Array]:
        """The outputs and the values of some names."""
        seen: dict[str, Array] = {}

        def keep(name: str) -> Hook:
            return lambda values: seen.update({name: values[0]})

        outputs = self.run_all([feeds], give, {name: keep(name) for name in names})[0]
        return outputs + [seen[name] for name in names]

    def run_all(self, batches: Sequence[dict[str, Array]], give: Give, watch: Mapping[str, Hook] | None = None
                ) -> list[list[Array]]:  # fmt: skip
        """The outputs for each of several inputs, which go through the nodes side by side; `watch` has hooks by the
        name of a value, which see it for all of them."""
        hooks, kept = watch or {}, set(self.outputs)
        runs: list[dict[str, Any]] = []
        for feeds in batches:
            floats = {n: a for n, a in feeds.items() if a.dtype.kind not in "iub"}
            widened = {n: a.astype(np.float64) for n, a in floats.items()} if self.wide else {}
            runs.append({"": None, **feeds, **widened})

        def see(names: Iterable[str]) -> None:
            if self.stand is not None:
                self.stand.learn({name: runs[0][name] for name in names})
            for name in hooks.keys() & set(names):
                new = hooks[name]([values[name] for values in runs])
                for values, array in zip(runs, new or (), strict=False):
                    values[name] = array

        see(runs[0])
        with warnings.catch_warnings(), np.errstate(all="ignore"):
            warnings.simplefilter("ignore")
            for i, node in enumerate(self.evaluator.rt_nodes_):
                names = _reads(node.onnx_node)
                for name in names:
                    if name not in runs[0] and name in self.constants:
                        array = give(name)
                        for values in runs:
                            values[name] = array
                for values in runs:
                    more = {"context": values} if node.need_context() else {}
                    outputs = node.run(*(values[n] for n in node.input), **more)
                    values.update(zip(node.output, outputs, strict=False))
                see(node.output)
                for values in runs:
                    for name in names:
                        if self.last[name] == i and name not in kept:
                            values.pop(name, None)
                    values[""] = None
        return [[_plain(values[n] if n in values else give(n)) for n in self.outputs] for values in runs]


def _plain(value: Any) -> Array:
    """An output as an array, floats in float64; what is no tensor counts as nothing."""
    if not isinstance(value, (np.ndarray, np.generic)):
        return np.asarray(0)
    array = np.asarray(value)
    return array.astype(np.float64) if array.dtype.kind == "f" or "float" in array.dtype.name else array


def _reads(node: onnx.NodeProto) -> list[str]:
    """The names that a node reads, its sub-graphs included."""
    out = [n for n in node.input if n]
    for attr in node.attribute:
        for graph in [attr.g] if attr.HasField("g") else list(attr.graphs):
            out += [n for inner in graph.node for n in _reads(inner)] + [o.name for o in graph.output]
    return out


def _widen_graph(graph: onnx.GraphProto) -> None:
    nodes = [part for node in graph.node for part in _widen(node)]
    del graph.node[:]
    graph.node.extend(nodes)
    for held in graph.initializer:  # of a sub-graph
        if ir.DataType(held.data_type) in FLOAT_TYPES:
            array = np.asarray(ir.serde.deserialize_tensor(held).numpy())
            held.CopyFrom(onnx.numpy_helper.from_array(array.astype(np.float64), held.name))
    for value in (*graph.input, *graph.output):
        kind = value.type.tensor_type
        if kind.elem_type and ir.DataType(kind.elem_type) in FLOAT_TYPES:
            kind.elem_type = DOUBLE.value
    for node in graph.node:
        for attr in node.attribute:
            for inner in [attr.g] if attr.HasField("g") else list(attr.graphs):
                _widen_graph(inner)


def input_shapes(model: ir.Model, known: Mapping[str, int], open_sizes: tuple[int, int, int]
                 ) -> dict[str, tuple[int, ...]]:  # fmt: skip
    """The shapes of a model's inputs by name, those that are initializers left out (see `open_shapes`)."""
    return open_shapes({name: [d or None for d in dims] for name, dims in input_dims(model).items()}, known, open_sizes)


def inputs_for(model: ir.Model, shapes: Mapping[str, tuple[int, ...]], attempt: int = 0) -> dict[str, Array]:
    """Random inputs of these shapes: floats are normal with mean 0.5; integers are 1 and 0 in every row, so that no
    softmax over equal tokens hides a query or key, all 1 at the third attempt and all 0 at the fourth; masks are all
    true, or 1, and at the second attempt false, as some mark what is left out."""
    rng = np.random.default_rng(attempt)
    feeds: dict[str, Array] = {}
    for value in (value for value in model.graph.inputs if value.name in shapes):
        shape = shapes[value.name or ""]
        if math.prod(shape) > MOST:
            raise ValueError(f"input {value.name!r} is too large: {shape}")
        dtype = value.dtype or ir.DataType.FLOAT
        if dtype in FLOAT_TYPES:
            feeds[value.name or ""] = (rng.standard_normal(shape) + 0.5).astype(dtype.numpy())
        elif dtype == ir.DataType.BOOL or attempt == 2 or names_mask(value.name or ""):
            feeds[value.name or ""] = np.full(shape, attempt != 1, dtype.numpy())
        elif attempt == 3 or not shape:
            feeds[value.name or ""] = np.full(shape, attempt != 3, dtype.numpy())
        else:
            both = np.broadcast_to((np.arange(shape[-1]) + 1) % 2, shape)
            feeds[value.name or ""] = rng.permuted(both, axis=-1).astype(dtype.numpy())
    return feeds
