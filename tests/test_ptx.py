"""The code that the kernels compile to, for GPUs that need not be there: see `tests.ptx`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import cache
from typing import Any

import pytest

from tests.bench.common import ROOT

pytest.importorskip("triton")

FORWARD = ("norm", "layer", "add_norm", "norm_add", "norm_add_norm", "qk_norm")
BACKWARD = ("norm_backward", "layer_backward", "norm_add_norm_backward", "qk_norm_backward")
SOME = [f"{op} {dtype} {n}" for op, dtype, n in (
    *((op, "bf16", n) for op in FORWARD for n in (64, 4096)), *((op, "bf16", n) for op in BACKWARD for n in (64, 4096)),
    ("norm", "fp16", 8192), ("norm", "fp32", 4096), ("layer", "fp32", 8192), ("norm_backward", "fp16", 8192),
    ("norm_backward", "fp32", 4096), ("dx_backward", "fp32", 8192), ("norm", "bf16", 32768),
    ("norm_add_norm_backward", "bf16", 16384), ("add_norm", "bf16", 65536),
    ("layer_backward", "bf16", 65536))]  # fmt: skip
SPILLED = {80: 8, 90: 8, 100: 80}
"""Bytes that ptxas may put by to run more warps at once; for Blackwell it keeps backwards at 64 registers a thread."""

FASTEST = {("norm_add_norm_backward", 1024): 104, ("qk_norm_backward", 4096): 16}
"""The same for tiles that were the fastest of a dozen all the same, in bfloat16 on an H200; there the second does not
spill, in float32 it does, which is not measured."""

Kernels = dict[str, list[dict[str, Any]]]


@cache
def compiled(capability: int, *names: str) -> Kernels:
    """The kernels of these calls, or of all, compiled in a process of its own: Triton has one driver and one mode."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-W", "ignore", "-m", "tests.ptx", str(capability), *names], cwd=ROOT,
                          capture_output=True, text=True, env=environment, check=False)  # fmt: skip
    assert done.returncode == 0, done.stderr
    found: Kernels = json.loads(done.stdout)
    return found


def assert_good(capability: int, kernels: Kernels) -> None:
    """No arithmetic in float64, nothing in local memory, and rows read and written 128 bits at a time.

    The longest rows 64 bits at a time: twice the threads took 828 us for 904 in a backward of N = 65,536 on an H200.
    """
    for name, parts in kernels.items():
        op, dtype, n = name.split()
        spilled = max(SPILLED[capability], FASTEST.get((op, int(n)), 0))
        for part in parts:
            about = (name, part)
            assert not part["double"] and not part["local"] and part["stack"] <= spilled, about
            half = part["kernel"] == "backward_long" and int(n) > 16384
            width = "64" if half and dtype != "fp32" else "128"
            if part["kernel"] not in ("sum_partials", "partials_long"):  # one writes columns, the other few lines
                assert part["stores"].get(width), about
                assert set(part["stores"]) <= ({width, "32"} if "backward" in part["kernel"] else {"128"}), about
            if part["kernel"] != "sum_partials":  # it reads what the L2 cache holds, with more threads than vectors
                assert part["loads"].get(width if part["kernel"] == "backward_long" else "128"), about


def test_code_for_hopper() -> None:
    kernels = compiled(90, *SOME)
    assert sorted(kernels) == sorted(SOME)
    assert_good(90, kernels)


@pytest.mark.parametrize("name", ["norm", "add_norm", "norm_add_norm"])
def test_each_row_is_read_and_written_once(name: str) -> None:
    (kernel,) = compiled(90, *SOME)[f"{name} bf16 4096"]
    per_tensor = 4096 * 16 // (128 * 256)
    read = {"norm": 2, "add_norm": 3, "norm_add_norm": 4}[name]  # with the weights
    assert kernel["loads"] == {"128": read * per_tensor}
    assert kernel["stores"] == {"128": (1 if name == "norm" else 2) * per_tensor}


def test_one_launch_where_a_row_fits() -> None:
    kernels = compiled(90, *SOME)
    for op in FORWARD:
        assert [k["kernel"] for k in kernels[f"{op} bf16 4096"]] == ["forward_pair" if op == "qk_norm" else "forward"]
    for op in BACKWARD:
        first = "backward_pair" if op == "qk_norm_backward" else "backward"
        assert [k["kernel"] for k in kernels[f"{op} bf16 4096"]] == [first, "sum_partials"]


@pytest.mark.parametrize("capability", [80, pytest.param(100, marks=pytest.mark.slow)])
def test_code_for_other_gpus(capability: int) -> None:
    assert_good(capability, compiled(capability, "norm bf16 4096", "add_norm bf16 4096", "norm_backward bf16 4096"))


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 90, 100])
def test_code_of_everything(capability: int) -> None:
    assert_good(capability, compiled(capability))
