"""How far results are from one another, and whether they tell anything."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from normfuse.ort_values import Array


def distance(a: Array, b: Array) -> float:
    """The largest difference of two results; infinite where one has a NaN or another infinity and the other has not."""
    finite = np.isfinite(a) & np.isfinite(b)
    if (np.isnan(a) != np.isnan(b)).any() or (a[~finite] != b[~finite])[~np.isnan(a[~finite])].any():
        return float("inf")
    return float(np.max(np.abs(a[finite] - b[finite]), initial=0.0))


def worst(want: Sequence[Any], got: Sequence[Any]) -> float:
    """The largest difference of two lists of outputs, each relative to its largest element."""
    gaps = [relative(np.asarray(a), np.asarray(b)) for a, b in zip(want, got, strict=True)]
    return max(gaps, default=0.0)


def normwise(want: Sequence[Any], got: Sequence[Any]) -> float:
    """The largest distance of two outputs, each as the norm of the difference relative to the norm: steadier than the
    largest element where outputs are few."""
    pairs = [alike(np.asarray(a), np.asarray(b)) for a, b in zip(want, got, strict=True)]
    floats = [(a, b) for a, b in pairs if a.dtype.kind == "f" and a.size]
    return largest(float(np.linalg.norm(a - b) / (np.linalg.norm(a) or 1.0)) for a, b in floats)


def alike(a: Array, b: Array) -> tuple[Array, Array]:
    """Two outputs without the infinities that are the same in both, such as what a mask hides."""
    if a.dtype.kind != "f" or a.shape != b.shape or not (same := np.isinf(a) & (a == b)).any():
        return a, b
    return np.where(same, 0, a), np.where(same, 0, b)


def tells(output: Array) -> bool:
    """Whether something can be seen in an output: it holds no NaN, and not infinities alone, as of a mask."""
    if output.dtype.kind not in "fc":
        return True
    return not np.isnan(output).any() and (not output.size or bool(np.isfinite(output).any()))


def largest(errors: Iterable[float]) -> float:
    """The largest of some errors: NaN where one is, which `max` may pass over."""
    return float(np.max([0.0, *errors]))


def relative(want: Array, got: Array) -> float:
    """The largest difference relative to the largest element; infinite where shapes, integers, NaNs or infinities do
    differ."""
    if want.shape != got.shape or want.dtype.kind not in "fc":
        return 0.0 if want.shape == got.shape and (want == got).all() else float("inf")
    gap, top = distance(want, got), float(np.max(np.abs(want[np.isfinite(want)]), initial=0.0))
    return gap / top if top else gap
