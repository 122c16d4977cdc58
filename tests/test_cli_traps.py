"""The command line and the doors beside it: outputs that are no tensors, damaged inputs, closed pipes."""

from __future__ import annotations

import json
import os
import pkgutil
import re
import resource
import signal
import stat
import subprocess
import sys
import tempfile
import time
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper

import normfuse
from normfuse import bench
from normfuse.calibrate import load
from normfuse.cli import main
from normfuse.cli_process import ending
from normfuse.cli_print import Table, _print_rich
from normfuse.errors import InputError
from normfuse.reduce import reduce
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
    source = saved(tmp_path / "in.onnx")
    path = os.pathsep.join(filter(None, [str(tmp_path / "lib"), os.environ.get("PYTHONPATH")]))
    for command in (("verify", str(source), str(source)), ("bench", str(source))):
        done = run(*command, env=os.environ | {"PYTHONPATH": path})
        assert done.returncode == (130 if said == "interrupted" else 2)
        assert said in done.stderr and "pip install" not in done.stderr
    if said != "interrupted":
        done = run("env", env=os.environ | {"PYTHONPATH": path})
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
    (("rewrite", "in.onnx", "o.onnx", "--tolerance", "0"), "--tolerance 0.0 is not a positive number"),
    (("rewrite", "in.onnx", "o.onnx", "--first", "no,a b"), "--first 'no,a b': 'a b' is not known"),
    (("rewrite", "in.onnx", "o.onnx", "--norms", ""), "--norms '' is not a pattern"),
    (("inspect", "target=onnx/m.onnx"), "target=onnx/m.onnx: no such file"),
    (("inspect", "a/norms=3.onnx"), "a/norms=3.onnx: no such file"),
    (("rewrite", "in.onnx", "o.onnx", "--verify", "model", "--layernorm-to-rmsnorm", "approximate"),
     "--verify model asks for equal outputs, which --layernorm-to-rmsnorm approximate does not give"),
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


def test_a_link_is_written_through(tmp_path: Path) -> None:
    """In place, what the link leads to is the input, and the result."""
    (tmp_path / "blobs").mkdir()
    source = saved(tmp_path / "blobs" / "m")
    before = source.read_bytes()
    for name, to in (("again.onnx", "link.onnx"), ("link.onnx", "blobs/m")):
        (tmp_path / name).symlink_to(to)
    report = normfuse.rewrite(tmp_path / "again.onnx", tmp_path / "again.onnx", in_place=True)
    assert report.target == str(tmp_path / "again.onnx") and os.readlink(tmp_path / "again.onnx") == "link.onnx"
    assert os.readlink(tmp_path / "link.onnx") == "blobs/m" and source.read_bytes() != before
    assert len(onnx.load(source).graph.node) == len(normfuse.inspect(source).norms) == 1
    program(tmp_path / "blobs" / "p")
    (tmp_path / "link.pt2").symlink_to("blobs/p")
    done = run("rewrite", tmp_path / "link.pt2", "--in-place", "--trust", "--layernorm-to-rmsnorm", "exact", "--force")
    assert done.returncode == 0 and (tmp_path / "link.pt2").is_symlink(), done.stderr
    assert sorted(path.name for path in (tmp_path / "blobs").iterdir()) == ["m", "p"]


def test_a_link_to_a_model_with_weights_beside_it(tmp_path: Path) -> None:
    (tmp_path / "blobs").mkdir()
    source = saved(tmp_path / "blobs" / "m.onnx")
    onnx.save(onnx.load(source), source, save_as_external_data=True, location="w.bin", size_threshold=0)
    for name, to in (("link.onnx", "blobs/m.onnx"), ("w.bin", "blobs/w.bin"), ("blobs/near.onnx", "m.onnx")):
        (tmp_path / name).symlink_to(to)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    done = run("rewrite", tmp_path / "link.onnx", "--in-place")
    assert done.returncode == 2 and "link.onnx: is a link, and its weights would go beside" in done.stderr
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    assert run("rewrite", tmp_path / "blobs" / "near.onnx", "--in-place").returncode == 0
    assert (tmp_path / "blobs" / "near.onnx").is_symlink() and source.read_bytes() != before[source]


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
    eval(normfuse.rewrite(source, tmp_path / "out.onnx", overwrite=True).replay)
    assert normfuse.rewrite(source, source, in_place=True).replay.endswith(", in_place=True)")


def test_an_output_that_is_a_folder(tmp_path: Path) -> None:
    """Whether it is there or not."""
    for name in ("there", "nowhere"):
        (tmp_path / "there").mkdir(exist_ok=True)
        result = run("rewrite", saved(tmp_path / "in.onnx"), f"{tmp_path / name}/")
        assert result.returncode == 2 and "a folder; give the name of a file in it" in result.stderr
    assert not (tmp_path / "nowhere").exists() and not any((tmp_path / "there").iterdir())


def test_no_folder_of_its_own_is_needed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As where only the folder of the output may be written."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "nowhere"))
    normfuse.rewrite(saved(tmp_path / "in.onnx"), tmp_path / "out.onnx")


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
    ({"norms": 3}, r"norms=3 is not a text, such as '\*\.output"),
    ({"first": None}, "first=None is not a text, such as 'onnxsim'"), ({"first": ","}, "first=',' names no optimiser"),
    ({"ort_version": "x"}, "ort_version='x' is not a version"), ({"tolerance": 10**400}, "tolerance is larger than"),
    ({"tolerance": "x"}, "tolerance='x' is not a number"), ({"tolerance": True}, "tolerance=True is not a number"),
    ({"untie": "no"}, "untie='no' is not True or False"), ({"ort_version": 1.31}, "ort_version=1.31 is not a text"),
])  # fmt: skip
def test_options_of_another_type(given: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        normfuse.Config(**given)


NOTHING: Any = None


@pytest.mark.parametrize(("call", "said"), [
    (lambda p: normfuse.rewrite(onnx.load(p), p), "the input is a ModelProto and not the path of a file; normfuse.opt"),
    (lambda p: normfuse.rewrite(p, NOTHING), "the output is a NoneType and not the path of a file"),
    (lambda p: normfuse.export(torch.nn.LayerNorm(8), (torch.ones(8),), NOTHING), "the output is a NoneType and not"),
    (lambda p: normfuse.inspect(p).save_html(NOTHING), "the page is a NoneType and not the path of a file"),
    (lambda p: normfuse.inspect(os.fsencode(p)), "a bytes is not a model that NormFuse reads"),
    (lambda p: normfuse.inspect(onnx.ModelProto()), "the ModelProto: not an ONNX model .no graph in it."),
    (lambda p: bench.bench([], bench.How()), "give a list of one model, or of two"),
    (lambda p: bench.bench(str(p), bench.How()), "give a list of one model, or of two"),
    (lambda p: bench.How(rounds=0), "rounds=0: it takes 3 rounds"),
    (lambda p: bench.How(threads=-1), "threads=-1: give 1 or more"),
])  # fmt: skip
def test_arguments_of_another_kind(call: Any, said: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=f"^{said}"):
        call(saved(tmp_path / "in.onnx"))


def test_weights_under_an_old_name_are_named(tmp_path: Path) -> None:
    source = saved(tmp_path / "in.onnx")
    onnx.save(onnx.load(source), source, save_as_external_data=True, location="in.data", size_threshold=0)
    assert not normfuse.rewrite(source, tmp_path / "other.onnx").notes
    (left,) = normfuse.rewrite(source, source, in_place=True).notes
    assert left.endswith(f"{tmp_path / 'in.data'} is not read by the model any more")
    assert not normfuse.rewrite(source, source, in_place=True).notes  # with nothing to do


# -- what was ignored, cut off or left behind -------------------------------------------------------------------------


def program(path: Path) -> Path:
    module = torch.nn.Sequential(torch.nn.Linear(16, 256), torch.nn.LayerNorm(256)).eval()
    torch.export.save(torch.export.export(module, (torch.randn(2, 16),)), path)
    return path


def test_a_full_disk_under_a_program(tmp_path: Path) -> None:
    """torch's writer would end the process."""
    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (16_000, 16_000))

    source = program(tmp_path / "in.pt2")
    done = run("rewrite", source, tmp_path / "out.pt2", "--trust", preexec_fn=limit)
    assert (done.returncode, done.stdout) == (2, "") and "out.pt2: cannot be written: " in done.stderr
    assert len(done.stderr.splitlines()) == 1 and list(tmp_path.iterdir()) == [source]


@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP"])
def test_a_signal_to_end(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                         capsys: pytest.CaptureFixture[str]) -> None:  # fmt: skip
    """It comes while the result is being written."""
    source, number = saved(tmp_path / "in.onnx"), getattr(signal, name)
    before = signal.signal(number, signal.SIG_DFL)  # nohup has it ignored

    def end(*_: object) -> int:
        os.kill(os.getpid(), number)
        time.sleep(5)
        return 0o600

    monkeypatch.setattr("normfuse.io.write._permissions", end)
    try:
        assert main(["rewrite", str(source), str(tmp_path / "out.onnx"), "--json"]) == 128 + number
        assert signal.getsignal(number) is signal.SIG_DFL
    finally:
        signal.signal(number, before)
    assert json.loads(capsys.readouterr().out)["error"] == {"kind": "Interrupted", "message": f"ended by {name}"}
    assert list(tmp_path.iterdir()) == [source]


@pytest.mark.parametrize(("name", "place"), [
    ("SIGTERM", "normfuse.io.write._permissions"), ("SIGINT", "normfuse.io.write._permissions"),
    ("SIGTERM", "normfuse.cli_report.report_blocks"),
])  # fmt: skip
def test_a_signal_that_gets_lost(name: str, place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                 capsys: pytest.CaptureFixture[str]) -> None:  # fmt: skip
    """It comes while a callback runs, whose exceptions nobody sees."""
    source, number = saved(tmp_path / "in.onnx"), getattr(signal, name)
    before, real = signal.getsignal(number), pkgutil.resolve_name(place)
    signal.signal(number, signal.SIG_DFL)
    monkeypatch.setattr(sys, "unraisablehook", lambda _: None)

    class Held:
        pass

    def send(_: object) -> None:
        os.kill(os.getpid(), number)
        time.sleep(5)

    def lose(*args: Any, **options: Any) -> Any:
        held = Held()
        kept = weakref.ref(held, send)
        del held
        assert kept() is None
        return real(*args, **options)

    monkeypatch.setattr(place, lose)
    try:
        assert main(["rewrite", str(source), str(tmp_path / "out.onnx"), "--json"]) == 128 + number
    finally:
        signal.signal(number, before)
    assert json.loads(capsys.readouterr().out)["error"]["kind"] == "Interrupted"
    assert (tmp_path / "out.onnx").exists() is place.endswith("report_blocks")
    assert list(tmp_path.glob(".normfuse-*")) == []
    monkeypatch.undo()
    normfuse.rewrite(source, tmp_path / "out.onnx", overwrite=True)  # the signal is past


def test_a_signal_that_is_to_be_ignored(tmp_path: Path) -> None:
    """As nohup says of SIGHUP."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with ending():
            os.kill(os.getpid(), signal.SIGHUP)
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize("lines", [RMS, "y = Mul(x, w)"])
def test_what_others_may_not_read(lines: str, tmp_path: Path) -> None:
    source = saved(tmp_path / "in.onnx", lines)
    onnx.save(onnx.load(source), source, save_as_external_data=True, location="in.data", size_threshold=0)
    for name in ("in.onnx", "in.data"):
        (tmp_path / name).chmod(0o600)
    normfuse.rewrite(source, tmp_path / "out.onnx")
    made = [path for path in tmp_path.iterdir() if path.name.startswith("out")]
    assert len(made) == 2 and {stat.S_IMODE(path.stat().st_mode) for path in made} == {0o600}
    (tmp_path / "out.onnx").chmod(0o640)  # what is replaced says
    normfuse.rewrite(source, tmp_path / "out.onnx", overwrite=True)
    assert stat.S_IMODE((tmp_path / "out.onnx").stat().st_mode) == 0o640


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
    a, b = (saved(tmp_path / f"{n}.onnx", f"y = Slice(x, zero, {n}, last)") for n in ("eight", "four"))
    for path, n in ((a, 8), (b, 4)):
        made = onnx.load(path)
        made.graph.output[0].type.tensor_type.shape.dim[1].dim_value = n
        for name, array in (("zero", [0]), ("eight", [8]), ("four", [4])):
            made.graph.initializer.append(numpy_helper.from_array(np.array(array), name))
        onnx.save(made, path)
    done = run("verify", a, b, "-q")
    assert done.returncode == 1
    said = "different: output 'y' is float32 of shape 2x8, and float32 of shape 2x4 in the second"
    assert done.stdout.startswith(said)
    found = json.loads(run("verify", a, b, "--json").stdout)
    assert found["outputs"][0]["other"] == {"shape": [2, 4], "dtype": "float32"}


@pytest.mark.parametrize(("call", "said"), [
    (lambda p: normfuse.rewrite(p / "in.pt2", p / "out.pt2", trust="no"), "allow it with"),  # type: ignore[arg-type]
    (lambda p: normfuse.optimize(p / "in.onnx", {"numerics": "fast"}), "config is a dict"),  # type: ignore[arg-type]
    (lambda p: normfuse.rewrite(p / "in.onnx", p / "o.onnx", normfuse.Config), "config is the class"),  # type: ignore[arg-type]
    (lambda p: normfuse.export(torch.nn.LayerNorm(8), (torch.ones(2, 8),), p / "o.onnx", 3), "config is a int"),  # type: ignore[arg-type]
    (lambda p: normfuse.InductorPass({}), "config is a dict"),  # type: ignore[arg-type]
    (lambda p: normfuse.rewrite(p / "in.onnx", p / "o.onnx", calibration=p / "gone"), "leave them out"),
    (lambda p: normfuse.optimize(p / "in.onnx", calibration=[]), "leave them out"),
    (lambda p: normfuse.optimize(p / "in.onnx", args=(1,)), "args and kwargs are to trace an nn.Module with"),
    (lambda p: normfuse.optimize(torch.export.load(p / "in.pt2"), kwargs={"a": 1}), "args and kwargs are to trace"),
    (lambda p: normfuse.optimize(torch.export.load(p / "in.pt2"), normfuse.Config(target="ort-cpu")),
     "target='ort-cpu' is for ONNX models, and torch runs this one"),
    (lambda p: normfuse.optimize(torch.nn.LayerNorm(8), normfuse.Config("exact", target="ort-cuda"), args=(1,)),
     "target='ort-cuda' is for ONNX models"),
    (lambda p: normfuse.InductorPass(normfuse.Config(target="ort-cpu")), "target='ort-cpu' is for ONNX models"),
    (lambda p: normfuse.InductorPass(normfuse.Config(untie=True)), "untie=True is for"),
    (lambda p: reduce(p / "in.onnx", p / "o.onnx", normfuse.Config(force=True)), "force=True is for"),
    (lambda p: reduce("", p / "o.onnx"), "the input is an empty path; give the name of a file"),
    (lambda p: normfuse.verify.compare_models(p / "in.onnx", p / "in.onnx", inputs={"x": np.ones((1, 3))}), "not run"),
])  # fmt: skip
def test_arguments_that_mean_nothing(call: Any, said: str, tmp_path: Path) -> None:
    saved(tmp_path / "in.onnx")
    program(tmp_path / "in.pt2")
    with pytest.raises(normfuse.NormFuseError, match=said):
        call(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.onnx", "in.pt2"]


MEANINGLESS: list[tuple[dict[str, Any], str]] = [
    ({"norms": "a*"}, "norms='a*'"), ({"norms": "a*", "layernorm_to_rmsnorm": "exact"}, "norms='a*'"),
    ({"tolerance": 0.5, "layernorm_to_rmsnorm": "exact"}, "tolerance=0.5"),
    ({"untie": True, "fold_scale": True}, "untie=True"), ({"force": True, "target": "ort-cpu"}, "force=True"),
    ({"ort_version": "1.31"}, "ort_version='1.31'"), ({"ort_version": "1.31", "target": "normfuse"}, "ort_version="),
]


@pytest.mark.parametrize(("options", "said"), MEANINGLESS, ids=str)
def test_options_that_mean_nothing(options: dict[str, Any], said: str, tmp_path: Path) -> None:
    source, config = saved(tmp_path / "in.onnx"), normfuse.Config(**options)
    calls: list[Any] = [
        lambda: normfuse.rewrite(source, tmp_path / "o.onnx", config), lambda: normfuse.optimize(source, config),
        lambda: normfuse.export(torch.nn.LayerNorm(8), (torch.ones(2, 8),), tmp_path / "o.onnx", config)]  # fmt: skip
    for call in calls:
        with pytest.raises(InputError, match=f"{re.escape(said)}.* is for .*, and means nothing here; leave it out"):
            call()
    typed = [f"--{name.replace('_', '-')}" if value is True else f"--{name.replace('_', '-')}={value}"
             for name, value in options.items()]  # fmt: skip
    done = run("rewrite", source, tmp_path / "o.onnx", *typed)
    assert done.returncode == 2 and not (tmp_path / "o.onnx").exists()
    flag = "--" + said.partition("=")[0].replace("_", "-")
    assert f"normfuse: {flag} " in done.stderr and f"{flag} True" not in done.stderr


def test_numbers_of_numpy_are_numbers() -> None:
    half: Any = np.float32(0.5)
    assert normfuse.Config(tolerance=half) == normfuse.Config(tolerance=0.5)
    assert "tolerance=0.5" in repr(normfuse.Config(tolerance=half))


class Named:
    """A path that is no Path."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __fspath__(self) -> str:
        return str(self.path)


def test_paths_of_any_kind(tmp_path: Path) -> None:
    source = Named(saved(tmp_path / "in.onnx"))
    assert len(normfuse.inspect(source).norms) == 1 and normfuse.optimize(source)[1].fused == 1
    for command in (["inspect"], ["rewrite", "--in-place"], ["verify", source.path], ["bench"]):
        done = run(*command, "")
        assert done.returncode == 2 and "is an empty path; give the name of a file" in done.stderr, done.stderr


@pytest.mark.parametrize("option", [{"first": "onnxsim"}, {"ort_version": "1.31"}, {"target": "ort-cpu"}])
def test_options_that_torch_has_no_use_for(option: dict[str, Any]) -> None:
    torch._dynamo.reset()
    with pytest.raises(Exception, match=r"has no option|is for ONNX models"):
        torch.compile(torch.nn.LayerNorm(8), backend="normfuse", options=option)(torch.ones(2, 8))


@pytest.mark.parametrize("asked", [18, 99])
def test_an_opset_that_the_exporter_does_not_give(asked: int, tmp_path: Path) -> None:
    report = normfuse.export(torch.nn.LayerNorm(8), (torch.ones(2, 8),), tmp_path / "o.onnx", opset_version=asked)
    said = f"opset {asked} was asked for: torch.onnx.export does not convert this model to it" in report.notes
    assert said is (report.opset != asked)


def lookup(path: Path) -> Path:
    lines = "e = Gather(table, ids) f = Gather(table, more) s = Add(e, f) p = Relu(s) "
    lines += "y = LayerNormalization<axis=-1>(p, w)"
    head = '<ir_version: 9, opset_import: ["": 18]> g (int64[B] ids, int64[C] more) => (float[D,16] y)'
    made = onnx.parser.parse_model(f"{head} {{ {lines} }}")
    for name, array in (("table", np.random.default_rng(0).random((8, 16))), ("w", np.ones(16))):
        made.graph.initializer.append(numpy_helper.from_array(array.astype(np.float32), name))
    onnx.save(made, path)
    return path


@pytest.mark.parametrize(("ids", "said"), [
    ([0] * 8, "does not run on the calibration inputs"), ([0.0, 1.0, 2.5] * 4, "holds numbers that int64 does not"),
    ([0.0, 1.0, 2.0] * 4, ""),
])  # fmt: skip
def test_calibration_inputs_that_do_not_fit(ids: list[float], said: str, tmp_path: Path) -> None:
    for name in "ab":
        np.savez(tmp_path / f"{name}.npz", ids=np.array(ids), more=np.arange(12) % 8)
    done = run("rewrite", lookup(tmp_path / "in.onnx"), tmp_path / "out.onnx", "--layernorm-to-rmsnorm", "approximate",
               "--calibration", tmp_path, "--tolerance", "9")  # fmt: skip
    assert done.returncode == (2 if said else 0) and said in done.stderr


@pytest.mark.parametrize("command", [
    ("verify", "bad", "in.onnx"), ("verify", "in.onnx", "bad"), ("reduce", "bad", "out"), ("inspect", "bad"),
    ("bench", "bad"),
])  # fmt: skip
def test_files_of_another_format(command: tuple[str, ...], tmp_path: Path) -> None:
    saved(tmp_path / "in.onnx")
    (tmp_path / "bad").write_bytes(b"GGUF" + bytes(100))
    done = run(*command, cwd=tmp_path)
    assert done.returncode == 2 and "bad: a GGUF file: weights without a graph" in done.stderr
    (tmp_path / "bad").write_text(POINTER)
    done = run(*command, cwd=tmp_path)
    assert done.returncode == 2 and "bad: a git-lfs pointer, not the file itself; run git lfs pull" in done.stderr


POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 12345\n"


def test_pointers_of_git_lfs(tmp_path: Path) -> None:
    source = saved(tmp_path / "in.onnx")
    onnx.save(onnx.load(source), source, save_as_external_data=True, location="w.bin", size_threshold=0)
    (tmp_path / "w.bin").write_text(POINTER)
    (tmp_path / "p.pt2").write_text(POINTER)
    for name, said in (("in.onnx", "'w.bin' is a git-lfs pointer"), ("p.pt2", "p.pt2: a git-lfs pointer")):
        done = run("inspect", tmp_path / name)
        assert done.returncode == 2 and said in done.stderr and "run git lfs pull" in done.stderr


def test_archives_where_a_model_is_asked_for(tmp_path: Path) -> None:
    torch.save({}, tmp_path / "state.pt")
    program(tmp_path / "p.pt2")
    for command, said in (
        (("bench", "state.pt"), "state.pt: a file of torch.save"), (("bench", "p.pt2"), "and this is a .pt2; export"),
        (("reduce", "p.pt2", "o.onnx"), "p.pt2: a zip archive, such as a .pt2, and no ONNX model; export"),
    ):  # fmt: skip
        done = run(*command, cwd=tmp_path)
        assert done.returncode == 2 and said in done.stderr, done.stderr


def test_what_reduce_lacks_is_not_advised(tmp_path: Path) -> None:
    source = saved(tmp_path / "in.onnx")
    for more in ([], ["--overwrite"]):
        done = run("reduce", source, source, *more)
        assert done.returncode == 2 and done.stderr.strip().endswith("is the input itself; choose another name")


def test_quiet_lines_have_names(tmp_path: Path) -> None:
    saved(tmp_path / "a.onnx")
    saved(tmp_path / "b.onnx")
    lines = run("inspect", "a.onnx", "b.onnx", "-q", cwd=tmp_path).stdout.splitlines()
    assert [line.partition(": found 1")[0] for line in lines] == ["a.onnx", "b.onnx"]
    assert run("inspect", "a.onnx", "-q", cwd=tmp_path).stdout.startswith("found 1")


def test_names_and_places(tmp_path: Path) -> None:
    saved(tmp_path / "in.onnx")
    odd = os.fsencode(tmp_path) + b"/\xff.onnx"
    Path(os.fsdecode(odd)).write_bytes((tmp_path / "in.onnx").read_bytes())
    for args, said in (
        (("verify", os.fsdecode(odd), os.fsdecode(odd)), "whose names are UTF-8; rename it"),
        (("inspect", "a  b.gone"), "a  b.gone: no such file"),
        (("inspect", "in.onnx", "--frob"), "`normfuse inspect --help`"),
        (("rewrite", "in.onnx", ""), "no output is given"),
        (("rewrite", "in.onnx", "", "--in-place"), "no output is given"),
        (("inspect", "in.onnx", "--report", "page.onnx"), "give a name that ends in .html"),
        (("verify", "in.onnx", "some.zip"), "some.zip is a .pt2 or another zip archive, and in.onnx is none"),
    ):  # fmt: skip
        (tmp_path / "some.zip").write_bytes(b"PK\3\4")
        done = run(*args, cwd=tmp_path)
        assert done.returncode == 2 and said in done.stderr, (args, done)
