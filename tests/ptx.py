"""Compiles the kernels for GPUs that need not be there, through `launch` itself, and says what came out, as JSON.

python -m tests.ptx CAPABILITY [CASE...]

The driver is a stand-in that only names its target, and `launch` compiles instead of launching: the signatures, the
specialisations of strides and pointers and the configuration are those of a real call on tensors of these shapes.
"""

from __future__ import annotations

import itertools
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from normfuse.ops import launch

TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"
EPS = 1e-6


class Target(NamedTuple):
    """As much of a driver as a compilation asks for."""

    capability: int

    def get_current_target(self) -> GPUTarget:
        """A CUDA GPU."""
        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        """Its number."""
        return 0

    def get_current_stream(self, device: int) -> int:
        """Its stream."""
        return 0


class Compiled(NamedTuple):
    """What can be read from a kernel without running it."""

    kernel: str
    loads: dict[str, int]
    stores: dict[str, int]
    double: bool
    local: bool
    registers: int
    stack: int
    shared: int


def accesses(ptx: str, what: str) -> dict[str, int]:
    """How many global loads, copies to shared memory among them, or stores there are of each number of bits."""
    found: dict[str, int] = {}
    for size in re.findall(r"\bcp\.async\.c[ag]\.shared\.global \[[^,]*, \[[^,]*, (\w+)", ptx) if what == "ld" else ():
        width = str(8 * int(size, 0))
        found[width] = found.get(width, 0) + 1
    for vector, bits in re.findall(rf"\b{what}\.global(?:\.\w+)*?(\.v\d)?\.[bfsu](\d+)\b", ptx):
        width = str(int(bits) * int(vector[2:] or 1))
        found[width] = found.get(width, 0) + 1
    return found


def compiled(kernel: Any) -> Compiled:
    """The facts of one kernel, registers and stack by cuobjdump."""
    ptx = kernel.asm["ptx"]
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        usage = subprocess.run([TOOLS / "cuobjdump", "-res-usage", file.name], capture_output=True, text=True,
                               check=True).stdout  # fmt: skip
    registers, stack = (int(re.findall(rf"{name}:(\d+)", usage)[0]) for name in ("REG", "STACK"))
    local = bool(re.search(r"\.local\b", ptx))
    double = ".f64" in ptx
    return Compiled(kernel.metadata.name, accesses(ptx, "ld"), accesses(ptx, "st"), double, local, registers, stack,
                    kernel.metadata.shared)  # fmt: skip


def calls() -> Iterator[tuple[str, Callable[[], object]]]:
    """(operator type N, call) for what models have: packed heads, usual and large rows, rows in blocks."""
    types = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
    for (name, dtype), n in itertools.product(types.items(), (64, 128, 1024, 4096, 8192, 16384, 32768, 65536)):
        x, w, q = (torch.zeros(*s, n, dtype=dtype) for s in ((64,), (), (2, 4, 16)))
        k, rms, layer, pair = q[:, :2], (EPS, 0.0, "rms_norm"), (EPS, 0.0, "layer_norm"), (w, None, w, None)
        norm, need = (EPS, 0.0, "first", None), [True, False, True, False]
        for op, call in (
            ("norm", partial(launch.norm, x, w, None, *norm)),
            ("layer", partial(launch.norm, x, w, w, EPS, 0.0, "last", None, "layer_norm")),
            ("add_norm", partial(launch.add_norm, x, x, w, None, *norm)),
            ("norm_add", partial(launch.norm_add, x, x, w, None, *norm)),
            ("norm_add_norm", partial(launch.norm_add_norm, x, x, *pair, *norm)),
            ("qk_norm", partial(launch.qk_norm, q, k, *pair, *norm)),
            ("norm_backward", partial(launch.norm_backward, x, x, w, None, x, *rms, True, False)),
            ("dx_backward", partial(launch.norm_backward, x, x, w, None, None, *rms, False, False)),
            ("layer_backward", partial(launch.norm_backward, x, x, w, w, None, *layer, True, True)),
            ("norm_add_norm_backward", partial(launch.norm_add_norm_backward, x, x, x, x, *pair, *rms, need)),
            ("qk_norm_backward", partial(launch.qk_norm_backward, q, k, q, k, *pair, *rms, need)),
        ):
            yield f"{op} {name} {n}", call


SHARED = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024, 120: 99 * 1024}
"""Bytes of shared memory a program, by compute capability (CUDA C++ programming guide, technical specifications)."""


def compile_all(capability: int, wanted: list[str]) -> dict[str, list[dict[str, Any]]]:
    """Every call that is wanted, all of them if none is named, and its kernels."""
    found: list[Compiled] = []
    driver.set_active(Target(capability))

    def compile_only(kernel: Any, grid: Any, x: Tensor, warps: int, *args: Any) -> None:
        found.append(compiled(kernel.warmup(*args, grid=grid, num_warps=warps, enable_fp_fusion=False)))

    launch._launch = compile_only
    launch._shared_memory = cache(lambda device: SHARED[capability])
    out = {}
    for name, call in calls():
        if not wanted or name in wanted:
            found.clear()
            call()
            out[name] = [kernel._asdict() for kernel in found]
    return out


if __name__ == "__main__":
    print(json.dumps(compile_all(int(sys.argv[1]), sys.argv[2:])))
