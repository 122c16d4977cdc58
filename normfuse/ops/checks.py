"""Arguments that the operators cannot take, said in words: operator, argument, what was expected."""

from __future__ import annotations

import torch
from torch import Tensor

from normfuse.errors import InputError

CASTS, KINDS = ("first", "last"), ("rms_norm", "layer_norm")
_EXPECTED = "float16, bfloat16, float32 or float64"
FLOATS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


def check(op: str, eps: float, cast: str, kind: str, dtype: torch.dtype | None) -> None:
    """The attributes of an operator. Raises `InputError`."""
    if not 0 < eps < float("inf"):
        raise InputError(f"normfuse::{op}: eps is {eps}; it has to be greater than 0, and finite")
    if dtype is not None and dtype not in FLOATS:
        raise InputError(f"normfuse::{op}: dtype is {_name(dtype)}, expected {_EXPECTED}")
    for name, value, known in (("cast", cast, CASTS), ("kind", kind, KINDS)):
        if value not in known:
            raise InputError(f"normfuse::{op}: {name} is {value!r}; choose one of {', '.join(map(repr, known))}")


def check_rows(op: str, name: str, x: Tensor, *parameters: tuple[str, Tensor | None]) -> None:
    """A tensor to be normalised, and its weight and bias, as (name, tensor). Raises `InputError`."""
    _check_float(op, name, x)
    if x.dim() == 0 or x.shape[-1] == 0:
        raise InputError(f"normfuse::{op}: {name} has shape {_shape(x)}; its last axis is normalised, and has to "
                         "be there and hold something")  # fmt: skip
    for label, parameter in parameters:
        if parameter is not None:
            _check_float(op, label, parameter)
            check_device(op, label, parameter, name, x)
            if parameter.dim() != 1 or parameter.shape[0] != x.shape[-1]:
                raise InputError(f"normfuse::{op}: {label} has shape {_shape(parameter)}, expected ({x.shape[-1]},), "
                                 f"the length of the last axis of {name}")  # fmt: skip


def check_beside(op: str, name: str, other: Tensor, x: Tensor) -> None:
    """A residual or gradient has the shape and the device of x: nothing is broadcast. Raises `InputError`."""
    _check_float(op, name, other)
    check_device(op, name, other, "x", x)
    if other.shape != x.shape:
        raise InputError(f"normfuse::{op}: {name} has shape {_shape(other)}, expected {_shape(x)}, that of x")


def _check_float(op: str, name: str, x: Tensor) -> None:
    if x.dtype not in FLOATS:
        raise InputError(f"normfuse::{op}: {name} is {_name(x.dtype)}, expected {_EXPECTED}")
    if x.layout not in (torch.strided, torch.jagged):
        raise InputError(f"normfuse::{op}: {name} is {_name(x.layout)}; call to_dense() first")


def check_device(op: str, name: str, tensor: Tensor, first: str, x: Tensor) -> None:
    """All tensors are where the first is. Raises `InputError`."""
    if tensor.device != x.device:
        raise InputError(f"normfuse::{op}: {name} is on {tensor.device} and {first} on {x.device}; expected one device")


def _name(kind: torch.dtype | torch.layout) -> str:
    return str(kind).removeprefix("torch.")


def _shape(x: Tensor) -> str:
    return str(tuple(x.shape))
