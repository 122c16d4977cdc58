"""One graph on trial: every norm found, no near miss taken for one, equal outputs, nothing to do a second time.

What is equal is decided in float64 on rows that are hard on norms, by `program.evaluate`, which knows only the neutral
description; the product's own checking has no part in it.
"""

from __future__ import annotations

import hashlib
import json
import random
import traceback
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import onnx
import torch

import normfuse
from normfuse.config import OF_TORCH
from normfuse.report import Report
from tests.fuzz import moved, onnx_eval, to_fx, to_onnx
from tests.fuzz.generator import generate
from tests.fuzz.program import Array, Noise, Program, evaluate, later, values

TOLERANCE = 2.0**-22
"""Relative to the largest element of an output: a factor such as sqrt(N), in no graph, is folded into a float32."""
MARGIN, SAMPLES = 8.0, 4
"""An output may be so many times as far off as it gets by roundings by chance, of which so many sets are tried."""
DOUBLE, SINGLE = 2.0**-52, 2.0**-24
"""Both sides compute in float64; constants that were folded, and eps, are kept in float32."""
BLIND = 0.1
"""An output that roundings alone may put off by so much of its largest element says nothing."""
FX_SHARE, SITES_SHARE, INSPECT_SHARE, RUNTIME_SHARE = 0.4, 0.2, 0.1, 0.03
ROUNDINGS = {"float16": 2.0**-11, "float32": 2.0**-24, "float64": 2.0**-53}

Feeds = dict[int, Array]
Run = Callable[[Feeds], list[Array]]


@dataclass(slots=True)
class Verdict:
    """What became of one seed: `failures` are (front end, kind, message)."""

    seed: int
    norms: int = 0
    found: int = 0
    misses: int = 0
    fused: int = 0
    compared: int = 0
    blind: int = 0
    """Of the outputs compared, those where roundings alone may make all the difference."""
    runs: dict[str, int] = field(default_factory=dict)
    failures: list[tuple[str, str, str]] = field(default_factory=list)
    digest: bytes = b""


def judge(seed: int, only: str = "") -> Verdict:
    """Generate the graph of a seed and try it in ONNX and, for a share of the seeds, in torch."""
    torch.set_num_threads(1)
    program, rng = generate(seed), random.Random(seed * 2 + 1)
    verdict = Verdict(seed, misses=len(program.misses))
    trial = _Trial(program, verdict, rng)
    torch_too = rng.random() < FX_SHARE
    for name, wanted in (("onnx", True), ("fx", torch_too)):
        if only == name or (wanted and not only):
            verdict.runs[name] = 1
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    getattr(trial, f"in_{name}")()
            except Exception as why:
                where = traceback.extract_tb(why.__traceback__)[-1]
                text = f"{type(why).__name__}: {why} ({where.filename.rpartition('/')[2]}:{where.lineno})"
                kind = "error" if isinstance(why, normfuse.NormFuseError) else "crash"
                verdict.failures.append((name, kind, " ".join(text.split())))
    verdict.digest = trial.digest.digest()
    return verdict


def config(seed: int, rng: random.Random) -> normfuse.Config:
    """A configuration: a target, a numerics, and in most cases no verification, so that the algebra is on trial."""
    target: Any = rng.choice(("onnx", "standard", "normfuse", "ort-cpu"))
    version = "1.31"
    if other := later(seed, "target"):
        target, version = other.choice(("ort-cuda", "ort-cpu")), other.choice(("1.24", "1.29", "1.31"))
    return normfuse.Config(target=target, numerics="fast" if rng.random() < 0.2 else "exact",
                           ort_version=version if target.startswith("ort-") else "",
                           verify="sites" if rng.random() < SITES_SHARE else "off")  # fmt: skip


def feeds(program: Program) -> Iterator[tuple[str, Feeds]]:
    """Inputs in float64 by kind; a condition is true every other time."""
    rng = np.random.default_rng(program.seed)
    for i, kind in enumerate(("random", "offset", "large mean", "tiny", "zero", "spike")):
        found: Feeds = {}
        for v in program.inputs:
            if v.dtype == "bool":
                found[v.index] = np.array(i % 2 == 0)
            else:
                found[v.index] = np.asarray(_rows(kind, rng.standard_normal(v.shape)), v.dtype).astype(np.float64)
        yield kind, found


def _rows(kind: str, normal: Array) -> Array:
    if kind == "spike":
        spike = np.zeros(normal.size)
        spike[::7] = 3.0
        return spike.reshape(normal.shape)
    return {"random": normal, "offset": normal + 3.0, "large mean": normal + 30.0, "tiny": normal * 1e-3,
            "zero": np.zeros(normal.shape)}[kind]  # fmt: skip


class _Trial:
    def __init__(self, program: Program, verdict: Verdict, rng: random.Random) -> None:
        self.program, self.verdict, self.rng = program, verdict, rng
        self.config = config(program.seed, rng)
        self.digest = hashlib.sha256()

    def fail(self, front: str, kind: str, message: str) -> None:
        self.verdict.failures.append((front, kind, message))

    # -- the two front ends ---------------------------------------------------------------------------------------

    def in_onnx(self) -> None:
        model = to_onnx.write(self.program)
        before = model.SerializeToString(deterministic=True)
        made, report = normfuse.optimize(model, self.config)
        after = made.SerializeToString(deterministic=True)
        if model.SerializeToString(deterministic=True) != before:
            self.fail("onnx", "input changed", "optimize changed the model that it was given")
        self.records("onnx", report)
        onnx.checker.check_model(made, full_check=True)
        names = {v.index: v.name for v in self.program.inputs}

        def run(model: onnx.ModelProto) -> Run:
            evaluator = onnx_eval.Model(model)
            return lambda given: evaluator.run({names[i]: a for i, a in given.items()})

        self.compare("onnx", run(model), run(made), flat=False)
        again, _ = normfuse.optimize(made, self.config)
        if again.SerializeToString(deterministic=True) != after:
            self.fail("onnx", "not idempotent", "a second rewrite changed the result")
        self.digest.update(after)
        if self.rng.random() < INSPECT_SHARE:
            seen = normfuse.inspect(model)
            if [(n.kind, n.axes, n.eps) for n in seen.norms] != [(n.kind, n.axes, n.eps) for n in report.norms]:
                self.fail("onnx", "inspect differs", "inspect and rewrite found other norms")
        if self.rng.random() < RUNTIME_SHARE:
            self.runtime(model, made)
        if rng := later(self.program.seed, "moved"):
            other = moved.move(model, rng)
            made, _ = normfuse.optimize(other, self.config)
            onnx.checker.check_model(made, full_check=True)
            self.compare("moved", run(other), run(made), flat=False)

    def in_fx(self) -> None:
        module = to_fx.write(self.program)
        before = str(module.graph)
        known = self.config.target in OF_TORCH
        config = self.config if known else replace(self.config, target="onnx", ort_version="")
        made, report = normfuse.optimize(module, config)
        after = str(made.graph)
        if str(module.graph) != before:
            self.fail("fx", "input changed", "optimize changed the module that it was given")
        self.records("fx", report, any("fill_" in str(node.target) for node in module.graph.nodes))
        names = {v.index: v.name for v in self.program.inputs}

        def run(module: torch.fx.GraphModule) -> Run:
            return lambda given: to_fx.run(module, {names[i]: a for i, a in given.items()})

        self.compare("fx", run(module), run(made), flat=True)
        again, _ = normfuse.optimize(made, config)
        if str(again.graph) != after:
            self.fail("fx", "not idempotent", "a second rewrite changed the result")
        self.digest.update(after.encode())

    # -- the demands ------------------------------------------------------------------------------------------------

    def records(self, front: str, report: Report, written: bool = False) -> None:
        """Each true norm is in the report, and nothing else is; some may be missing where memory is written over."""
        plain = report.to_dict()
        del plain["summary"]["seconds"]
        self.digest.update(json.dumps(plain, sort_keys=True).encode())
        left = [(n.kind, tuple(n.axes), n.eps, n.size, n.name) for n in report.norms]
        for truth in self.program.truths:
            hit = next((r for r in left if truth.fits(*r[:4])), None)
            if hit is not None:
                left.remove(hit)
            elif truth.least and not written:
                self.fail(front, "missed", f"{truth.kind} over {truth.axes[0]} eps {truth.eps[0]:.4g} ({truth.how})")
            if not written:
                self.verdict.norms += truth.least
                self.verdict.found += min(truth.least, int(hit is not None))
        left = [r for r in left if not any(truth.fits(*r[:4]) for truth in self.program.truths)]
        for kind, axes, eps, _, name in left:
            if emerges(self.program, kind, axes, eps):
                continue
            near = ", ".join(self.program.misses) or "nothing"
            self.fail(front, "phantom", f"{name} is no {kind} over {axes} eps {eps:.4g}; near misses: {near}")
        for refusal in report.refusals:  # 1/N in float32 and a one-pass variance: then the check errs, not the algebra
            far = "large mean" in refusal.message or "offset" in refusal.message
            shy = refusal.code == "NF202" and front == "onnx"  # a form for every norm that is found
            if shy or (refusal.code == "NF201" and not (self.program.loose and far)):
                self.fail(front, refusal.code, f"{refusal.node}: {refusal.message}")
        self.verdict.fused += report.fused

    def compare(self, front: str, before: Run, after: Run, flat: bool) -> None:
        """The outputs are those of the description, on every kind of rows, or of the graph as it was: the description
        does not say what an infinity becomes as an integer."""
        for kind, given in feeds(self.program):
            wanted, made = evaluate(self.program, given, flat), after(given)
            gaps = [distance(want, got) for want, got in zip(wanted, made, strict=True)]
            tops = [top(want) for want in wanted]
            self.verdict.compared += len(gaps)
            if all(gap <= TOLERANCE * most for gap, most in zip(gaps, tops, strict=True)):
                continue
            chances = spread(self.program, given, wanted, flat, DOUBLE, SINGLE)
            was = [(distance(a, b), top(a)) for a, b in zip(before(given), made, strict=True)]
            described = zip(gaps, tops, strict=True)
            for value, *both, by_chance in zip(self.program.outputs, described, was, chances, strict=True):
                self.verdict.blind += MARGIN * by_chance > BLIND * both[0][1]
                gap, most = min(both, key=lambda one: one[0] - TOLERANCE * one[1])
                if not gap <= TOLERANCE * most + MARGIN * by_chance:
                    self.fail(front, "different", f"{value.name} on {kind} rows is off by {gap:.2g} of {most:.2g}, "
                              f"by roundings {by_chance:.2g}")  # fmt: skip
                    return

    def runtime(self, model: onnx.ModelProto, made: onnx.ModelProto) -> None:
        """ONNX Runtime takes the result where it takes the model, and is about as near to float64."""
        try:
            old = session(model)
        except Exception:
            return
        new = session(made)
        self.verdict.runs["runtime"] = 1
        types = {op.out.dtype for op in self.program.ops} | {v.dtype for v in self.program.inputs}
        rounding = max(ROUNDINGS[t] for t in types & set(ROUNDINGS))
        for kind, given in feeds(self.program):
            fed = {v.name: np.asarray(given[v.index], v.dtype) for v in self.program.inputs}
            wanted = evaluate(self.program, given)
            chances = spread(self.program, given, wanted, False, rounding, max(rounding, SINGLE))
            both = old.run(None, fed), new.run(None, fed)
            for value, want, by_chance, a, b in zip(self.program.outputs, wanted, chances, *both, strict=True):
                was, now = _gap(want, a), _gap(want, b)
                if np.isfinite(was) and not now <= 4 * was + MARGIN * by_chance:
                    self.fail("onnx", "less exact", f"{value.name} on {kind} rows in ONNX Runtime: off by {now:.2g}, "
                              f"was {was:.2g}, by roundings {by_chance:.2g}, of {top(want):.2g}")  # fmt: skip
                    return


def emerges(program: Program, kind: str, axes: tuple[int, ...], eps: float) -> bool:
    """Whether some value is that norm of another, with any weight and bias, though nobody put it there.

    Near misses can make one together: (x + mean(x)) / s, from which its mean is taken away, is (x - mean(x)) / s.
    """
    rng = np.random.default_rng(program.seed)
    fixed = {v.index: _input(rng, v.shape, v.dtype) for v in program.inputs}
    envs = []
    for scale in (1.0, np.sqrt(eps)) * 8:
        moving = {v.index: _input(rng, v.shape, v.dtype, scale) for v in program.inputs if len(v.shape) > 1}
        envs.append(values(program, fixed | moving))
    stacks = {i: np.stack([env[i] for env in envs]) for i in envs[0] if len({env[i].shape for env in envs}) == 1}
    for x in stacks.values():
        if x.ndim <= max(-a for a in axes) or x.dtype.kind != "f" or all(x.shape[a] == 1 for a in axes):
            continue
        centred = x - x.mean(axes, keepdims=True) if kind == "layer_norm" else x
        with np.errstate(all="ignore"):
            n = _columns(centred / np.sqrt((centred * centred).mean(axes, keepdims=True) + eps), axes)
        if any(y.shape == x.shape and y.dtype.kind == "f" and _line(n, _columns(y, axes)) for y in stacks.values()):
            return True
    return False


def _input(rng: np.random.Generator, shape: tuple[int, ...], dtype: str, scale: float = 1.0) -> Array:
    found = scale * rng.standard_normal(shape)
    return found > -1 if dtype == "bool" else np.asarray(found, dtype).astype(np.float64)


def _columns(a: Array, axes: tuple[int, ...]) -> Array:
    """A column for each place along some axes."""
    moved = np.moveaxis(a, axes, range(-len(axes), 0))
    return moved.reshape(-1, int(np.prod(moved.shape[-len(axes):])))


def _line(n: Array, y: Array) -> bool:
    """Whether, column by column, y is w * n + b with a w that is not all zeros."""
    if not (np.isfinite(n).all() and np.isfinite(y).all()):
        return False
    d = n - n.mean(0)
    power = (d * d).sum(0)
    w = (d * y).sum(0) / np.where(power == 0, 1.0, power)
    off = y - y.mean(0) - w * d
    return bool(np.abs(off).max() <= 1e-6 * np.abs(y).max() and np.abs(w).max() > 1e-3 * np.abs(y).max())


def spread(program: Program, given: Feeds, wanted: list[Array], flat: bool, values: float,
           constants: float) -> list[float]:  # fmt: skip
    """How far off each output gets by roundings by chance."""
    noise = Noise(np.random.default_rng(program.seed), values, constants)
    found = [0.0] * len(wanted)
    for _ in range(SAMPLES):
        off = [distance(a, b) for a, b in zip(wanted, evaluate(program, given, flat, noise), strict=True)]
        found = [max(a, b) for a, b in zip(found, off, strict=True)]
    return found


def top(a: Array) -> float:
    """The largest element that is finite."""
    return float(np.max(np.abs(a[np.isfinite(a)]), initial=0.0))


def _gap(want: Array, got: Array) -> float:
    found = got.astype(np.float64)
    if want.shape != found.shape:
        return float("inf")
    both = np.isfinite(want) & np.isfinite(found)
    if not both.all():
        return 0.0 if (np.isfinite(want) == np.isfinite(found)).all() else float("inf")
    return float(np.max(np.abs(want - found), initial=0.0))


def distance(want: Array, got: Array) -> float:
    """The largest difference; infinite for another shape, or where one is infinite or a NaN and the other is not."""
    if want.shape != got.shape:
        return float("inf")
    both = np.isfinite(want) & np.isfinite(got)
    if not both.all() and not np.array_equal(want[~both], got[~both], equal_nan=True):
        return float("inf")
    return float(np.max(np.abs(want[both] - got[both]), initial=0.0))


def session(model: onnx.ModelProto) -> Any:
    """A quiet CPU session on one thread, with the fusions that ONNX Runtime makes by itself."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
