"""What the command line leaves in files and streams: links, permissions, full disks, closed pipes, signals."""

from __future__ import annotations

import errno
import importlib.abc
import json
import os
import pkgutil
import resource
import runpy
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

import normfuse
from normfuse import reduce
from normfuse.cli import main
from normfuse.cli_process import ending
from normfuse.errors import InputError
from normfuse.io import files
from normfuse.sessions import session
from tests.cli_tools import RMS, cli, program, rms_file


@pytest.mark.parametrize("dry", [False, True])
def test_a_report_that_cannot_be_written_behind_the_model(dry: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                                          capsys: pytest.CaptureFixture[str]) -> None:  # fmt: skip
    source, out = rms_file(tmp_path / "in.onnx"), tmp_path / "out.onnx"

    def full(*_: object) -> None:
        raise InputError("page.html: cannot be written: No space left on device")

    monkeypatch.setattr("normfuse.html.page.write", full)
    args = ["rewrite", str(source), str(out), "--report", str(tmp_path / "page.html"), "-q"]
    assert main([*args, *["--dry-run"] * dry]) == 2
    told = capsys.readouterr().err.strip()
    assert out.exists() is not dry and told.endswith("left on device" if dry else f"left on device; {out} was written")


def test_messages_are_for_the_door_where_they_are_read(tmp_path: Path) -> None:
    source, out = rms_file(tmp_path / "in.onnx"), rms_file(tmp_path / "out.onnx")
    for target, python, typed in ((out, "overwrite=True", "--overwrite"), (source, "in_place=True", "--in-place")):
        with pytest.raises(InputError, match=f"with {python}$"):
            normfuse.rewrite(source, target)
        assert cli("rewrite", source, target).stderr.strip().endswith(f"with {typed}")


@pytest.mark.parametrize("closed", [(1,), (2,), (1, 2)])
def test_closed_streams(closed: tuple[int, ...], tmp_path: Path) -> None:
    source = rms_file(tmp_path / "in.onnx")

    def close() -> None:
        for handle in closed:
            os.close(handle)

    assert cli("rewrite", source, tmp_path / "out.onnx", capture_output=False, preexec_fn=close).returncode == 0
    assert (tmp_path / "out.onnx").exists()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is full")
def test_a_full_disk_behind_stdout() -> None:
    with open("/dev/full", "w") as full:
        done = cli("explain", "--json", capture_output=False, stdout=full, stderr=subprocess.PIPE)
    assert done.returncode == 2 and "Traceback" not in done.stderr


def test_a_link_is_there_already(tmp_path: Path) -> None:
    source = rms_file(tmp_path / "in.onnx")
    for name, to in (("dangling", "/nonexistent/x"), ("ring", str(tmp_path / "ring"))):
        (tmp_path / name).symlink_to(to)
        assert cli("rewrite", source, tmp_path / name).returncode == 2
        assert (tmp_path / name).is_symlink()
    assert cli("rewrite", tmp_path / "ring", tmp_path / "out.onnx", "--bench").returncode == 2


def test_a_link_is_written_through(tmp_path: Path) -> None:
    """In place, what the link leads to is the input, and the result."""
    (tmp_path / "blobs").mkdir()
    source = rms_file(tmp_path / "blobs" / "m")
    before = source.read_bytes()
    for name, to in (("again.onnx", "link.onnx"), ("link.onnx", "blobs/m")):
        (tmp_path / name).symlink_to(to)
    report = normfuse.rewrite(tmp_path / "again.onnx", tmp_path / "again.onnx", in_place=True)
    assert report.target == str(tmp_path / "again.onnx") and os.readlink(tmp_path / "again.onnx") == "link.onnx"
    assert os.readlink(tmp_path / "link.onnx") == "blobs/m" and source.read_bytes() != before
    assert len(onnx.load(source).graph.node) == len(normfuse.inspect(source).norms) == 1
    program(tmp_path / "blobs" / "p")
    (tmp_path / "link.pt2").symlink_to("blobs/p")
    done = cli("rewrite", tmp_path / "link.pt2", "--in-place", "--trust", "--layernorm-to-rmsnorm", "exact", "--force")
    assert done.returncode == 0 and (tmp_path / "link.pt2").is_symlink(), done.stderr
    assert sorted(path.name for path in (tmp_path / "blobs").iterdir()) == ["m", "p"]


def test_a_link_to_a_model_with_weights_beside_it(tmp_path: Path) -> None:
    (tmp_path / "blobs").mkdir()
    source = rms_file(tmp_path / "blobs" / "m.onnx")
    onnx.save(onnx.load(source), source, save_as_external_data=True, location="w.bin", size_threshold=0)
    for name, to in (("link.onnx", "blobs/m.onnx"), ("w.bin", "blobs/w.bin"), ("blobs/near.onnx", "m.onnx")):
        (tmp_path / name).symlink_to(to)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    done = cli("rewrite", tmp_path / "link.onnx", "--in-place")
    assert done.returncode == 2 and "link.onnx: is a link, and its weights would go beside" in done.stderr
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    assert cli("rewrite", tmp_path / "blobs" / "near.onnx", "--in-place").returncode == 0
    assert (tmp_path / "blobs" / "near.onnx").is_symlink() and source.read_bytes() != before[source]


def test_a_link_beside_which_the_weights_are_not(tmp_path: Path) -> None:
    """ONNX Runtime looks for them there alone."""
    (tmp_path / "blobs").mkdir()
    source = rms_file(tmp_path / "blobs" / "m.onnx")
    onnx.save(onnx.load(source), source, save_as_external_data=True, location="w.bin", size_threshold=100)
    (tmp_path / "link.onnx").symlink_to("blobs/m.onnx")
    for args in (("rewrite", "link.onnx", "out.onnx", "--verify", "model"), ("verify", "link.onnx", "out.onnx"),
                 ("bench", "link.onnx", "out.onnx", "--rounds", "3")):  # fmt: skip
        assert (done := cli(*args, cwd=tmp_path)).returncode == 0, done.stderr


@pytest.mark.skipif(os.name == "nt", reason="it parts folders there")
def test_a_backslash_in_a_name(tmp_path: Path) -> None:
    source = rms_file(tmp_path / "in.onnx")
    onnx.save(onnx.load(source), source, save_as_external_data=True, location="w.bin", size_threshold=100)
    normfuse.rewrite(source, tmp_path / "a\\b.onnx", normfuse.Config(verify="model"))
    assert len(normfuse.inspect(tmp_path / "a\\b.onnx").norms) == 1


def test_permissions_stay(tmp_path: Path) -> None:
    source = rms_file(tmp_path / "in.onnx")
    source.chmod(0o600)
    assert cli("rewrite", source, "--in-place").returncode == 0
    assert source.stat().st_mode & 0o777 == 0o600


def test_the_call_that_does_it_again(tmp_path: Path) -> None:
    source = rms_file(tmp_path / "in.onnx")
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
        result = cli("rewrite", rms_file(tmp_path / "in.onnx"), f"{tmp_path / name}/")
        assert result.returncode == 2 and "a folder; give the name of a file in it" in result.stderr
    assert not (tmp_path / "nowhere").exists() and not any((tmp_path / "there").iterdir())


def test_no_folder_of_its_own_is_needed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As where only the folder of the output may be written."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "nowhere"))
    normfuse.rewrite(rms_file(tmp_path / "in.onnx"), tmp_path / "out.onnx")


def test_a_full_disk_under_a_program(tmp_path: Path) -> None:
    """torch's writer would end the process."""
    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (16_000, 16_000))

    source = program(tmp_path / "in.pt2")
    done = cli("rewrite", source, tmp_path / "out.pt2", "--trust", preexec_fn=limit)
    assert (done.returncode, done.stdout) == (2, "") and "out.pt2: cannot be written: " in done.stderr
    assert len(done.stderr.splitlines()) == 1 and list(tmp_path.iterdir()) == [source]


@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP"])
def test_a_signal_to_end(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                         capsys: pytest.CaptureFixture[str]) -> None:  # fmt: skip
    """It comes while the result is being written."""
    source, number = rms_file(tmp_path / "in.onnx"), getattr(signal, name)
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
    source, number = rms_file(tmp_path / "in.onnx"), getattr(signal, name)
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
    source = rms_file(tmp_path / "in.onnx", lines)
    onnx.save(onnx.load(source), source, save_as_external_data=True, location="in.data", size_threshold=0)
    for name in ("in.onnx", "in.data"):
        (tmp_path / name).chmod(0o600)
    normfuse.rewrite(source, tmp_path / "out.onnx")
    made = [path for path in tmp_path.iterdir() if path.name.startswith("out")]
    assert len(made) == 2 and {stat.S_IMODE(path.stat().st_mode) for path in made} == {0o600}
    (tmp_path / "out.onnx").chmod(0o640)  # what is replaced says
    normfuse.rewrite(source, tmp_path / "out.onnx", overwrite=True)
    assert stat.S_IMODE((tmp_path / "out.onnx").stat().st_mode) == 0o640


def no_links(*names: object) -> None:
    """`os.link` on a file system that gives a file one name only."""
    raise OSError(errno.EPERM, os.strerror(errno.EPERM))


@pytest.mark.parametrize("links", [True, False])
@pytest.mark.parametrize("door", ["onnx", "with weights", "nothing to do", "pt2", "export", "reduce", "page"])
def test_a_file_that_appears_meanwhile(door: str, links: bool, tmp_path: Path,
                                       monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    """Nothing is replaced that nobody allowed to be replaced, also if it was not there when the run began; on file
    systems that give a file one name only as well."""
    target = tmp_path / {"pt2": "out.pt2", "page": "out.html"}.get(door, "out.onnx")
    source = tmp_path / ("in.pt2" if door == "pt2" else "in.onnx")
    rms_file(source, "y = Relu(x)" if door == "nothing to do" else RMS)
    if door == "with weights":
        onnx.save(onnx.load(source), source, save_as_external_data=True, location="w.bin", size_threshold=64)
    names = {p.name for p in tmp_path.iterdir()}
    fsync = os.fsync

    def late(handle: int) -> None:  # of the output itself, which is named next
        if not target.exists() and (door != "with weights" or list(tmp_path.glob("*.data"))):
            target.write_text("precious")
        fsync(handle)

    monkeypatch.setattr(os, "fsync", late)
    if not links:
        monkeypatch.setattr(os, "link", no_links)
    with pytest.raises(normfuse.InputError, match="exists already"):
        if door == "page":
            normfuse.inspect(source).save_html(target)
        elif door == "reduce":
            monkeypatch.setattr(reduce, "reduce_model", lambda model, *rest: (model, None))
            reduce.reduce(source, target)
        elif door in ("onnx", "with weights", "nothing to do"):
            normfuse.rewrite(source, target)
        elif door == "pt2":
            normfuse.rewrite(program(source), target, trust=True)
        else:
            normfuse.export(torch.nn.RMSNorm(8), (torch.ones(2, 8),), target)
    assert target.read_text() == "precious"
    assert {p.name for p in tmp_path.iterdir()} == {*names, target.name}


@pytest.mark.parametrize("links", [True, False])
@pytest.mark.parametrize("lines", [RMS, "y = Relu(x)"])
def test_file_systems_that_give_a_file_one_name(links: bool, lines: str, tmp_path: Path,
                                                monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    """The result is the same, and nothing else is left."""
    source = rms_file(tmp_path / "in.onnx", lines)
    onnx.save(onnx.load(source), source, save_as_external_data=True, location="w.bin", size_threshold=64)
    if not links:
        monkeypatch.setattr(os, "link", no_links)
    for overwrite in (False, True):
        normfuse.rewrite(source, tmp_path / "out.onnx", overwrite=overwrite)
        (data,) = tmp_path.glob("out-*.data")
        assert {p.name for p in tmp_path.iterdir()} == {"in.onnx", "w.bin", "out.onnx", data.name}
        assert all(p.stat().st_nlink == 1 for p in tmp_path.iterdir())
        x = {"x": np.ones((2, 16), np.float32)}
        assert (session(tmp_path / "out.onnx").run(None, x)[0] == session(source).run(None, x)[0]).all()


@pytest.mark.parametrize("whole", [0, 1, 2, 3, 4, 5])
def test_weights_that_another_run_has_written_since(whole: int, tmp_path: Path,
                                                    monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    """Their name is made from their content, so both runs have the same, and the one that fails takes its own away."""
    source, target = rms_file(tmp_path / "in.onnx"), tmp_path / "out.onnx"
    onnx.save(onnx.load(source), source, save_as_external_data=True, location="w.bin", size_threshold=64)
    serialised = files._serialised

    def other(*given: Any) -> bytes:  # between the weights and the model
        monkeypatch.setattr(files, "_serialised", serialised)
        assert len(list(tmp_path.glob("out-*.data"))) == 1
        for _ in range(whole):  # the number of the first file of weights is given to another one
            normfuse.rewrite(source, target, overwrite=True)
        raise KeyboardInterrupt

    monkeypatch.setattr(files, "_serialised", other)
    with pytest.raises(KeyboardInterrupt):
        normfuse.rewrite(source, target)
    assert target.exists() == bool(whole) and len(list(tmp_path.glob("out-*.data"))) == bool(whole)
    if whole:
        x = {"x": np.ones((2, 16), np.float32)}
        assert (session(target).run(None, x)[0] == session(source).run(None, x)[0]).all()


def test_ctrl_c_before_the_command_line_is_read(monkeypatch: pytest.MonkeyPatch,
                                                capsys: pytest.CaptureFixture[str]) -> None:  # fmt: skip
    class Interrupt(importlib.abc.MetaPathFinder):
        def find_spec(self, name: str, *rest: object) -> None:
            if name == "normfuse.cli":
                raise KeyboardInterrupt

    monkeypatch.delattr(normfuse, "cli", raising=False)
    monkeypatch.delitem(sys.modules, "normfuse.cli", raising=False)
    monkeypatch.setattr(sys, "meta_path", [Interrupt(), *sys.meta_path])
    with pytest.raises(SystemExit) as ended:
        runpy.run_module("normfuse", run_name="__main__")
    assert ended.value.code == 130 and capsys.readouterr().err == "normfuse: interrupted\n"
