"""Operators that a certificate cannot compute: any function of what they read stands for them.

A conversion edits constants ahead of such an operator or behind it and has no rule for it, so that it holds whatever
the operator computes, or not at all; with a function that nobody chose for it, it does not hold by chance.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import onnx
from onnx.reference.op_run import OpRun

from normfuse.graph import FLOATS, Value
from normfuse.io.message import graphs_of, nodes_of
from normfuse.ort_values import Array

COMPUTED = ("", "ai.onnx", "ai.onnx.ml", "ai.onnx.preview.training")
"""The domains whose operators ONNX's reference evaluator has."""


class StandIns:
    """The operators of a model and of its conversion that nothing computes; `values`: what is known of its values.

    The size of a result is what the shape says that was inferred for it, its symbols being what they were in values
    that have been computed. `used` has the names of the operators.
    """

    def __init__(self, values: Mapping[str, Value]) -> None:
        self.values = values
        self.sizes: dict[str, int] = {}
        self.used: set[str] = set()
        self.read: set[str] = set()

    def operators(self, graph: onnx.GraphProto, known: Iterable[type[OpRun]]) -> list[type[OpRun]]:
        """Classes for the reference evaluator, for those operators of a graph that are not `known`."""
        have = {(one.op_domain, one.__name__) for one in known}
        for one in graphs_of(graph):
            self.read |= {v.name for v in one.output} | {name for node in one.node for name in node.input}
        found = {(node.domain, node.op_type) for node in nodes_of(graph) if node.domain not in COMPUTED} - have
        self.used |= {op for _, op in found}
        return [type(op, (_StandIn,), {"op_domain": domain, "stand": self}) for domain, op in sorted(found)]

    def learn(self, computed: Mapping[str, Any]) -> None:
        """See the sizes of values that were computed."""
        for name, array in computed.items():
            value = self.values.get(name)
            if value is not None and value.shape is not None and isinstance(array, np.ndarray):
                pairs = zip(value.shape, array.shape, strict=False)
                self.sizes.update({d: n for d, n in pairs if isinstance(d, str)})

    def shape(self, name: str) -> list[int]:
        """The sizes of a result; `ValueError` where they cannot be told, or it is no tensor of floats, and is read."""
        if name not in self.read - {""}:
            return [0]
        value = self.values.get(name)
        dims = None if value is None or value.dtype not in FLOATS else value.shape
        sizes = [self.sizes.get(d) if isinstance(d, str) else d for d in dims or ()]
        if dims is None or None in sizes:
            raise ValueError(f"{name} is computed by an operator that is not known here, and so is its size")
        return [n for n in sizes if n is not None]


class _StandIn(OpRun):
    stand: StandIns

    def _run(self, *inputs: Array | None, **attributes: Any) -> tuple[Array, ...]:
        """Each result has of each operand an element in each place, and a sum over all of them with other weights; of
        the inverse hyperbolic sine of them, beside which a mask of -1e38 or infinity leaves the others their digits."""
        if any(attr.HasField("g") or attr.graphs for attr in self.onnx_node.attribute):
            raise ValueError(f"{self.onnx_node.op_type} has graphs of its own")
        flats = [np.nan_to_num(np.arcsinh(x.astype(np.float64).reshape(-1)), posinf=1e3, neginf=-1e3)
                 for x in inputs if x is not None and x.size]  # fmt: skip
        outputs = []
        for k, name in enumerate(self.onnx_node.output):
            total = np.zeros(self.stand.shape(name))
            for i, flat in enumerate(flats):
                some = np.sin(np.arange(flat.size) * (1.3 + i) + k + 1)
                total = total + np.resize(flat * (1.5 + some), total.shape) + flat @ some / np.sqrt(flat.size)
            outputs.append(total)
        return tuple(outputs)
