"""Which form a norm gets in which runtime: a table, each row measured or cited.

`onnx` and `normfuse` have one form for all runtimes. `ort-cpu` and `ort-cuda` are ONNX Runtime with one provider, whose
kernels differ from version to version: in 1.29 the contrib operator that takes in the addition is faster than addition
and norm, from 1.30 on it is two to seven times slower; before 1.30 LayerNormalization subtracts the square of the mean
from the mean square and loses what a large mean hides.

The first row that fits says what to do. The forms:

- "operator": LayerNormalization, RMSNormalization, or a function, as for target "onnx"
- "skip": the contrib operators SkipLayerNormalization and SkipSimplifiedLayerNormalization, in domain com.microsoft
- "leave": what the model has
- "apart": a model's own Skip operator becomes the addition and the norm
- "sum": an addition is written as Sum, which the runtime does not take into a slower operator
- "float32": an operator of half types that is no norm, which the runtime would take apart, gets casts around it
- "product": a product and the number behind it become the contrib operator FusedMatMul
- "taken in": a constant behind a convolution is spelled so that the runtime takes it into the convolution's weights
- "function": a Softmax becomes a call of a function, for which our library has a kernel
- "refuse": as "leave", and it is a refusal, since the runtime has no kernel

Measured rows: `tests/bench/results/forms.json`, by `python -m tests.bench.forms`; a test compares the two.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from normfuse.config import VERSION, Config
from normfuse.errors import InputError, UnsupportedError
from normfuse.norm import Norm, reads_x

Version = tuple[int, int]
HALF = frozenset({"float16", "bfloat16"})
FLOAT = frozenset({"float32"})
ANY = HALF | FLOAT | {"float64"}
OLDEST: Version = (1, 20)
NEWEST: Version = (1, 32)
"""The newest version that was measured; newer ones get its rows."""
PROVIDERS = {"ort-cpu": "CPU", "ort-cuda": "CUDA"}


@dataclass(frozen=True, slots=True)
class Row:
    """A line of the table: where it holds, the form there, and how that is known.

    `what` is "add_norm" for a residual addition and its norm, "norm" for a norm alone or inside one, "skip" for a Skip
    operator that the model has already, "half" for another operator, named `kind`, "masked" for a Softmax of what a
    mask was added to, "scaled" for a product and the number that it is multiplied by, "convolved" for a constant that
    the result of a convolution is multiplied by or that is added to it, "sum" for the addition that a LayerNorm alone
    reads, "conversion" for a LayerNorm that could be an RMSNorm ("leave": it is not made one, "operator": it is).
    `since` and `before` are versions of the runtime, `types` those of the tensor that the operator would read, `ranks`
    its ranks; `cast` is where the operator rounds half types, "" for any; `numerics` "" for either.
    """

    target: str
    kind: str
    what: str
    types: frozenset[str]
    form: str
    evidence: str
    since: Version = OLDEST
    before: Version = (99, 0)
    ranks: tuple[int, ...] = ()
    cast: str = ""
    numerics: str = ""

    @property
    def range(self) -> str:
        """Types and versions, in words."""
        until = "and newer" if self.before == (99, 0) else f"to before {_dotted(self.before)}"
        return f"{'/'.join(sorted(self.types))} in {_dotted(self.since)} {until}"


_SKIP = "measured: 0.68 to 0.95 of the time of addition and RMSNormalization, once 1.13"
_SKIP_LAYER = "measured: 0.21 to 0.94 of the time of addition and LayerNormalization, as inexact as that"
_ONE_PASS = "measured: LayerNormalization errs by up to 1e-2 where the mean is 100, the model's own arithmetic by 5e-6"
_SLOW = "measured: LayerNormalization takes up to 4 times as long as the model's own arithmetic"
_RMS = "measured: 0.44 to 1.43 of the time of the model's own arithmetic"
_LAYER = "measured: 0.44 to 1.02 of the time of the model's own arithmetic before 1.27"
_TWO = "measured: 0.35 to 0.57 of the time of the model's own arithmetic, Skip operators 0.95 to 7.1 times as long"
_APART = "measured: Skip operators 0.95 to 6.4 times as long as addition and norm"
_APART_HALF = "measured: Skip operators 1 to 5 times as long as what they compute, the addition and norm in float32"
_OURS = "measured in 1.31: 0.07 to 0.33 of the time of the Skip operator at 512x2048, with the library"
_NOT_STANDARD = "cited: an operator of ONNX Runtime, and not of the standard (ContribOperators.md)"
_SUM = "measured in 1.31: 0.13 to 0.31 of the time of Add, which ONNX Runtime makes SkipLayerNormalization of"
_NO_KERNEL = "tried in 1.23, 1.27, 1.31 and 1.32: no kernel for bfloat16"
_FUSED = "measured in 1.31 on an H200: 0.54 to 0.81 of the time of addition and norm"
_HALF = "measured in 1.31 on an H200: 0.56 to 0.64 of the time of addition and norm; rounds once (onnxruntime#28682)"
_OVERFLOW = "cited: Skip operators sum half types in half before 1.27 (onnxruntime#29034), or round elsewhere"
_CUDA_LAYER = "cited: SkipLayerNormalization takes the variance as mean(x^2) - mean(x)^2 (onnxruntime, layer_norm.cuh)"
_NO_GAIN = "measured: an RMSNorm takes 0.45 to 1.59 of the time of a LayerNorm there, about as long"
_GAIN = "measured: an RMSNorm takes 0.24 to 0.89 of the time of a LayerNorm, single rows up to 1.56"
_WIDE = "measured: 0.08 to 0.83 of the time; ONNX Runtime has it in float32 only, and runs its parts instead"
_SCALED = "measured: 0.19 to 1.00 of the time of both, with 512 tokens at most 0.83; rounds once"
_CONVOLVED = "measured: 0.29 to 0.78 of the time of one number for all, which ONNX Runtime does not take in"
_AS_IT_IS = "measured: with target ort-cpu 0.08 to 0.83 of the time on the CPU"
_SOFTMAX = ("measured in 1.31 on the CPU, with the library: 0.18 to 0.91 of the time of Add and Softmax under a causal "
            "mask with AVX-512 and 0.50 to 1.22 with AVX2, 0.55 to 1.49 where the mask is 0")
_MASKED = ("measured in 1.31: target normfuse with the library takes 0.18 to 0.91 of the time under a causal mask with "
           "AVX-512 and 0.50 to 1.22 with AVX2")
_SOFTMAX_HALF = "measured in 1.31 on the CPU, with the library: 0.12 to 0.82 of the time of its parts"
FLAT = (2, 3)
WIDE = {"Softmax": (13, 99), "LogSoftmax": (13, 99), "Gelu": (20, 99), "HardSwish": (14, 21), "HardSigmoid": (6, 21),
        "LeakyRelu": (6, 21)}  # fmt: skip
"""The opsets in which the standard says what an operator is made of, so that ONNX Runtime takes it apart."""

ROWS = (
    Row("ort-cpu", "rms_norm", "skip", FLOAT, "apart", _APART, since=(1, 30)),
    Row("ort-cpu", "layer_norm", "skip", FLOAT, "apart", _APART, since=(1, 30)),
    Row("ort-cpu", "rms_norm", "skip", frozenset({"float16"}), "apart", _APART_HALF, since=(1, 30)),
    Row("ort-cpu", "layer_norm", "skip", frozenset({"float16"}), "apart", _APART_HALF, since=(1, 30)),
    Row("normfuse", "rms_norm", "skip", HALF | FLOAT, "apart", _OURS),
    Row("normfuse", "layer_norm", "skip", HALF | FLOAT, "apart", _OURS),
    *(Row("standard", kind, "skip", HALF | FLOAT, "apart", _NOT_STANDARD) for kind in ("rms_norm", "layer_norm")),
    Row("normfuse", "Softmax", "half", frozenset({"float16"}), "function", _SOFTMAX_HALF),
    Row("normfuse", "Softmax", "masked", FLOAT, "function", _SOFTMAX),
    Row("ort-cpu", "Softmax", "masked", FLOAT, "leave", _MASKED, since=(1, 31)),
    Row("ort-cpu", "MatMul", "scaled", frozenset({"float16"}), "product", _SCALED),
    *(Row(target, "Conv", "convolved", FLOAT, "taken in", _CONVOLVED) for target in ("onnx", "ort-cpu", "normfuse")),
    *(Row(target, op, "half", frozenset({"float16"}), "leave", _AS_IT_IS)
      for op in WIDE for target in ("onnx", "normfuse") if (target, op) != ("normfuse", "Softmax")),
    Row("ort-cpu", "rms_norm", "norm", frozenset({"bfloat16"}), "refuse", _NO_KERNEL),
    Row("ort-cpu", "layer_norm", "norm", frozenset({"bfloat16"}), "refuse", _NO_KERNEL, before=(1, 31)),
    Row("ort-cpu", "rms_norm", "add_norm", FLOAT, "skip", _SKIP, before=(1, 30), ranks=FLAT),
    Row("ort-cpu", "layer_norm", "add_norm", FLOAT, "skip", _SKIP_LAYER, before=(1, 30), ranks=FLAT,
        numerics="fast"),
    Row("ort-cpu", "layer_norm", "norm", FLOAT, "leave", _ONE_PASS, before=(1, 30), numerics="exact"),
    Row("ort-cpu", "layer_norm", "norm", HALF | FLOAT, "leave", _SLOW, since=(1, 27), before=(1, 30)),
    Row("ort-cpu", "rms_norm", "norm", ANY, "operator", _RMS, before=(1, 30)),
    Row("ort-cpu", "layer_norm", "norm", ANY, "operator", _LAYER, before=(1, 30)),
    Row("ort-cpu", "rms_norm", "norm", ANY, "operator", _TWO, since=(1, 30)),
    Row("ort-cpu", "layer_norm", "norm", ANY, "operator", _TWO, since=(1, 30)),
    Row("ort-cpu", "layer_norm", "sum", FLOAT, "sum", _SUM, since=(1, 30)),
    Row("ort-cpu", "layer_norm", "conversion", ANY, "leave", _NO_GAIN, before=(1, 27)),
    Row("ort-cpu", "layer_norm", "conversion", ANY, "operator", _GAIN, since=(1, 27)),
    *(Row("ort-cpu", op, "half", frozenset({"float16"}), "float32", _WIDE) for op in WIDE),
    Row("ort-cuda", "rms_norm", "add_norm", FLOAT, "skip", _FUSED, ranks=FLAT),
    Row("ort-cuda", "rms_norm", "add_norm", HALF, "skip", _HALF, since=(1, 27), ranks=FLAT, cast="last"),
    Row("ort-cuda", "rms_norm", "add_norm", HALF, "skip", _HALF, since=(1, 27), ranks=FLAT, numerics="fast"),
    Row("ort-cuda", "layer_norm", "add_norm", FLOAT, "skip", _FUSED, ranks=FLAT, numerics="fast"),
    Row("ort-cuda", "rms_norm", "norm", ANY, "operator", _OVERFLOW),
    Row("ort-cuda", "layer_norm", "norm", ANY, "operator", _CUDA_LAYER),
)  # fmt: skip


class Table:
    """The rows for one configuration.

    Raises `InputError` for a version that is none, `UnsupportedError` for one that is too old.
    """

    def __init__(self, config: Config) -> None:
        self.target, self.numerics = config.target, config.numerics
        self.version = runtime_version(config.ort_version)
        if self.target in PROVIDERS and self.version < OLDEST:
            raise UnsupportedError(
                f"ONNX Runtime {_dotted(self.version)} is older than the oldest that target {self.target!r} knows, "
                f"{_dotted(OLDEST)}; use target 'onnx', which runs wherever the model runs")  # fmt: skip

    @property
    def name(self) -> str:
        """The runtime, in words."""
        where = PROVIDERS.get(self.target)
        return f"target {self.target!r}" if where is None else f"ONNX Runtime {_dotted(self.version)} on {where}"

    def row(self, norm: Norm, what: str = "norm") -> Row | None:
        """The row for a norm; None where the target has none, so that "operator" is meant."""
        read = norm.x.dtype if what == "add_norm" or reads_x(norm) else norm.compute
        for row in self._rows(norm.kind, what, read):
            if (not row.ranks or len(norm.x.shape or ()) in row.ranks) and row.cast in ("", norm.cast):
                return row
        return None

    def apart(self, kind: str, dtype: str | None) -> Row | None:
        """The row that says to take a Skip operator of the model apart, if one does."""
        return next(self._rows(kind, "skip", dtype), None)

    def widened(self, op: str, dtype: str | None, opset: int) -> Row | None:
        """The row that says to compute an operator that is no norm in float32, if one does."""
        low, high = WIDE.get(op, (1, 0))
        return next(self._rows(op, "half", dtype), None) if low <= opset <= high else None

    def scaled(self, dtype: str | None) -> Row | None:
        """The row that says to make one operator of a product and the number behind it, if one does."""
        return next(self._rows("MatMul", "scaled", dtype), None)

    def convolved(self, dtype: str | None) -> Row | None:
        """The row that says to spell a constant behind a convolution for each channel, if one does."""
        return next(self._rows("Conv", "convolved", dtype), None)

    def summed(self, dtype: str | None) -> Row | None:
        """The row that says to write the addition ahead of a LayerNorm as Sum, if one does."""
        return next(self._rows("layer_norm", "sum", dtype), None)

    def masked(self, dtype: str | None) -> Row | None:
        """The row for a Softmax of what a mask was added to, if there is one."""
        return next(self._rows("Softmax", "masked", dtype), None)

    def _rows(self, kind: str, what: str, dtype: str | None) -> Iterator[Row]:
        for row in ROWS:
            if (row.target == self.target and row.kind == kind and row.what == what and dtype in row.types
                    and row.since <= self.version < row.before and row.numerics in ("", self.numerics)):  # fmt: skip
                yield row

    def lines(self, used: Mapping[Row, int]) -> list[str]:
        """What to tell of the rows that were used, each so often."""
        new = f", newer than {_dotted(NEWEST)}, the newest measured" if self.version > NEWEST else ""
        head = [f"target {self.target}: {self.name}{new}"] if self.target in PROVIDERS else []
        what = {"add_norm": " with its addition", "skip": " in a Skip operator of the model",
                "masked": " with its mask", "scaled": " with the number behind it", "sum": ", the addition ahead",
                "convolved": ", a constant behind it"}
        return [*head, *(f"{n} x {row.kind}{what.get(row.what, '')}: {row.form} ({row.range}; {row.evidence})"
                        for row, n in used.items())]  # fmt: skip


def runtime_version(asked: str) -> Version:
    """The version asked for, else the one installed, else the newest that was measured."""
    if asked:
        return _parsed(asked)
    for package in ("onnxruntime-gpu", "onnxruntime"):
        try:
            return _parsed(importlib.metadata.version(package))
        except importlib.metadata.PackageNotFoundError:
            continue
    return NEWEST


def _parsed(text: str) -> Version:
    found = VERSION.match(text)
    if found is None:
        raise InputError(f"ort_version={text!r} is not a version; give one such as '1.31'")
    return int(found[1]), int(found[2])


def _dotted(version: Version) -> str:
    return ".".join(map(str, version))
