"""What the cases of `tests.kernel_cases` share: tensors, views, and how closely results have to agree.

Half types: as `meaning` bit for bit, but for what another order of the float32 sums moves over a rounding boundary, at
most 1 element in 1,000. Wider types: no further from float64 than `meaning` is, give or take some eps.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterable, Iterator
from types import ModuleType
from typing import Any, TypeVar

import torch
from torch import Tensor

from normfuse.ops import meaning

EPS = 1e-6
BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
SIZES = (1, 2, 3, 7, 64, 100, 128, 896, 4096, 40000)
KINDS = ("rms_norm", "layer_norm")
RARE = 1e-3
CLASSES: dict[str, tuple[int, str, str, float]] = {
    "Llama": (8192, "rms_norm", "first", 0.0),
    "Gemma": (8192, "rms_norm", "last", 1.0),
    "OLMo 2": (8192, "rms_norm", "last", 0.0),
    "T5": (16384, "rms_norm", "first", 0.0),
    "Cohere": (8192, "layer_norm", "last", 0.0),
}
"""N, and the order of roundings."""

Found = dict[str, Any]
T = TypeVar("T")
CASES: dict[str, Callable[[str], Found]] = {}


def case(function: Callable[[str], Found]) -> Callable[[str], Found]:
    """Register a case: a function of the device that raises or says what it found."""
    CASES[function.__name__] = function
    return function


def kernels() -> ModuleType:
    """`normfuse.ops.launch`."""
    from normfuse.ops import launch

    return launch


def draw(*shape: int, dtype: torch.dtype = FP32, seed: int = 0, device: str = "cpu") -> Tensor:
    """Random normal numbers, the same on every device."""
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(*shape, generator=generator).to(dtype).to(device)


def tensors(value: Any) -> tuple[Tensor, ...]:
    """An operator's results as a tuple."""
    return value if isinstance(value, tuple) else (value,)


def doubled(args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Arguments in float64."""
    return tuple(a.double() if isinstance(a, Tensor) else FP64 if isinstance(a, torch.dtype) else a for a in args)


def same_form(got: Tensor, want: Tensor) -> None:
    """Shape and dtype."""
    assert (got.shape, got.dtype) == (want.shape, want.dtype), (got.shape, got.dtype, want.shape, want.dtype)


def assert_bits(got: Tensor, want: Tensor, *about: object) -> None:
    """The same bits, or a NaN at the same place."""
    same_form(got, want)
    assert torch.equal(got.isnan(), want.isnan()) and torch.equal(got.nan_to_num(), want.nan_to_num()), about


def _place(t: Tensor) -> Tensor:
    """The place of each number of a half type in the order of all; both zeros have place 0."""
    bits = t.view(torch.int16).int()
    return torch.where(bits < 0, -(bits & 0x7FFF), bits)


def apart(a: Tensor, b: Tensor) -> Tensor:
    """How many ulp lie between numbers of a half type."""
    return (_place(a) - _place(b)).abs()


def neighbour(t: Tensor, steps: int) -> Tensor:
    """The numbers of a half type that are some ulp above."""
    place = _place(t) + steps
    return torch.where(place < 0, -place - 2**15, place).to(torch.int16).view(t.dtype)


def mismatches(got: Tensor, want: Tensor, ulps: float, *about: object) -> int:
    """Elements of a half type that differ; few, and by no more than some ulp, counted where |want| < 1 as if it were 1.

    Beside a residual or a bias, small results are differences of larger numbers.
    """
    same_form(got, want)
    size = torch.finfo(want.dtype).eps * torch.exp2(want.double().abs().clamp_min(1.0).log2().floor())
    off = (got.double() - want.double()).abs()
    different = int((off > 0).sum())
    assert bool((off <= ulps * size).all()), (*about, "ulp", float((off / size).max()))
    assert different <= max(2, RARE * want.numel()), (*about, different, want.numel())
    return different


def assert_close(got: Tensor, want: Tensor, exact: Tensor, *about: object, few: float = 4.0) -> None:
    """No further from the exact result than the definition, give or take a few eps."""
    same_form(got, want)
    if got.numel():
        off, own, scale = ((t.double() - exact).abs().max() for t in (got, want, 2 * exact))
        allowed = 1.5 * own + few * torch.finfo(got.dtype).eps * scale
        assert bool(off <= allowed), (*about, float(off), float(own), float(allowed))


def assert_rounded(got: Tensor, want: Tensor, *about: object) -> None:
    """The same but for another order of float32 sums."""
    if want.dtype.itemsize == 2:
        mismatches(got, want, 1.0, *about)
    else:
        assert_close(got, want, want.double(), *about)


def compare(name: str, *args: Any) -> int:
    """One forward against its definition; how many elements differ in a half type."""
    got, want = tensors(getattr(kernels(), name)(*args)), tensors(getattr(meaning, name)(*args))
    exact = tensors(getattr(meaning, name)(*doubled(args)))
    about = (name, [tuple(a.shape) if isinstance(a, Tensor) else a for a in args], want[0].dtype)
    different = 0
    for g, w, e in zip(got, want, exact, strict=True):
        if w.dtype.itemsize == 2:
            different += mismatches(g, w, 8.0, *about)
        else:
            assert_close(g, w, e, *about)
    return different


def some(items: Iterable[T], share: int) -> Iterator[T]:
    """All of them, or one of every `share` where NORMFUSE_SAMPLE is set: the interpreter is slow."""
    return itertools.islice(items, 0, None, share if "NORMFUSE_SAMPLE" in os.environ else 1)


def grid() -> Iterator[tuple[int, torch.dtype, str, str, float]]:
    """(N, dtype, kind, cast, offset) for the tests of every operator; where NORMFUSE_SAMPLE is set, a fifth."""
    for i, n in enumerate(SIZES):
        for j, dtype in enumerate((BF16, FP16, FP32, FP64)):
            if n in (7, 128, 4096) or dtype in ((BF16, FP32) if n > 4096 else (BF16, FP16, FP32)):
                for k, kind in enumerate(KINDS):
                    if "NORMFUSE_SAMPLE" in os.environ and (i + j + k) % 5:
                        continue
                    yield n, dtype, kind, ("first", "last")[(i + j + k) % 2], float((i + j // 2) % 2)


def views(n: int, dtype: torch.dtype, device: str) -> Iterator[tuple[str, Tensor]]:
    """Tensors of rows of N as models hold them."""
    yield "slice", draw(3, 5, n + 16, dtype=dtype, device=device)[..., :n]
    yield "unaligned", draw(7, n + 1, dtype=dtype, device=device)[:, 1:]
    yield "heads", draw(2, 3, 4 * n, dtype=dtype, device=device).view(2, 3, 4, n).transpose(1, 2)
    yield "heads of qkv", draw(2, 3, 12 * n, dtype=dtype, device=device)[..., : 4 * n].view(2, 3, 4, n).transpose(1, 2)
    yield "one row, many times", draw(1, n, dtype=dtype, device=device).expand(6, n)
    yield "inner axis expanded", draw(4, 1, n, dtype=dtype, device=device).expand(4, 3, n)
    yield "every second", draw(4, 6, n, dtype=dtype, device=device)[::2, ::3]
    yield "one dimension", draw(n, dtype=dtype, device=device)
    yield "last axis not dense", draw(n, 6, dtype=dtype, device=device).t()
    yield "three axes", draw(3, 4, 5, n, dtype=dtype, device=device)[::2, :3, ::2]
    yield "four axes", draw(3, 4, 3, 5, n, dtype=dtype, device=device)[::2, 1:3, :2, ::2]
