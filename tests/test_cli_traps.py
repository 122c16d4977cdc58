"""The command line and the doors beside it: outputs that are no tensors, damaged inputs, what is said of both."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper

from normfuse.calibrate import load, read_batches
from normfuse.cli import main
from normfuse.cli_print import Table, _print_rich
from normfuse.errors import InputError
from normfuse.verify import compare_outputs
from tests.cli_tools import RMS, cli, program, rms_file


# -- ONNX Runtime that does not import --------------------------------------------------------------------------------


@pytest.mark.parametrize(("body", "said"), [
    ('raise ImportError("libcudnn.so.9: cannot open\\nmore")', "cannot be imported: libcudnn.so.9: cannot open"),
    ("import gone_with_it", "cannot be imported: No module named 'gone_with_it'"),
    ("1 / 0", "cannot be imported: division by zero"),
    ("try: raise KeyboardInterrupt\nexcept BaseException: raise ImportError('multiarray failed')", "interrupted"),
])  # fmt: skip
def test_a_broken_onnx_runtime_is_not_called_missing(body: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "lib" / "onnxruntime").mkdir(parents=True)
    (tmp_path / "lib" / "onnxruntime" / "__init__.py").write_text(body)
    source = rms_file(tmp_path / "in.onnx")
    path = os.pathsep.join(filter(None, [str(tmp_path / "lib"), os.environ.get("PYTHONPATH")]))
    for command in (("verify", str(source), str(source)), ("bench", str(source))):
        done = cli(*command, env=os.environ | {"PYTHONPATH": path})
        assert done.returncode == (130 if said == "interrupted" else 2)
        assert said in done.stderr and "pip install" not in done.stderr
    if said != "interrupted":
        done = cli("env", env=os.environ | {"PYTHONPATH": path})
        assert done.returncode == 0 and said in " ".join(done.stdout.split())


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
    source = rms_file(tmp_path / "in.onnx", RMS + " ys = SequenceConstruct(y, n)", "seq(float[B,16]) ys")
    assert cli("rewrite", source, tmp_path / "out.onnx", "--verify", "model").returncode == 0
    assert cli("verify", source, tmp_path / "out.onnx").returncode == 0


# -- inputs -----------------------------------------------------------------------------------------------------------


def test_inputs_that_are_no_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "f.npz")
    source = rms_file(tmp_path / "in.onnx")
    done = cli("verify", source, source, "--inputs", tmp_path / "f.npz")
    assert done.returncode == 2 and "f.npz is not a regular file" in done.stderr
    (tmp_path / "text.npz").write_text("not an archive")
    done = cli("verify", source, source, "--inputs", tmp_path / "text.npz")
    assert done.returncode == 2 and "text.npz is no .npz file; make it with" in done.stderr


def test_a_dry_run_with_a_report(tmp_path: Path) -> None:
    rms_file(tmp_path / "in.onnx")
    done = cli("rewrite", "in.onnx", "--dry-run", "--report", "page.html", cwd=tmp_path)
    assert done.returncode == 0 and "dry run: no model was written\nwrote page.html" in done.stdout


def test_calibration_inputs_that_are_no_file(tmp_path: Path) -> None:
    for path, said in (("", "an empty path"), (tmp_path, "holds no .npz file"), (tmp_path / "gone.npz", "No such")):
        with pytest.raises(InputError, match=said):
            read_batches(path)


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
    (("bench", "in.onnx", "--threads", str(2**31)), "--threads 2147483648: give 1 to"),
    (("verify", "in.onnx", "in.onnx", "--seed", "-1"), "--seed -1: give a number from 0"),
    (("verify", "in.onnx", "gone.pt2"), "gone.pt2"),
    (("rewrite", "in.onnx", "o.onnx", "--tolerance", "0"), "--tolerance 0.0 is no positive, finite number"),
    (("rewrite", "in.onnx", "o.onnx", "--tolerance", "inf"), "--tolerance inf is no positive, finite number"),
    (("rewrite", "in.onnx", "o.onnx", "--first", "no,a b"), "--first 'no,a b': 'a b' is not known"),
    (("rewrite", "in.onnx", "o.onnx", "--norms", ""), "--norms '' is not a pattern"),
    (("inspect", "target=onnx/m.onnx"), "target=onnx/m.onnx: no such file"),
    (("inspect", "a/norms=3.onnx"), "a/norms=3.onnx: no such file"),
    (("rewrite", "in.onnx", "o.onnx", "--verify", "model", "--layernorm-to-rmsnorm", "approximate"),
     "--verify model asks for equal outputs, which --layernorm-to-rmsnorm approximate does not give"),
])  # fmt: skip
def test_values_that_cannot_be(args: tuple[str, ...], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str],
                               monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    rms_file(tmp_path / "in.onnx")
    monkeypatch.chdir(tmp_path)
    assert main(list(args)) == 2
    assert said in capsys.readouterr().err


# -- what is said -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", ["24", "40", "80", "200"])
def test_no_terminal_cuts_numbers(width: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
                                  ) -> None:  # fmt: skip
    monkeypatch.setenv("COLUMNS", width)
    name = "a rather long name of a file " * 2
    rows = [(f"0.{i}2345678", "7 x 128", "a" + "\x1b" * 14 if i else name, "1.2345 MiB") for i in range(4)]
    _print_rich([Table(("median ms", "shape", "name", "memory"), rows)])
    out = capsys.readouterr().out
    for row in rows:
        assert row[0] in out and row[1] in out and row[3] in out


def test_what_differs_is_said(tmp_path: Path) -> None:
    a, b = (rms_file(tmp_path / f"{n}.onnx", f"y = Slice(x, zero, {n}, last)") for n in ("eight", "four"))
    for path, n in ((a, 8), (b, 4)):
        made = onnx.load(path)
        made.graph.output[0].type.tensor_type.shape.dim[1].dim_value = n
        for name, array in (("zero", [0]), ("eight", [8]), ("four", [4])):
            made.graph.initializer.append(numpy_helper.from_array(np.array(array), name))
        onnx.save(made, path)
    done = cli("verify", a, b, "-q")
    assert done.returncode == 1
    said = "different: output 'y' is float32 of shape 2x8, and float32 of shape 2x4 in the second"
    assert done.stdout.startswith(said)
    found = json.loads(cli("verify", a, b, "--json").stdout)
    assert found["outputs"][0]["other"] == {"shape": [2, 4], "dtype": "float32"}


@pytest.mark.parametrize("command", [
    ("verify", "bad", "in.onnx"), ("verify", "in.onnx", "bad"), ("reduce", "bad", "out"), ("inspect", "bad"),
    ("bench", "bad"),
])  # fmt: skip
def test_files_of_another_format(command: tuple[str, ...], tmp_path: Path) -> None:
    rms_file(tmp_path / "in.onnx")
    (tmp_path / "bad").write_bytes(b"GGUF" + bytes(100))
    done = cli(*command, cwd=tmp_path)
    assert done.returncode == 2 and "bad: a GGUF file: weights without a graph" in done.stderr
    (tmp_path / "bad").write_text(POINTER)
    done = cli(*command, cwd=tmp_path)
    assert done.returncode == 2 and "bad: a git-lfs pointer, not the file itself; run git lfs pull" in done.stderr


POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 12345\n"


def test_pointers_of_git_lfs(tmp_path: Path) -> None:
    source = rms_file(tmp_path / "in.onnx")
    onnx.save(onnx.load(source), source, save_as_external_data=True, location="w.bin", size_threshold=0)
    (tmp_path / "w.bin").write_text(POINTER)
    (tmp_path / "p.pt2").write_text(POINTER)
    for name, said in (("in.onnx", "'w.bin' is a git-lfs pointer"), ("p.pt2", "p.pt2: a git-lfs pointer")):
        done = cli("inspect", tmp_path / name)
        assert done.returncode == 2 and said in done.stderr and "run git lfs pull" in done.stderr


def test_archives_where_a_model_is_asked_for(tmp_path: Path) -> None:
    torch.save({}, tmp_path / "state.pt")
    program(tmp_path / "p.pt2")
    for command, said in (
        (("bench", "state.pt"), "state.pt: a file of torch.save"), (("bench", "p.pt2"), "and this is a .pt2; export"),
        (("reduce", "p.pt2", "o.onnx"), "p.pt2: a zip archive, such as a .pt2, and no ONNX model; export"),
    ):  # fmt: skip
        done = cli(*command, cwd=tmp_path)
        assert done.returncode == 2 and said in done.stderr, done.stderr


def test_what_reduce_lacks_is_not_advised(tmp_path: Path) -> None:
    source = rms_file(tmp_path / "in.onnx")
    for more in ([], ["--overwrite"]):
        done = cli("reduce", source, source, *more)
        assert done.returncode == 2 and done.stderr.strip().endswith("is the input itself; choose another name")


def test_quiet_lines_have_names(tmp_path: Path) -> None:
    rms_file(tmp_path / "a.onnx")
    rms_file(tmp_path / "b.onnx")
    lines = cli("inspect", "a.onnx", "b.onnx", "-q", cwd=tmp_path).stdout.splitlines()
    assert [line.partition(": found 1")[0] for line in lines] == ["a.onnx", "b.onnx"]
    assert cli("inspect", "a.onnx", "-q", cwd=tmp_path).stdout.startswith("found 1")


def test_names_and_places(tmp_path: Path) -> None:
    rms_file(tmp_path / "in.onnx")
    old = '<ir_version: 8, opset_import: ["": 1]> g (float[2] x) => (float[2] y) { y = Neg(x) }'
    onnx.save(onnx.parser.parse_model(old), tmp_path / "old.onnx")
    odd = os.fsencode(tmp_path) + b"/\xff.onnx"
    Path(os.fsdecode(odd)).write_bytes((tmp_path / "in.onnx").read_bytes())
    for args, said in (
        (("verify", os.fsdecode(odd), os.fsdecode(odd)), "whose names are UTF-8; rename it"),
        (("inspect", "a  b.gone"), "a  b.gone: no such file"),
        (("verify", "in.onnx", "b.gone"), "b.gone: no such file"),
        (("inspect", "in.onnx", "--frob"), "`normfuse inspect --help`"),
        (("rewrite", "in.onnx", ""), "no output is given"),
        (("rewrite", "in.onnx", "", "--in-place"), "no output is given"),
        (("inspect", "in.onnx", "--report", "page.onnx"), "give a name that ends in .html"),
        (("inspect", "in.onnx", "--report", ""), "empty path"),
        (("rewrite", "in.onnx", "--dry-run", "--report", ""), "empty path"),
        (("bench", "in.onnx", "--report", ""), "empty path"),
        (("verify", "in.onnx", "in.onnx", "--inputs", ""), "empty path"),
        (("-q", "inspect", "in.onnx"), "options stand behind the command"),
        (("inspect", "in.onnx", "old.onnx"), "old.onnx: opset 1 is older"),
        (("verify", "in.onnx", "some.zip"), "some.zip is a .pt2 or another zip archive, and in.onnx is none"),
    ):  # fmt: skip
        (tmp_path / "some.zip").write_bytes(b"PK\3\4")
        done = cli(*args, cwd=tmp_path)
        assert done.returncode == 2 and said in done.stderr, (args, done)
