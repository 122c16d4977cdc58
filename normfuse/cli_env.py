"""What NormFuse works with on this machine: versions, the providers that sessions really get, the GPU."""

from __future__ import annotations

import contextlib
import io
import platform
from importlib import metadata
from typing import Any

from normfuse.errors import UnsupportedError

PACKAGES = ("normfuse", "torch", "onnx", "onnx-ir", "onnxscript", "numpy")


def version(package: str) -> str | None:
    """The installed version of a distribution, or None."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def environment() -> dict[str, Any]:
    """Names and versions; None for what is not there."""
    found: dict[str, Any] = {"python": platform.python_version(), "platform": platform.platform()}
    found |= {name.replace("-", "_"): version(name) for name in PACKAGES}
    found["onnxruntime"] = _onnxruntime()
    found["onnxruntime_providers"] = sessions_have() if found["onnxruntime"] else []
    found["onnxruntime_operators"] = _operators()
    found["triton"] = version("triton")
    found["gpu"] = _gpu()
    return found


def _onnxruntime() -> str | None:
    """The version and the build: the GPU and the CPU package share one module, so that both at once is a mistake."""
    names = ("onnxruntime", "onnxruntime-gpu")
    from normfuse.ort_values import onnx_runtime

    found = ", ".join(f"{v} ({name})" for name in names if (v := version(name)))
    try:
        onnx_runtime()
    except UnsupportedError as why:
        return f"{found}; {why}" if found else None
    return found or None


def _operators() -> str | None:
    """Our own kernels for ONNX Runtime, which need a C compiler where the package is installed."""
    import normfuse.ort

    return f"{len(normfuse.ort.names())} ({normfuse.ort.instructions()})" if normfuse.ort.library_path() else None


def sessions_have() -> list[str]:
    """The providers of a session on a tiny model; one whose libraries are missing is offered but never given."""
    from normfuse.ort_values import onnx_runtime

    try:
        ort = onnx_runtime()
        from onnx import TensorProto, helper
    except (ImportError, UnsupportedError):
        return []
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [1]) for name in "xy")
    graph = helper.make_graph([helper.make_node("Identity", ["x"], ["y"])], "g", [x], [y])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8).SerializeToString()
    options = ort.SessionOptions()
    options.log_severity_level = 4
    ort.set_default_logger_severity(4)
    given: list[str] = []
    for provider in ort.get_available_providers():
        with contextlib.suppress(Exception), contextlib.redirect_stdout(io.StringIO()):
            session = ort.InferenceSession(model, options, providers=[provider])
            given += [name for name in session.get_providers() if name == provider]
    return given


def _gpu() -> str | None:
    """The first CUDA device that torch sees."""
    try:
        import torch
    except ImportError:
        return None
    if not torch.cuda.is_available():
        return None
    major, minor = torch.cuda.get_device_capability(0)
    return f"{torch.cuda.get_device_name(0)} (compute capability {major}.{minor})"
