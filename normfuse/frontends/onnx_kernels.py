"""Operators for whole ONNX models in the reference evaluator, which has them slow, or not as the standard says."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
from onnx.reference.op_run import OpRun

from normfuse.frontends.onnx_check import LayerNormalization
from normfuse.frontends.onnx_contrib import SKIP_EPSILON
from normfuse.ort_values import Array


class Conv(OpRun):
    """Convolution by windows and one product; the reference loops over positions."""

    op_domain = ""

    def _run(self, x: Array, w: Array, b: Array | None = None, auto_pad: str = "NOTSET",
             dilations: Iterable[int] | None = None, group: int = 1, kernel_shape: Any = None,
             pads: Iterable[int] | None = None, strides: Iterable[int] | None = None) -> tuple[Array]:  # fmt: skip
        n = x.ndim - 2
        step, apart = list(strides or [1] * n), list(dilations or [1] * n)
        reach = [(k - 1) * d + 1 for k, d in zip(w.shape[2:], apart, strict=True)]
        around = list(pads or [0] * 2 * n)
        if auto_pad.startswith("SAME"):
            need = [max((-(-s // t) - 1) * t + r - s, 0) for s, t, r in zip(x.shape[2:], step, reach, strict=True)]
            low = [p // 2 if auto_pad == "SAME_UPPER" else p - p // 2 for p in need]
            around = low + [p - q for p, q in zip(need, low, strict=True)]
        x = np.pad(x, [(0, 0), (0, 0), *zip(around[:n], around[n:], strict=True)])
        axes = tuple(range(2, 2 + n))
        windows = np.lib.stride_tricks.sliding_window_view(x, reach, axis=axes)
        windows = windows[(slice(None), slice(None), *(slice(None, None, s) for s in step),
                           *(slice(None, None, d) for d in apart))]  # fmt: skip
        parts = []
        for g in range(group):
            inputs, outputs = x.shape[1] // group, w.shape[0] // group
            part = windows[:, g * inputs : (g + 1) * inputs]
            kernel = w[g * outputs : (g + 1) * outputs]
            over = [1, *range(2 + n, 2 + 2 * n)]
            parts.append(np.tensordot(part, kernel, axes=(over, [1, *range(2, 2 + n)])))
        out = np.moveaxis(np.concatenate(parts, axis=-1), -1, 1)
        return (out if b is None else out + b.reshape(-1, *[1] * n),)


class FusedConv(Conv):
    """ONNX Runtime's convolution, what is added to it and an activation."""

    op_domain = "com.microsoft"

    def _run(self, x: Array, w: Array, b: Array | None = None, z: Array | None = None,  # type: ignore[override]
             activation: str = "", activation_params: Iterable[float] | None = None,
             **more: Any) -> tuple[Array]:  # fmt: skip
        (y,) = super()._run(x, w, b, **more)
        y = y if z is None else y + z
        return (ACTIVATIONS[activation](y, *(activation_params or ())).astype(x.dtype),)


ACTIVATIONS: dict[str, Callable[..., Array]] = {
    "": lambda y: y, "Relu": lambda y: np.maximum(y, 0), "Tanh": np.tanh, "Sigmoid": lambda y: 1 / (1 + np.exp(-y)),
    "LeakyRelu": lambda y, alpha: np.where(y < 0, alpha * y, y), "Clip": np.clip,
    "HardSigmoid": lambda y, alpha, beta: np.clip(alpha * y + beta, 0, 1),
}  # fmt: skip
"""What ONNX Runtime fuses into a convolution, with its parameters."""


class OneHot(OpRun):
    """One value where an index points, another elsewhere; the reference takes no depth of shape [1]."""

    op_domain = ""

    def _run(self, indices: Array, depth: Array, values: Array, axis: int = -1) -> tuple[Array]:
        n, rank = int(depth.reshape(-1)[0]), indices.ndim + 1
        index = np.expand_dims(np.where(indices < 0, indices + n, indices), axis)
        places = np.arange(n).reshape([-1 if a == axis % rank else 1 for a in range(rank)])
        return (np.where(index == places, values[1], values[0]),)


class GatherElements(OpRun):
    """One element of each row by an index; the reference takes no index that is shorter than the data."""

    op_domain = ""

    def _run(self, data: Array, indices: Array, axis: int = 0) -> tuple[Array]:
        axis %= data.ndim
        cut = tuple(slice(None) if a == axis else slice(n) for a, n in enumerate(indices.shape))
        index = np.where(indices < 0, indices + data.shape[axis], indices)
        return (np.take_along_axis(data[cut], index, axis),)


class Pad(OpRun):
    """Padding; a negative width cuts off, which the reference refuses."""

    op_domain = ""

    def _run(self, data: Array, pads: Array, value: Array | None = None, axes: Array | None = None,
             mode: str = "constant") -> tuple[Array]:  # fmt: skip
        over = [int(a) % data.ndim for a in (range(data.ndim) if axes is None else np.asarray(axes).reshape(-1))]
        widths = [(0, 0)] * data.ndim
        for i, axis in enumerate(over):
            widths[axis] = int(pads[i]), int(pads[i + len(over)])
        cut = tuple(slice(max(-a, 0), n - max(-b, 0)) for n, (a, b) in zip(data.shape, widths, strict=True))
        more: dict[str, Any] = {"constant_values": 0 if value is None else value} if mode == "constant" else {}
        modes: Any = {"constant": "constant", "reflect": "reflect", "edge": "edge", "wrap": "wrap"}[mode]
        grown = [(max(a, 0), max(b, 0)) for a, b in widths]
        return (np.pad(data[cut], grown, modes, **more).astype(data.dtype),)


FEW = 2**20
"""Elements whose error function is computed before torch would be imported."""


def erf(x: Array) -> Array:
    """The error function, in float64."""
    if x.size <= FEW:
        return np.fromiter(map(math.erf, x.ravel().tolist()), np.float64, x.size).reshape(x.shape)
    import torch

    return np.asarray(torch.erf(torch.from_numpy(np.ascontiguousarray(x.astype(np.float64)))).numpy())


class Erf(OpRun):
    """The error function in the type of its operand; the reference computes one element at a time, in float32."""

    op_domain = ""

    def _run(self, x: Array) -> tuple[Array]:
        return (erf(x).astype(x.dtype),)


class Softmax(OpRun):
    """e^x / sum(e^x) along an axis; before opset 13 along all from `axis` on, which the reference leaves out."""

    op_domain = ""

    def _run(self, x: Array, axis: int = -1) -> tuple[Array]:
        together = self.run_params.get("opsets", {}).get("", 13) < 13
        if together and not any(given.name == "axis" for given in self.onnx_node.attribute):
            axis = 1
        rows = x.reshape(*x.shape[: axis % x.ndim], -1) if together else np.moveaxis(x, axis, -1)
        e = rows - rows.max(-1, keepdims=True, initial=-np.inf)
        found = self.of(e, np.exp(e).sum(-1, keepdims=True))
        return (np.asarray(found.reshape(x.shape) if together else np.moveaxis(found, -1, axis)).astype(x.dtype),)

    @staticmethod
    def of(e: Array, total: Array) -> Array:
        """The result, of exponents and the sum of their powers."""
        return np.asarray(np.exp(e) / total)


class LogSoftmax(Softmax):
    """log(softmax(x))."""

    @staticmethod
    def of(e: Array, total: Array) -> Array:
        """The result, of exponents and the sum of their powers."""
        return np.asarray(e - np.log(total))


class FastGelu(OpRun):
    """ONNX Runtime's x/2 * (1 + tanh(sqrt(2/pi) * (x + 0.044715 x^3))), of x and a bias."""

    op_domain = "com.microsoft"

    def _run(self, x: Array, bias: Array | None = None) -> tuple[Array]:
        x = x if bias is None else x + bias
        return ((x / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))).astype(x.dtype),)


class QuickGelu(OpRun):
    """ONNX Runtime's x * sigmoid(alpha * x)."""

    op_domain = "com.microsoft"

    def _run(self, x: Array, alpha: float = 1.702) -> tuple[Array]:
        return ((x / (1 + np.exp(-alpha * x))).astype(x.dtype),)


class Gelu(OpRun):
    """ONNX Runtime's x/2 * (1 + erf(x / sqrt(2))); the evaluator hands over an attribute of ONNX's own Gelu."""

    op_domain = "com.microsoft"

    def _run(self, x: Array, approximate: str = "none") -> tuple[Array]:
        return ((x / 2 * (1 + erf(x / np.sqrt(2.0)))).astype(x.dtype),)


class BiasGelu(OpRun):
    """ONNX Runtime's Gelu of x + bias."""

    op_domain = "com.microsoft"

    def _run(self, x: Array, bias: Array) -> tuple[Array]:
        return Gelu._run(self, x + bias)  # type: ignore[arg-type]


class SkipLayerNormalization(LayerNormalization):
    """ONNX Runtime's norm of x + skip + bias, which it gives, too, behind two statistics that nobody reads."""

    op_domain = "com.microsoft"

    def _run(self, x: Array, skip: Array, gamma: Array, *rows: Array | None,  # type: ignore[override]
             epsilon: float = SKIP_EPSILON) -> tuple[Array, ...]:  # fmt: skip
        beta, bias = [*([] if self.centred else [None]), *rows, None, None][:2]
        total = x + skip if bias is None else x + bias + skip
        return (*self._all(total, gamma, beta, -1, epsilon, 1), total)[: len(self.onnx_node.output)]


class SkipSimplifiedLayerNormalization(SkipLayerNormalization):
    """The same without mean and beta."""

    centred = False


class EmbedLayerNormalization(LayerNormalization):
    """ONNX Runtime's norm of the sum of the embeddings of tokens, positions and segments, and that sum."""

    op_domain = "com.microsoft"

    def _run(self, ids: Array, segments: Array | None, words: Array, places: Array,  # type: ignore[override]
             kinds: Array | None, gamma: Array, beta: Array, mask: Array | None = None,
             at: Array | None = None, epsilon: float = SKIP_EPSILON, mask_index_type: int = 1,
             ) -> tuple[Array, ...]:  # fmt: skip
        total = words[ids] + (places[: ids.shape[1]] if at is None else places[at])
        if segments is not None and kinds is not None:
            total = total + kinds[segments]
        y, *_ = self._all(total, gamma, beta, -1, epsilon, 1)
        return (y, np.zeros(len(ids), np.int32), total)[: len(self.onnx_node.output)]


KERNELS: list[Any] = [Conv, FusedConv, OneHot, GatherElements, Pad, Erf, Softmax, LogSoftmax, FastGelu,
                      QuickGelu, Gelu, BiasGelu, EmbedLayerNormalization, SkipLayerNormalization,
                      SkipSimplifiedLayerNormalization]  # fmt: skip
