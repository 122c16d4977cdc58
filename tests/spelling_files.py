"""The spellings as each exporter writes them, in files, and how often the tests take which."""

from __future__ import annotations

import inspect
import zlib
from pathlib import Path

import onnxruntime as ort
import pytest
import torch

from tests.families import cached
from tests.spellings import CANNOT_RUN, SPELLINGS, Exporter, export

HALF, SINGLE, BRAIN = torch.float16, torch.float32, torch.bfloat16
REDUCTIONS = {"ReduceMean", "ReduceSum", "ReduceL2", "ReduceSumSquare", "GlobalAveragePool", "Einsum"}
EXPORTERS: tuple[tuple[Exporter, int], ...] = (
    ("dynamo", 18), ("dynamo", 23), ("torchscript", 9), ("torchscript", 10), ("torchscript", 11), ("torchscript", 17),
)  # fmt: skip


def marks(exporter: Exporter, dtype: torch.dtype, i: int, opset: int) -> tuple[pytest.MarkDecorator, ...]:
    """By default, in float32: of torch's newer exporter, which takes long, a tenth at the first opset and another tenth
    at the second; of the older one all at opset 11 and a sixth at each other. And a part in half types."""
    if dtype == SINGLE:
        turn = (9, 10, 17).index(opset) if opset in (9, 10, 17) else 0
        often = i % 10 == (opset == 23) if exporter == "dynamo" else opset == 11 or i % 6 == turn
    else:
        often = i % (24 if exporter == "dynamo" else 6) == opset % 2
    return () if often else (pytest.mark.slow,)


def exported(exporter: Exporter, opset: int, dtype: torch.dtype, name: str) -> Path:
    """The exported spelling, cached; unoptimised where the optimised one is not a valid model."""
    digest = zlib.crc32(inspect.getsource(SPELLINGS[name].fn).encode())
    optimize = name not in CANNOT_RUN.get((exporter, opset, dtype), ())
    return cached(
        f"{exporter}-{opset}-{str(dtype)[6:]}-{name}-{digest:08x}.onnx",
        lambda path: export(SPELLINGS[name], exporter, opset, dtype, path, optimize=optimize),
    )


def session(path: Path) -> ort.InferenceSession:
    """A quiet CPU session on one thread."""
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
