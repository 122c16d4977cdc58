"""A neutral description of a small graph, a way to write one down, and its meaning in numpy, all in float64.

The description knows nothing of ONNX, torch or NormFuse: `tests.fuzz.to_onnx` and `tests.fuzz.to_fx` write it out, and
`evaluate` says what both have to compute.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
Shape = tuple[int, ...]
EPS_TOLERANCE = 1e-4
WIDTH = {"float16": 0, "float32": 1, "float64": 2}
LATER = 0.3
"""The share of what the generator learned later. It is drawn apart: with 0 graphs of older seeds are as they were."""


@dataclass(slots=True, eq=False)
class Val:
    """A tensor: an input of the graph, a constant (`data` in float64, as its type can hold it), or an op's result."""

    index: int
    shape: Shape
    dtype: str
    data: Array | None = None
    given: bool = False

    @property
    def name(self) -> str:
        return f"{'x' if self.given else 'v' if self.data is None else 'c'}{self.index}"


@dataclass(slots=True, eq=False)
class Op:
    """One operation. `branches` are the bodies of an if (two), a loop or a call, each with its result."""

    kind: str
    args: tuple[Val, ...]
    out: Val
    attrs: dict[str, Any] = field(default_factory=dict)
    branches: list[tuple[list[Op], Val]] = field(default_factory=list)

    def __str__(self) -> str:
        more = "".join(f", {k}={v}" for k, v in self.attrs.items())
        inner = "".join(f"\n    {line}" for ops, last in self.branches for line in (*ops, f"-> {last.name}"))
        args = ", ".join(map(_shown, self.args))
        return f"{self.out.name}: {self.out.dtype}{list(self.out.shape)} = {self.kind}({args}{more}){inner}"


def _shown(value: Val) -> str:
    return f"{float(value.data.reshape(-1)[0]):g}" if value.data is not None and value.data.size == 1 else value.name


@dataclass(slots=True)
class Truth:
    """A norm that is in the graph: its kind, its axes from the end (any of these), its eps (any of these).

    `least` records of it have to be in a report. There may be more, where several read the quotient: n + b and n * w
    are two norms, and so are n and -n. Over last axes a view of x may have other axes, of as many elements, `size`.
    """

    kind: str
    axes: tuple[tuple[int, ...], ...]
    eps: tuple[float, ...]
    how: str
    least: int = 1
    size: int = 0

    def fits(self, kind: str, axes: Sequence[int], eps: float, size: int | None) -> bool:
        seen = tuple(axes) in self.axes or (size == self.size and all(map(_last, (axes, self.axes[0]))))
        near = any(abs(eps - e) <= EPS_TOLERANCE * e + 1e-12 for e in self.eps)
        return kind == self.kind and seen and near

    def over(self, shape: Shape) -> Truth:
        """The same, with axes of size 1 taken or left."""
        rank = len(shape)
        some = {tuple(a for a in axes if shape[a + rank] != 1) for axes in self.axes if len(axes) <= rank}
        return replace(self, axes=(*self.axes, *sorted(some)))


def _last(axes: Sequence[int]) -> bool:
    return sorted(axes) == list(range(-len(axes), 0))


@dataclass(slots=True)
class Program:
    """A graph, what is true of it, and the names of the near misses in it."""

    seed: int
    inputs: list[Val]
    ops: list[Op]
    outputs: list[Val]
    truths: list[Truth]
    misses: list[str]
    loose: bool = False
    """Some constant, such as 1/N, is not what it stands for in the type of the graph."""

    def __str__(self) -> str:
        lines = [f"seed {self.seed}", *(f"{v.name}: {v.dtype}{list(v.shape)}" for v in self.inputs)]
        lines += [str(op) for op in self.ops]
        lines.append("return " + ", ".join(v.name for v in self.outputs))
        lines += [f"norm: {t.how}: {t.kind} over {t.axes} eps {t.eps}" for t in self.truths]
        return "\n".join([*lines, *(f"near miss: {m}" for m in self.misses)])


class Builder:
    """Writes a program down, op by op; shapes follow from numpy."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        self.count = 0
        self.ops: list[Op] = []
        self.inputs: list[Val] = []
        self.loose = False

    # -- choice ---------------------------------------------------------------------------------------------------

    def chance(self, p: float) -> bool:
        return self.rng.random() < p

    def pick(self, *choices: Any) -> Any:
        return choices[int(self.rng.random() * len(choices))]

    # -- values ---------------------------------------------------------------------------------------------------

    def _val(self, shape: Shape, dtype: str, **more: Any) -> Val:
        self.count += 1
        return Val(self.count, shape, dtype, **more)

    def input(self, shape: Shape, dtype: str) -> Val:
        value = self._val(shape, dtype, given=True)
        self.inputs.append(value)
        return value

    def const(self, data: Any, dtype: str) -> Val:
        """A constant as its type can hold it."""
        array = np.asarray(data, np.float64)
        held = array.astype(dtype).astype(np.float64)
        return self._val(array.shape, dtype, data=held)

    def number(self, c: float, dtype: str, exact: bool = False) -> Val:
        """A constant of one element in one of the shapes that exporters give it; `exact`: it stands for c itself."""
        value = self.const(np.full(self.pick((), (), (), (1,)), c), dtype)
        assert value.data is not None
        self.loose = self.loose or (exact and float(value.data.reshape(-1)[0]) != c)
        return value

    def op(self, kind: str, *args: Val, shape: Shape | None = None, dtype: str | None = None, **attrs: Any) -> Val:
        out = self._val(np.broadcast_shapes(*(a.shape for a in args)) if shape is None else shape,
                        dtype or args[0].dtype)  # fmt: skip
        self.ops.append(Op(kind, args, out, attrs))
        return out

    # -- ops that are more than elementwise --------------------------------------------------------------------------

    def cast(self, v: Val, dtype: str) -> Val:
        return v if v.dtype == dtype else self.op("cast", v, dtype=dtype, to=dtype)

    def reduce(self, kind: str, v: Val, axes: Sequence[int], keep: bool = True, **more: Any) -> Val:
        shape = tuple(1 if i in axes else d for i, d in enumerate(v.shape) if keep or i not in axes)
        return self.op(kind, v, shape=shape, axes=tuple(axes), keep=keep, **more)

    def unsqueeze(self, v: Val, axes: Sequence[int]) -> Val:
        shape = list(v.shape)
        for a in sorted(axes):
            shape.insert(a, 1)
        return self.op("unsqueeze", v, shape=tuple(shape), axes=tuple(sorted(axes)))

    def squeeze(self, v: Val, axes: Sequence[int]) -> Val:
        shape = tuple(d for i, d in enumerate(v.shape) if i not in axes)
        return self.op("squeeze", v, shape=shape, axes=tuple(axes))

    def reshape(self, v: Val, shape: Shape) -> Val:
        return self.op("reshape", v, shape=shape)

    def expand(self, v: Val, shape: Shape) -> Val:
        return self.op("expand", v, shape=shape)

    def transpose(self, v: Val, perm: Sequence[int]) -> Val:
        return self.op("transpose", v, shape=tuple(v.shape[p] for p in perm), perm=tuple(perm))

    def matmul(self, a: Val, b: Val) -> Val:
        shape = (*np.broadcast_shapes(a.shape[:-2], b.shape[:-2]), a.shape[-2], b.shape[-1])
        return self.op("matmul", a, b, shape=shape)


def later(seed: int, what: str) -> random.Random | None:
    """Where to draw from for something that the generator learned later, or None: not in this graph."""
    rng = random.Random(f"{seed} {what}")
    return rng if rng.random() < LATER else None


# -- meaning --------------------------------------------------------------------------------------------------------


def _axes(op: Op) -> dict[str, Any]:
    return {"axis": op.attrs["axes"], "keepdims": op.attrs["keep"]}


def _normed(op: Op, x: Array, *params: Array) -> Array:
    axes = tuple(range(x.ndim - op.attrs["count"], x.ndim))
    h = x - x.mean(axes, keepdims=True) if op.kind == "layer_norm" else x
    y: Array = h / np.sqrt(np.square(h).mean(axes, keepdims=True) + op.attrs["eps"])
    y = y * params[0] if params else y
    return y + params[1] if len(params) > 1 else y


KERNELS: dict[str, Callable[..., Any]] = {
    "add": lambda op, a, b: a + b, "sub": lambda op, a, b: a - b,
    "mul": lambda op, a, b: a * b, "div": lambda op, a, b: a / b, "pow": lambda op, a, b: a ** b,
    "neg": lambda op, a: -a, "abs": lambda op, a: np.abs(a), "sqrt": lambda op, a: np.sqrt(a),
    "rsqrt": lambda op, a: 1 / np.sqrt(a), "reciprocal": lambda op, a: 1 / a, "square": lambda op, a: a * a,
    "max": lambda op, a, b: np.maximum(a, b), "min": lambda op, a, b: np.minimum(a, b),
    "cast": lambda op, a: a, "identity": lambda op, a: a, "trunc": lambda op, a: np.trunc(a),
    "relu": lambda op, a: np.maximum(a, 0.0), "tanh": lambda op, a: np.tanh(a),
    "sigmoid": lambda op, a: 1 / (1 + np.exp(-a)),
    "mean": lambda op, a: a.mean(**_axes(op)), "sum": lambda op, a: a.sum(**_axes(op)),
    "sumsq": lambda op, a: (a * a).sum(**_axes(op)), "vecnorm": lambda op, a: np.sqrt((a * a).sum(**_axes(op))),
    "amax": lambda op, a: a.max(**_axes(op)),
    "var": lambda op, a: a.var(ddof=op.attrs["correction"], **_axes(op)),
    "rowdot": lambda op, a, b: (a * b).sum(-1),
    "matmul": lambda op, a, b: a @ b,
    "unsqueeze": lambda op, a: a.reshape(op.out.shape), "squeeze": lambda op, a: a.reshape(op.out.shape),
    "reshape": lambda op, a: a.reshape(op.out.shape), "expand": lambda op, a: np.broadcast_to(a, op.out.shape),
    "transpose": lambda op, a: a.transpose(op.attrs["perm"]),
    "half": lambda op, a: a[..., : op.out.shape[-1]],
    "layer_norm": _normed, "rms_norm": _normed,
}  # fmt: skip
"""What each kind of operation computes."""


@dataclass(slots=True)
class Noise:
    """Roundings by chance: each result off by up to `values` of itself, each constant by up to `constants`.

    Zero, powers of two and exponents stay as they are: whoever folds them rounds nothing. What becomes of the outputs
    tells how far two right ways to compute them may be apart, whatever amplifies the roundings on the way.
    """

    rng: np.random.Generator
    values: float
    constants: float

    def value(self, a: Array) -> Array:
        return a * (1.0 + self.values * self.rng.uniform(-1, 1, a.shape)) if a.dtype == np.float64 else a

    def constant(self, a: Array) -> Array:
        kept = (a == 0) | (np.frexp(np.abs(a))[0] == 0.5)
        return np.where(kept, a, a * (1.0 + self.constants * self.rng.uniform(-1, 1, a.shape)))


def evaluate(program: Program, feeds: Mapping[int, Array], flat: bool = False,
             noise: Noise | None = None) -> list[Array]:  # fmt: skip
    """The outputs for inputs by index, in float64; `flat`: an if is its first branch, a loop one turn."""
    env = values(program, feeds, flat, noise)
    return [env[v.index] for v in program.outputs]


def values(program: Program, feeds: Mapping[int, Array], flat: bool = False,
           noise: Noise | None = None) -> dict[int, Array]:  # fmt: skip
    """All values by index, those of bodies in their last turn."""
    env: dict[int, Array] = dict(feeds)
    with np.errstate(all="ignore"):
        _run(program.ops, env, flat, noise)
    return env


def _run(ops: list[Op], env: dict[int, Array], flat: bool, noise: Noise | None) -> None:
    for op in ops:
        args = [env[v.index] if v.data is None else v.data for v in op.args]
        if noise is not None and op.kind != "pow":
            args = [a if v.data is None else noise.constant(a) for v, a in zip(op.args, args, strict=True)]
        if op.branches:
            env[op.out.index] = _controlled(op, args, env, flat, noise)
        elif noise is None:
            env[op.out.index] = KERNELS[op.kind](op, *args)
        else:
            attrs = {k: float(noise.constant(np.array(v))) if k == "eps" else v for k, v in op.attrs.items()}
            env[op.out.index] = noise.value(KERNELS[op.kind](replace(op, attrs=attrs), *args))


def _controlled(op: Op, args: list[Array], env: dict[int, Array], flat: bool, noise: Noise | None) -> Array:
    ops, last = op.branches[op.kind == "if" and not flat and not bool(args[0])]
    for _ in range(1 if flat else op.attrs.get("trips", 1)):
        if op.kind == "loop":
            env[op.attrs["carried"].index] = args[0]
        _run(ops, env, flat, noise)
        args = [env[last.index]]
    return env[last.index]
