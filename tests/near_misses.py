"""Graphs that look like norms and are not, or are norms with a trap: each broke a tool that shipped.

`NEAR_MISSES` are ONNX models, `TORCH_NEAR_MISSES` torch functions of `(x, w)`. Each must be refused or stay
equal: `equal_ok` says which, see `NearMiss`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import numpy as np
import numpy.typing as npt
import onnx
import onnx.numpy_helper
import onnx.parser
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

Array = npt.NDArray[np.generic]
Inputs = dict[str, Array]


@dataclass(frozen=True)
class NearMiss:
    """One ONNX model, and why a matcher of spellings gets it wrong."""

    name: str
    build: Callable[[], onnx.ModelProto]
    inputs: Callable[[np.random.Generator], Inputs]
    why: str
    equal_ok: bool = False
    """True where some norm in the model may be fused, because that part is one exactly: outputs stay equal.
    False where no norm may be fused: it would change outputs, or rest on what cannot be known."""
    runnable: bool = True
    """False where ONNX Runtime's CPU provider cannot run the model."""


NEAR_MISSES: dict[str, NearMiss] = {}


# --- building -----------------------------------------------------------------------------------------------


def _constants() -> dict[str, Array]:
    """The initializers that bodies name, the same on every call; a model gets those that its body uses."""
    rng = np.random.default_rng(7)

    def draw(*shape: int) -> npt.NDArray[np.float32]:
        return (1.5 + 0.5 * rng.standard_normal(shape)).astype(np.float32)

    f, i = np.float32, np.int64
    out: dict[str, Array] = {
        "w": draw(64),
        "b": draw(64) - f(1.2),
        "w2": draw(64),
        "w5": draw(5, 1),
        "w5x64": draw(5, 64),
        "w3x1x64": draw(3, 1, 64),
        "b3x1x64": draw(3, 1, 64),
        "w1x1x1x64": draw(1, 1, 1, 64),
        "wscalar": draw(1),
        "w8": draw(8),
        "w8x8": draw(8, 8),
        "wc": draw(8, 1, 1),
        "bc": draw(8, 1, 1) - f(1.2),
        "b8": draw(8) - f(1.2),
        "m8": draw(8) - f(1.5),
        "v8": np.abs(draw(8)) + f(0.1),
        "wide": draw(64, 64) * f(0.1),
        "eps": np.array(1e-5, f),
        "eps_one": np.array([[[1e-5]]], f),
        "eps_small": np.array(1e-12, f),
        "eps_large": np.array(0.1, f),
        "eps_vector": np.linspace(1e-5, 0.5, 64, dtype=f),
        "eps_rows": np.linspace(1e-5, 0.5, 5, dtype=f).reshape(5, 1),
        "eps_negative": np.array(-1e-3, f),
        "eps_zero": np.array(0.0, f),
        "eps_half": np.array(1e-5, np.float16),
        "eps_half_underflows": np.array(1e-12, np.float16),
        "w_half": draw(64).astype(np.float16),
        "zero": np.array(0.0, f),
        "one": np.array(1.0, f),
        "two": np.array(2.0, f),
        "three": np.array(3.0, f),
        "four": np.array(4.0, f),
        "half": np.array(0.5, f),
        "two_half": np.array(2.0, np.float16),
        "inv_n": np.array(1 / 64, f),
        "n_less_1": np.array(63.0, f),
        "n_plus_1": np.array(65.0, f),
        "root_n": np.array(8.0, f),
        "n_int": np.array(64, np.int32),
        "last": np.array([-1], i),
        "axis0": np.array([0], i),
        "axis1": np.array([1], i),
        "axis2": np.array([2], i),
        "axis02": np.array([0, 2], i),
        "axis12": np.array([1, 2], i),
        "axis23": np.array([2, 3], i),
        "axis023": np.array([0, 2, 3], i),
        "start0": np.array([0], i),
        "end32": np.array([32], i),
        "step1": np.array([1], i),
        "grouped": np.array([0, 2, -1], i),
        "flat": np.array([-1], i),
        "mask": (np.arange(64) % 3 != 0).astype(f),
        "scatter_at": np.array([[0], [1]], i),
        "scatter_rows": draw(2, 64),
        "ratio": np.array(0.5, f),
        "yes": np.array(True),
        "tiny": np.array(1e-12, f),
    }
    return out


def _model(
    signature: str,
    body: str,
    *,
    opset: int = 18,
    overridable: tuple[str, ...] = (),
    ir_version: int | None = None,
    domains: str = "",
) -> onnx.ModelProto:
    """Parse a graph; initializers come from `_constants`, the overridable ones are graph inputs too."""
    ir = ir_version or {18: 8, 21: 10, 23: 11}[opset]
    text = f'<ir_version: {ir}, opset_import: ["" : {opset}{domains}]> g {signature} {{ {body} }}'
    model = onnx.parser.parse_model(text)
    used = _names_used(model.graph) - {i.name for i in model.graph.input}
    for name, value in _constants().items():
        if name in used:
            tensor = onnx.numpy_helper.from_array(np.asarray(value), name)
            model.graph.initializer.append(tensor)
            if name in overridable:
                model.graph.input.append(onnx.helper.make_tensor_value_info(name, tensor.data_type, list(tensor.dims)))
    return model


def _names_used(graph: onnx.GraphProto) -> set[str]:
    """Every name the nodes of a graph read, sub-graphs included."""
    names: set[str] = set()
    for node in graph.node:
        names.update(node.input)
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.GRAPH:
                names |= _names_used(attribute.g)
    return names


def _feed(shapes: Mapping[str, tuple[int, ...]], rng: np.random.Generator) -> Inputs:
    """Random float32 inputs, off centre."""
    return {name: (rng.standard_normal(s) + 0.5).astype(np.float32) for name, s in shapes.items()}


def _case(
    name: str,
    why: str,
    body: str,
    *,
    signature: str = "(float[B,S,64] x) => (float[B,S,64] y)",
    feed: Mapping[str, tuple[int, ...]] | Callable[[np.random.Generator], Inputs] | None = None,
    equal_ok: bool = False,
    runnable: bool = True,
    opset: int = 18,
    overridable: tuple[str, ...] = (),
    ir_version: int | None = None,
    domains: str = "",
    edit: Callable[[onnx.ModelProto], None] | None = None,
) -> None:
    """Enter one model into the table."""
    assert name not in NEAR_MISSES, name

    def build() -> onnx.ModelProto:
        model = _model(signature, body, opset=opset, overridable=overridable, ir_version=ir_version, domains=domains)
        if edit is not None:
            edit(model)
        return model

    inputs = feed if callable(feed) else partial(_feed, dict(feed or {"x": (2, 5, 64)}))
    NEAR_MISSES[name] = NearMiss(name, build, inputs, why, equal_ok, runnable)


# Parts that bodies are put together from.
_RSTD = "q = Mul(x, x) m = ReduceMean(q, last) e = Add(m, eps) s = Sqrt(e)"
_RMS = _RSTD + " n = Div(x, s) y = Mul(n, w)"
_CENTRE = "mu = ReduceMean(x, last) c = Sub(x, mu) q = Mul(c, c) v = ReduceMean(q, last) e = Add(v, eps) s = Sqrt(e)"
_LN = _CENTRE + " n = Div(c, s) nw = Mul(n, w) y = Add(nw, b)"
_X = "(float[B,S,64] x)"
_XY = "(float[B,S,64] x, float[B,S,64] z) => (float[B,S,64] y)"
_TWO = {"x": (2, 5, 64), "z": (2, 5, 64)}
_SQUARE = "(float[64,64] x) => (float[64,64] y)"
_NCHW = "(float[B,8,H,W] x) => (float[B,8,H,W] y)"
_IMAGE = {"x": (2, 8, 4, 6)}


# --- shapes -------------------------------------------------------------------------------------------------

_case(
    "keepdims0_square_rms",
    "keepdims=0 on a square tensor broadcasts along the other axis (onnxruntime#30513)",
    "q = Mul(x, x) m = ReduceMean<keepdims = 0>(q, last) e = Add(m, eps) s = Sqrt(e) n = Div(x, s) y = Mul(n, w)",
    signature=_SQUARE,
    feed={"x": (64, 64)},
)
_case(
    "keepdims0_square_layer_norm",
    "keepdims=0 on a square tensor, for the mean and the variance (onnxruntime#31144)",
    "mu = ReduceMean<keepdims = 0>(x, last) c = Sub(x, mu) q = Mul(c, c) v = ReduceMean<keepdims = 0>(q,"
    " last)"
    " e = Add(v, eps) s = Sqrt(e) n = Div(c, s) nw = Mul(n, w) y = Add(nw, b)",
    signature=_SQUARE,
    feed={"x": (64, 64)},
)
_case(
    "keepdims0_square_variance_only",
    "the mean keeps its axis, the variance does not: rows are divided by another row's deviation",
    "mu = ReduceMean(x, last) c = Sub(x, mu) q = Mul(c, c) v = ReduceMean<keepdims = 0>(q, last)"
    " e = Add(v, eps) s = Sqrt(e) n = Div(c, s) nw = Mul(n, w) y = Add(nw, b)",
    signature=_SQUARE,
    feed={"x": (64, 64)},
)
_case(
    "keepdims0_batch_equals_sequence",
    "keepdims=0 with batch = sequence * 1: the statistics of one sequence meet the rows of another",
    "q = Mul(x, x) m = ReduceMean<keepdims = 0>(q, last) e = Add(m, eps) s = Sqrt(e) n = Div(x, s) y = Mul(n, w)",
    signature="(float[B,64,64] x) => (float[B,64,64] y)",
    feed={"x": (64, 64, 64)},
)
_case(
    "scale_wider_batch",
    "the scale is wider than x, so that the Mul expands (onnxruntime#31980, onnx#8203)",
    _RSTD + " n = Div(x, s) y = Mul(n, w3x1x64)",
    signature="(float[1,S,64] x) => (float[3,S,64] y)",
    feed={"x": (1, 5, 64)},
    equal_ok=True,
)
_case(
    "scale_wider_rank",
    "the scale has a higher rank than x",
    _RSTD + " n = Div(x, s) y = Mul(n, w1x1x1x64)",
    signature="(float[B,S,64] x) => (float[1,B,S,64] y)",
    equal_ok=True,
)
_case(
    "scale_wider_before",
    "the wide scale multiplies x before the normalisation",
    _RSTD + " xw = Mul(x, w3x1x64) y = Div(xw, s)",
    signature="(float[1,S,64] x) => (float[3,S,64] y)",
    feed={"x": (1, 5, 64)},
    equal_ok=True,
)
_case(
    "bias_wider",
    "the bias is wider than x",
    _CENTRE + " n = Div(c, s) nw = Mul(n, w) y = Add(nw, b3x1x64)",
    signature="(float[1,S,64] x) => (float[3,S,64] y)",
    feed={"x": (1, 5, 64)},
    equal_ok=True,
)
_case(
    "scale_per_row",
    "the scale varies over the rows, not along them (onnxruntime#25855)",
    _RSTD + " n = Div(x, s) y = Mul(n, w5)",
    equal_ok=True,
)
_case(
    "scale_of_rows_and_columns",
    "the scale varies over the rows and along them",
    _RSTD + " n = Div(x, s) y = Mul(n, w5x64)",
    equal_ok=True,
)
_case(
    "scale_of_one_element",
    "the scale has one element, x's tail 64 (onnxruntime#25855)",
    _RSTD + " n = Div(x, s) y = Mul(n, wscalar)",
    equal_ok=True,
)
_case(
    "rank_1_weight_last",
    "a rank-1 input: the quotient has the weight's shape and is taken for the scale (onnxruntime#31147)",
    "q = Mul(x, x) m = ReduceMean(q, last) e = Add(m, eps) s = Sqrt(e) n = Div(x, s) y = Mul(n, w)",
    signature="(float[64] x) => (float[64] y)",
    feed={"x": (64,)},
    equal_ok=True,
)
_case(
    "rank_1_weight_first",
    "a rank-1 input with the operands the other way round",
    "q = Mul(x, x) m = ReduceMean(q, last) e = Add(m, eps) s = Sqrt(e) n = Div(x, s) y = Mul(w, n)",
    signature="(float[64] x) => (float[64] y)",
    feed={"x": (64,)},
    equal_ok=True,
)
_case(
    "rank_1_gate",
    "a rank-1 input times a data tensor of the same shape: neither factor is a constant",
    "q = Mul(x, x) m = ReduceMean(q, last) e = Add(m, eps) s = Sqrt(e) n = Div(x, s) y = Mul(n, z)",
    signature="(float[64] x, float[64] z) => (float[64] y)",
    feed={"x": (64,), "z": (64,)},
    equal_ok=True,
)
_case(
    "rank_1_squared_quotient",
    "a rank-1 quotient times itself: no factor is a weight",
    "q = Mul(x, x) m = ReduceMean(q, last) e = Add(m, eps) s = Sqrt(e) n = Div(x, s) y = Mul(n, n)",
    signature="(float[64] x) => (float[64] y)",
    feed={"x": (64,)},
    equal_ok=True,
)
_case(
    "axis_1",
    "normalised over axis 1 while the weight lies along the last axis (onnxruntime#15844)",
    "q = Mul(x, x) m = ReduceMean(q, axis1) e = Add(m, eps) s = Sqrt(e) n = Div(x, s) y = Mul(n, w)",
    equal_ok=True,
)
_case(
    "axis_1_square",
    "normalised over axis 1 of a square tail, so that every shape fits the last axis too (onnxruntime#17060)",
    "mu = ReduceMean(x, axis1) c = Sub(x, mu) q = Mul(c, c) v = ReduceMean(q, axis1) e = Add(v, eps) s ="
    " Sqrt(e)"
    " n = Div(c, s) nw = Mul(n, w) y = Add(nw, b)",
    signature="(float[B,64,64] x) => (float[B,64,64] y)",
    feed={"x": (2, 64, 64)},
    equal_ok=True,
)
_case(
    "axes_not_contiguous",
    "normalised over the first and the last axis: no operator has such axes",
    "q = Mul(x, x) m = ReduceMean(q, axis02) e = Add(m, eps) s = Sqrt(e) n = Div(x, s) y = Mul(n, w)",
    equal_ok=True,
)
_case(
    "axes_none_given",
    "no axes given: the mean is over all of them",
    "q = Mul(x, x) m = ReduceMean(q) e = Add(m, eps) s = Sqrt(e) n = Div(x, s) y = Mul(n, w)",
    equal_ok=True,
)
_case(
    "axes_empty_noop",
    "no axes given with noop_with_empty_axes: the mean is the square itself, x / sqrt(x^2 + eps)",
    "q = Mul(x, x) m = ReduceMean<noop_with_empty_axes = 1>(q) e = Add(m, eps) s = Sqrt(e) n = Div(x, s) y = Mul(n, w)",
)
_case(
    "axes_of_mean_and_variance_differ",
    "the mean is over the last axis, the second moment over the last two",
    "mu = ReduceMean(x, last) c = Sub(x, mu) q = Mul(x, x) m2 = ReduceMean(q, axis12) mm = Mul(mu, mu)"
    " v = Sub(m2, mm) p = Max(v, zero) e = Add(p, eps) s = Sqrt(e) n = Div(c, s) nw = Mul(n, w) y = Add(nw,"
    " b)",
)
_case(
    "axes_of_mean_and_variance_differ_two_pass",
    "centred over axis 1, scaled over the last: not a LayerNorm of x, though an RMSNorm of the centred value",
    "mu = ReduceMean(x, axis1) c = Sub(x, mu) q = Mul(c, c) v = ReduceMean(q, last) e = Add(v, eps) s ="
    " Sqrt(e)"
    " n = Div(c, s) nw = Mul(n, w) y = Add(nw, b)",
    equal_ok=True,
)
_case(
    "shape_dynamic_reshape",
    "a reshape by a run-time shape in front: shape inference loses the rank (onnxruntime#4293)",
    "h = Reshape(x, shape) q = Mul(h, h) m = ReduceMean(q, last) e = Add(m, eps) s = Sqrt(e) n = Div(h, s)"
    " k = Mul(n, w) y = Reshape(k, flat)",
    signature="(float[B,S,64] x, int64[R] shape) => (float[M] y)",
    feed=lambda rng: {**_feed({"x": (2, 5, 64)}, rng), "shape": np.array([10, 64], np.int64)},
    equal_ok=True,
)
_case(
    "shape_output_renamed",
    "the output's dimensions have names of their own: a rewrite must not tie them to others (onnxruntime#4293)",
    _LN,
    signature="(float[B,S,64] x) => (float[O,P,Q] y)",
    equal_ok=True,
)


def _stale_value_info(model: onnx.ModelProto) -> None:
    """Value infos with other dimension names than the graph's inputs have."""
    for name in ("n", "q"):
        info = onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ["rows", "columns", "features"])
        model.graph.value_info.append(info)


_case(
    "shape_names_stale",
    "inner values are declared with dimension names that inputs do not have (onnxruntime#4293)",
    _RMS,
    equal_ok=True,
    edit=_stale_value_info,
)
_case(
    "size_1_axis",
    "the normalised axis has one element: LayerNorm gives the bias",
    "mu = ReduceMean(x, last) c = Sub(x, mu) q = Mul(c, c) v = ReduceMean(q, last) e = Add(v, eps) s ="
    " Sqrt(e)"
    " n = Div(c, s) y = Mul(n, wscalar)",
    signature="(float[B,S,1] x) => (float[B,S,1] y)",
    feed={"x": (2, 5, 1)},
    equal_ok=True,
)
_case(
    "size_1_axis_expanded_by_weight",
    "the normalised axis has one element and the weight expands it",
    _RMS,
    signature="(float[B,S,1] x) => (float[B,S,64] y)",
    feed={"x": (2, 5, 1)},
    equal_ok=True,
)
_case(
    "size_1_axis_reduced_away",
    "the mean is over an axis of one element: x / sqrt(x^2 + eps), element by element",
    "q = Mul(x, x) m = ReduceMean(q, axis1) e = Add(m, eps) s = Sqrt(e) n = Div(x, s) y = Mul(n, w)",
    signature="(float[B,1,64] x) => (float[B,1,64] y)",
    feed={"x": (2, 1, 64)},
    equal_ok=True,
)
_case(
    "size_unknown_sum",
    "sum * (1/64) over an axis of unknown size, fed with size 1: the weight's 64 does not prove the divisor",
    "q = Mul(x, x) t = ReduceSum(q, last) m = Mul(t, inv_n) e = Add(m, eps) s = Sqrt(e) n = Div(x, s) y = Mul(n, w)",
    signature="(float[B,S,D] x) => (float[B,S,E] y)",
    feed={"x": (2, 5, 1)},
)
_case(
    "size_unknown_weight_expands",
    "an axis of unknown size, fed with size 1: the weight may be wider than x",
    _RMS,
    signature="(float[B,S,D] x) => (float[B,S,E] y)",
    feed={"x": (2, 5, 1)},
    equal_ok=True,
)
_case(
    "rank_dynamic_positive_axis",
    "axis 2 of a tensor of unknown rank, fed with rank 4: it is not the last axis",
    "h = Reshape(x, shape) q = Mul(h, h) m = ReduceMean(q, axis2) e = Add(m, eps) s = Sqrt(e) n = Div(h, s)"
    " k = Mul(n, w) y = Reshape(k, flat)",
    signature="(float[B,S,64] x, int64[R] shape) => (float[M] y)",
    feed=lambda rng: {**_feed({"x": (6, 5, 64)}, rng), "shape": np.array([2, 3, 5, 64], np.int64)},
)
_case(
    "rank_dynamic_last_axis",
    "the last axis of a tensor of unknown rank, fed with size 1: the weight expands it",
    "h = Reshape(x, shape) q = Mul(h, h) m = ReduceMean(q, last) e = Add(m, eps) s = Sqrt(e) n = Div(h, s)"
    " k = Mul(n, w) y = Reshape(k, flat)",
    signature="(float[B,S,64] x, int64[R] shape) => (float[M] y)",
    feed=lambda rng: {**_feed({"x": (2, 1, 64)}, rng), "shape": np.array([2, 8, 8, 1], np.int64)},
    equal_ok=True,
)
_case(
    "axes_at_run_time",
    "the axes are a graph input, fed with another axis than the last",
    "q = Mul(x, x) m = ReduceMean(q, axes) e = Add(m, eps) s = Sqrt(e) n = Div(x, s) y = Mul(n, w)",
    signature="(float[B,S,64] x, int64[1] axes) => (float[B,S,64] y)",
    feed=lambda rng: {**_feed({"x": (2, 5, 64)}, rng), "axes": np.array([1], np.int64)},
)
_case(
    "axes_overridable",
    "the axes are an initializer that callers may override",
    _RMS,
    overridable=("last",),
    feed=lambda rng: {**_feed({"x": (2, 5, 64)}, rng), "last": np.array([1], np.int64)},
)
_case(
    "axes_from_shape",
    "the axes are computed, but from the rank only: they fold to the last axis",
    "sh = Shape(x) r = Size(sh) k = Constant<value_int = -1>() p = Add(r, k) d = Constant<value_int = 1>()"
    " axes = Range(p, r, d) q = Mul(x, x) m = ReduceMean(q, axes) e = Add(m, eps) s = Sqrt(e) n = Div(x, s)"
    " y = Mul(n, w)",
    equal_ok=True,
)

# --- other uses of inner values -----------------------------------------------------------------------------

_case(
    "inner_normalised_is_output",
    "the normalised value without its weight is a graph output (onnxruntime#4110)",
    _RMS,
    signature=f"{_X} => (float[B,S,64] y, float[B,S,64] n)",
    equal_ok=True,
)
_case(
    "inner_deviation_is_output",
    "the root mean square is a graph output",
    _RMS,
    signature=f"{_X} => (float[B,S,64] y, float[B,S,1] s)",
    equal_ok=True,
)
_case(
    "inner_mean_and_centred_are_outputs",
    "the mean and the centred value of a LayerNorm are graph outputs",
    _LN,
    signature=f"{_X} => (float[B,S,64] y, float[B,S,1] mu, float[B,S,64] c)",
    equal_ok=True,
)
_case(
    "inner_value_used_elsewhere",
    "the variance feeds another branch",
    _LN + " z = Mul(v, two)",
    signature=f"{_X} => (float[B,S,64] y, float[B,S,1] z)",
    equal_ok=True,
)
_case(
    "shared_mean",
    "two norms of the same x share the centring after CSE (onnxruntime#15919)",
    _LN + " e2 = Add(v, eps_small) s2 = Sqrt(e2) n2 = Div(c, s2) y2 = Mul(n2, w2)",
    signature=f"{_X} => (float[B,S,64] y, float[B,S,64] y2)",
    equal_ok=True,
)
_case(
    "shared_mean_with_a_near_miss",
    "a LayerNorm and an eps outside the root share the mean: one may be fused, the other not",
    _LN + " s2 = Sqrt(v) e2 = Add(s2, eps_large) n2 = Div(c, e2) y2 = Mul(n2, w2)",
    signature=f"{_X} => (float[B,S,64] y, float[B,S,64] y2)",
    equal_ok=True,
)
_case(
    "shared_deviation",
    "two RMSNorms share their root: same eps, other weights",
    _RMS + " y2 = Mul(n, w2)",
    signature=f"{_X} => (float[B,S,64] y, float[B,S,64] y2)",
    equal_ok=True,
)
_case(
    "captured_inner_value",
    "a branch of an If captures the root mean square of a norm outside",
    _RMS + " z = If(p) <then_branch = t() => (float[B,S,1] a) { a = Mul(s, two) },"
    " else_branch = f() => (float[B,S,1] c1) { c1 = Identity(e) }>",
    signature="(float[B,S,64] x, bool p) => (float[B,S,64] y, float[B,S,1] z)",
    feed=lambda rng: {**_feed({"x": (2, 5, 64)}, rng), "p": np.array(True)},
    equal_ok=True,
)
_case(
    "captured_input",
    "a norm inside a branch whose x and weight come from the graph outside",
    "y = If(p) <then_branch = t() => (float[B,S,64] o) { q = Mul(x, x) m = ReduceMean(q, last) e = Add(m,"
    " eps)"
    " s = Sqrt(e) n = Div(x, s) o = Mul(n, w) }, else_branch = f() => (float[B,S,64] i) { i = Identity(x) }>",
    signature="(float[B,S,64] x, bool p) => (float[B,S,64] y)",
    feed=lambda rng: {**_feed({"x": (2, 5, 64)}, rng), "p": np.array(True)},
    equal_ok=True,
)
_case(
    "captured_eps",
    "eps comes out of a branch",
    "k = If(p) <then_branch = t() => (float a) { a = Identity(eps) },"
    " else_branch = f() => (float c1) { c1 = Identity(eps_large) }>"
    " q = Mul(x, x) m = ReduceMean(q, last) e = Add(m, k) s = Sqrt(e) n = Div(x, s) y = Mul(n, w)",
    signature="(float[B,S,64] x, bool p) => (float[B,S,64] y)",
    feed=lambda rng: {**_feed({"x": (2, 5, 64)}, rng), "p": np.array(False)},
)
_case(
    "captured_across_the_branch",
    "the statistics are taken outside, the division is inside a branch",
    _RSTD + " y = If(p) <then_branch = t() => (float[B,S,64] o) { n = Div(x, s) o = Mul(n, w) },"
    " else_branch = f() => (float[B,S,64] i) { i = Identity(x) }>",
    signature="(float[B,S,64] x, bool p) => (float[B,S,64] y)",
    feed=lambda rng: {**_feed({"x": (2, 5, 64)}, rng), "p": np.array(True)},
    equal_ok=True,
)
_case(
    "name_shadowed_in_a_branch",
    "a branch has its own value under the name of the outer centred value's input",
    "k = If(p) <then_branch = t() => (float[B,S,64] o) { h = Mul(x, two) o = Mul(h, h) },"
    " else_branch = f() => (float[B,S,64] o2) { h = Mul(x, three) o2 = Mul(h, x) }>"
    " m = ReduceMean(k, last) e = Add(m, eps) s = Sqrt(e) n = Div(x, s) y = Mul(n, w)",
    signature="(float[B,S,64] x, bool p) => (float[B,S,64] y)",
    feed=lambda rng: {**_feed({"x": (2, 5, 64)}, rng), "p": np.array(True)},
)
_case(
    "loop_carried_weight",
    "inside a Loop the weight is carried from one turn to the next",
    "trip = Constant<value_int = 3>() t = Constant<value = bool {1}>()"
    " wl, y = Loop(trip, t, w) <body = lb(int64 i, bool c, float[64] wi)"
    " => (bool co, float[64] wo, float[B,S,64] yo) { co = Identity(c) wo = Mul(wi, half) q = Mul(x, x)"
    " m = ReduceMean(q, last) e = Add(m, eps) s = Sqrt(e) n = Div(x, s) yo = Mul(n, wi) }>",
    signature="(float[B,S,64] x) => (float[T,B,S,64] y)",
    equal_ok=True,
)

# --- types --------------------------------------------------------------------------------------------------


def _half_feed(rng: np.random.Generator, scale: float = 1.0) -> Inputs:
    """A float16 input of the given scale."""
    return {"x": (scale * rng.standard_normal((2, 5, 64))).astype(np.float16)}


_HALF = "(float16[B,S,64] x) => (float16[B,S,64] y)"
_case(
    "half_eps_underflows",
    "eps 1e-12 is zero in float16: the graph divides by the bare root (onnxruntime#17689)",
    "q = Mul(x, x) m = ReduceMean(q, last) e = Add(m, eps_half_underflows) s = Sqrt(e) n = Div(x, s)"
    " y = Mul(n, w_half)",
    signature=_HALF,
    feed=_half_feed,
)
_case(
    "half_eps_rounded",
    "eps 1e-5 is 1.0014e-05 in float16, and the arithmetic is in float16 (onnxruntime#17689)",
    "q = Mul(x, x) m = ReduceMean(q, last) e = Add(m, eps_half) s = Sqrt(e) n = Div(x, s) y = Mul(n, w_half)",
    signature=_HALF,
    feed=_half_feed,
    equal_ok=True,
)
_case(
    "half_cast_before_weight",
    "cast back before the weight: another rounding than after it (onnxruntime#26631)",
    "h = Cast<to = 1>(x) q = Mul(h, h) m = ReduceMean(q, last) e = Add(m, eps) s = Sqrt(e) d = Div(h, s)"
    " n = Cast<to = 10>(d) y = Mul(n, w_half)",
    signature=_HALF,
    feed=_half_feed,
    equal_ok=True,
)
_case(
    "half_cast_after_weight",
    "cast back after the float32 weight (onnxruntime#26631)",
    "h = Cast<to = 1>(x) q = Mul(h, h) m = ReduceMean(q, last) e = Add(m, eps) s = Sqrt(e) d = Div(h, s)"
    " nw = Mul(d, w) y = Cast<to = 10>(nw)",
    signature=_HALF,
    feed=_half_feed,
    equal_ok=True,
)
_case(
    "half_root_rounded",
    "the root is rounded to float16 before the division",
    "h = Cast<to = 1>(x) q = Mul(h, h) m = ReduceMean(q, last) e = Add(m, eps) s = Sqrt(e) t = Cast<to ="
    " 10>(s)"
    " d = Div(x, t) y = Mul(d, w_half)",
    signature=_HALF,
    feed=_half_feed,
    equal_ok=True,
)
_case(
    "half_square_before_cast",
    "the square is taken in float16 and overflows above 255: only then the cast",
    "q = Mul(x, x) h = Cast<to = 1>(q) m = ReduceMean(h, last) e = Add(m, eps) s = Sqrt(e) g = Cast<to ="
    " 1>(x)"
    " d = Div(g, s) n = Cast<to = 10>(d) y = Mul(n, w_half)",
    signature=_HALF,
    feed=partial(_half_feed, scale=300.0),
)
_case(
    "half_square_before_cast_centred",
    "the squared deviation is taken in float16 and overflows, then cast",
    "h = Cast<to = 1>(x) mu = ReduceMean(h, last) c = Sub(h, mu) ch = Cast<to = 10>(c) q = Mul(ch, ch)"
    " qf = Cast<to = 1>(q) v = ReduceMean(qf, last) e = Add(v, eps) s = Sqrt(e) d = Div(c, s) n = Cast<to ="
    " 10>(d)"
    " y = Mul(n, w_half)",
    signature=_HALF,
    feed=partial(_half_feed, scale=300.0),
)
_case(
    "half_through_a_narrow_cast",
    "a float32 x is rounded to float16 for the statistics only",
    "h = Cast<to = 10>(x) g = Cast<to = 1>(h) q = Mul(g, g) m = ReduceMean(q, last) e = Add(m, eps) s ="
    " Sqrt(e)"
    " n = Div(x, s) y = Mul(n, w)",
    feed=lambda rng: {"x": (1e4 * (rng.standard_normal((2, 5, 64)) + 8.0)).astype(np.float32)},
)
_case(
    "output_type_widened",
    "a float32 weight on a float16 x: the output is float32 (onnxruntime#27455)",
    "h = Cast<to = 1>(x) q = Mul(h, h) m = ReduceMean(q, last) e = Add(m, eps) s = Sqrt(e) d = Div(h, s) y = Mul(d, w)",
    signature="(float16[B,S,64] x) => (float[B,S,64] y)",
    feed=_half_feed,
    equal_ok=True,
)
_case(
    "output_type_rounded_then_widened",
    "cast to float16 and back before the float32 weight: dropping the pair of casts changes the output",
    "h = Cast<to = 1>(x) q = Mul(h, h) m = ReduceMean(q, last) e = Add(m, eps) s = Sqrt(e) d = Div(h, s)"
    " n = Cast<to = 10>(d) g = Cast<to = 1>(n) y = Mul(g, w)",
    signature="(float16[B,S,64] x) => (float[B,S,64] y)",
    feed=_half_feed,
    equal_ok=True,
)


def _integers(rng: np.random.Generator) -> Inputs:
    """Small integers."""
    return {"x": rng.integers(-9, 10, (2, 5, 64)).astype(np.int32)}


_case(
    "integer_cast_first",
    "integers cast to float: the norm's x is the cast, not the integers",
    "h = Cast<to = 1>(x) q = Mul(h, h) m = ReduceMean(q, last) e = Add(m, eps) s = Sqrt(e) n = Div(h, s) y = Mul(n, w)",
    signature="(int32[B,S,64] x) => (float[B,S,64] y)",
    feed=_integers,
    equal_ok=True,
)
_case(
    "integer_mean",
    "the mean is taken in integers: the division truncates",
    "q = Mul(x, x) mi = ReduceMean(q, last) m = Cast<to = 1>(mi) e = Add(m, eps) s = Sqrt(e) h = Cast<to ="
    " 1>(x)"
    " n = Div(h, s) y = Mul(n, w)",
    signature="(int32[B,S,64] x) => (float[B,S,64] y)",
    feed=_integers,
)
_case(
    "integer_sum_divided",
    "the sum is divided in integers",
    "q = Mul(x, x) t = ReduceSum(q, last) mi = Div(t, n_int) m = Cast<to = 1>(mi) e = Add(m, eps) s = Sqrt(e)"
    " h = Cast<to = 1>(x) n = Div(h, s) y = Mul(n, w)",
    signature="(int32[B,S,64] x) => (float[B,S,64] y)",
    feed=_integers,
)
_case(
    "integer_truncated_input",
    "x passes through an integer type: the statistics see truncated values",
    "i = Cast<to = 7>(x) h = Cast<to = 1>(i) q = Mul(h, h) m = ReduceMean(q, last) e = Add(m, eps) s ="
    " Sqrt(e)"
    " n = Div(x, s) y = Mul(n, w)",
)

# --- the arithmetic -----------------------------------------------------------------------------------------

_case(
    "exponent_4_rms",
    "the fourth power instead of the square (wrong in ONNX Runtime 1.32)",
    "q = Pow(x, four) m = ReduceMean(q, last) e = Add(m, eps) s = Sqrt(e) n = Div(x, s) y = Mul(n, w)",
)
_case(
    "exponent_4_layer_norm",
    "the fourth power of the deviation (wrong in ONNX Runtime 1.32)",
    "mu = ReduceMean(x, last) c = Sub(x, mu) q = Pow(c, four) v = ReduceMean(q, last) e = Add(v, eps) s ="
    " Sqrt(e)"
    " n = Div(c, s) nw = Mul(n, w) y = Add(nw, b)",
)
_case(
    "exponent_from_data",
    "the exponent is a graph input",
    "q = Pow(x, p) m = ReduceMean(q, last) e = Add(m, eps) s = Sqrt(e) n = Div(x, s) y = Mul(n, w)",
    signature="(float[B,S,64] x, float p) => (float[B,S,64] y)",
    feed=lambda rng: {**_feed({"x": (2, 5, 64)}, rng), "p": np.array(4.0, np.float32)},
)
_case(
    "exponent_of_root",
    "the mean square to the power -1/4 instead of -1/2",
    "q = Mul(x, x) m = ReduceMean(q, last) e = Add(m, eps) s = Sqrt(e) t = Sqrt(s) n = Div(x, t) y = Mul(n, w)",
)
_case(
    "no_root",
    "divided by the mean square itself",
    "q = Mul(x, x) m = ReduceMean(q, last) e = Add(m, eps) n = Div(x, e) y = Mul(n, w)",
)
_case(
    "reversed_difference",
    "mean - x: a LayerNorm with the negated weight (wrong in ONNX Runtime 1.32)",
    "mu = ReduceMean(x, last) c = Sub(mu, x) q = Mul(c, c) v = ReduceMean(q, last) e = Add(v, eps) s ="
    " Sqrt(e)"
    " n = Div(c, s) nw = Mul(n, w) y = Add(nw, b)",
    equal_ok=True,
)
_case(
    "reversed_quotient",
    "std / d: the reciprocal of a norm (wrong in ONNX Runtime 1.32)",
    _CENTRE + " n = Div(s, c) nw = Mul(n, w) y = Add(nw, b)",
)
_case(
    "reversed_quotient_rms",
    "rms / x",
    _RSTD + " n = Div(s, x) y = Mul(n, w)",
)
_case(
    "multiplied_by_deviation",
    "multiplied by the root instead of divided by it",
    _RSTD + " n = Mul(x, s) y = Mul(n, w)",
)
_case(
    "weight_divides",
    "the norm is divided by the weight: a norm with weight 1/w",
    _RSTD + " n = Div(x, s) y = Div(n, w)",
    equal_ok=True,
)
_case(
    "nchw_weight_and_bias",
    "channels-first with a weight and another bias (ONNX Runtime's Python tool fills the bias with the weight)",
    "mu = ReduceMean(x, axis1) c = Sub(x, mu) q = Mul(c, c) v = ReduceMean(q, axis1) e = Add(v, eps) s ="
    " Sqrt(e)"
    " n = Div(c, s) nw = Mul(n, wc) y = Add(nw, bc)",
    signature=_NCHW,
    feed=_IMAGE,
    equal_ok=True,
)
_case(
    "nchw_no_bias",
    "channels-first without a bias (ONNX Runtime's Python tool fills it with the weight)",
    "mu = ReduceMean(x, axis1) c = Sub(x, mu) q = Mul(c, c) v = ReduceMean(q, axis1) e = Add(v, eps) s ="
    " Sqrt(e)"
    " n = Div(c, s) y = Mul(n, wc)",
    signature=_NCHW,
    feed=_IMAGE,
    equal_ok=True,
)
_case(
    "eps_default_of_layer_norm",
    "the operator without an eps attribute: its default is 1e-5, not 1e-12",
    "y = LayerNormalization(x, w, b)",
    feed=lambda rng: {"x": (1e-3 * rng.standard_normal((2, 5, 64))).astype(np.float32)},
    equal_ok=True,
)
_case(
    "eps_default_of_rms_norm",
    "RMSNormalization without an eps attribute: 1e-5",
    "y = RMSNormalization(x, w)",
    feed=lambda rng: {"x": (1e-3 * rng.standard_normal((2, 5, 64))).astype(np.float32)},
    equal_ok=True,
    opset=23,
)
_case(
    "eps_absent_rms",
    "no eps at all: a zero row gives NaN, and no default may be invented",
    "q = Mul(x, x) m = ReduceMean(q, last) s = Sqrt(m) n = Div(x, s) y = Mul(n, w)",
    feed=lambda rng: {"x": (1e-4 * rng.standard_normal((2, 5, 64))).astype(np.float32)},
)
_case(
    "eps_absent_layer_norm",
    "no eps at all in a LayerNorm",
    "mu = ReduceMean(x, last) c = Sub(x, mu) q = Mul(c, c) v = ReduceMean(q, last) s = Sqrt(v) n = Div(c, s)"
    " nw = Mul(n, w) y = Add(nw, b)",
    feed=lambda rng: {"x": (1e-4 * rng.standard_normal((2, 5, 64))).astype(np.float32)},
)
_case(
    "eps_zero",
    "eps is added and is zero",
    "q = Mul(x, x) m = ReduceMean(q, last) e = Add(m, eps_zero) s = Sqrt(e) n = Div(x, s) y = Mul(n, w)",
    feed=lambda rng: {"x": (1e-4 * rng.standard_normal((2, 5, 64))).astype(np.float32)},
)
_case(
    "eps_outside_root",
    "eps is added to the root, not under it",
    "q = Mul(x, x) m = ReduceMean(q, last) s = Sqrt(m) e = Add(s, eps_large) n = Div(x, e) y = Mul(n, w)",
)
_case(
    "eps_outside_reciprocal",
    "eps is added to the reciprocal of the root",
    "q = Mul(x, x) m = ReduceMean(q, last) s = Sqrt(m) r = Reciprocal(s) e = Add(r, eps_large) n = Mul(x, e)"
    " y = Mul(n, w)",
)
_case(
    "eps_inside_and_outside",
    "eps is added under the root and again outside",
    _RSTD + " t = Add(s, eps_large) n = Div(x, t) y = Mul(n, w)",
)
_case(
    "eps_subtracted",
    "eps is subtracted",
    "q = Mul(x, x) m = ReduceMean(q, last) e = Sub(m, eps) s = Sqrt(e) n = Div(x, s) y = Mul(n, w)",
)
_case(
    "eps_vector",
    "eps varies along the row",
    "q = Mul(x, x) m = ReduceMean(q, last) e = Add(m, eps_vector) s = Sqrt(e) n = Div(x, s) y = Mul(n, w)",
)
_case(
    "eps_per_row",
    "eps varies over the rows",
    "q = Mul(x, x) m = ReduceMean(q, last) e = Add(m, eps_rows) s = Sqrt(e) n = Div(x, s) y = Mul(n, w)",
)
_case(
    "eps_of_rank_3",
    "eps has three axes of size one: one number all the same",
    "q = Mul(x, x) m = ReduceMean(q, last) e = Add(m, eps_one) s = Sqrt(e) n = Div(x, s) y = Mul(n, w)",
    equal_ok=True,
)
_case(
    "eps_negative",
    "eps is negative",
    "q = Mul(x, x) m = ReduceMean(q, last) e = Add(m, eps_negative) s = Sqrt(e) n = Div(x, s) y = Mul(n, w)",
)
_case(
    "eps_is_an_input",
    "eps is a graph input",
    "q = Mul(x, x) m = ReduceMean(q, last) e = Add(m, k) s = Sqrt(e) n = Div(x, s) y = Mul(n, w)",
    signature="(float[B,S,64] x, float k) => (float[B,S,64] y)",
    feed=lambda rng: {**_feed({"x": (2, 5, 64)}, rng), "k": np.array(0.3, np.float32)},
)
_case(
    "eps_overridable",
    "eps is an initializer that is a graph input too: callers may override it",
    _RMS,
    overridable=("eps",),
    feed=lambda rng: {**_feed({"x": (2, 5, 64)}, rng), "eps": np.array(0.3, np.float32)},
)
_case(
    "eps_from_data",
    "eps is computed from the data",
    "q = Mul(x, x) m = ReduceMean(q, last) a = Abs(x) k = ReduceMax(a, last) e = Add(m, k) s = Sqrt(e)"
    " n = Div(x, s) y = Mul(n, w)",
)
_case(
    "weight_overridable",
    "the weight is an initializer that callers may override: it must be passed on, not folded",
    _RMS,
    overridable=("w",),
    feed=lambda rng: {**_feed({"x": (2, 5, 64)}, rng), "w": np.full(64, 0.25, np.float32)},
    equal_ok=True,
)
_case(
    "exponent_overridable",
    "the exponent is an initializer that callers may override",
    "q = Pow(x, two) m = ReduceMean(q, last) e = Add(m, eps) s = Sqrt(e) n = Div(x, s) y = Mul(n, w)",
    overridable=("two",),
    feed=lambda rng: {**_feed({"x": (2, 5, 64)}, rng), "two": np.array(4.0, np.float32)},
)
_case(
    "variance_unbiased",
    "divided by N - 1: a LayerNorm with another weight and eps",
    "mu = ReduceMean(x, last) c = Sub(x, mu) q = Mul(c, c) t = ReduceSum(q, last) v = Div(t, n_less_1)"
    " e = Add(v, eps) s = Sqrt(e) n = Div(c, s) nw = Mul(n, w) y = Add(nw, b)",
    equal_ok=True,
)
_case(
    "variance_unbiased_no_eps",
    "the unbiased deviation without an eps",
    "mu = ReduceMean(x, last) c = Sub(x, mu) q = Mul(c, c) t = ReduceSum(q, last) v = Div(t, n_less_1) s ="
    " Sqrt(v)"
    " n = Div(c, s) nw = Mul(n, w) y = Add(nw, b)",
)
_case(
    "std_plus_eps",
    "(x - mean) / (std + eps), as the annotated Transformer writes it",
    "mu = ReduceMean(x, last) c = Sub(x, mu) q = Mul(c, c) t = ReduceSum(q, last) v = Div(t, n_less_1) s ="
    " Sqrt(v)"
    " e = Add(s, eps_large) n = Div(c, e) nw = Mul(n, w) y = Add(nw, b)",
)
_case(
    "std_plus_eps_biased",
    "(x - mean) / (std + eps) with the population deviation",
    "mu = ReduceMean(x, last) c = Sub(x, mu) q = Mul(c, c) v = ReduceMean(q, last) s = Sqrt(v)"
    " e = Add(s, eps_large) n = Div(c, e) nw = Mul(n, w) y = Add(nw, b)",
)
_case(
    "divisor_of_variance",
    "the sum of squares is divided by N + 1: a norm with another weight and eps",
    "q = Mul(x, x) t = ReduceSum(q, last) m = Div(t, n_plus_1) e = Add(m, eps) s = Sqrt(e) n = Div(x, s) y = Mul(n, w)",
    equal_ok=True,
)
_case(
    "divisor_of_mean",
    "the mean is a sum over N - 1: what is subtracted is not the mean",
    "t = ReduceSum(x, last) mu = Div(t, n_less_1) c = Sub(x, mu) q = Mul(x, x) m2 = ReduceMean(q, last)"
    " mm = Mul(mu, mu) v = Sub(m2, mm) p = Max(v, zero) e = Add(p, eps) s = Sqrt(e) n = Div(c, s) nw ="
    " Mul(n, w)"
    " y = Add(nw, b)",
)
_case(
    "divisor_of_mean_two_pass",
    "the mean is a sum over N - 1, the variance is of that difference: an RMSNorm of it, no LayerNorm of x",
    "t = ReduceSum(x, last) mu = Div(t, n_less_1) c = Sub(x, mu) q = Mul(c, c) v = ReduceMean(q, last)"
    " e = Add(v, eps) s = Sqrt(e) n = Div(c, s) nw = Mul(n, w) y = Add(nw, b)",
    equal_ok=True,
)
_case(
    "half_of_the_mean",
    "half the mean is subtracted, the variance is the true one",
    "mu = ReduceMean(x, last) c = Sub(x, mu) q = Mul(c, c) v = ReduceMean(q, last) e = Add(v, eps) s ="
    " Sqrt(e)"
    " h = Mul(mu, half) d = Sub(x, h) n = Div(d, s) y = Mul(n, w)",
)
_case(
    "not_centred_above",
    "the variance is centred, the numerator is not",
    _CENTRE + " n = Div(x, s) y = Mul(n, w)",
)
_case(
    "not_centred_below",
    "the numerator is centred, the second moment is not",
    "mu = ReduceMean(x, last) c = Sub(x, mu) q = Mul(x, x) m = ReduceMean(q, last) e = Add(m, eps) s ="
    " Sqrt(e)"
    " n = Div(c, s) y = Mul(n, w)",
)
_case(
    "moments_added",
    "E[x^2] + E[x]^2: the sign of the one-pass variance is wrong",
    "mu = ReduceMean(x, last) c = Sub(x, mu) q = Mul(x, x) m2 = ReduceMean(q, last) mm = Mul(mu, mu) v ="
    " Add(m2, mm)"
    " e = Add(v, eps) s = Sqrt(e) n = Div(c, s) y = Mul(n, w)",
)
_case(
    "clamp_above_zero",
    "the one-pass variance is clamped at 0.5, not at zero",
    "mu = ReduceMean(x, last) c = Sub(x, mu) q = Mul(x, x) m2 = ReduceMean(q, last) mm = Mul(mu, mu) v ="
    " Sub(m2, mm)"
    " p = Max(v, half) e = Add(p, eps) s = Sqrt(e) n = Div(c, s) y = Mul(n, w)",
    feed=lambda rng: {"x": (0.3 * rng.standard_normal((2, 5, 64))).astype(np.float32)},
)
_case(
    "clamp_from_above",
    "the mean square is clamped from above",
    "q = Mul(x, x) m = ReduceMean(q, last) p = Min(m, one) e = Add(p, eps) s = Sqrt(e) n = Div(x, s) y = Mul(n, w)",
    feed=lambda rng: {"x": (3.0 * rng.standard_normal((2, 5, 64))).astype(np.float32)},
)
_case(
    "clamp_as_eps",
    "max(mean square, eps) instead of mean square + eps",
    "q = Mul(x, x) m = ReduceMean(q, last) p = Max(m, eps_large) s = Sqrt(p) n = Div(x, s) y = Mul(n, w)",
    feed=lambda rng: {"x": (0.3 * rng.standard_normal((2, 5, 64))).astype(np.float32)},
)
_case(
    "absolute_mean",
    "the mean of |x| instead of a root mean square",
    "a = Abs(x) m = ReduceMean(a, last) e = Add(m, eps) n = Div(x, e) y = Mul(n, w)",
)
_case(
    "absolute_under_the_root",
    "the mean of |x| under the root: nothing is squared",
    "a = Abs(x) m = ReduceMean(a, last) e = Add(m, eps) s = Sqrt(e) n = Div(x, s) y = Mul(n, w)",
)
_case(
    "absolute_above",
    "|x| over the root mean square: an RMSNorm of |x|, not of x",
    _RSTD + " a = Abs(x) n = Div(a, s) y = Mul(n, w)",
    equal_ok=True,
)
_case(
    "absolute_deviation",
    "the centred value over the mean absolute deviation",
    "mu = ReduceMean(x, last) c = Sub(x, mu) a = Abs(c) v = ReduceMean(a, last) e = Add(v, eps) n = Div(c, e)"
    " y = Mul(n, w)",
)
_case(
    "cube_above",
    "x^3 over the root mean square of x",
    _RSTD + " k = Pow(x, three) n = Div(k, s) y = Mul(n, w)",
)
_case(
    "cube_below",
    "the mean of |x|^3 under the root",
    "a = Abs(x) q = Pow(a, three) m = ReduceMean(q, last) e = Add(m, eps) s = Sqrt(e) n = Div(x, s) y = Mul(n, w)",
)
_case(
    "self_gated",
    "x times its own norm: linear in neither",
    _RSTD + " n = Div(x, s) g = Mul(n, x) y = Mul(g, w)",
    equal_ok=True,
)
_case(
    "root_mean_of_maximum",
    "divided by the largest absolute value",
    "a = Abs(x) m = ReduceMax(a, last) e = Add(m, eps) n = Div(x, e) y = Mul(n, w)",
)

# --- what the mean is of ------------------------------------------------------------------------------------

_case(
    "mean_square_of_another_tensor",
    "the mean square is of another input",
    "q = Mul(z, z) m = ReduceMean(q, last) e = Add(m, eps) s = Sqrt(e) n = Div(x, s) y = Mul(n, w)",
    signature=_XY,
    feed=_TWO,
)
_case(
    "product_of_two_tensors",
    "the mean is of x * z",
    "q = Mul(x, z) a = Abs(q) m = ReduceMean(a, last) e = Add(m, eps) s = Sqrt(e) n = Div(x, s) y = Mul(n, w)",
    signature=_XY,
    feed=_TWO,
)
_case(
    "mean_of_another_tensor",
    "the mean is of another input, the variance of that difference: no LayerNorm, though an RMSNorm of x - mean(z)",
    "mu = ReduceMean(z, last) c = Sub(x, mu) q = Mul(c, c) v = ReduceMean(q, last) e = Add(v, eps) s ="
    " Sqrt(e)"
    " n = Div(c, s) nw = Mul(n, w) y = Add(nw, b)",
    signature=_XY,
    feed=_TWO,
    equal_ok=True,
)
_case(
    "variance_of_another_tensor",
    "the variance is of another input",
    "mu = ReduceMean(x, last) c = Sub(x, mu) mz = ReduceMean(z, last) d = Sub(z, mz) q = Mul(d, d)"
    " v = ReduceMean(q, last) e = Add(v, eps) s = Sqrt(e) n = Div(c, s) nw = Mul(n, w) y = Add(nw, b)",
    signature=_XY,
    feed=_TWO,
)
_case(
    "statistics_before_the_residual",
    "the statistics are of x, the numerator is x + z",
    _RSTD + " r = Add(x, z) n = Div(r, s) y = Mul(n, w)",
    signature=_XY,
    feed=_TWO,
)
_case(
    "mean_of_a_slice",
    "the mean square is of the first half of the row",
    "h = Slice(x, start0, end32, last, step1) q = Mul(h, h) m = ReduceMean(q, last) e = Add(m, eps) s ="
    " Sqrt(e)"
    " n = Div(x, s) y = Mul(n, w)",
)
_case(
    "mean_of_a_slice_layer_norm",
    "the mean is of the first half of the row, the variance of all of it",
    "h = Slice(x, start0, end32, last, step1) mu = ReduceMean(h, last) c = Sub(x, mu) mx = ReduceMean(x,"
    " last)"
    " d = Sub(x, mx) q = Mul(d, d) v = ReduceMean(q, last) e = Add(v, eps) s = Sqrt(e) n = Div(c, s) y ="
    " Mul(n, w)",
)
_case(
    "mean_of_a_slice_with_the_row_divisor",
    "the sum of half the row, divided by the row's length",
    "h = Slice(x, start0, end32, last, step1) q = Mul(h, h) t = ReduceSum(q, last) m = Mul(t, inv_n) e ="
    " Add(m, eps)"
    " s = Sqrt(e) n = Div(x, s) y = Mul(n, w)",
)
_case(
    "masked_mean_constant",
    "a constant mask on the square",
    "q = Mul(x, x) k = Mul(q, mask) m = ReduceMean(k, last) e = Add(m, eps) s = Sqrt(e) n = Div(x, s) y = Mul(n, w)",
)
_case(
    "masked_mean_input",
    "a mask from outside, divided by its count",
    "q = Mul(x, x) k = Mul(q, z) t = ReduceSum(k, last) c = ReduceSum(z, last) m = Div(t, c) e = Add(m, eps)"
    " s = Sqrt(e) n = Div(x, s) y = Mul(n, w)",
    signature=_XY,
    feed=lambda rng: {
        **_feed({"x": (2, 5, 64)}, rng),
        "z": (rng.random((2, 5, 64)) > 0.3).astype(np.float32),
    },
)
_case(
    "masked_mean_where",
    "the positive part only, chosen by Where",
    "g = Greater(x, zero) h = Where(g, x, zero) q = Mul(h, h) m = ReduceMean(q, last) e = Add(m, eps) s ="
    " Sqrt(e)"
    " n = Div(x, s) y = Mul(n, w)",
)
_case(
    "weighted_mean",
    "the weight is squared with x but missing above: no norm of x, though one of w * x with the weight 1/w",
    "k = Mul(x, w) q = Mul(k, k) m = ReduceMean(q, last) e = Add(m, eps) s = Sqrt(e) y = Div(x, s)",
    equal_ok=True,
)
_case(
    "statistics_shifted_in_time",
    "the statistics of row 0 are used for every row",
    _RSTD + " i = Constant<value_ints = [0]>() s0 = Gather<axis = 1>(s, i) n = Div(x, s0) y = Mul(n, w)",
)
_case(
    "write_between",
    "rows are overwritten between the statistics and the use",
    _RSTD + " h = ScatterND(x, scatter_at, k) n = Div(h, s) y = Mul(n, w)",
    signature="(float[4,64] x, float[2,64] k) => (float[4,64] y)",
    feed={"x": (4, 64), "k": (2, 64)},
)
_case(
    "activation_between",
    "an activation between the statistics and the use",
    _RSTD + " h = Relu(x) n = Div(h, s) y = Mul(n, w)",
)
_case(
    "dropout_between",
    "dropout in training mode between the statistics and the use",
    _RSTD + " h = Dropout<seed = 7>(x, ratio, yes) n = Div(h, s) y = Mul(n, w)",
)
_case(
    "dropout_in_the_statistics",
    "the statistics are of the dropped-out x, the numerator is x",
    "h = Dropout<seed = 7>(x, ratio, yes) q = Mul(h, h) m = ReduceMean(q, last) e = Add(m, eps) s = Sqrt(e)"
    " n = Div(x, s) y = Mul(n, w)",
)
_case(
    "dropout_at_inference",
    "dropout without training mode does nothing",
    _RSTD + " h = Dropout(x) n = Div(h, s) y = Mul(n, w)",
    equal_ok=True,
)
_case(
    "random_noise",
    "noise is added to x after the statistics",
    _RSTD + " k = RandomNormalLike<seed = 7.0>(x) h = Add(x, k) n = Div(h, s) y = Mul(n, w)",
)

# --- the weight from data -----------------------------------------------------------------------------------

_case(
    "weight_from_x",
    "the scale is computed from x itself and varies over the rows",
    _RSTD + " n = Div(x, s) g = Sigmoid(x) y = Mul(n, g)",
    equal_ok=True,
)
_case(
    "weight_from_x_mean_over_rows",
    "the scale is x's mean over the rows: of the weight's shape, but data",
    _RSTD + " n = Div(x, s) g = ReduceMean<keepdims = 0>(x, i) y = Mul(n, g)",
    signature="(float[B,S,64] x) => (float[B,S,64] y)",
    equal_ok=True,
    edit=lambda model: model.graph.initializer.append(onnx.numpy_helper.from_array(np.array([0, 1], np.int64), "i")),
)
_case(
    "weight_adaptive",
    "adaptive norm: scale and shift come from a conditioning input, one a sequence",
    _CENTRE + " n = Div(c, s) g = MatMul(t, wide) h = Add(g, one) u = Mul(n, h) y = Add(u, t)",
    signature="(float[B,S,64] x, float[B,1,64] t) => (float[B,S,64] y)",
    feed={"x": (2, 5, 64), "t": (2, 1, 64)},
    equal_ok=True,
)
_case(
    "weight_is_an_input",
    "the weight is a graph input of the right shape: it is constant over the rows",
    _RSTD + " n = Div(x, s) y = Mul(n, k)",
    signature="(float[B,S,64] x, float[64] k) => (float[B,S,64] y)",
    feed={"x": (2, 5, 64), "k": (64,)},
    equal_ok=True,
)
_case(
    "weight_before_the_statistics",
    "the weight multiplies x first and the statistics are of the product: a weightless norm of w * x",
    "h = Mul(x, w) q = Mul(h, h) m = ReduceMean(q, last) e = Add(m, eps) s = Sqrt(e) y = Div(h, s)",
    equal_ok=True,
)
_case(
    "bias_before_the_root",
    "the bias is added to x after the statistics and before the division",
    _RSTD + " h = Add(x, b) y = Div(h, s)",
)

# --- other normalisations -----------------------------------------------------------------------------------

_case(
    "group_norm_operator",
    "GroupNormalization",
    "y = GroupNormalization<num_groups = 2, epsilon = 0.00001>(x, w8, b8)",
    signature=_NCHW,
    feed=_IMAGE,
    equal_ok=True,
    opset=21,
)
_case(
    "group_norm_decomposed",
    "group norm in parts: a weightless LayerNorm of the groups, then a weight for each channel",
    "g = Reshape(x, grouped) mu = ReduceMean(g, last) c = Sub(g, mu) q = Mul(c, c) v = ReduceMean(q, last)"
    " e = Add(v, eps) s = Sqrt(e) d = Div(c, s) sh = Shape(x) n = Reshape(d, sh) nw = Mul(n, wc) y ="
    " Add(nw, bc)",
    signature=_NCHW,
    feed=_IMAGE,
    equal_ok=True,
)
_case(
    "instance_norm_operator",
    "InstanceNormalization",
    "y = InstanceNormalization<epsilon = 0.00001>(x, w8, b8)",
    signature=_NCHW,
    feed=_IMAGE,
    equal_ok=True,
)
_case(
    "instance_norm_decomposed",
    "instance norm in parts: the axes are the spatial ones, the weight lies along the channels",
    "mu = ReduceMean(x, axis23) c = Sub(x, mu) q = Mul(c, c) v = ReduceMean(q, axis23) e = Add(v, eps) s ="
    " Sqrt(e)"
    " n = Div(c, s) nw = Mul(n, wc) y = Add(nw, bc)",
    signature=_NCHW,
    feed=_IMAGE,
    equal_ok=True,
)
_case(
    "batch_norm_operator",
    "BatchNormalization: the statistics are constants",
    "y = BatchNormalization(x, w8, b8, m8, v8)",
    signature=_NCHW,
    feed=_IMAGE,
)
_case(
    "batch_norm_decomposed",
    "batch norm in training: statistics over the batch and the space",
    "mu = ReduceMean(x, axis023) c = Sub(x, mu) q = Mul(c, c) v = ReduceMean(q, axis023) e = Add(v, eps) s"
    " = Sqrt(e)"
    " n = Div(c, s) nw = Mul(n, wc) y = Add(nw, bc)",
    signature=_NCHW,
    feed=_IMAGE,
    equal_ok=True,
)
_case(
    "batch_norm_running_statistics",
    "batch norm in parts with constant statistics",
    "c = Sub(x, b) k = Mul(w2, w2) e = Add(k, eps) s = Sqrt(e) n = Div(c, s) y = Mul(n, w)",
)
_case(
    "l2_normalise_clamped",
    "x / max(norm, 1e-12), as F.normalize does",
    "t = ReduceL2(x, last) p = Max(t, eps_large) n = Div(x, p) r = Mul(n, root_n) y = Mul(r, w)",
    feed=lambda rng: {"x": (1e-3 * rng.standard_normal((2, 5, 64))).astype(np.float32)},
)
_case(
    "l2_normalise_clamped_sum",
    "x * rsqrt(max(sum of squares, 1e-12)), as TensorFlow does",
    "t = ReduceSumSquare(x, last) p = Max(t, tiny) s = Sqrt(p) n = Div(x, s) y = Mul(n, w)",
    feed=lambda rng: {"x": (1e-8 * rng.standard_normal((2, 5, 64))).astype(np.float32)},
)
_case(
    "l2_normalise_operator",
    "LpNormalization: no eps",
    "n = LpNormalization<axis = -1, p = 2>(x) r = Mul(n, root_n) y = Mul(r, w)",
)
_case(
    "l1_normalise",
    "divided by the sum of absolute values",
    "t = ReduceL1(x, last) e = Add(t, eps) n = Div(x, e) y = Mul(n, w)",
)
_case(
    "mean_variance_normalization",
    "MeanVarianceNormalization: axes 0, 2, 3, and an eps added to the deviation",
    "y = MeanVarianceNormalization(x)",
    signature=_NCHW,
    feed=_IMAGE,
)


# --- torch --------------------------------------------------------------------------------------------------

TorchFn = Callable[[Tensor, Tensor], Tensor]

TORCH_NEAR_MISSES: dict[str, tuple[TorchFn, tuple[int, ...]]] = {}
"""Name -> function of `(x, w)` and the shape of x; w is `(64,)`. They write to copies of x, never to x."""

_equal_ok: set[str] = set()


def _torch_case(*, shape: tuple[int, ...] = (2, 5, 64), equal_ok: bool = False) -> Callable[[TorchFn], TorchFn]:
    """Enter the decorated function into the table under its own name."""

    def enter(fn: TorchFn) -> TorchFn:
        name = fn.__name__.removeprefix("_t_")
        assert name not in TORCH_NEAR_MISSES, name
        TORCH_NEAR_MISSES[name] = (fn, shape)
        if equal_ok:
            _equal_ok.add(name)
        return fn

    return enter


def _rstd(x: Tensor) -> Tensor:
    """The inverse root mean square of the rows."""
    return torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5)


def _ln_rstd(x: Tensor) -> Tensor:
    """The inverse standard deviation of the rows."""
    return torch.rsqrt(x.var(-1, correction=0, keepdim=True) + 1e-5)


@_torch_case()
def _t_inplace_relu(x: Tensor, w: Tensor) -> Tensor:
    h = x.clone()
    rstd = _rstd(h)
    h.relu_()
    return h * rstd * w


@_torch_case()
def _t_inplace_add(x: Tensor, w: Tensor) -> Tensor:
    h = x.clone()
    rstd = _rstd(h)
    h.add_(1.0)
    return h * rstd * w


@_torch_case(equal_ok=True)
def _t_inplace_mul(x: Tensor, w: Tensor) -> Tensor:
    h = x.clone()
    rstd = _rstd(h)
    h.mul_(2.0)  # twice the norm, not the norm of twice x
    return h * rstd * w


@_torch_case()
def _t_inplace_slice(x: Tensor, w: Tensor) -> Tensor:
    h = x.clone()
    rstd = _rstd(h)
    h[..., 0] = 0.0
    return h * rstd * w


@_torch_case()
def _t_inplace_slice_copy(x: Tensor, w: Tensor) -> Tensor:
    h = x.clone()
    rstd = _rstd(h)
    h[..., :32].copy_(h[..., 32:])
    return h * rstd * w


@_torch_case()
def _t_inplace_view(x: Tensor, w: Tensor) -> Tensor:
    h = x.clone()
    flat = h.view(-1)
    rstd = _rstd(h)
    flat.clamp_(-0.5, 0.5)
    return h * rstd * w


@_torch_case()
def _t_inplace_view_made_later(x: Tensor, w: Tensor) -> Tensor:
    h = x.clone()
    rstd = _rstd(h)
    h.view(-1, 64)[0].fill_(1.0)
    return h * rstd * w


@_torch_case()
def _t_inplace_transposed(x: Tensor, w: Tensor) -> Tensor:
    h = x.clone()
    rstd = _rstd(h)
    h.transpose(0, 1).sin_()
    return h * rstd * w


@_torch_case()
def _t_inplace_index_put(x: Tensor, w: Tensor) -> Tensor:
    h = x.clone()
    rstd = _rstd(h)
    h.index_put_((torch.tensor([0]),), torch.ones(64, dtype=x.dtype))
    return h * rstd * w


@_torch_case()
def _t_inplace_masked_fill(x: Tensor, w: Tensor) -> Tensor:
    h = x.clone()
    rstd = _rstd(h)
    h.masked_fill_(h < 0, 0.0)
    return h * rstd * w


@_torch_case()
def _t_inplace_out(x: Tensor, w: Tensor) -> Tensor:
    h = x.clone()
    rstd = _rstd(h)
    torch.exp(x, out=h)
    return h * rstd * w


@_torch_case()
def _t_inplace_statistics(x: Tensor, w: Tensor) -> Tensor:
    ms = x.pow(2).mean(-1, keepdim=True) + 1e-5
    ms.view(-1).clamp_(min=1.0)
    return x * torch.rsqrt(ms) * w


@_torch_case(equal_ok=True)
def _t_inplace_eps(x: Tensor, w: Tensor) -> Tensor:
    ms = x.pow(2).mean(-1, keepdim=True)
    ms.add_(1e-5).rsqrt_()
    return x * ms * w


@_torch_case()
def _t_inplace_centred(x: Tensor, w: Tensor) -> Tensor:
    c = x - x.mean(-1, keepdim=True)
    variance = c.pow(2).mean(-1, keepdim=True)
    c[:, 1:] += 1.0
    return c * torch.rsqrt(variance + 1e-5) * w


@_torch_case(equal_ok=True)
def _t_inplace_subtract_mean(x: Tensor, w: Tensor) -> Tensor:
    h = x.clone()
    h -= h.mean(-1, keepdim=True)
    return h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-5) * w


@_torch_case()
def _t_inplace_between_mean_and_variance(x: Tensor, w: Tensor) -> Tensor:
    h = x.clone()
    mean = h.mean(-1, keepdim=True)
    h.abs_()
    return (h - mean) * _ln_rstd(h) * w


@_torch_case(equal_ok=True)
def _t_inplace_weight(x: Tensor, w: Tensor) -> Tensor:
    k = w.clone()
    n = x * _rstd(x)
    k.add_(1.0)  # a norm with weight 1 + w
    return n * k


@_torch_case(equal_ok=True)
def _t_inplace_after_the_norm(x: Tensor, w: Tensor) -> Tensor:
    h = x.clone()
    y = h * _rstd(h) * w
    h.zero_()  # the norm must be taken before this
    return y + h


@_torch_case(equal_ok=True)
def _t_inplace_on_the_output(x: Tensor, w: Tensor) -> Tensor:
    n = x * _rstd(x)
    y = n * w
    n.zero_()
    return y + n


@_torch_case(equal_ok=True)
def _t_inplace_before_the_norm(x: Tensor, w: Tensor) -> Tensor:
    h = x.clone()
    h.add_(1.0)
    return h * _rstd(h) * w


@_torch_case()
def _t_dropout_between(x: Tensor, w: Tensor) -> Tensor:
    return F.dropout(x, 0.5, training=True) * _rstd(x) * w


@_torch_case()
def _t_dropout_in_the_statistics(x: Tensor, w: Tensor) -> Tensor:
    return x * _rstd(F.dropout(x, 0.5, training=True)) * w


@_torch_case()
def _t_dropout_twice(x: Tensor, w: Tensor) -> Tensor:
    return F.dropout(x, 0.5, training=True) * _rstd(F.dropout(x, 0.5, training=True)) * w


@_torch_case(equal_ok=True)
def _t_dropout_at_inference(x: Tensor, w: Tensor) -> Tensor:
    return F.dropout(x, 0.5, training=False) * _rstd(x) * w


@_torch_case()
def _t_std_unbiased_plus_eps(x: Tensor, w: Tensor) -> Tensor:
    return w * (x - x.mean(-1, keepdim=True)) / (x.std(-1, keepdim=True) + 1e-2)


@_torch_case()
def _t_std_biased_plus_eps(x: Tensor, w: Tensor) -> Tensor:
    return w * (x - x.mean(-1, keepdim=True)) / (x.std(-1, correction=0, keepdim=True) + 1e-2)


@_torch_case()
def _t_std_without_eps(x: Tensor, w: Tensor) -> Tensor:
    std, mean = torch.std_mean(x, -1, correction=0, keepdim=True)
    return (x - mean) / std * w


@_torch_case(equal_ok=True)
def _t_var_unbiased(x: Tensor, w: Tensor) -> Tensor:
    return (x - x.mean(-1, keepdim=True)) * torch.rsqrt(x.var(-1, keepdim=True) + 1e-2) * w


@_torch_case()
def _t_eps_outside(x: Tensor, w: Tensor) -> Tensor:
    return x / (x.pow(2).mean(-1, keepdim=True).sqrt() + 1e-2) * w


@_torch_case()
def _t_eps_outside_norm(x: Tensor, w: Tensor) -> Tensor:
    norm: Tensor = x.norm(2, dim=-1, keepdim=True)
    return x / (norm * 0.125 + 1e-2) * w


@_torch_case()
def _t_eps_vector(x: Tensor, w: Tensor) -> Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + w.abs() * 0.1) * w


@_torch_case()
def _t_eps_from_parameter(x: Tensor, w: Tensor) -> Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + w[0].abs()) * w


@_torch_case()
def _t_eps_negative(x: Tensor, w: Tensor) -> Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) - 1e-3) * w


@_torch_case()
def _t_masked_mean(x: Tensor, w: Tensor) -> Tensor:
    mask = (torch.arange(64) % 3 != 0).to(x.dtype)
    ms = (x.pow(2) * mask).sum(-1, keepdim=True) / mask.sum()
    return x * torch.rsqrt(ms + 1e-5) * w


@_torch_case()
def _t_masked_mean_where(x: Tensor, w: Tensor) -> Tensor:
    ms = torch.where(x > 0, x, 0.0).pow(2).mean(-1, keepdim=True)
    return x * torch.rsqrt(ms + 1e-5) * w


@_torch_case()
def _t_slice_mean(x: Tensor, w: Tensor) -> Tensor:
    return x * _rstd(x[..., :32]) * w


@_torch_case()
def _t_slice_mean_strided(x: Tensor, w: Tensor) -> Tensor:
    return x * _rstd(x[..., ::2]) * w


@_torch_case(shape=(2, 5, 128))
def _t_slice_above(x: Tensor, w: Tensor) -> Tensor:
    return x[..., :64] * _rstd(x) * w


@_torch_case()
def _t_statistics_of_first_row(x: Tensor, w: Tensor) -> Tensor:
    return x * _rstd(x[:, :1]) * w


@_torch_case()
def _t_statistics_rolled(x: Tensor, w: Tensor) -> Tensor:
    return x * _rstd(x.roll(1, 1)) * w


@_torch_case(equal_ok=True)
def _t_weight_from_data(x: Tensor, w: Tensor) -> Tensor:
    return x * _rstd(x) * torch.sigmoid(x)


@_torch_case(equal_ok=True)
def _t_weight_from_data_row(x: Tensor, w: Tensor) -> Tensor:
    return x * _rstd(x) * (w + x.mean((0, 1)))


@_torch_case()
def _t_mean_square_of_another(x: Tensor, w: Tensor) -> Tensor:
    return x * _rstd(x.cos()) * w


@_torch_case(equal_ok=True)
def _t_mean_of_another(x: Tensor, w: Tensor) -> Tensor:
    c = x - x.cos().mean(-1, keepdim=True)  # an RMSNorm of c, no LayerNorm of x
    return c * _rstd(c) * w


@_torch_case()
def _t_variance_of_another(x: Tensor, w: Tensor) -> Tensor:
    return (x - x.mean(-1, keepdim=True)) * _ln_rstd(x.cos()) * w


@_torch_case(equal_ok=True)
def _t_detached_statistics(x: Tensor, w: Tensor) -> Tensor:
    return x * _rstd(x.detach()) * w  # the same forward; the gradient is another


@_torch_case(equal_ok=True)
def _t_detached_input(x: Tensor, w: Tensor) -> Tensor:
    h = x.detach()
    return h * _rstd(h) * w


@_torch_case(equal_ok=True, shape=(1, 5, 64))
def _t_weight_wider(x: Tensor, w: Tensor) -> Tensor:
    return x * _rstd(x) * w.expand(3, 1, 64)


@_torch_case(equal_ok=True)
def _t_weight_of_higher_rank(x: Tensor, w: Tensor) -> Tensor:
    return x * _rstd(x) * w.view(1, 1, 1, 64)


@_torch_case(equal_ok=True, shape=(2, 5, 1))
def _t_weight_expands_the_row(x: Tensor, w: Tensor) -> Tensor:
    return x * _rstd(x) * w


@_torch_case(shape=(64, 64))
def _t_keepdim_false_square(x: Tensor, w: Tensor) -> Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1) + 1e-5) * w


@_torch_case(shape=(64, 64))
def _t_keepdim_false_square_layer_norm(x: Tensor, w: Tensor) -> Tensor:
    return (x - x.mean(-1)) * torch.rsqrt(x.var(-1, correction=0) + 1e-5) * w


@_torch_case(shape=(5, 5, 64))
def _t_statistics_transposed(x: Tensor, w: Tensor) -> Tensor:
    return x * _rstd(x).transpose(0, 1) * w


@_torch_case(shape=(4, 4, 64))
def _t_statistics_reshaped(x: Tensor, w: Tensor) -> Tensor:
    return x * _rstd(x).reshape(2, 8, 1).flip(0).reshape(4, 4, 1) * w


@_torch_case()
def _t_exponent_4(x: Tensor, w: Tensor) -> Tensor:
    return x * torch.rsqrt(x.pow(4).mean(-1, keepdim=True) + 1e-5) * w


@_torch_case()
def _t_sign_kept(x: Tensor, w: Tensor) -> Tensor:
    return x * torch.rsqrt((x * x.abs()).mean(-1, keepdim=True).abs() + 1e-5) * w


@_torch_case()
def _t_normalise_clamped(x: Tensor, w: Tensor) -> Tensor:
    return F.normalize(x * 1e-13, dim=-1) * 8.0 * w


@_torch_case()
def _t_integer_mean(x: Tensor, w: Tensor) -> Tensor:
    i = (x * 4).to(torch.int32)
    ms = ((i * i).sum(-1, keepdim=True) // 64).to(x.dtype)
    return i.to(x.dtype) * torch.rsqrt(ms + 1e-5) * w


@_torch_case()
def _t_data_dependent_row_order(x: Tensor, w: Tensor) -> Tensor:
    return x.sort(1).values * _rstd(x) * w


@_torch_case(equal_ok=True, shape=(2, 64, 5))
def _t_group_norm_one_group(x: Tensor, w: Tensor) -> Tensor:
    return F.group_norm(x, 1, w, w)  # a LayerNorm over channels and positions


@_torch_case(equal_ok=True, shape=(2, 64, 5))
def _t_group_norm(x: Tensor, w: Tensor) -> Tensor:
    return F.group_norm(x, 4, w, w)


@_torch_case(equal_ok=True, shape=(2, 64, 5))
def _t_instance_norm(x: Tensor, w: Tensor) -> Tensor:
    return F.instance_norm(x, weight=w, bias=w)


@_torch_case(equal_ok=True, shape=(6, 64, 5))
def _t_batch_norm(x: Tensor, w: Tensor) -> Tensor:
    return F.batch_norm(x, None, None, w, w, training=True)


TORCH_EQUAL_OK: frozenset[str] = frozenset(_equal_ok)
"""The torch near misses with a norm in them that may be fused, because that part is one exactly."""

TORCH_RANDOM: frozenset[str] = frozenset({"dropout_between", "dropout_in_the_statistics", "dropout_twice"})
"""The torch near misses that draw random numbers: compare under the same seed, or only check the refusal."""

CODES = {
    # what is nearly a norm says why it is none
    "keepdims0_square_rms": "NF107",
    "keepdims0_square_layer_norm": "NF107",
    "eps_outside_root": "NF101",
    "std_plus_eps": "NF101",
    "eps_outside_reciprocal": "NF101",
    "eps_vector": "NF104",
    "eps_negative": "NF103",
    "eps_zero": "NF103",
    "eps_is_an_input": "NF104",
    "eps_overridable": "NF122",
    "not_centred_above": "NF102",
    "exponent_4_rms": "NF112",
    "cube_above": "NF112",
    "clamp_as_eps": "NF119",
    "l2_normalise_clamped": "NF119",
    "mean_of_a_slice": "NF106",
    "variance_of_another_tensor": "NF106",
    "dropout_between": "NF106",
    "half_square_before_cast_centred": "NF117",
    "half_through_a_narrow_cast": "NF117",
    "inner_deviation_is_output": "NF116",
    "inner_value_used_elsewhere": "NF116",
    "axes_at_run_time": "NF114",
    "rank_dynamic_positive_axis": "NF115",
    "integer_mean": "NF113",
    "reversed_quotient": "NF105",
    "size_unknown_sum": "NF115",
}
