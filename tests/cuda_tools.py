"""The CUDA half of the operator library on a driver without a GPU: see fake_cuda.c.

What it launches can be computed in Triton's interpreter, on tensors of the CPU, so that the choice of a kernel, its
arguments and the kernel are tested together.
"""

from __future__ import annotations

import ctypes as c
import os
from collections.abc import Callable
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tests.kernel_tools import BF16, FP16, FP32

ROOT = Path(__file__).parents[1]
SOURCES = ROOT / "normfuse" / "ort"
OPS = ("norm", "add_norm", "norm_add", "norm_add_norm", "qk_norm", "bias_add_norm", "add_norm_unrounded",
       "bias_add_norm_unrounded")  # fmt: skip
KINDS = ("rms_norm", "layer_norm")
TYPES = (FP32, FP16, BF16)
FORMS = 12
Types = tuple[torch.dtype, bool, torch.dtype]
"""x, whether its norm is rounded before the weight, the result."""
ALL_TYPES: list[Types] = [(FP32, False, FP32), (FP32, False, FP16), (FP32, False, BF16), *(
    (h, first, result) for h in (FP16, BF16) for first in (True, False) for result in (h, FP32))]  # fmt: skip
TENSORS = ("x", "r", "y", "s", "w", "b", "w2", "b2", "x2", "y2")
NUMBERS = ("m", "n", "m2", "n2", "tiles")


class Spec(c.Structure):
    """`Spec` of ops.h."""

    _fields_ = [(name, c.c_int) for name in "op layer x compute first result".split()]
    _fields_ += [(name, c.c_int) for name in "has_w1 has_b1 has_w2 has_b2 unrounded has_x_bias has_mask".split()]


class Args(c.Structure):
    """`Args` of ops.h."""

    _fields_ = [*((name, c.c_void_p) for name in "stream x r x_bias y s w b w2 b2".split()), ("m", c.c_longlong),
                ("n", c.c_longlong), ("x2", c.c_void_p), ("y2", c.c_void_p), ("m2", c.c_longlong),
                ("n2", c.c_longlong), ("eps", c.c_float)]  # fmt: skip


class Launch(NamedTuple):
    """What a driver is asked to launch."""

    text: str
    entry: str
    shape: list[int]
    stream: int
    values: dict[str, Any]
    hidden: list[int]


Load = c.CFUNCTYPE(c.c_int, c.c_char_p)
Function = c.CFUNCTYPE(c.c_int, c.c_int, c.c_char_p)
Start = c.CFUNCTYPE(c.c_int, c.c_int, c.POINTER(c.c_uint), c.c_void_p, c.POINTER(c.c_void_p))


def library() -> c.CDLL:
    """The library that is tested."""
    lib = c.CDLL(os.environ["NORMFUSE_TESTED"])
    lib.nf_cuda_run.restype = c.c_char_p
    lib.nf_ptx_text.restype = c.c_void_p
    return lib


def spec(op: str, kind: str, types: Types, weights: str = "wb", compute: torch.dtype = FP32) -> Spec:
    """An operator whose norms have the weights named."""
    x, first, result = types
    has = [int(name in weights) for name in "wb"]
    has += has if op in ("norm_add_norm", "qk_norm") else [0, 0]
    return Spec(OPS.index(named(op)), KINDS.index(kind), TYPES.index(x), TYPES.index(compute), int(first),
                TYPES.index(result), *has, op.endswith("_unrounded"), op.startswith("bias_"))  # fmt: skip


def named(op: str) -> str:
    """The operator without what is added to it."""
    return op.removeprefix("bias_").removesuffix("_unrounded")


class Driver:
    """The driver, a library of its own that uses it, and what was asked of it."""

    def __init__(self) -> None:
        self.cuda, self.lib = c.CDLL("libcuda.so.1"), library()
        self.texts: list[str] = []
        self.entries: list[tuple[int, str]] = []
        self.launches: list[Launch] = []
        self.then: Callable[[Launch], None] = lambda launch: None
        self.hooks = Load(self._load), Function(self._function), Start(self._launch)
        for name, hook in zip(("fake_load", "fake_function", "fake_launch"), self.hooks, strict=True):
            c.c_void_p.in_dll(self.cuda, name).value = c.cast(hook, c.c_void_p).value

    def set(self, name: str, value: int) -> None:
        """Set a variable of the fake."""
        c.c_int.in_dll(self.cuda, name).value = value

    def fail(self, function: bytes, status: int = 1) -> None:
        """Let a function fail from now on."""
        self.failing = function  # the driver has no copy
        c.c_char_p.in_dll(self.cuda, "fake_failing").value = function
        self.set("fake_status", status)

    def _load(self, text: bytes) -> int:
        self.texts.append(text.decode())
        return len(self.texts)

    def _function(self, module: int, name: bytes) -> int:
        self.entries.append((module - 1, name.decode()))
        return len(self.entries)

    def _launch(self, function: int, shape: Any, stream: int | None, arguments: Any) -> int:
        types: list[Any] = [*[c.c_uint64] * 10, *[c.c_int] * 5, c.c_float, *[c.c_uint64] * 2]
        values = [c.cast(arguments[i], c.POINTER(t))[0] for i, t in enumerate(types)]
        module, entry = self.entries[function - 1]
        named = dict(zip((*TENSORS, *NUMBERS, "eps"), values, strict=False))
        self.launches.append(Launch(self.texts[module], entry, shape[:7], stream or 0, named, values[16:]))
        return 0

    def run(self, what: Spec, **args: Any) -> list[Launch]:
        """Run an operator; its launches."""
        done = len(self.launches)
        args = {name: v.data_ptr() if isinstance(v, Tensor) else v for name, v in args.items()}
        message = self.lib.nf_cuda_run(c.byref(what), c.byref(Args(**args)))
        if message is not None:
            raise RuntimeError(message.decode())
        for launch in self.launches[done:]:  # an error in a call back from C would be lost
            self.then(launch)
        return self.launches[done:]

    @cache  # noqa: B019 - there is one
    def forms(self, op: int, layer: int, types: Types, arch: int = 1) -> dict[str, int]:
        """The texts of the kernels of an operator, and their forms."""
        first = ((op * 2 + layer) * len(ALL_TYPES) + ALL_TYPES.index(types)) * FORMS
        found = {}
        for form in range(FORMS):
            text = text_of(self.lib, arch, first + form)
            if text:
                found[text] = form
        return found


def text_of(lib: c.CDLL, arch: int, number: int) -> str:
    """The text of a kernel, empty where there is none."""
    address = lib.nf_ptx_text(arch, number)
    text = c.string_at(address).decode()
    c.CDLL(None).free(c.c_void_p(address))
    return text


class Interpreted:
    """Computes each launch in the interpreter."""

    def __init__(self, driver: Driver) -> None:
        self.driver = driver

    def __call__(self, op: str, kind: str, types: Types, tensors: dict[str, Tensor | None], eps: float,
                 weights: str = "wb") -> list[Launch]:  # fmt: skip
        """Run an operator on tensors, whose last axis is the rows'."""
        from normfuse.ops import kernels_aot
        from normfuse.ort import aot

        memory = {t.data_ptr(): t for t in tensors.values() if t is not None}

        def compute(launch: Launch) -> None:
            ops = [o for o in (op.removeprefix("bias_"), "norm", "norm_add") if o != "qk_norm"]
            ((name, form),) = {(o, found[launch.text]) for o in dict.fromkeys(ops) if launch.text in (
                found := self.driver.forms(aot.OPS.index(o), KINDS.index(kind), types))}  # fmt: skip
            i = ALL_TYPES.index(types)
            variant = aot.Variant(name, kind[: -len("_norm")], aot.TYPES[i], aot.FORMS[form], 90)
            dtypes = {t: getattr(torch, str(v).replace("fp", "float").replace("bf16", "bfloat16"))
                      for t, v in aot.tensor_types(variant).items()}  # fmt: skip
            given = [memory[a] if (a := launch.values[t]) else torch.empty(0, dtype=dtypes[t]) for t in TENSORS]
            for t, tensor in zip(TENSORS, given, strict=True):
                assert tensor.dtype == dtypes[t], (t, tensor.dtype, dtypes[t])
            assert launch.entry == variant.form.entry
            numbers = [launch.values[t] for t in NUMBERS]
            kernel = getattr(kernels_aot, launch.entry)
            kernel[(launch.shape[0],)](*given, *numbers, launch.values["eps"], aot.how_of(variant))

        self.driver.then = compute
        try:
            x, k = tensors["x"], tensors.get("x2")
            assert x is not None
            sizes = {"m": x.numel() // x.shape[-1], "n": x.shape[-1]}
            sizes |= {} if k is None else {"m2": k.numel() // k.shape[-1], "n2": k.shape[-1]}
            return self.driver.run(spec(op, kind, types, weights), **tensors, **sizes, eps=eps)
        finally:
            self.driver.then = lambda launch: None


def numbers() -> list[tuple[int, int]]:
    """(architecture, number) of every kernel."""
    return list(product(range(2), range(5 * 2 * len(ALL_TYPES) * FORMS)))
