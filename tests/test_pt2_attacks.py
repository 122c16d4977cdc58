"""Hostile .pt2 files: a normal answer or one line, quickly, in little memory; nothing in the file is ever run."""

from __future__ import annotations

import io
import json
import os
import pickle
import random
import resource
import stat
import struct
import subprocess
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import normfuse
from tests.cli_tools import COMMAND, fails, fails_json, run
from tests.pt2_cases import exported, saved
from tests.pt2_mutations import mutate, packed, seeds

SECONDS = 10
JSON = "models/model.json"
Items = list[tuple[str, bytes]]


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Items:
    """The members of a good file."""
    path = saved(exported("lifted eps"), tmp_path_factory.mktemp("pt2") / "model.pt2")
    with zipfile.ZipFile(path) as z:
        return [(i.filename, z.read(i)) for i in z.infolist()]


def changed(items: Items, suffix: str, content: bytes | Callable[[bytes], bytes]) -> Items:
    """The members with the content of one changed."""
    return [(n, (content if isinstance(content, bytes) else content(c)) if n.endswith(suffix) else c) for n, c in items]


def program(items: Items) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(next(c for n, c in items if n.endswith(JSON)))
    return found


def graph_of(data: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = data["graph_module"]["graph"]
    return found


def answers(path: Path, *more: object) -> tuple[int, str]:
    """Inspect and, untrusted, rewrite: an answer or one line each, within the time. The code and text of inspect."""
    started = time.perf_counter()
    result = run("inspect", path)
    if result[0] != 0:
        fails(result)
    code, out, _ = run("inspect", path, "--json")
    data = json.loads(out)
    assert code == result[0] and ("error" in data) == (code == 2)
    fails(run("rewrite", path, path.parent / "out.pt2", *more))
    assert time.perf_counter() - started < SECONDS
    assert not (path.parent / "out.pt2").exists()
    assert all(c == "\n" or c.isprintable() for c in result[1] + result[2])
    return code, result[1] + result[2]


# -- pickles ------------------------------------------------------------------------------------------------------


class Bomb:
    """Makes a file when it is unpickled."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.canary),)


@pytest.mark.parametrize("kind", ["plain pickle", "torch.save"])
@pytest.mark.parametrize("place", ["weights", "constants", "legacy weights", "legacy constants", "sample inputs"])
def test_pickles_are_not_opened(good: Items, place: str, kind: str, tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    if kind == "torch.save":
        buffer = io.BytesIO()
        torch.save(Bomb(canary), buffer)
        bomb = buffer.getvalue()
    else:
        bomb = pickle.dumps(Bomb(canary))
    root = good[0][0].partition("/")[0]

    def pickled(content: bytes) -> bytes:
        data = json.loads(content)
        for payload in data["config"].values():
            payload["use_pickle"] = True
        return json.dumps(data).encode()

    items = {
        "weights": [*changed(good, "weights_config.json", pickled), (f"{root}/data/weights/weight_0", bomb)],
        "constants": changed(changed(good, "constants_config.json", pickled), "constants/tensor_0", bomb),
        "legacy weights": [*good, (f"{root}/data/weights/model.pt", bomb)],
        "legacy constants": [i for i in [*good, (f"{root}/data/constants/model.pt", bomb)] if "config" not in i[0]],
        "sample inputs": changed(good, "sample_inputs/model.pt", bomb),
    }[place]
    path = tmp_path / "model.pt2"
    path.write_bytes(packed(items))
    code, text = answers(path)
    assert code == 0 and not canary.exists()
    assert ("pickled or missing" in text) == ("constants" in place)
    assert "trust" in fails(run("rewrite", path, tmp_path / "out.pt2")) and not canary.exists()


def test_the_pickles_would_have_run(good: Items, tmp_path: Path) -> None:
    """The check of the tests above: torch.export.load runs them, so --trust is asked for with reason."""
    canary = tmp_path / "canary"
    path = tmp_path / "model.pt2"
    buffer = io.BytesIO()
    torch.save(Bomb(canary), buffer)

    def custom(content: bytes) -> bytes:
        data = json.loads(content)
        for payload in data["config"].values():
            payload["use_pickle"] = True
        return json.dumps(data).encode()

    items = changed(changed(good, "constants_config.json", custom), "constants/tensor_0", buffer.getvalue())
    path.write_bytes(packed(items))
    run("rewrite", path, tmp_path / "out.pt2", "--trust")
    assert canary.exists()


# -- zip ----------------------------------------------------------------------------------------------------------


def zips(good: Items) -> Iterator[tuple[str, bytes, str]]:
    """(name, file, kind of error) of archives that are made to do harm, or damaged."""
    root = good[0][0].partition("/")[0]
    plain = packed(good)
    for name, content in (("spaces", b"[" + b" " * 2**27 + b"]"), ("one string", b'{"a":"' + b"x" * 2**26 + b'"}')):
        yield f"bomb of {name}", packed(changed(good, JSON, content), zipfile.ZIP_DEFLATED), "Unsafe"
    yield "many members", packed([*good, *((f"{root}/{i}", b"") for i in range(70000))]), "Unsafe"
    for name in ("../evil", f"{root}/../../evil", "/etc/evil", f"{root}\\..\\evil", "..", f"{root}/a/../../../evil"):
        yield f"slip {name}", packed([*good, (name, b"x")]), "Unsafe"
    link = io.BytesIO()
    with zipfile.ZipFile(link, "w") as z:
        for name, content in good:
            z.writestr(name, content)
        info = zipfile.ZipInfo(f"{root}/extra")
        info.external_attr = (stat.S_IFLNK | 0o777) << 16
        z.writestr(info, "/etc/passwd")
    yield "link", link.getvalue(), "Unsafe"
    model = next(i for i in good if i[0].endswith(JSON))
    yield "two models", packed([*good, model]), "Unsafe"
    yield "two models, one other", packed([*good, (model[0], b"{}")]), "Unsafe"
    yield "two folders", packed([*good, ("other/models/model.json", b"{}")]), "Input"
    for share in (0.1, 0.5, 0.9, 0.999):
        yield f"truncated at {share}", plain[: int(len(plain) * share)], "Input"
    yield "trailing", plain + b"x" * 100, "Input"
    yield "prefix", b"PK\3\4" + bytes(60) + plain, "Unsafe"
    yield "nothing", b"", "Input"
    yield "no members", packed([]), "Input"
    yield "signature", b"PK\3\4", "Input"
    at = plain.rindex(b"PK\1\2")
    yield "encrypted", _flagged(plain, JSON, 8, 1), "Input"
    yield "unknown compression", _flagged(plain, JSON, 10, 99), "Input"
    yield "wrong checksum", plain.replace(b'"graph_module"', b'"graph_modulf"', 1), "Input"
    yield "longer than it is", _sized(plain, JSON, 2**31), "Unsafe"
    yield "shorter than it is", _sized(plain, JSON, 100), "Unsafe|Input"
    yield "directory elsewhere", plain[:-6] + struct.pack("<I", 0) + plain[-2:], "Unsafe"
    yield "more members than there are", plain[:-12] + struct.pack("<H", len(good) + 1) + plain[-10:], "Input"
    yield "overlapping", plain[: at + 42] + bytes(4) + plain[at + 46 :], "Unsafe"
    lie = b"PK\6\6" + bytes(20) + struct.pack("<QQQQ", 2**62, 2**62, 2**62, 0) + b"PK\6\7" + bytes(16)
    yield "zip64 lie", plain[:-22] + lie + plain[-22:], "Unsafe"


def _flagged(data: bytes, name: str, at: int, value: int) -> bytes:
    """The directory's record of a member with a 16-bit field changed."""
    out = bytearray(data)
    start = data.index(b"PK\1\2")
    while not data[start + 46 : start + 46 + 200].split(b"PK")[0].endswith(name.encode()):
        start = data.index(b"PK\1\2", start + 1)
    out[start + at : start + at + 2] = struct.pack("<H", value)
    return bytes(out)


def _sized(data: bytes, name: str, size: int) -> bytes:
    for at in (20, 24):
        low, high = struct.unpack("<HH", struct.pack("<I", size))
        data = _flagged(_flagged(data, name, at, low), name, at + 2, high)
    return data


def test_hostile_archives(good: Items, tmp_path: Path) -> None:
    for i, (name, data, kind) in enumerate(zips(good)):
        path = tmp_path / f"{i}.pt2"
        path.write_bytes(data)
        code, text = answers(path)
        assert code == 2, name
        error = json.loads(run("inspect", path, "--json")[1])["error"]
        assert error["kind"].removesuffix("Error").removesuffix("Model") in kind, (name, error)
        assert len(text) < 400
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(f"{j}.pt2" for j in range(i + 1))


def test_compressed_archives_are_read(good: Items, tmp_path: Path) -> None:
    path = tmp_path / "model.pt2"
    path.write_bytes(packed(good, zipfile.ZIP_DEFLATED))
    assert answers(path)[0] == 0


@pytest.mark.parametrize("content", [
    b"", b"\xff\xfe{}", b"\x80\x81", b"null", b"[]", b"1", b"{", b'{"a": NaN}', b'{"a": Infinity}', b"[" * 10**6,
    b'{"a":' * 10**6, b'{"a":' + b"[" * 10**6 + b"]" * 10**6 + b"}", b'{"a": ' + b"9" * 10**6 + b"}",
    b'{"a": [' + b"{}," * 5 * 10**6 + b"1]}", b'{"schema_version": {"major": 1e400}}',
    b'{"schema_version": {"major": "8"}}', b"\xef\xbb\xbf{}", b'{"\\ud800": 1}',
], ids=lambda c: repr(c[:12]))  # fmt: skip
def test_hostile_json(good: Items, content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "model.pt2"
    path.write_bytes(packed(changed(good, JSON, content)))
    assert answers(path)[0] == 2
    for other in ("constants_config.json", "archive_format", "archive_version", "byteorder"):
        path.write_bytes(packed(changed(good, other, content)))
        assert answers(path)[0] == 2 or other == "byteorder"


def test_memory_is_bounded(good: Items, tmp_path: Path) -> None:
    """The largest JSON that is taken, of many small objects: refused or read below 3 GiB."""
    path = tmp_path / "model.pt2"
    path.write_bytes(packed(changed(good, JSON, b'{"a": [' + b'{"b":1},' * (2**22 - 10) + b"1]}")))

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_DATA, (3 * 2**30, 3 * 2**30))

    started = time.perf_counter()
    done = subprocess.run([*COMMAND, "inspect", str(path)], capture_output=True, text=True, check=False,
                          preexec_fn=limit, timeout=120)  # fmt: skip
    fails((done.returncode, done.stdout, done.stderr))
    assert time.perf_counter() - started < 6 * SECONDS


# -- the program --------------------------------------------------------------------------------------------------


def programs(good: Items, canary: Path) -> Iterator[tuple[str, dict[str, Any], int | None]]:
    """(name, program, exit code or None for either) of graphs that are not what torch.export writes."""
    evil = f"__import__('os').mkdir({str(canary)!r})"
    escape = "\x1b[31mred\x1b[0m\x1b]0;title\x07<script>alert(1)</script>\u202e\n"

    def of(change: Callable[[dict[str, Any]], object]) -> dict[str, Any]:
        data = program(good)
        change(graph_of(data))
        return data

    def sized(value: Any) -> dict[str, Any]:
        return of(lambda g: [t["sizes"].__setitem__(0, value) for t in g["tensor_values"].values() if t["sizes"]])

    def node(key: str, value: Any, at: int = 0) -> dict[str, Any]:
        return of(lambda g: g["nodes"][at].__setitem__(key, value))

    for number, code in ((2**63, 2), (2**63 - 1, 2), (-1, 2), (10**400, 2), (1.5, 2), (True, 2), ("4", 2), (0, None)):
        yield f"size {number!r:.20}", sized({"as_int": number}), code
    for text in (evil, f"Symbol({evil})", "s0 + " * 20000 + "1", "(" * 5000, "2**2**2**2**2**99", escape):
        yield f"size {text[:30]}", sized({"as_expr": {"expr_str": text, "hint": None}}), None
    yield "size of no kind", sized({}), 2
    yield "size of two kinds", sized({"as_int": 1, "as_expr": {"expr_str": "s"}}), 2
    for target in ("os.system", "torch.ops.aten.__class__", "torch.ops.aten.mul.__init__", "torch.load", "eval",
                   "torch.ops.aten.mul.Tensor.__globals__", "torch.ops.load_library.x.y", "_operator.attrgetter",
                   "torch.ops.acme.norm.default", "#extension:op", "torch.ops.higher_order.__class__", escape, "",
                   "torch.ops.higher_order.cond", "torch.ops.aten.view.default", evil):  # fmt: skip
        yield f"target {target[:30]}", node("target", target), None
    yield "target of no text", node("target", 7), 2
    for name in (evil, escape, "class", "self", "a.b", "x" * 999, "_1" * 400, "9" * 900):
        yield f"name {name[:20]}", of(lambda g, n=name: _rename(g, n)), 0  # type: ignore[misc]
    yield "name too long", of(lambda g: _rename(g, "x" * 10**6)), 2
    yield "read before", of(lambda g: g["nodes"].reverse()), 2
    yield "cycle", of(lambda g: g["nodes"][0]["inputs"][0].__setitem__("arg", g["outputs"][0])), 2
    yield "never computed", of(lambda g: g["outputs"].append({"as_tensor": {"name": "nobody"}})), 2
    yield "computed twice", of(lambda g: g["nodes"].append(g["nodes"][-1])), 2
    yield "no meta", of(lambda g: g["tensor_values"].clear()), 2
    yield "no nodes", of(lambda g: g.__setitem__("nodes", None)), 2
    yield "unknown type", of(lambda g: [t.__setitem__("dtype", 99) for t in g["tensor_values"].values()]), 2
    yield "unknown argument", node("inputs", [{"name": "self", "arg": {"as_magic": 1}, "kind": 1}]), 2
    yield "argument of no schema", node("inputs", [{"name": escape, "arg": {"as_int": 1}, "kind": 1}]), 2
    deep: Any = {"as_int": 1}
    for _ in range(400):
        deep = {"as_string_to_argument": {"a": deep}}
    yield "deep argument", node("inputs", [{"name": "self", "arg": deep, "kind": 1}]), 2
    inner: Any = {"inputs": [], "outputs": [], "nodes": [], "tensor_values": {}}
    for _ in range(60):
        given = {"name": "", "arg": {"as_graph": {"name": "forward", "graph": inner}}, "kind": 1}
        call = {"target": "torch.ops.higher_order.cond", "outputs": [], "metadata": {}, "inputs": [given]}
        inner = {"inputs": [], "outputs": [], "nodes": [call], "tensor_values": {}}
    yield "deep graphs", of(lambda g: g["nodes"].append(inner["nodes"][0])), 2
    yield "stack", node("metadata", {"nn_module_stack": "a,[" * 20000, "stack_trace": escape, "custom": "{"}), 0
    yield "stack of brackets", node("metadata", {"nn_module_stack": "a,b,c" + "[,(" * 9000 + ";"}), 0
    data = program(good)
    data["graph_module"]["signature"]["input_specs"] *= 2
    yield "more specs", data, 0
    data = program(good)
    data["graph_module"]["signature"]["input_specs"] *= 20000
    yield "many constants", data, 2
    data = program(good)
    data["guards_code"], data["verifiers"] = [evil], [evil]
    data["graph_module"]["module_call_graph"] = [{"fqn": evil, "signature": {"in_spec": evil, "out_spec": evil}}]
    yield "guards", data, 0


def _rename(graph: dict[str, Any], new: str) -> None:
    """Call the result of the last node something else."""
    old = graph["outputs"][0]["as_tensor"]["name"]
    text = json.dumps(graph).replace(json.dumps(old), json.dumps(new))
    graph.clear()
    graph.update(json.loads(text))


def test_hostile_programs(good: Items, tmp_path: Path) -> None:
    canary, path = tmp_path / "canary", tmp_path / "model.pt2"
    for name, data, code in programs(good, canary):
        path.write_bytes(packed(changed(good, JSON, json.dumps(data).encode())))
        got, text = answers(path)
        assert code is None or got == code, (name, text)
    assert [p.name for p in tmp_path.iterdir()] == ["model.pt2"]


@pytest.mark.parametrize("change", [
    {"path_name": "../../../etc/passwd"}, {"path_name": "/etc/passwd"}, {"path_name": "tensor_9"}, {"path_name": None},
    {"tensor_meta": None}, {"tensor_meta": {}}, {"use_pickle": None}, {"use_pickle": "no"},
], ids=str)  # fmt: skip
def test_hostile_constants(good: Items, change: dict[str, Any], tmp_path: Path) -> None:
    def edit(content: bytes) -> bytes:
        data = json.loads(content)
        for payload in data["config"].values():
            payload.update(change)
        return json.dumps(data).encode()

    path = tmp_path / "model.pt2"
    path.write_bytes(packed(changed(good, "constants_config.json", edit)))
    answers(path)


@pytest.mark.parametrize("offset", [1, 2**20, 2**63, -1, "x", None])
def test_constants_beyond_their_bytes(good: Items, offset: Any, tmp_path: Path) -> None:
    def edit(content: bytes) -> bytes:
        data = json.loads(content)
        for payload in data["config"].values():
            payload["tensor_meta"]["storage_offset"] = {"as_int": offset}
        return json.dumps(data).encode()

    path = tmp_path / "model.pt2"
    path.write_bytes(packed(changed(good, "constants_config.json", edit)))
    code, text = answers(path)
    assert code == 0 and "found 0" in text  # without its eps it is no norm


WRONG: tuple[dict[str, Any], ...] = (
    {"as_string": "x"}, {"as_none": True}, {"as_float": "NaN"}, {"as_float": "Infinity"}, {"as_float": 1e308},
    {"as_int": 2**62}, {"as_int": -9}, {"as_ints": [5, -9]}, {"as_ints": []}, {"as_bool": True},
    {"as_scalar_type": 6}, {"as_complex": {"real": 1, "imag": 2}}, {"as_operator": "os.system"}, {"as_tensors": []},
)  # fmt: skip
SHAPES: tuple[list[dict[str, Any]], ...] = ([], [{"as_int": 1}], [{"as_int": 0}] * 3, [{"as_int": 17}] * 4)


def wrong_parts(data: dict[str, Any]) -> Iterator[str]:
    """The program with one argument after another of a wrong kind or left out, and one tensor after another of another
    shape or type, in sub-graphs too; it is put right again after each."""
    todo = [graph_of(data)]
    while todo:
        graph = todo.pop()
        todo += [given["arg"]["as_graph"]["graph"] for node in graph["nodes"] for given in node["inputs"]
                 if "as_graph" in given["arg"]]  # fmt: skip
        yield from _wrong_parts_of(graph)


def _wrong_parts_of(graph: dict[str, Any]) -> Iterator[str]:
    for node in graph["nodes"]:
        for i, given in enumerate(node["inputs"]):
            good = given["arg"]
            for bad in WRONG:
                given["arg"] = bad
                yield f"{node['target']}: {given['name']} is {bad}"
            given["arg"] = good
            del node["inputs"][i]
            yield f"{node['target']}: without {given['name']}"
            node["inputs"].insert(i, given)
    for name, meta in graph["tensor_values"].items():
        sizes, dtype = meta["sizes"], meta["dtype"]
        for meta["sizes"] in SHAPES:
            yield f"{name} is {meta['sizes']}"
        meta["sizes"] = sizes
        for meta["dtype"] in (5, 6, 8, 12, 13, 29):
            yield f"{name} is of type {meta['dtype']}"
        meta["dtype"] = dtype


@pytest.mark.parametrize("seed", [
    "fused", *(pytest.param(n, marks=pytest.mark.slow) for n in ("small", "no grad", "condition", "scalars")),
])  # fmt: skip
def test_every_part_that_does_not_fit(seed: str, tmp_path: Path) -> None:
    program_ = exported("small" if seed == "fused" else seed)
    path = saved(normfuse.optimize(program_)[0] if seed == "fused" else program_, tmp_path / "model.pt2")
    with zipfile.ZipFile(path) as z:
        items = [(i.filename, z.read(i)) for i in z.infolist()]
    data = program(items)
    count = 0
    for what in wrong_parts(data):
        path.write_bytes(packed(changed(items, JSON, json.dumps(data).encode())))
        try:
            normfuse.inspect(path)
        except normfuse.NormFuseError:
            pass
        except Exception as why:
            raise AssertionError(what) from why
        count += 1
    assert count > 300 and len(normfuse.inspect(saved(exported("small"), path)).norms) == 2


# -- mutations ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("start", [0, *(pytest.param(s, marks=pytest.mark.slow) for s in range(100, 1000, 100))])
def test_mutations(start: int, tmp_path: Path) -> None:
    path = tmp_path / "model.pt2"
    codes = []
    for seed in range(start, start + 100):
        rng = random.Random(seed)
        path.write_bytes(mutate(rng.choice(seeds()), rng))
        started = time.perf_counter()
        code, out, _ = run("inspect", path, "--json")
        assert time.perf_counter() - started < SECONDS, seed
        assert code == 0 or fails_json((code, out, "")), seed
        codes.append(code)
    assert 10 < codes.count(0) < 90  # both happen, or the mutations are too weak or too wild
