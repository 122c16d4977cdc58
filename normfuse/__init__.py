"""NormFuse finds every LayerNorm and RMSNorm of a model, however it is spelled, and puts one operator in its place."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from normfuse.config import Config
from normfuse.errors import InputError, NormFuseError, UnsafeModelError, UnsupportedError, VerificationError

if TYPE_CHECKING:
    from normfuse.api import inspect, optimize, rewrite
    from normfuse.backend import InductorPass, last_report, reports
    from normfuse.onnx_export import export
    from normfuse.report import Report

__version__ = "0.1.0"
__all__ = [
    "Config",
    "InductorPass",
    "InputError",
    "NormFuseError",
    "Report",
    "UnsafeModelError",
    "UnsupportedError",
    "VerificationError",
    "__version__",
    "export",
    "inspect",
    "last_report",
    "optimize",
    "reports",
    "rewrite",
]


def __getattr__(name: str) -> Any:
    """Import what needs torch, onnx or numpy only when it is used, so that `import normfuse` is instant."""
    if name in ("inspect", "optimize", "rewrite"):
        from normfuse import api

        return getattr(api, name)
    if name in ("InductorPass", "last_report", "reports"):
        from normfuse import backend

        return getattr(backend, name)
    if name in ("bench", "nn", "ops", "ort"):
        from importlib import import_module

        return import_module(f"normfuse.{name}")
    if name == "export":
        from normfuse.onnx_export import export

        return export
    if name == "Report":
        from normfuse.report import Report

        return Report
    raise AttributeError(f"module 'normfuse' has no attribute {name!r}")
