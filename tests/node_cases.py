"""ONNX's own expanded LayerNormalization and RMSNormalization node tests: the function bodies, inlined."""

from __future__ import annotations

import importlib
import re
import warnings
from functools import cache
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
import onnx
from onnx.backend.test.case import node

Arrays: TypeAlias = dict[str, npt.NDArray[np.generic]]
NodeCase: TypeAlias = tuple[str, onnx.ModelProto, Arrays, Arrays]

_EXPANDED = re.compile(r"test_(layer|rms)_normalization_\w+_expanded(_ver\d+)?")


@cache
def _collected() -> tuple[NodeCase, ...]:
    """Collect once: onnx makes the cases of an operator when its module is imported, and keeps them in a global."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name in ("layernormalization", "rmsnormalization"):
            importlib.import_module(f"{node.__name__}.{name}")
    cases = node._NodeTestCases
    found: list[NodeCase] = []
    for case in cases:
        if case.model is None or case.data_sets is None or not _EXPANDED.fullmatch(case.name):
            continue
        ((inputs, outputs),) = case.data_sets
        names_in = [value.name for value in case.model.graph.input]
        names_out = [value.name for value in case.model.graph.output]
        found.append(
            (
                case.name,
                case.model,
                {n: np.asarray(a) for n, a in zip(names_in, inputs, strict=True)},
                {n: np.asarray(a) for n, a in zip(names_out, outputs, strict=True)},
            )
        )
    return tuple(found)


def expanded_cases() -> list[NodeCase]:
    """All `test_{layer,rms}_normalization_*_expanded*` as (name, copy of the model, inputs, outputs)."""
    out: list[NodeCase] = []
    for name, model, inputs, outputs in _collected():
        fresh = onnx.ModelProto()
        fresh.CopyFrom(model)
        out.append((name, fresh, dict(inputs), dict(outputs)))
    return out
