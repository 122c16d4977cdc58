"""The table from torch functions, tensor methods and aten operators to neutral kinds; a new operator is one row.

A row is called as ``row(call)`` and gives True when it has lowered the node; otherwise the node stays opaque. The
same names serve all three: `torch.rsqrt`, `Tensor.rsqrt` and `aten.rsqrt` differ in nothing that matters here.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx, nn

from normfuse.frontends import fx_norms as norms
from normfuse.frontends import fx_views as views
from normfuse.frontends.fx_call import Call, Row, Unfit, axes_of, by_name, guarded, shape_of_pair
from normfuse.frontends.fx_effects import name_of, without_history
from normfuse.frontends.fx_meta import elsewhere, is_tensor, meta_of
from normfuse.graph import Value

# -- elementwise ---------------------------------------------------------------------------------------------------


def binary(kind: str, swapped: bool = False) -> Row:
    """x (op) y with torch's broadcasting and promotion; `alpha` scales the second operand."""

    def row(call: Call) -> bool:
        x, y = call.value(0, "input", "self"), call.value(1, "other", "exponent")
        x, y = x or call.value(0, "input", "self", like=y), y
        if x is None or y is None or call.get(-1, "rounding_mode") is not None:
            return False
        x.dtype, y.dtype = x.dtype or y.dtype, y.dtype or x.dtype
        a, b = (y, x) if swapped else (x, y)
        alpha = call.number(2, "alpha", default=1) if kind in ("add", "sub") else 1
        if alpha is None or alpha == 1:
            return call.emit(kind, [a, b])
        b = step(call, "mul", b, call.low.number(float(alpha), b.dtype))
        return last_step(call, kind, a, b)

    return guarded(row)


def step(call: Call, kind: str, a: Value, b: Value) -> Value:
    """A step inside one operator, which torch computes in float32 for half types."""
    out = call.low.virtual(shape_of_pair(a, b), "float32" if a.dtype in norms.HALF else a.dtype)
    call.emit(kind, [a, b], out)
    return out


def last_step(call: Call, kind: str, a: Value, b: Value) -> bool:
    """The last step of an operator, rounded once."""
    if "float32" not in (a.dtype, b.dtype) or str(meta_of(call.node).dtype) == "torch.float32":
        return call.emit(kind, [a, b])
    return call.emit("cast", [step(call, kind, a, b)])


def unary(kind: str) -> Row:
    """The same kind, one operand."""
    return guarded(lambda call: call.emit(kind, [call.tensor()]))


def _addc(kind: str) -> Row:
    """addcmul and addcdiv: self + value * t1 (op) t2."""

    def row(call: Call) -> bool:
        x, a, b = call.tensor(), call.tensor(1, "tensor1"), call.tensor(2, "tensor2")
        c = call.number(3, "value", default=1)
        product = step(call, kind, a, b)
        if c is not None and c != 1:
            product = step(call, "mul", product, call.low.number(float(c), product.dtype))
        return last_step(call, "add", x, product)

    return guarded(row)


def _clamp(call: Call) -> bool:
    x = call.tensor()
    low, high = call.value(1, "min", like=x), call.get(2, "max")
    return low is not None and high is None and call.emit("max", [x, low])


def _maximum(call: Call) -> bool:
    x, y = call.tensor(), call.value(1, "other", "min")
    return y is not None and call.emit("max", [x, y])


def _relu(call: Call) -> bool:
    x = call.tensor()
    return call.emit("max", [x, call.low.number(0.0, x.dtype)])


def _cast(call: Call) -> bool:
    """to, float, type_as, _to_copy, convert_element_type: what changes is in the result's type."""
    x = call.tensor()
    source, meta = call.get(0), meta_of(call.node)
    if not isinstance(source, fx.Node):
        return False
    before = meta_of(source)
    if elsewhere(meta, before):
        return False
    return is_tensor(meta) and call.emit("cast", [x])


def _identity(call: Call) -> bool:
    return call.emit("identity", [call.tensor()])


def _detach(call: Call) -> bool:
    return without_history(call.node.args[0], name_of(call.node) == "detach_") and _identity(call)


def _dropout(call: Call) -> bool:
    p, training = call.get(1, "p", default=0.5), call.get(2, "training", "train", default=True)
    return (p == 0 or training is False) and _identity(call)


# -- reductions ----------------------------------------------------------------------------------------------------


def widened(call: Call, x: Value, dtype: Any) -> Value:
    """x in the type that a reduction is told to compute in."""
    if not isinstance(dtype, torch.dtype) or str(dtype) == f"torch.{x.dtype}":
        return x
    out = call.low.virtual(x.shape, str(dtype).removeprefix("torch."))
    call.emit("cast", [x], out)
    return out


def reduction(kind: str) -> Row:
    """mean and sum: (input, dim=None, keepdim=False, *, dtype=None)."""

    def row(call: Call) -> bool:
        x = call.tensor()
        dim = call.get(1, "dim", "axis")
        if isinstance(dim, torch.dtype):
            return False
        axes, keep = axes_of(dim, len(x.shape or ())), bool(call.get(2, "keepdim", "keepdims", default=False))
        return call.emit(kind, [widened(call, x, call.get(-1, "dtype"))], axes=axes, keepdims=keep)

    return guarded(row)


def _spread(call: Call, x: Value) -> dict[str, Any]:
    """axes, keepdims and correction of var, std and their companions."""
    dim, unbiased, keep = call.get(1, "dim", "axis"), call.get(2, "unbiased", default=True), call.get(3, "keepdim")
    if isinstance(dim, bool):
        dim, unbiased = None, dim
    correction = call.get(-1, "correction", default=1 if unbiased else 0)
    correction = 1 if correction is None else correction
    if not isinstance(correction, (int, float)) or not isinstance(unbiased, bool):
        raise Unfit
    return {"axes": axes_of(dim, len(x.shape or ())), "keepdims": bool(keep), "correction": correction}


def variance(kind: str) -> Row:
    """var and std, unbiased by default."""
    return guarded(lambda call: call.emit(kind, [call.tensor()], **_spread(call, call.tensor())))


def variance_and_mean(kind: str) -> Row:
    """var_mean and std_mean: two nodes."""

    def row(call: Call) -> bool:
        x = call.tensor()
        attrs = _spread(call, x)
        first, mean = call.outs(2)
        if first is None or mean is None:
            return False
        call.emit(kind, [x], first, **attrs)
        del attrs["correction"]
        return call.emit("mean", [x], mean, **attrs)

    return guarded(row)


def vector_norm(order: int, dim: int, default: Any = 2) -> Row:
    """The Euclidean norm over some axes; `order` and `dim` are the positions of the arguments."""

    def row(call: Call) -> bool:
        x = call.tensor()
        p, dims = call.get(order, "p", "ord", default=default), call.get(dim, "dim")
        many = dims is None or (isinstance(dims, (tuple, list)) and len(dims) != 1)
        if p == "fro" or (p is None and default is None):
            p = 2
        elif many and default is None:  # linalg.norm: a matrix norm
            return False
        if p != 2:
            return False
        axes, keep = axes_of(dims, len(x.shape or ())), bool(call.get(dim + 1, "keepdim", default=False))
        return call.emit("vecnorm", [widened(call, x, call.get(-1, "dtype"))], axes=axes, keepdims=keep)

    return guarded(row)


def _average_pool(count: int, adaptive: bool = True) -> Row:
    """adaptive_avg_pool to one element, or avg_pool with a window over all of the last axes: a mean over them."""

    def row(call: Call) -> bool:
        x = call.tensor()
        size = call.get(1, "output_size" if adaptive else "kernel_size")
        sizes = tuple(size) if isinstance(size, (tuple, list)) else (size,)
        if not adaptive:
            padding = call.get(3, "padding", default=0)
            set_off = any(padding if isinstance(padding, (tuple, list)) else [padding])
            if set_off or call.get(6, "divisor_override") is not None:
                return False
        wanted = (1,) * count if adaptive else (x.shape or ())[-count:]
        if (sizes * count if len(sizes) == 1 else sizes) != wanted:
            return False
        rank = len(x.shape or ())
        return call.emit("mean", [x], axes=tuple(range(rank - count, rank)), keepdims=True)

    return guarded(row)


# -- constants and the rest ----------------------------------------------------------------------------------------


def filled(position: int, number: float | None = None) -> Row:
    """full, ones, zeros and their like; the fill value stands at `position`."""

    def row(call: Call) -> bool:
        c = call.get(position, "fill_value", "value", "data", "s") if number is None else number
        while isinstance(c, (list, tuple)) and len(c) == 1:
            c = c[0]
        if not isinstance(c, (int, float)) or call.node in call.low.tainted or not is_tensor(meta_of(call.node)):
            return False
        call.low.constant(call.node, float(c))
        return True

    return row


def role(kind: str, **attrs: Any) -> Row:
    """Operators that only matter for where a norm stands."""

    def row(call: Call) -> bool:
        call.low.role(call.node, kind, **attrs)
        return True

    return row


OPS: dict[str, Row] = by_name(
    {
        "add __add__ __radd__": binary("add"),
        "sub subtract __sub__": binary("sub"),
        "rsub __rsub__": binary("sub", swapped=True),
        "mul multiply __mul__ __rmul__": binary("mul"),
        "div divide true_divide truediv __truediv__": binary("div"),
        "__rtruediv__": binary("div", swapped=True),
        "pow __pow__": binary("pow"),
        "neg negative": unary("neg"),
        "abs absolute __abs__": unary("abs"),
        "square": unary("square"),
        "sqrt": unary("sqrt"),
        "rsqrt": unary("rsqrt"),
        "reciprocal": unary("reciprocal"),
        "addcmul": _addc("mul"),
        "addcdiv": _addc("div"),
        "clamp clip": guarded(_clamp),
        "clamp_min maximum": guarded(_maximum),
        "relu": guarded(_relu),
        "to float double half bfloat16 type type_as _to_copy convert_element_type": guarded(_cast),
        "contiguous clone alias lift_fresh lift_fresh_copy positive": guarded(_identity),
        "detach detach_": guarded(_detach),
        "dropout": guarded(_dropout),
        "mean": reduction("mean"),
        "sum": reduction("sum"),
        "var": variance("var"),
        "std": variance("std"),
        "var_mean": variance_and_mean("var"),
        "std_mean": variance_and_mean("std"),
        "norm": vector_norm(1, 2, "fro"),
        "linalg_vector_norm": vector_norm(1, 2),
        "linalg_norm": vector_norm(1, 2, None),
        "adaptive_avg_pool1d": _average_pool(1),
        "adaptive_avg_pool2d _adaptive_avg_pool2d": _average_pool(2),
        "avg_pool1d": _average_pool(1, adaptive=False),
        "avg_pool2d": _average_pool(2, adaptive=False),
        "matmul __matmul__ bmm": guarded(views.matmul),
        "mm": guarded(views.mm),
        "linear": guarded(views.linear),
        "vecdot linalg_vecdot": guarded(views.vecdot),
        "einsum": guarded(views.einsum),
        "reshape view view_as reshape_as flatten unflatten _unsafe_view ravel": guarded(views.reshape),
        "unsqueeze": guarded(views.unsqueeze),
        "squeeze": guarded(views.squeeze),
        "expand expand_as broadcast_to": guarded(views.expand),
        "repeat tile repeat_interleave": guarded(views.repeat),
        "permute": guarded(views.permute),
        "transpose swapaxes swapdims t": guarded(views.transpose),
        "numpy_T matrix_H mT mH adjoint": guarded(views.turned),
        "movedim moveaxis": guarded(views.moved),
        "getattr": guarded(views.attribute),
        "getitem __getitem__": guarded(views.getitem),
        "slice": guarded(views.slice_),
        "layer_norm": norms.norm("layer_norm"),
        "rms_norm": norms.norm("rms_norm"),
        "group_norm": norms.group_norm,
        "native_group_norm": norms.native_group_norm,
        "native_layer_norm": norms.norm("layer_norm", many=True),
        "_fused_rms_norm": norms.norm("rms_norm", many=True),
        **{f"normfuse::{name}": norms.fused(name) for name in norms.FUSED},
        "full full_like": filled(1),
        "new_full": filled(2),
        "tensor scalar_tensor": filled(0),
        "ones ones_like new_ones": filled(-1, 1.0),
        "zeros zeros_like new_zeros": filled(-1, 0.0),
        "addmm baddbmm conv1d conv2d conv3d convolution conv_transpose1d conv_transpose2d": role("linear"),
        "gru lstm rnn_tanh rnn_relu": role("recurrent"),
        "scaled_dot_product_attention _scaled_dot_product_flash_attention _scaled_dot_product_efficient_attention "
        "_scaled_dot_product_flash_attention_for_cpu _scaled_dot_product_cudnn_attention "
        "flex_attention": role("attention"),
        "multi_head_attention_forward": role("attention", projects=True),
        "silu sigmoid gelu tanh softplus mish hardswish leaky_relu elu erf": role("activation"),
        "embedding gather index_select index take_along_dim": role("gather"),
        "narrow split split_with_sizes chunk unbind select tensor_split": role("slice"),
        "cat concat concatenate stack": role("concat"),
        "where masked_fill": role("where"),
    }
)
"""Bare name of a torch function, method or aten operator -> how to lower it."""

ATTENTION = role("attention")
"""Of an operator of another library with attention in its name, such as FlashAttention's."""

MODULES: dict[type[nn.Module], Row] = {
    nn.LayerNorm: norms.norm_module("layer_norm"),
    nn.RMSNorm: norms.norm_module("rms_norm"),
    nn.GroupNorm: norms.group_norm_module,
    nn.Identity: guarded(_identity),
    nn.ReLU: guarded(_relu),
    nn.SiLU: role("activation"),
    nn.GELU: role("activation"),
    nn.Sigmoid: role("activation"),
    nn.Tanh: role("activation"),
    nn.Linear: role("linear"),
    nn.Conv1d: role("linear"),
    nn.Conv2d: role("linear"),
    nn.GRU: role("recurrent"),
    nn.LSTM: role("recurrent"),
    nn.RNN: role("recurrent"),
    nn.Embedding: role("gather"),
}
"""Class of a module that stands in the graph as a call -> how to lower it."""
