"""ONNX Runtime where it is there, and bfloat16 in and out of it: its Python interface has no arrays of that type, only
values by pointer."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from normfuse.errors import UnsupportedError, first_line

Array = np.ndarray[Any, Any]
BFLOAT16 = "tensor(bfloat16)"


def onnx_runtime() -> Any:
    """The module of ONNX Runtime. Raises `UnsupportedError` where it is missing, or cannot be imported."""
    try:
        import onnxruntime
    except Exception as why:
        if getattr(why, "name", None) == "onnxruntime" and isinstance(why, ModuleNotFoundError):
            text = "this needs ONNX Runtime: pip install 'normfuse[cpu]' or 'normfuse[gpu]'"
            raise UnsupportedError(text) from None
        at: BaseException | None = why
        while at is not None:  # libraries in C make an ImportError of it
            if isinstance(at, KeyboardInterrupt):
                raise at from None
            at = at.__cause__ or at.__context__
        raise UnsupportedError(f"ONNX Runtime is installed, but cannot be imported: {first_line(why)}") from why
    return onnxruntime


def in_numpy(runtime: Any) -> Any:
    """The session, or one around it that takes and gives arrays of bfloat16, where it has inputs or outputs of that."""
    values = (*runtime.get_inputs(), *runtime.get_outputs())
    return InBfloat16(runtime) if any(v.type == BFLOAT16 for v in values) else runtime


class InBfloat16:
    """A session whose inputs or outputs are partly of bfloat16."""

    def __init__(self, runtime: Any) -> None:
        self.runtime = runtime
        self.types = {v.name: v.type for v in (*runtime.get_inputs(), *runtime.get_outputs())}

    def __getattr__(self, name: str) -> Any:
        return getattr(self.runtime, name)

    def run(self, names: Sequence[str] | None, feeds: Mapping[str, Array], options: Any = None) -> list[Array]:
        """As the session's own, of tensors."""
        import ml_dtypes
        from onnx import TensorProto
        from onnxruntime import OrtValue

        def given(name: str, array: Array) -> Any:
            if self.types.get(name) != BFLOAT16:
                return OrtValue.ortvalue_from_numpy(np.asarray(array))
            bits = np.asarray(array, ml_dtypes.bfloat16, order="C").view(np.uint16)  # of other floats too: npz has none
            return OrtValue.ortvalue_from_numpy_with_onnx_type(bits, TensorProto.BFLOAT16)

        def array(name: str, value: Any) -> Array:
            if self.types[name] != BFLOAT16:
                return np.asarray(value.numpy())
            data = ctypes.string_at(value.data_ptr(), value.tensor_size_in_bytes())
            return np.frombuffer(data, ml_dtypes.bfloat16).reshape(value.shape()).copy()

        wanted = list(names) if names is not None else [v.name for v in self.runtime.get_outputs()]
        values = {name: given(name, array) for name, array in feeds.items()}
        found = self.runtime.run_with_ort_values(wanted, values, options)
        return [array(name, value) for name, value in zip(wanted, found, strict=True)]
