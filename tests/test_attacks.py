"""Hostile models: not a byte outside their folder is read or written, and the answer is one line and takes seconds."""

from __future__ import annotations

import contextlib
import os
import resource
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

import normfuse
from normfuse.config import Config
from normfuse.errors import InputError, NormFuseError, UnsafeModelError, UnsupportedError
from normfuse.io.data import MAPPED
from normfuse.io.files import external_tensors, read_onnx
from tests.attacks import ATTACKS, SECRET, outer
from tests.cli_tools import fails, fails_json, norm_model, run, saved
from tests.fuzz.files import fuzz

SECONDS, MEBIBYTES = 10, 512
COMMANDS = {
    "inspect": ["inspect", "model.onnx"],
    "rewrite": ["rewrite", "model.onnx", "out.onnx"],
    "convert": ["rewrite", "model.onnx", "out.onnx", "--layernorm-to-rmsnorm", "exact", "--fold-scale"],
    "reference": ["rewrite", "model.onnx", "out.onnx", "--external-data", "reference"],
    "verify": ["verify", "good.onnx", "model.onnx"],
}
_opened: list[str] = []


def _listen(event: str, arguments: tuple[Any, ...]) -> None:
    if event == "open" and isinstance(arguments[0], str | bytes | os.PathLike):
        _opened.append(os.fsdecode(arguments[0]))


sys.addaudithook(_listen)


@pytest.fixture
def places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Path, Path]]:
    """The folder of a model, which is the current one, and a folder that must be left alone."""
    inside, outside = tmp_path / "inside", tmp_path / "outside"
    inside.mkdir()
    outside.mkdir()
    (outside / "secret").write_bytes(SECRET)
    saved(norm_model(), inside / "good.onnx")
    monkeypatch.chdir(inside)
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "secret").write_bytes(SECRET)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    before = _seen(outside)
    _opened.clear()
    yield inside, outside
    for path in _opened:
        assert not os.path.realpath(path).startswith((str(outside), "/etc/passwd", "/proc", "/dev/zero")), path
    assert _seen(outside) == before


def _seen(folder: Path) -> list[tuple[Any, ...]]:
    return [(p.name, p.read_bytes(), p.stat().st_mtime_ns, p.stat().st_size) for p in sorted(folder.iterdir())]


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("name", ATTACKS)
def test_attack(name: str, command: str, places: tuple[Path, Path]) -> None:
    inside, outside = places
    made = ATTACKS[name].build(inside, outside)
    (inside / "model.onnx").write_bytes(made if isinstance(made, bytes) else made.SerializeToString())
    _opened.clear()
    before = {p.name for p in inside.iterdir()}
    memory, started = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.monotonic()
    result = run(*COMMANDS[command])
    assert time.monotonic() - started < SECONDS
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory < MEBIBYTES * 1024
    if ATTACKS[name].refused:
        assert len(fails(result)) < 1000
        assert {p.name for p in inside.iterdir()} == before
        assert fails_json(run(*COMMANDS[command], "--json"))
    elif command != "verify":
        assert result[0] == 0, result
    assert "\x1b" not in result[1] + result[2]
    for path in inside.iterdir():
        if path.name not in before and path.stat().st_size < 2**20:
            assert SECRET not in path.read_bytes()
    assert SECRET.decode() not in result[1] + result[2]


@pytest.mark.parametrize("name", [n for n, a in ATTACKS.items() if a.refused])
def test_attack_in_memory(name: str, places: tuple[Path, Path]) -> None:
    """A message that somebody else has parsed is no more trusted than a file."""
    inside, outside = places
    made = ATTACKS[name].build(inside, outside)
    if not isinstance(made, onnx.ModelProto):
        return
    _opened.clear()
    for config in (Config(), Config(layernorm_to_rmsnorm="exact", fold_scale=True)):
        with contextlib.suppress(NormFuseError):
            normfuse.optimize(made, config)[0].SerializeToString()


def test_where_output_goes(places: tuple[Path, Path]) -> None:
    """A link, a hard link or a data file of the name to be given is replaced; what it led to stays as it was."""
    inside, outside = places
    onnx.save(norm_model(), inside / "model.onnx", save_as_external_data=True, location="w.bin", size_threshold=0)
    assert run("rewrite", "model.onnx", "first.onnx")[0] == 0
    (data,) = inside.glob("first-*.data")
    content = data.read_bytes()
    data.unlink()
    data.symlink_to(outside / "secret")
    (inside / "link.onnx").symlink_to(outside / "secret")
    os.link(outside / "secret", inside / "hard.onnx")
    for name in ("first.onnx", "link.onnx", "hard.onnx"):
        assert run("rewrite", "model.onnx", name, "--overwrite")[0] == 0
        onnx.checker.check_model(inside / name)
    assert not data.is_symlink() and data.read_bytes() == content


@pytest.mark.parametrize("kind", ["pipe", "device", "ring", "long", "nul"])
def test_output_that_is_no_file(kind: str, places: tuple[Path, Path]) -> None:
    inside, _ = places
    os.mkfifo(inside / "pipe.onnx")
    (inside / "ring.onnx").symlink_to("ring.onnx")
    target = {"pipe": "pipe.onnx", "device": "/dev/null", "ring": "ring.onnx/out.onnx", "long": "n" * 300 + ".onnx",
              "nul": "a\0b.onnx"}[kind]  # fmt: skip
    before = sorted(inside.iterdir())
    fails(run("rewrite", "good.onnx", target, "--overwrite"))
    assert sorted(inside.iterdir()) == before


def test_many_files(places: tuple[Path, Path]) -> None:
    """One file for each of 1,500 tensors, more than a process may have open; read by several threads."""
    inside, _ = places
    model = norm_model()
    (inside / "data").mkdir()
    for i in range(1500):
        array = np.full(64, i, "f4")
        (inside / "data" / str(i)).write_bytes(array.tobytes())
        model.graph.initializer.append(outer(numpy_helper.from_array(array, f"t{i}"), f"data/{i}"))
    saved(model, inside / "model.onnx")
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(1024, hard), hard))
    try:
        tensors = list(external_tensors(read_onnx("model.onnx")[0]))
        before = len(os.listdir("/proc/self/fd"))
        with ThreadPoolExecutor(8) as threads:
            found = list(threads.map(lambda t: float(t.numpy()[63]), tensors * 2))
        assert found == [float(i) for i in range(1500)] * 2
        assert len(os.listdir("/proc/self/fd")) <= before + MAPPED
        assert run("rewrite", "model.onnx", "out.onnx", "--external-data", "reference")[0] == 0
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_a_file_that_is_swapped(places: tuple[Path, Path]) -> None:
    """Between the check and the first look at the elements, which may be much later."""
    inside, outside = places
    onnx.save(norm_model(), inside / "model.onnx", save_as_external_data=True, location="w.bin", size_threshold=0)
    for swap in ("link", "other", "folder"):
        tensors = list(external_tensors(read_onnx("model.onnx")[0]))
        (inside / "w.bin").rename(inside / "kept")
        if swap == "link":
            (inside / "w.bin").symlink_to(outside / "secret")
        elif swap == "other":
            (inside / "w.bin").write_bytes(SECRET + bytes(4))
        else:
            (inside / "w.bin").mkdir()
        with pytest.raises(UnsafeModelError, match="changed while it was read"):
            tensors[0].numpy()
        (inside / "w.bin").rmdir() if swap == "folder" else (inside / "w.bin").unlink()
        (inside / "kept").rename(inside / "w.bin")
    assert read_onnx("model.onnx")


def test_what_the_library_between_forgets(tmp_path: Path) -> None:
    """Quantization annotations are kept on every way; what cannot be kept is refused."""
    model = norm_model()
    for name in ("x", "square"):
        model.graph.quantization_annotation.add(tensor_name=name)
    made, report = normfuse.optimize(model)
    assert report.to_dict()["fused"] == 1
    assert [a.tensor_name for a in made.graph.quantization_annotation] == ["x"]
    source = saved(model, tmp_path / "model.onnx")
    normfuse.rewrite(source, tmp_path / "out.onnx")
    assert [a.tensor_name for a in onnx.load(tmp_path / "out.onnx").graph.quantization_annotation][:1] == ["x"]
    model.training_info.add().algorithm.name = "step"
    with pytest.raises(UnsupportedError, match="holds training graphs"):
        normfuse.optimize(model)
    model = norm_model()
    model.opset_import.add(domain="ai.onnx.preview.training", version=1)
    normfuse.optimize(model)
    model.graph.node.append(onnx.helper.make_node("Gradient", ["x"], ["g"], domain="ai.onnx.preview.training", xs=["x"],
                                                  y="square"))  # fmt: skip
    with pytest.raises(UnsupportedError, match="holds a Gradient operator"):
        normfuse.optimize(model)
    values = numpy_helper.from_array(np.ones(1, "f4"), "sparse")
    model = norm_model()
    model.graph.sparse_initializer.append(
        onnx.helper.make_sparse_tensor(values, numpy_helper.from_array(np.zeros(1, "i8")), [64]))  # fmt: skip
    with pytest.raises(UnsupportedError, match="'sparse' is a sparse initializer"):
        normfuse.optimize(model)


@pytest.mark.parametrize("path", [
    "model.onnx", "./model.onnx", "../inside/model.onnx", "größe 模型.onnx", "a b/c.onnx",
])  # fmt: skip
def test_ordinary_paths(path: str, places: tuple[Path, Path]) -> None:
    inside, _ = places
    (inside / "a b").mkdir()
    onnx.save(norm_model(), path, save_as_external_data=True, location="w.bin", size_threshold=0)
    for target in ("out.onnx", "a b/größe.onnx", str(inside / "full.onnx")):
        assert run("rewrite", path, target)[0] == 0
        onnx.checker.check_model(target)
    assert run("verify", path, "out.onnx")[0] == 0
    with pytest.raises(InputError):
        normfuse.inspect("no such file")


@pytest.mark.fuzz
def test_damaged_files() -> None:
    """`python -m tests.fuzz onnx` is the long form."""
    found, wrong = fuzz(600, first=1_000_000, block=600)
    assert wrong == []
    assert found["done"] > 100 and found["refused"] > 200
