"""How nodes of a torch graph are run to check them: on the CPU, wherever the model is, in float64 if need be."""

from __future__ import annotations

from typing import Any

import torch

FLOATS = (torch.float16, torch.bfloat16, torch.float32)
DEVICES = frozenset("cuda xpu mps hpu".split())
WIDENING = {"float": "double", "half": "double", "bfloat16": "double"}


def here(argument: Any, wide: bool) -> Any:
    """An argument of a node, which may name a device or, in float64, a type."""
    if isinstance(argument, torch.device) or (isinstance(argument, str) and argument.partition(":")[0] in DEVICES):
        return torch.device("cpu")
    return torch.float64 if wide and isinstance(argument, torch.dtype) and argument in FLOATS else argument


def method(name: str, wide: bool) -> str:
    """A method of a node, which may be that of a device or, in float64, of a type."""
    return "cpu" if name in DEVICES else WIDENING.get(name, name) if wide else name
