"""Kernels of the fused operators for ONNX Runtime: a library of custom operators in domain "normfuse".

    options = onnxruntime.SessionOptions()
    normfuse.ort.register(options, "fused.onnx")
    session = onnxruntime.InferenceSession("fused.onnx", options)

A model that `normfuse rewrite --target normfuse` wrote runs anywhere by the bodies of its functions; where the library
is registered, ONNX Runtime takes its kernels instead. They give the same results, to the order of a sum.
"""

from __future__ import annotations

import ctypes
from functools import cache
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from typing import TYPE_CHECKING, Any

from normfuse.errors import InputError, UnsupportedError
from normfuse.ort_values import onnx_runtime

if TYPE_CHECKING:
    import onnx

OLDEST = (1, 17)
"""The oldest ONNX Runtime: the first whose C API has parallel loops and shape inference for custom operators."""

_ENTRY = "normfuse.operators"
_DONE = "normfuse.registered"
_DOMAIN = "normfuse"
_DISABLED = "optimization.disable_specified_optimizers"


def library_path() -> Path | None:
    """The compiled library, or None where the package was installed without a C compiler."""
    names = (Path(__file__).with_name(f"_library{suffix}") for suffix in EXTENSION_SUFFIXES)
    return next((path for path in names if path.exists()), None)


def register(options: Any, model: str | Path | onnx.ModelProto | None = None, provider: str = "cpu") -> None:
    """Load the operators into an `onnxruntime.SessionOptions`.

    Once for the same options, which hold for one model; ONNX Runtime refuses sessions with them after a second time.
    With the `model` that the session is to run, only the operators that it calls: ONNX Runtime takes about 0.1 ms for
    each operator that it is offered, and there are two thousand. With `provider="cuda"`, for sessions with the CUDA
    provider, only those that have a CUDA kernel: the others run there by their bodies, and not on the CPU. A `model`
    without convolutions and pools is loaded without ONNX Runtime's NCHWc optimiser, which has nothing to do there and
    ends the process at some graphs of float16 with open sizes (1.31), unless the options say what to disable, or the
    `disabled_optimizers` of the session do.

    Raises `UnsupportedError` where the library was not compiled, where ONNX Runtime is missing or too old, or where it
    refuses the library; `InputError` where `model` is no model, `provider` not known, or the options hold the operators
    already.
    """
    if provider not in ("cpu", "cuda"):
        raise InputError(f"provider={provider!r} is not known; choose 'cpu' or 'cuda'")
    path = library_path()
    if path is None:
        raise UnsupportedError("NormFuse was installed without a C compiler, so that it has no operators for ONNX "
                               "Runtime: install gcc or clang, then NormFuse again; models run without them too")
    version = str(onnx_runtime().__version__)
    if tuple(int(part) for part in version.split(".")[:2]) < OLDEST:
        raise UnsupportedError(f"NormFuse's operators need ONNX Runtime {'.'.join(map(str, OLDEST))} or newer, and "
                               f"this is {version}: update it, or load the model without them")  # fmt: skip
    if not hasattr(options, "register_custom_ops_library"):
        raise InputError(f"a {type(options).__name__} are no session options: give an onnxruntime.SessionOptions")
    if _entry(options, _DONE):
        raise InputError("these session options hold NormFuse's operators already; make new ones for each model")
    wanted = None if provider == "cpu" else "cuda"
    plain = False
    if model is not None:
        model, found = _read(model), set(names(provider))
        wanted = " ".join(n for n in called(model, provider) if n in found)
        plain = not _windows(model)
    try:
        if plain and not _entry(options, _DISABLED):
            options.add_session_config_entry(_DISABLED, "NchwcTransformer")
        if wanted is not None:
            options.add_session_config_entry(_ENTRY, wanted)
        options.register_custom_ops_library(str(path))
        options.add_session_config_entry(_DONE, "1")
    except Exception as why:
        raise UnsupportedError(f"ONNX Runtime {version} does not take the operators of {path}: {why}") from why


def _entry(options: Any, name: str) -> str:
    """What session options hold under a name; empty where there is no such entry."""
    try:
        return str(options.get_session_config_entry(name))
    except RuntimeError:
        return ""


def names(provider: str = "cpu") -> list[str]:
    """The names of the operators, or of those with a CUDA kernel; none without the library."""
    found = _library()
    if found is None:
        return []
    found.nf_name.restype, found.nf_name.argtypes = ctypes.c_char_p, [ctypes.c_size_t]
    found.nf_on_cuda.argtypes = [ctypes.c_size_t]
    out: list[str] = []
    while (name := found.nf_name(len(out))) is not None:
        out.append(name.decode())
    # one that has a kernel of another type, or for CUDA, is there twice
    return list(dict.fromkeys(name for i, name in enumerate(out) if provider == "cpu" or found.nf_on_cuda(i)))


def instructions() -> str | None:
    """The instruction set that the kernels use on this machine; None without the library."""
    found = _library()
    if found is None:
        return None
    found.nf_isa.restype = ctypes.c_char_p
    return str(found.nf_isa().decode())


@cache
def _library() -> ctypes.CDLL | None:
    """The library, held for the life of the process: sessions and their options share its operators."""
    path = library_path()
    return None if path is None else ctypes.CDLL(str(path))


def called(model: str | Path | onnx.ModelProto, provider: str = "cpu") -> list[str]:
    """The functions of a model that may have operators: those of an exported torch program have an offset. Where ONNX
    Runtime saved an optimised model, nodes of the domain have no function any more, and are operators.

    CUDA kernels normalise trailing axes, so that a function called with others keeps its body there.
    """
    from normfuse.io.message import nodes_of

    model = _read(model)
    wanted = {f.name for f in model.functions if f.domain == _DOMAIN and "offset" not in f.attribute}
    defined = {f.name for f in model.functions if f.domain == _DOMAIN}
    bodies = set[str]()
    for node in nodes_of(model.graph):
        if node.domain == _DOMAIN and node.op_type not in defined:
            wanted.add(node.op_type)
        for attribute in node.attribute:
            if node.domain == _DOMAIN and attribute.name == "axes":
                axes = sorted(attribute.ints)
                bodies |= {node.op_type} if axes != list(range(-len(axes), 0)) else set()
    if provider == "cuda":
        wanted -= bodies
    return sorted(wanted)


def _read(model: str | Path | onnx.ModelProto) -> onnx.ModelProto:
    import onnx

    from normfuse.io.files import read_proto

    if isinstance(model, str | Path):
        model = read_proto(Path(model))
    if not isinstance(model, onnx.ModelProto):
        raise InputError(f"a {type(model).__name__} is no model: give the path of one, or an onnx.ModelProto")
    return model


def _windows(model: onnx.ModelProto) -> bool:
    """Whether a model has operators that ONNX Runtime's NCHWc optimiser is for."""
    from normfuse.io.message import nodes_of

    bodies = (model.graph, *model.functions)
    return any(node.op_type.endswith(("Conv", "Pool")) for body in bodies for node in nodes_of(body))
