"""Bad input: a one-line error or a sensible result; never a traceback, a hang or a half-written file."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from tests.cli_tools import COMMAND, fails, fails_json, norm_model, run, saved, wrap


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return saved(norm_model(), tmp_path / "model.onnx")


def unreadable(folder: Path) -> dict[str, Path]:
    """Files that are no model."""
    data = norm_model().SerializeToString()
    contents = {
        "truncated": data[: len(data) // 2], "random": np.random.default_rng(0).bytes(4096), "empty file": b"",
        "text": b"this is a text file\n" * 20, "json": b'{"model": 1}', "zeros": bytes(1000),
    }  # fmt: skip
    paths = {"missing": folder / "missing.onnx", "directory": folder}
    for name, content in contents.items():
        paths[name] = folder / f"{name.replace(' ', '_')}.onnx"
        paths[name].write_bytes(content)
    return paths


@pytest.mark.parametrize(
    "case", ["missing", "directory", "truncated", "random", "empty file", "text", "json", "zeros"]
)  # fmt: skip
def test_what_is_no_model_is_refused_in_one_line(model: Path, tmp_path: Path, case: str) -> None:
    folder = tmp_path / "bad"
    folder.mkdir()
    path = unreadable(folder)[case]
    before = sorted(tmp_path.rglob("*"))
    for argv in (["inspect", path], ["rewrite", path, tmp_path / "out.onnx"], ["verify", model, path]):
        assert path.name in fails(run(*argv))
        fails_json(run(*argv, "--json"), "InputError")
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("kind", ["pipe", "device"])
def test_special_files_do_not_hang(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "pipe.onnx" if kind == "pipe" else Path("/dev/zero")
    if kind == "pipe":
        os.mkfifo(path)
    for argv in (["inspect", path], ["rewrite", path, tmp_path / "out.onnx"]):
        done = subprocess.run([*COMMAND, *map(str, argv)], capture_output=True, text=True, check=False, timeout=30)
        assert fails((done.returncode, done.stdout, done.stderr))


@pytest.mark.parametrize("location", ["../secret", "/etc/hostname", "link"])
def test_data_outside_the_folder_is_not_read(tmp_path: Path, location: str) -> None:
    (tmp_path / "secret").write_bytes(bytes(256))
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "link").symlink_to(tmp_path / "secret")
    hostile = norm_model()
    weight = hostile.graph.initializer[1]
    weight.ClearField("raw_data")
    weight.data_location = TensorProto.EXTERNAL
    weight.external_data.add(key="location", value=location)
    (folder / "model.onnx").write_bytes(hostile.SerializeToString())
    for command in (["inspect"], ["rewrite", "--dry-run"]):
        fails_json(run(*command, folder / "model.onnx", "--json"), "UnsafeModelError")


def test_cycle(tmp_path: Path) -> None:
    nodes = [helper.make_node("Add", ["x", "b"], ["a"]), helper.make_node("Relu", ["a"], ["b"]),
             helper.make_node("Mul", ["a", "b"], ["y"])]  # fmt: skip
    path = tmp_path / "cycle.onnx"
    path.write_bytes(wrap(nodes, [], [2, 4]).SerializeToString())
    fails(run("inspect", path))
    fails(run("rewrite", path, tmp_path / "out.onnx"))
    assert not (tmp_path / "out.onnx").exists()


@pytest.mark.parametrize("case", ["unknown operator", "unknown domain", "no norms", "empty graph"])
def test_models_without_norms_pass_through(tmp_path: Path, case: str) -> None:
    nodes = {
        "unknown operator": [helper.make_node("Frobnicate", ["x"], ["y"])],
        "unknown domain": [helper.make_node("Gadget", ["x"], ["y"], domain="acme")],
        "no norms": [helper.make_node("Relu", ["x"], ["y"])],
        "empty graph": [],
    }[case]
    path, out_path = tmp_path / "model.onnx", tmp_path / "out.onnx"
    model = wrap(nodes, [], [2, 4])
    if not nodes:
        model.graph.output[0].name = "x"
    path.write_bytes(model.SerializeToString())
    assert "found 0" in run("inspect", path)[1]
    code, out, _ = run("rewrite", path, out_path)
    assert code == 0
    assert "found 0, fused 0" in out
    assert [n.op_type for n in onnx.load(out_path).graph.node] == [n.op_type for n in nodes]


def test_missing_external_data(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    big = norm_model()
    onnx.save(big, path, save_as_external_data=True, location="weights.bin", size_threshold=0)
    (tmp_path / "weights.bin").unlink()
    assert "weights.bin" in fails(run("rewrite", path, tmp_path / "out.onnx"))
    code, out, err = run("inspect", path)
    assert code == 0 or "weights.bin" in fails((code, out, err))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model.onnx"]


def test_a_model_cache_of_links(tmp_path: Path) -> None:
    """The layout of the Hugging Face cache: a snapshot of links to blobs, which have other names."""
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "1"
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    onnx.save(norm_model(), blobs / "m", save_as_external_data=True, location="model.onnx_data", size_threshold=0)
    (blobs / "model.onnx_data").rename(blobs / "d")
    (snapshot / "model.onnx").symlink_to("../../blobs/m")
    (snapshot / "model.onnx_data").symlink_to("../../blobs/d")
    assert run("rewrite", snapshot / "model.onnx", tmp_path / "out.onnx", "--verify", "model")[0] == 0
    onnx.checker.check_model(tmp_path / "out.onnx")
    (tmp_path / "secret").write_bytes((blobs / "d").read_bytes())
    (snapshot / "model.onnx_data").unlink()
    (snapshot / "model.onnx_data").symlink_to("../../secret")
    fails_json(run("rewrite", snapshot / "model.onnx", tmp_path / "other.onnx", "--json"), "UnsafeModelError")


def test_output_may_not_be_the_input(model: Path, tmp_path: Path) -> None:
    before = model.read_bytes()
    link = tmp_path / "link.onnx"
    link.symlink_to(model)
    hard = tmp_path / "hard.onnx"
    os.link(model, hard)
    for same in (
        model,
        tmp_path / "." / "model.onnx",
        tmp_path / ".." / tmp_path.name / "model.onnx",
        link,
        hard,
    ):
        for more in ([], ["--overwrite"]):
            fails(run("rewrite", model, same, *more))
            fails_json(run("rewrite", model, same, *more, "--json"), "InputError")
    assert model.read_bytes() == before
    for argv in ([model, model, "--in-place"], [model, "--in-place"]):
        model.write_bytes(before)
        assert run("rewrite", *argv)[0] == 0
        assert model.read_bytes() != before


def test_output_that_cannot_be_written(model: Path, tmp_path: Path) -> None:
    existing = tmp_path / "existing.onnx"
    existing.write_text("keep me")
    before = sorted(tmp_path.iterdir())
    for output in (existing, tmp_path / "no" / "such" / "out.onnx", tmp_path, model / "out.onnx"):
        fails(run("rewrite", model, output))
        fails_json(run("rewrite", model, output, "--json"), "InputError")
    assert "existing.onnx" in fails(run("rewrite", model, existing))
    assert existing.read_text() == "keep me"
    assert sorted(tmp_path.iterdir()) == before
    assert run("rewrite", model, existing, "--overwrite")[0] == 0
    assert len(onnx.load(existing).graph.node) == 1


@pytest.mark.parametrize(
    "argv",
    [
        [], ["nonsense"], ["inspect"], ["inspect", "a", "--report"], ["rewrite", "a"],
        ["rewrite", "a", "b", "--target", "x"],
        ["rewrite", "a", "b", "--no-such"], ["verify", "a"], ["verify", "a", "b", "--seed", "x"], ["explain", "NF9"],
        ["inspect", "a", "-q", "-v"], ["inspect", ""], ["rewrite", "a", ""], ["explain", "\x1b[31m"],
        ["rewrite", "a", "b", "--layernorm-to-rmsnorm", "approximate"], ["rewrite", "a", "b", "--target", "ort-cuda"],
    ],
    ids=" ".join,
)  # fmt: skip
def test_wrong_arguments(argv: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert "\x1b" not in fails(run(*argv))
    fails_json(run(*argv, "--json"))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("size", ["-1", "-9223372036854775808"])
def test_a_size_below_zero_is_unknown(size: str, tmp_path: Path) -> None:
    """onnx.shape_inference ends the process at a Slice of one."""
    made = onnx.parser.parse_model("""<ir_version: 8, opset_import: ["" : 18]>
        g (float[B,S,SIZE] x) => (float[B,S,64] y) <int64[1] zero = {0}, int64[1] end = {64}, int64[1] last = {-1},
        float eps = {1e-5}> { h = Slice(x, zero, end, last) q = Mul(h, h) m = ReduceMean(q, last) e = Add(m, eps)
        s = Sqrt(e) y = Div(h, s) }""".replace("SIZE", "S2"))
    made.graph.input[0].type.tensor_type.shape.dim[2].dim_value = int(size)
    onnx.save(made, tmp_path / "in.onnx")
    argv = ["rewrite", str(tmp_path / "in.onnx"), str(tmp_path / "out.onnx"), "--json"]
    done = subprocess.run([*COMMAND, *argv], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["summary"]["fused"] == 1


def test_what_the_reader_of_graphs_does_not_know_is_named(model: Path, tmp_path: Path) -> None:
    """A map, as scikit-learn's classifiers end in, and a sparse constant: valid, and not read."""
    made = onnx.load(model)
    made.graph.output[0].type.map_type.key_type = TensorProto.INT64
    maps = saved(made, tmp_path / "maps.onnx")
    made = onnx.load(model)
    index = helper.make_tensor("i", TensorProto.INT64, [1], [1])
    sparse = helper.make_sparse_tensor(helper.make_tensor("v", TensorProto.FLOAT, [1], [1.0]), index, [4])
    made.graph.node.insert(0, helper.make_node("Constant", [], ["sparse"], sparse_value=sparse))
    for path, word in ((maps, "Map types"), (saved(made, tmp_path / "sparse.onnx"), "Sparse tensors")):
        line = fails(run("inspect", path))
        assert word in line and "Error calling" not in line


@pytest.mark.parametrize("body", [
    "If (flag) <then_branch = t () => (float[] x) { z = Neg(x) }, else_branch = e () => (float[] o) { o = Neg(x) }>",
    "Loop(two, flag, x) <body = b (int64 i, bool q, float[N] s) => (bool q, float[N] x) { z = Neg(s) }>"])
def test_a_sub_graph_that_gives_what_it_does_not_compute(body: str, tmp_path: Path) -> None:
    """No runtime takes it."""
    made = onnx.parser.parse_model(f"""<ir_version: 8, opset_import: ["": 17]> g (float[N] x, bool flag) => (float[N] y)
        <int64 two = {{2}}> {{ y = {body} }}""")
    path = saved(made, tmp_path / "in.onnx")
    for argv in (["inspect", path], ["rewrite", path, tmp_path / "out.onnx"]):
        assert "'x' is given by a sub-graph that does not compute it" in fails(run(*argv))
    assert not (tmp_path / "out.onnx").exists()
