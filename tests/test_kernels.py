"""The Triton kernels compute what `normfuse.ops.meaning` says: see `tests.kernel_cases`."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch

from tests import kernel_cases as kernel_cases  # registers the cases
from tests.bench.common import ROOT
from tests.kernel_tools import CASES, Found

pytest.importorskip("triton")


def run(*names: str, **more: str) -> dict[str, Found]:
    """What cases find in Triton's interpreter."""
    command = [sys.executable, "-W", "ignore", "-m", "tests.kernel_cases", *names]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True,
                          env=os.environ | {"TRITON_INTERPRET": "1"} | more, check=False)  # fmt: skip
    assert done.returncode == 0, done.stderr
    found: dict[str, Found] = json.loads(done.stdout)
    return found


@pytest.fixture(scope="module")
def interpreted() -> dict[str, Found]:
    """What the cases found, with some of the types and sizes."""
    return run(NORMFUSE_SAMPLE="1")


@pytest.mark.parametrize("name", CASES)
def test_interpreted(name: str, interpreted: dict[str, Found]) -> None:
    print(name, interpreted[name])
    assert "failed" not in interpreted[name], interpreted[name]["failed"]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["forward", "backward", "mixed_types", "strided", "shortest_and_longest_rows"])
def test_interpreted_in_full(name: str) -> None:
    found = run(name)[name]
    assert "failed" not in found, found["failed"]


@pytest.mark.gpu
@pytest.mark.parametrize("name", CASES)
def test_on_a_gpu(name: str) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA GPU")
    print(name, CASES[name]("cuda"))
