"""Fixtures, and what torch's exporters find out anew for each model, which is half of the time of a small one."""

import contextlib
import functools
from typing import Any

import pytest

with contextlib.suppress(ImportError, AttributeError, KeyError):  # other versions of torch keep them elsewhere
    from torch.onnx._internal.exporter import _registration, _schemas

    # the source of some 500 ONNX functions, and the signature of each
    onnxscript_apis: Any = vars(_registration)["onnxscript_apis"]
    onnxscript_apis.get_torchlib_ops = functools.cache(onnxscript_apis.get_torchlib_ops)
    _schemas.op_signature_from_function = functools.cache(_schemas.op_signature_from_function)

with contextlib.suppress(ImportError, AttributeError):
    import torch
    from torch._export import utils

    # an object for each of 800 operators, for each of 30 namespaces: again only where there are more operators
    made: Any = functools.cache(lambda count, make=utils._materialize_cpp_cia_ops: make())
    utils._materialize_cpp_cia_ops = lambda: made(
        len(torch._C._dispatch_get_registrations_for_dispatch_key("CompositeImplicitAutograd")))  # fmt: skip


@pytest.fixture
def fresh() -> None:
    """Nothing was compiled before."""
    import torch
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    counters.clear()


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> "list[torch.fx.GraphModule]":
    """The graphs that the backend hands on."""
    from normfuse import backend

    seen: list[torch.fx.GraphModule] = []
    rewrite = backend.rewrite

    def spy(*args: Any, **kwargs: Any) -> torch.fx.GraphModule:
        seen.append(rewrite(*args, **kwargs))
        return seen[-1]

    monkeypatch.setattr(backend, "rewrite", spy)
    return seen
