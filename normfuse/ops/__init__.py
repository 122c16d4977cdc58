"""The fused operators `torch.ops.normfuse.*`; importing this package registers them.

`meaning` defines each in plain torch, `kernels` computes it in Triton, `register` makes it a torch operator.
"""

from typing import Any

from normfuse.ops import register as register


def __getattr__(name: str) -> Any:
    """`to_onnx` needs onnx, and is imported when it is used."""
    if name == "to_onnx":
        from importlib import import_module

        return import_module("normfuse.ops.to_onnx")
    raise AttributeError(f"module 'normfuse.ops' has no attribute {name!r}")
