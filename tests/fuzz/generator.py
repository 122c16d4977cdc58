"""From one integer to a small random graph: norms, near misses and what stands around them, with the truth about it."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np

from tests.fuzz import norms
from tests.fuzz.misses import FRAGILE, MISSES, SQUARE, UNCENTRED
from tests.fuzz.program import WIDTH, Builder, Op, Program, Truth, Val, later

PLAIN = tuple(name for name in MISSES if name not in SQUARE)
MISS = 0.36
"""The share of units that are near misses: about half of all graphs have one."""


def generate(seed: int) -> Program:
    """The graph of a seed, the same in every process."""
    return _Generator(seed).run()


class _Generator:
    """`pool` holds the values to go on from, all of one shape and type; the inputs of the graph among them."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.b = b = Builder(seed)
        self.dtype = str(b.pick("float32", "float32", "float32", "float32", "float16", "float64"))
        last = b.pick(4, 8, 8, 16, 6, 12)
        self.square = b.chance(0.12)
        rows = [b.pick(2, 3, 4, 5, 1) for _ in range(b.pick(0, 1, 1, 2, 2))]
        shape = (*rows, last, last) if self.square else (*rows, b.pick(2, 3, 4, 6), last)[-4:]
        self.shape = tuple(shape) if len(shape) < 4 else (*shape[:2], *shape[2:])
        self.given = [b.input(self.shape, self.dtype) for _ in range(b.pick(1, 1, 2))]
        self.pool = list(self.given)
        self.outputs: list[Val] = []
        self.truths: list[Truth] = []
        self.misses: list[str] = []

    def run(self) -> Program:
        b = self.b
        for _ in range(b.pick(1, 1, 1, 2, 2, 3, 4)):
            self._around()
            if b.chance(MISS):
                self._miss()
            else:
                self._norm()
        read = {v for op in b.ops for v in _read(op)}
        self.outputs += [v for v in self.pool if v not in read and not v.given and b.chance(0.9)]
        if not self.outputs or b.chance(0.2):
            self.outputs.append(next(v for v in reversed(self.pool) if not v.given) if len(self.pool) > len(self.given)
                                else b.op("neg", self.pool[0]))  # fmt: skip
        outputs = list(dict.fromkeys(self.outputs))
        truths = [truth.over(self.shape) for truth in self.truths]
        return Program(self.seed, b.inputs, b.ops, outputs, truths, self.misses, b.loose)

    # -- around the norms -------------------------------------------------------------------------------------------

    def _source(self) -> Val:
        return self.pool[-1] if self.b.chance(0.6) else self.b.pick(*self.pool)

    def _around(self) -> None:
        b, x = self.b, self._source()
        way = b.pick("none", "none", "residual", "residual", "linear", "activation", "gate", "copy")
        if way == "residual":
            self.pool.append(b.op("add", x, self._source()))
        elif way == "linear":
            n = self.shape[-1]
            matrix = np.array([b.rng.gauss(0, 1) for _ in range(n * n)]).reshape(n, n) / np.sqrt(n)
            self.pool.append(b.op("matmul", x, b.const(matrix, self.dtype), shape=self.shape))
            if rng := later(self.seed, f"bias {len(b.ops)}"):
                self._bias(rng)
        elif way == "activation":
            self.pool.append(b.op(b.pick("tanh", "sigmoid", "relu", "neg", "abs"), x))
        elif way == "gate":
            self.pool.append(b.op("mul", x, b.op("sigmoid", self._source())))
        elif way == "copy":
            self.pool.append(b.op("identity", x))

    def _bias(self, rng: random.Random) -> None:
        """The bias of a linear layer, and mostly the residual stream behind it: what operators take in at once."""
        b, n = self.b, self.shape[-1]
        shape = rng.choice(((n,), (n,), (1, n), (1,)))
        bias = b.const(np.array([rng.gauss(0, 1) for _ in range(shape[-1])]).reshape(shape), self.dtype)
        both = [self.pool[-1], bias]
        if rng.random() < 0.3:
            both.reverse()
        self.pool.append(b.op("add", *both))
        if rng.random() < 0.7:
            both = [self.pool[-1], rng.choice(self.pool)]
            if rng.random() < 0.5:
                both.reverse()
            self.pool.append(b.op("add", *both))

    def _axes(self) -> tuple[int, ...]:
        """Mostly the last axis; never only axes of size 1."""
        b, rank = self.b, len(self.shape)
        last = rank - 1
        found = b.pick((last,), (last,), (last,), (last,), (last - 1, last), (0,), (b.rng.randrange(rank),),
                       tuple(sorted({0, last})), tuple(range(rank)))  # fmt: skip
        return found if any(self.shape[a] > 1 for a in found) else (last,)

    def _within(self, unit: Callable[[], Val], x: Val, share: float) -> Val:
        """A unit, or now and then the same inside a branch, a loop or a function."""
        b = self.b
        if not b.chance(share):
            return unit()
        kind, outer = b.pick("if", "loop", "call"), b.ops
        attrs: dict[str, Any] = {}
        args: tuple[Val, ...] = ()
        if kind == "if":
            args = (b.input((), "bool"),)
        if kind == "loop":
            args = (x,)
            carried = b._val(x.shape, x.dtype)
            attrs = {"trips": b.pick(1, 2), "carried": carried}
        inner: list[Op] = []
        b.ops = inner
        out = unit() if kind != "loop" else b.op("add", unit(), attrs["carried"])
        branches = [(inner, out)]
        if kind == "if":
            other: list[Op] = []
            b.ops = other
            branches.append((other, b.op(b.pick("neg", "identity", "tanh"), x)))
        b.ops = outer
        result = b._val(out.shape, out.dtype)
        b.ops.append(Op(kind, args, result, attrs, branches))
        return result

    # -- units ------------------------------------------------------------------------------------------------------

    def _norm(self) -> None:
        b, x = self.b, self._source()
        if b.chance(0.15):
            out, truth = norms.operator(b, x)
            self.truths.append(truth)
            self.pool.append(out)
            return
        kind = b.pick("layer_norm", "rms_norm")
        if WIDTH[self.dtype] == 0 and b.chance(0.25):  # a residual stream that is rounded beside the norm
            summands = [b.cast(v, "float32") for v in (x, self._source())]
            x = b.op("add", *summands)
            self.pool.append(b.cast(x, self.dtype))
        nested: list[norms.Parts] = []
        seen, axes, back, ends = norms.view(b, x, self._axes())

        def unit() -> Val:
            out, parts = norms.write(b, seen, axes, kind, self.dtype)
            parts.truth.axes = ends
            nested.append(parts)
            return b.cast(out, self.dtype)

        before = len(b.ops)
        alike = (seen.shape, seen.dtype) == (x.shape, self.dtype)
        out = self._within(unit, seen, 0.12 if alike else 0.0)
        (parts,) = nested
        self.truths.append(parts.truth)
        self.pool.append(back(out))
        if not b.ops[-1].branches and not any(op.branches for op in b.ops[before:]):
            if b.chance(0.15):
                self._share(parts, axes, back)
            elif b.chance(0.12):
                self.outputs.append(b.pick(*parts.inner))
            elif b.chance(0.1):
                b.op("tanh", b.pick(*parts.inner))  # a dead end

    def _share(self, parts: norms.Parts, axes: tuple[int, ...], back: Callable[[Val], Val]) -> None:
        """A second norm of the same tensor, from the same statistic or the same root."""
        b, writer = self.b, norms.Norm(self.b, parts.core, axes)
        if b.chance(0.5):
            scale = (parts.truth.eps[0] / parts.truth.eps[1]) ** 0.5
            truth = Truth(parts.truth.kind, parts.truth.axes, (), "shares the statistic", size=parts.truth.size)
            more = norms.Parts(parts.narrow, parts.core, parts.statistic, parts.factor, truth, parts.wide, [])
            out = norms.finish(b, writer, more, scale)
            self.truths.append(truth)
        else:
            out = writer.affine(b.op("neg", parts.inner[-1]))
        self.pool.append(back(b.cast(out, self.dtype)))

    def _miss(self) -> None:
        b = self.b
        name = b.pick(*SQUARE) if self.square and b.chance(0.5) else b.pick(*PLAIN)
        fragile = name in FRAGILE
        x = b.pick(*self.given) if fragile else self._source()
        z = b.input(self.shape, self.dtype)  # of the pool none is sure to be unrelated to x
        axes = (len(self.shape) - 1,) if name in SQUARE or b.chance(0.5) else self._axes()
        if any(self.shape[a] == 1 for a in axes):
            axes = (len(self.shape) - 1,)
        found: list[Truth] = []

        def unit() -> Val:
            out, truths = MISSES[name](b, norms.Norm(b, x, axes), z)
            found.extend(truths)
            return out

        out = self._within(unit, x, 0.0 if fragile else 0.06)
        if name in UNCENTRED and not found:
            out = b.op("tanh", out)  # or its mean might be taken away later, which would make it a norm
        self.misses.append(name)
        self.truths += found
        (self.outputs if fragile else self.pool).append(out)


def _read(op: Op) -> list[Val]:
    """The values that an operation reads, its branches included."""
    inner = [v for ops, last in op.branches for o in ops for v in (*_read(o), last)]
    return [*op.args, *inner]
