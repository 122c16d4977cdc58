"""The command line and the doors beside it: outputs that are no tensors, damaged inputs, closed pipes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper

import normfuse
from normfuse.calibrate import load
from normfuse.cli import main
from normfuse.errors import InputError
from normfuse.verify import compare_outputs

RMS = "sq = Mul(x, x) ms = ReduceMean(sq, last) a = Add(ms, eps) r = Sqrt(a) n = Div(x, r) y = Mul(n, w)"


def saved(path: Path, lines: str = RMS, outputs: str = "float[B,16] y") -> Path:
    head = '<ir_version: 9, opset_import: ["": 18]>'
    made = onnx.parser.parse_model(f"{head} g (float[B,16] x) => ({outputs}) {{ {lines} }}")
    held = {"last": np.array([-1]), "eps": np.float32(1e-5), "w": np.ones(16, np.float32)}
    made.graph.initializer.extend(numpy_helper.from_array(np.asarray(v), n) for n, v in held.items())
    onnx.save(made, path)
    return path


def run(*args: str | Path, **more: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "normfuse", *map(str, args)]
    return subprocess.run(command, text=True, check=False, timeout=60, **({"capture_output": True} | more))


# -- what is equal ----------------------------------------------------------------------------------------------------


def same(x: Any, y: Any) -> bool:
    return bool(compare_outputs(["y"], [x], [y], 64, "cpu")["equal"])


LONG = np.zeros((1, 4096), np.float32)
OFF = LONG.copy()
OFF[0, 2000] = 5


@pytest.mark.parametrize(("x", "y", "equal"), [
    (np.full(4, 2**60), np.full(4, 2**60 + 1), False), (np.full(4, 2**60), np.full(4, 2**60), True),
    (np.array(["a"] * 2000, object), np.array(["a"] * 1999 + ["b"], object), False),
    ([LONG], [OFF], False), ([LONG], [LONG], True), ([LONG], [LONG, LONG], False), ({"a": LONG}, {"a": OFF}, False),
    ([LONG + np.float32(1)], [LONG + np.float32(1 + 2e-7)], True), ([LONG], [LONG.astype(np.float64)], False),
    (LONG + 1j, OFF + 1j, False), (LONG + 1j, LONG + 1j, True), ([np.array(True)], [np.array(False)], False),
    ({"a": 1}, {"a": 2}, False), (None, None, True), (None, LONG, False),
])  # fmt: skip
def test_outputs_that_differ(x: Any, y: Any, equal: bool) -> None:
    assert same(x, y) is equal


def test_a_norm_in_a_sequence(tmp_path: Path) -> None:
    source = saved(tmp_path / "in.onnx", RMS + " ys = SequenceConstruct(y, n)", "seq(float[B,16]) ys")
    assert run("rewrite", source, tmp_path / "out.onnx", "--verify", "model").returncode == 0
    assert run("verify", source, tmp_path / "out.onnx").returncode == 0


# -- inputs -----------------------------------------------------------------------------------------------------------


def test_inputs_that_are_no_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "f.npz")
    source = saved(tmp_path / "in.onnx")
    done = run("verify", source, source, "--inputs", tmp_path / "f.npz")
    assert done.returncode == 2 and "f.npz is not a regular file" in done.stderr


def test_damaged_inputs(tmp_path: Path) -> None:
    np.savez_compressed(tmp_path / "a.npz", x=np.arange(64.0).reshape(4, 16))
    data = (tmp_path / "a.npz").read_bytes()
    broken = tmp_path / "b.npz"
    for i in range(len(data)):
        broken.write_bytes(data[:i] + bytes([data[i] ^ 0xFF]) + data[i + 1 :])
        try:
            load(broken)
        except InputError as why:
            assert "b.npz" in str(why)
    with pytest.raises(InputError, match=r"gone\.npz is not a readable"):
        load(tmp_path / "gone.npz")


@pytest.mark.parametrize(("args", "said"), [
    (("bench", "in.onnx", "--threads", str(2**31)), "--threads 2147483648: give 1 or more"),
    (("verify", "in.onnx", "in.onnx", "--seed", "-1"), "--seed -1: give a number from 0"),
    (("verify", "in.onnx", "gone.pt2"), "gone.pt2"),
])  # fmt: skip
def test_values_that_cannot_be(args: tuple[str, ...], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str],
                               monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    saved(tmp_path / "in.onnx")
    monkeypatch.chdir(tmp_path)
    assert main(list(args)) == 2
    assert said in capsys.readouterr().err


# -- outputs ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("closed", [(1,), (2,), (1, 2)])
def test_closed_streams(closed: tuple[int, ...], tmp_path: Path) -> None:
    source = saved(tmp_path / "in.onnx")

    def close() -> None:
        for handle in closed:
            os.close(handle)

    assert run("rewrite", source, tmp_path / "out.onnx", capture_output=False, preexec_fn=close).returncode == 0
    assert (tmp_path / "out.onnx").exists()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is full")
def test_a_full_disk_behind_stdout() -> None:
    with open("/dev/full", "w") as full:
        done = run("explain", "--json", capture_output=False, stdout=full, stderr=subprocess.PIPE)
    assert done.returncode == 2 and "Traceback" not in done.stderr


def test_a_link_is_there_already(tmp_path: Path) -> None:
    source = saved(tmp_path / "in.onnx")
    for name, to in (("dangling", "/nonexistent/x"), ("ring", str(tmp_path / "ring"))):
        (tmp_path / name).symlink_to(to)
        assert run("rewrite", source, tmp_path / name).returncode == 2
        assert (tmp_path / name).is_symlink()
    assert run("rewrite", tmp_path / "ring", tmp_path / "out.onnx", "--bench").returncode == 2


def test_permissions_stay(tmp_path: Path) -> None:
    source = saved(tmp_path / "in.onnx")
    source.chmod(0o600)
    assert run("rewrite", source, "--in-place").returncode == 0
    assert source.stat().st_mode & 0o777 == 0o600


def test_the_call_that_does_it_again(tmp_path: Path) -> None:
    source = saved(tmp_path / "in.onnx")
    report = normfuse.rewrite(source, tmp_path / "out.onnx", external_data="reference")
    assert report.replay.endswith(", external_data='reference')")
    first = (tmp_path / "out.onnx").read_bytes()
    (tmp_path / "out.onnx").unlink()
    eval(report.replay)
    assert (tmp_path / "out.onnx").read_bytes() == first
    assert normfuse.rewrite(source, source, in_place=True).replay.endswith(", in_place=True)")


# -- python -----------------------------------------------------------------------------------------------------------


def test_documented_names() -> None:
    code = "import normfuse; normfuse.bench.How; normfuse.ops.to_onnx.export"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


@pytest.mark.parametrize("option", ["dynamo", "export_params", "external_data"])
def test_what_torch_may_be_told_all_the_same(option: str, tmp_path: Path) -> None:
    module, x = torch.nn.RMSNorm(8).eval(), (torch.randn(2, 8),)
    export: Any = normfuse.export
    with pytest.raises(InputError, match=f"takes no option '{option}'"):
        export(module, x, tmp_path / "a.onnx", **{option: False})
    assert len(export(module, x, tmp_path / "a.onnx", **{option: True}).norms) == 1


@pytest.mark.parametrize(("given", "said"), [
    ({"norms": 3}, "norms=3 is not a text"), ({"first": None}, "first=None is not a text"),
    ({"tolerance": "x"}, "tolerance='x' is not a number"), ({"tolerance": True}, "tolerance=True is not a number"),
    ({"untie": "no"}, "untie='no' is not True or False"), ({"ort_version": 1.31}, "ort_version=1.31 is not a text"),
])  # fmt: skip
def test_options_of_another_type(given: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        normfuse.Config(**given)
