"""What two files have in common once ONNX Runtime has loaded them."""

from __future__ import annotations

import weakref
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

pytest.importorskip("onnxruntime")

from tests.bench.common import merged, save
from tests.bench.contenders import Files, Job, loaded
from tests.bench.latency import against_best, in_parts, turn

MS = {"input": 4.0, "onnxsim": 3.0, "normfuse onnx": 2.0, "normfuse normfuse": 1.0, "control": 5.0}
OTHER = {"names": {"prefix": "other_"}, "order": {"swapped": True}, "constant": {"factor": 3.0}, "axis": {"axis": 0}}


def write(path: Path, prefix: str = "", factor: float = 2.0, axis: int = 1, swapped: bool = False) -> Path:
    """softmax(x) * factor + exp(x)."""
    a, b, c = (prefix + name for name in "abc")
    nodes = [helper.make_node("Softmax", ["x"], [a], axis=axis), helper.make_node("Exp", ["x"], [b])]
    nodes = (nodes[::-1] if swapped else nodes) + [
        helper.make_node("Mul", [a, "k"], [c]), helper.make_node("Add", [c, b], ["y"])]  # fmt: skip
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [2, 3]) for name in "xy"]
    constants = [numpy_helper.from_array(np.array(factor, np.float32), "k")]
    graph = helper.make_graph(nodes, "g", values[:1], values[1:], constants)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8), path)
    return path


@pytest.mark.parametrize(("what", "same"), [("names", True), ("order", True), ("constant", False), ("axis", False)])
def test_loaded(tmp_path: Path, what: str, same: bool) -> None:
    first, second = write(tmp_path / "a.onnx"), write(tmp_path / "b.onnx", **OTHER[what])  # type: ignore[arg-type]
    assert (loaded(first, "cpu", False) == loaded(second, "cpu", False)) is same


def test_one_that_runs_as_another_is_not_measured(tmp_path: Path) -> None:
    first, same, other = (write(tmp_path / f"{i}.onnx", **how) for i, how in  # type: ignore[arg-type]
                          enumerate(({}, OTHER["names"], OTHER["constant"])))  # fmt: skip
    files = Files({"input": first}, {}, {}, {loaded(first, "cpu", False): "input"})
    files.add("a", other, "cpu")
    files.add("b", other, "cpu")
    assert (files.made, files.same) == ({"input": first, "a": other}, {"b": "a"})
    files.add("a", same, "cpu")
    assert (files.made, files.same["a"]) == ({"input": first}, "input")


def test_ratio_to_the_best_of_the_others() -> None:
    runs = [{"input": [3.0, 3.0], "onnxsim": [2.0], "normfuse onnx": [x]} for x in (1.0, 2.0, 6.0)]
    assert against_best(runs) == ({"normfuse onnx": 1.0}, {"normfuse onnx": [0.5, 3.0]})


def test_which_of_the_others_is_best_the_other_runs_say() -> None:
    """Of two that are the same but for noise neither gains by having been the faster one."""
    times = [(1.0, 1.1), (1.1, 1.0), (1.0, 1.1), (1.1, 1.0)]
    runs = [{"input": [a], "onnxsim": [b], "normfuse onnx": [1.05]} for a, b in times]
    assert against_best(runs)[0]["normfuse onnx"] == pytest.approx(1.05 / 1.1, abs=1e-4)


def test_rows_of_another_day_stay_where_versions_and_conditions_are_the_same(tmp_path: Path) -> None:
    path, about, keys = tmp_path / "result.json", {"shapes": {16: "hidden"}}, ("model", "threads")
    old = [{"model": "a", "threads": 1, "ms": 1}, {"model": "b", "threads": 1, "ms": 2}]
    save(path, merged(None, about, old, keys))
    new = [{"model": "a", "threads": 1, "ms": 3}]
    assert merged(path, about, new, keys)["models"] == [old[1], *new]
    assert merged(path, {"shapes": 2}, new, keys)["models"] == new
    path.write_text(path.read_text().replace('"normfuse": "', '"normfuse": "9.'))
    assert merged(path, about, new, keys)["models"] == new


@pytest.mark.parametrize("place", range(5))
def test_in_parts_the_input_is_what_all_are_compared_by(place: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that is half as fast in the second part; each is measured once, and the input in each part."""
    asked: list[list[str]] = []

    def turn(job: Job, order: list[tuple[str, Path]], threads: int, provider: str, seconds: float) -> Any:
        asked.append([name for name, _ in order])
        slow = 2.0 if len(asked) > 1 else 1.0
        times = {name: [slow * ms] * 3 for name, ms in MS.items() if name in asked[-1]}
        return {"1": times}, {"1": {name: np.zeros(1) for name in times}}

    monkeypatch.setattr("tests.bench.latency.turn", turn)
    job = Job("model", "fp32", Path("in.onnx"), {"1": {}})
    order = [(name, Path(f"{name}.onnx")) for name in list(MS)[1:]]
    order.insert(place, ("input", job.path))
    times, outputs = in_parts(job, order, 1, "cpu", 1.0, 3)
    assert {name: t[0] for name, t in times["1"].items()} == MS and set(outputs["1"]) == set(MS)
    assert [len(names) for names in asked] == [3, 3] and all("input" in names for names in asked)
    assert sorted(name for names in asked for name in names) == sorted(["input", *MS])
    asked.clear()
    assert in_parts(job, order, 1, "cpu", 1.0, 100)[0] == {"1": {name: [ms] * 3 for name, ms in MS.items()}}
    assert asked == [[name for name, _ in order]]


def test_a_turn_keeps_no_memory_of_its_sessions(monkeypatch: pytest.MonkeyPatch) -> None:
    """As an output of ONNX Runtime does, which is a view of it."""
    outputs: list[weakref.ref[Any]] = []

    class Session:
        def run(self, names: None, inputs: dict[str, Any]) -> list[Any]:
            out = np.ones(3)
            outputs.append(weakref.ref(out))
            return [out]

    monkeypatch.setattr("tests.bench.latency.session", lambda *args: Session())
    job = Job("model", "fp32", Path("in.onnx"), {"1": {}, "16": {}})
    times, first = turn(job, [("input", job.path), ("onnxsim", job.path)], 1, "cpu", 0.001)
    assert len(outputs) > 8 and not any(ref() is not None for ref in outputs)
    assert first["16"]["onnxsim"].tolist() == [1, 1, 1] and len(times["1"]["input"]) >= 3
