"""`normfuse bench`: what it tells, in turns and with a clock of our own, and what it says of bad input."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

import normfuse
import normfuse.ort
from normfuse import bench, bench_norms, cli_bench, sessions
from tests.cli_tools import COMMAND, EVIL, fails, fails_json, norm_model, run, saved
from tests.html_tools import Page

pytest.importorskip("onnxruntime")
MEMORY = bench.memory
QUICK = ("--rounds", "5", "--threads", "1")


class Clock:
    """Stands still but for what advances it."""

    now = 100.0

    def __call__(self) -> float:
        return self.now

    def takes(self, *seconds: float) -> Callable[[], None]:
        """A job that takes these times, one after the other, over and over."""
        calls = 0

        def job() -> None:
            nonlocal calls
            self.now += seconds[calls % len(seconds)]
            calls += 1

        return job


@pytest.fixture(autouse=True)
def _without_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave out what takes a process for each model; two tests measure it."""
    monkeypatch.setattr(bench, "memory", lambda *_: None)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(bench, "clock", made)
    return made


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(norm_model(), tmp_path_factory.mktemp("bench") / "model.onnx")


@pytest.fixture(scope="module")
def fused(model: Path) -> Path:
    path = model.with_name("fused.onnx")
    normfuse.rewrite(model, path, normfuse.Config(target="normfuse"))
    return path


@pytest.fixture(scope="module")
def open_model(model: Path) -> Path:
    """relu(x[batch, sequence, 8] + table[sequence]) with a table of 6 rows: only sequence=6 fits."""
    x, y = (helper.make_tensor_value_info(v, TensorProto.FLOAT, ["batch", "sequence", 8]) for v in "xy")
    table = onnx.numpy_helper.from_array(np.ones((6, 8), np.float32), "table")
    nodes = [helper.make_node("Add", ["x", "table"], ["sum"]), helper.make_node("Relu", ["sum"], ["y"])]
    graph = helper.make_graph(nodes, "g", [x], [y], initializer=[table])
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    return saved(made, model.with_name("open.onnx"))


def replaced(monkeypatch: pytest.MonkeyPatch, clock: Clock, seconds: dict[Path, float]) -> None:
    """Make each run of a model take so long by the clock."""
    opened = sessions.open_session

    class Slowed:
        def __init__(self, path: Any, *more: Any) -> None:
            self.real, self.path = opened(path, *more), Path(path)

        def __getattr__(self, name: str) -> Any:
            return getattr(self.real, name)

        def run(self, names: Any, feeds: Any) -> Any:
            clock.now += seconds[self.path]
            return self.real.run(names, feeds)

    monkeypatch.setattr(bench, "open_session", Slowed)


# -- time -------------------------------------------------------------------------------------------------------------


def test_jobs_take_turns_and_each_begins_a_round() -> None:
    calls: list[str] = []
    times = bench.turns([lambda: calls.append("a"), lambda: calls.append("b")], rounds=4)
    assert [len(one) for one in times] == [4, 4]
    assert "".join(calls[2 * bench.WARM_UP :]) == "abbaabba"


def test_warm_up_does_not_count(clock: Clock) -> None:
    cold = [9.0] * bench.WARM_UP
    (times,) = bench.turns([clock.takes(*cold, 0.001, 0.001, 0.001, 0.001)], rounds=4)
    assert times == pytest.approx([1.0] * 4)


def test_rounds_follow_the_time_they_take(clock: Clock) -> None:
    assert len(bench.turns([clock.takes(10.0)])[0]) == bench.LEAST
    assert len(bench.turns([clock.takes(0.1)])[0]) == pytest.approx(bench.SECONDS / 0.1, abs=1)
    assert len(bench.turns([clock.takes(1e-9)])[0]) == bench.MOST


def test_progress_ends_at_one(clock: Clock) -> None:
    for rounds in (None, 7):
        told: list[float] = []
        bench.turns([clock.takes(1.0)], rounds, stage=told.append)
        assert told == sorted(told) and told[-1] == 1.0


def test_spread_and_ratio() -> None:
    assert bench.spread([5.0, 1.0, 2.0, 4.0, 3.0]) == {"min": 1.0, "q1": 2.0, "median": 3.0, "q3": 4.0}
    # a machine that slows down tenfold in the middle changes both alike
    a = [1.0, 1.0, 10.0, 10.0, 1.0]
    found = bench.compare(a, [x * 0.5 for x in a])
    assert found == {"median": 0.5, "q1": 0.5, "q3": 0.5, "within_noise": False}
    slow_later = bench.compare([1.0] * 5 + [2.0] * 6, [1.0] * 6 + [2.0] * 5)  # the machine, not the models
    assert slow_later["q1"] <= slow_later["median"] <= slow_later["q3"] == 1.0
    assert bench.compare([1.0, 1.0, 1.0, 1.0], [0.9, 1.1, 0.95, 1.05])["within_noise"] is True
    assert bench.compare([1.0, 1.0, 1.0, 1.0], [1.1, 1.2, 1.1, 1.2])["within_noise"] is False


def test_a_model_twice_as_slow_is_told_as_two(model: Path, fused: Path, clock: Clock,
                                              monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    replaced(monkeypatch, clock, {model: 0.010, fused: 0.020})
    code, out, err = run("bench", model, fused, *QUICK)
    assert (code, err) == (0, "")
    assert "cpu: B takes 2.00 of A (2.00-2.00)" in out.splitlines()
    assert [line.split()[0] for line in out.splitlines() if "model.onnx" in line or "fused.onnx" in line] == ["A", "B"]
    row = next(line for line in out.splitlines() if line.startswith("B"))
    assert "cpu" in row and "20  " in row and "20 to 20" in row


def test_two_alike_are_within_noise(model: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    replaced(monkeypatch, clock, {model: 0.010})
    assert run("bench", model, model, *QUICK, "-q")[1] == (
        "cpu: B takes 1.00 of A (1.00-1.00); the difference is within noise\n")


# -- what it tells ----------------------------------------------------------------------------------------------------


def test_json_is_all_that_goes_to_stdout(model: Path, fused: Path) -> None:
    argv = [*COMMAND, "bench", str(model), str(fused), *QUICK, "--json"]
    done = subprocess.run(argv, capture_output=True, text=True, check=True)
    assert done.stderr == ""
    data = json.loads(done.stdout)
    assert data["schema"] == 1 and data["threads"] == 1
    assert data["inputs"] == {"x": {"shape": [2, 5, 64], "dtype": "float32"}}
    assert [m["path"] for m in data["models"]] == [str(model), str(fused)]
    for one in data["models"]:
        found = one["providers"]["cpu"]
        t = found["milliseconds"]
        assert 0 < t["min"] <= t["q1"] <= t["median"] <= t["q3"]
        assert found["rounds"] == 5
        assert found["norm_share"] == 1.0  # the model is a norm and nothing else
        assert 0 < found["norm_gb_per_s"] < 1000
        assert found["memory_bytes"] > 0 or sys.platform != "linux"
    assert 0 < data["copy_gb_per_s"] < 1000
    ratio = data["ratio"]["cpu"]
    assert 0 < ratio["q1"] <= ratio["median"] <= ratio["q3"]


def test_one_model_has_no_ratio(model: Path) -> None:
    data = json.loads(run("bench", model, *QUICK, "--json")[1])
    assert len(data["models"]) == 1 and data["ratio"] is None
    text = run("bench", model, *QUICK)[1]
    assert "takes" not in text and "x 2x5x64 float32" in text and "1 thread;" in text
    assert run("bench", model, *QUICK, "-q")[1].startswith("cpu: ")


@pytest.mark.skipif(not normfuse.ort.names(), reason="installed without a C compiler")
def test_the_library_is_loaded_for_its_functions_unless_told_otherwise(model: Path, fused: Path) -> None:
    for more, expected in (((), [False, True]), (("--no-library",), [False, False])):
        data = json.loads(run("bench", model, fused, *QUICK, "--json", *more)[1])
        assert [m["operators"] for m in data["models"]] == expected
        assert [m["providers"]["cpu"]["norm_share"] for m in data["models"]] == [1.0, 1.0]
    assert "NormFuse's library" in run("bench", fused, *QUICK)[1]


@pytest.mark.parametrize("named", [True, False])
def test_share_of_norms_leaves_out_the_rest(tmp_path: Path, named: bool) -> None:
    proto = norm_model()
    proto.graph.node[-1].output[0] = "normed_y"
    rest = [helper.make_node("Sin", ["normed_y"], ["s"], name="Sin_rest"),
            helper.make_node("Erf", ["s"], ["y"], name="Erf_rest")]  # fmt: skip
    proto.graph.node.extend(rest)
    if not named:
        for node in proto.graph.node:
            node.name = ""
    path = saved(proto, tmp_path / "more.onnx")
    regions, functions = bench_norms.norms_of(str(path))
    mul, erf = ("Mul_y", "Erf_rest") if named else ("Mul_5", "Erf_7")
    assert regions is not None and len(regions) == 1 and not functions
    assert mul in regions[0] and erf not in regions[0]
    share = json.loads(run("bench", path, *QUICK, "--json")[1])["models"][0]["providers"]["cpu"]["norm_share"]
    assert 0.1 < share < 0.99


def test_bytes_that_norms_move(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A decomposed norm, and one operator that takes in an addition: each tensor counts once."""
    def event(name: str, op: str, took: float, read: int, written: int, place: int) -> dict[str, Any]:
        sizes = {"op_name": op, "activation_size": str(read), "output_size": str(written), "node_index": str(place)}
        return {"cat": "Node", "name": f"{name}_kernel_time", "dur": took, "args": sizes}

    run = [event("Div_normed", "Div", 1, 3000, 2000, 7), event("Mul_y", "Mul", 2, 2000, 2000, 8),
           event("Mul_square", "Mul", 3, 2000, 2000, 3), event("other", "Gemm", 10, 1, 1, 9)]  # fmt: skip
    more = event("fused", "SkipLayerNormalization", 4, 4000, 4000, 12)
    monkeypatch.setattr(bench_norms, "_events", lambda *_: run * (bench_norms.PROFILED + 1))
    assert bench_norms.profile(str(model), {}, 1, False) == bench_norms.Norms(6 / 16, 4000 / 6 / 1e3, 4000)
    monkeypatch.setattr(bench_norms, "_events", lambda *_: [*run, more] * (bench_norms.PROFILED + 1))
    assert bench_norms.profile(str(model), {}, 1, False) == bench_norms.Norms(10 / 20, 12000 / 10 / 1e3, 6000)
    run[1]["args"]["output_size"] = "0"
    assert bench_norms.profile(str(model), {}, 1, False) == bench_norms.Norms(10 / 20)
    taken = event("Mul_y/SimplifiedLayerNormFusion/", "SimplifiedLayerNormalization", 5, 2000, 2000, 8)
    monkeypatch.setattr(bench_norms, "_events", lambda *_: [taken, run[3]] * (bench_norms.PROFILED + 1))
    assert bench_norms.profile(str(model), {}, 1, False) == bench_norms.Norms(5 / 15, 4000 / 5 / 1e3, 4000)


def test_an_operator_that_waits_once(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An interruption takes a thousand times as long as a small operator; where runs differ all of them count."""
    def event(name: str, took: float) -> dict[str, Any]:
        sizes = {"op_name": name, "activation_size": "2000", "output_size": "2000"}
        return {"cat": "Node", "name": f"{name}_kernel_time", "dur": took, "args": sizes}

    runs = [[event("Mul_y", 2), event("other", 6)] for _ in range(bench_norms.PROFILED + 1)]
    runs[2][0]["dur"], runs[4][1]["dur"] = 4000, 3000
    monkeypatch.setattr(bench_norms, "_events", lambda *_: [e for run in runs for e in run])
    assert bench_norms.profile(str(model), {}, 1, False) == bench_norms.Norms(2 / 8, 4000 / 2 / 1e3, 4000)
    runs[3].append(event("other", 1000))
    assert bench_norms.profile(str(model), {}, 1, False).share == pytest.approx(4008 / 8032)


def test_the_rate_of_a_copy(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(np, "copyto", lambda *_: clock.takes(0.01)())
    assert bench.copy_rate(2_000_000) == pytest.approx(0.2)


def test_share_is_not_known_where_names_are_lost(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_norms, "norms_of", lambda path: ([frozenset({"elsewhere"})], frozenset[str]()))
    assert "not known" in run("bench", model, *QUICK)[1]


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells")
def test_memory_grows_with_the_weights(model: Path, tmp_path: Path) -> None:
    proto = norm_model()
    big = onnx.numpy_helper.from_array(np.ones((2**22,), np.float32), "big")  # 16 MiB
    proto.graph.initializer.append(big)
    proto.graph.node.append(helper.make_node("Relu", ["big"], ["more"]))
    proto.graph.output.append(helper.make_tensor_value_info("more", TensorProto.FLOAT, [2**22]))
    path = saved(proto, tmp_path / "big.onnx")
    small, large = (MEMORY(str(p), bench.How(threads=1)) for p in (model, path))
    assert small is not None and large is not None
    assert large - small > 16 * 2**20
    assert MEMORY(str(tmp_path / "missing.onnx"), bench.How()) is None


def test_report(model: Path, fused: Path, tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    out = run("bench", model, fused, *QUICK, "--report", path)[1]
    assert f"wrote {path}" in out
    source = path.read_text(encoding="utf-8")
    page = Page(source)
    verdict = next(line for line in out.splitlines() if line.startswith("cpu: "))
    assert verdict in page.text and "model.onnx" in page.text and "fused.onnx" in page.text
    assert source.count('class="bar-before"') == source.count('class="bar-after"') == 2  # time and bandwidth
    assert "a copy, " in page.text
    assert "--overwrite" in fails(run("bench", model, *QUICK, "--report", path))
    assert run("bench", model, *QUICK, "--report", path, "--overwrite")[0] == 0
    assert "takes" not in Page(path.read_text(encoding="utf-8")).text
    assert "model" in fails(run("bench", model, "--report", model, "--overwrite"))


def test_hostile_names_stay_text(tmp_path: Path) -> None:
    path = saved(norm_model(EVIL), tmp_path / "a<script>.onnx")
    code, out, _ = run("bench", path, *QUICK, "--report", tmp_path / "r.html")
    assert code == 0 and not set("\x1b\x07\u202e\r") & set(out)
    Page((tmp_path / "r.html").read_text(encoding="utf-8"))


def test_nothing_is_left_behind_when_interrupted(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object) -> None:
        assert any(tmp_path.iterdir())  # the profile's folder is there
        raise KeyboardInterrupt

    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr(bench_norms, "PROFILED", 1)
    monkeypatch.setattr(bench_norms, "_events", interrupt)
    assert run("bench", model, *QUICK)[0] == 130
    assert not any(tmp_path.iterdir())


# -- inputs -----------------------------------------------------------------------------------------------------------


def test_sizes_and_inputs(open_model: Path, tmp_path: Path) -> None:
    data = json.loads(run("bench", open_model, *QUICK, "--json", "--size", "batch=3", "--size", "sequence=6")[1])
    assert data["inputs"]["x"]["shape"] == [3, 6, 8] and data["notes"] == []
    assert "sizes not given: batch 2;" in run("bench", open_model, *QUICK, "--size", "sequence=6")[1]
    np.savez(tmp_path / "inputs.npz", x=np.zeros((5, 6, 8), np.float32))
    data = json.loads(run("bench", open_model, *QUICK, "--json", "--inputs", tmp_path / "inputs.npz")[1])
    assert data["inputs"]["x"]["shape"] == [5, 6, 8] and data["notes"] == []


def test_sizes_that_do_not_fit_name_the_option(open_model: Path) -> None:
    code, out, _ = run("bench", open_model, *QUICK)
    assert code == 0 and "sizes not given: batch 1, sequence 1" in out  # it adds six rows, or to one
    message = fails(run("bench", open_model, *QUICK, "--size", "sequence=4"))
    assert "batch=2, sequence=4" in message and "--size NAME=N" in message
    message = fails_json(run("bench", open_model, *QUICK, "--json", "--size", "sequnce=6"), "InputError")
    assert "'sequnce'" in message and "batch, sequence" in message


def test_sizes_that_memory_has_no_room_for(open_model: Path) -> None:
    for n in (10**11, 10**18 - 1):
        message = fails(run("bench", open_model, *QUICK, "--size", f"batch={n}"))
        assert f"there is no memory to draw inputs of {open_model}: 'x' is {n}x2x8" in message
    assert "give a name and a size" in fails(run("bench", open_model, "--size", f"batch={'9' * 5000}"))


def test_each_size_is_said_once(open_model: Path, tmp_path: Path) -> None:
    message = fails(run("bench", open_model, *QUICK, "--size", "batch=3", "--size", "batch=4"))
    assert message.endswith("--size batch=4: batch is 3 already; give each size once")
    np.savez(tmp_path / "inputs.npz", x=np.zeros((5, 6, 8), np.float32))
    message = fails(run("bench", open_model, *QUICK, "--size", "batch=3", "--inputs", tmp_path / "inputs.npz"))
    assert "the size 'batch' is that of input 'x', which is given; leave out --size batch=3, or --inputs" in message
    both = (*QUICK, "--size", "batch=5", "--inputs", tmp_path / "inputs.npz", "--json")
    assert json.loads(run("bench", open_model, *both)[1])["inputs"]["x"]["shape"] == [5, 6, 8]  # which they agree on


@pytest.mark.parametrize(("array", "said"), [
    (np.zeros((5, 6), np.float32), "input 'x' is given with shape 5x6, and the model wants batchxsequencex8"),
    (np.zeros((5, 6, 7), np.float32), "input 'x' is given with shape 5x6x7, and the model wants batchxsequencex8"),
    (np.zeros((5, 6, 8)), "input 'x' is given in float64, and the model wants float32"),
    (np.zeros((5, 3, 8), np.float32), "Add"),
])  # fmt: skip
def test_inputs_that_do_not_fit_are_named(open_model: Path, array: Any, said: str, tmp_path: Path) -> None:
    np.savez(tmp_path / "in.npz", x=array)
    message = fails(run("bench", open_model, *QUICK, "--inputs", tmp_path / "in.npz"))
    assert said in message and "--size" not in message
    assert said != "Add" or f"{open_model} does not run with --inputs {tmp_path / 'in.npz'}: " in message


def test_models_of_other_types(tmp_path: Path) -> None:
    paths = []
    for kind in (TensorProto.FLOAT, TensorProto.FLOAT16):
        x, y = (helper.make_tensor_value_info(v, kind, [2]) for v in "xy")
        graph = helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "g", [x], [y])
        made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
        paths.append(saved(made, tmp_path / f"{kind}.onnx"))
    message = fails(run("bench", *paths, *QUICK))
    assert "'x' is tensor(float) in" in message and "tensor(float16) in" in message


@pytest.mark.parametrize(("options", "said"), [
    ({"rounds": "x"}, "rounds='x' is not a whole number"), ({"threads": True}, "threads=True is not a whole number"),
    ({"threads": 1.5}, "threads=1.5 is not a whole number"), ({"threads": 99999}, "give 1 to [0-9]+, or 0"),
    ({"sizes": [("a", 1)]}, "give a dict of sizes by name"),
    ({"sizes": {3: 3}}, "give a dict of sizes by name"), ({"sizes": {"a": 0}}, "'a'.=0: give a number from 1"),
    ({"sizes": {"a": "x"}}, "'a'.='x' is not a whole number"), ({"inputs": 3}, "inputs is a int and not the path"),
    ({"library": "no"}, "library='no' is not True or False"),
])  # fmt: skip
def test_how_is_checked(options: Any, said: str) -> None:
    with pytest.raises(normfuse.InputError, match=said):
        bench.How(**options)


def test_numbers_and_paths_of_other_types(open_model: Path, tmp_path: Path) -> None:
    how = bench.How(np.int64(1), np.int64(3), {"batch": np.int64(3), "sequence": np.int64(6)})  # type: ignore[arg-type, dict-item]
    found = bench.bench([open_model], how)
    assert json.loads(json.dumps(found))["models"][0]["path"] == str(open_model)
    assert MEMORY(str(open_model), how) or sys.platform != "linux"
    np.savez(tmp_path / "in.npz", x=np.zeros((5, 6, 8), np.float32))
    found = bench.bench((open_model, str(open_model)), bench.How(1, 3, inputs=tmp_path / "in.npz"))
    assert found["inputs"]["x"]["shape"] == [5, 6, 8]
    for how in (None, {"rounds": 3}):  # type: ignore[assignment]
        with pytest.raises(normfuse.InputError, match=r"give normfuse\.bench\.How"):
            bench.bench([open_model], how)
    with pytest.raises(normfuse.InputError, match="how is a dict"):
        normfuse.rewrite(open_model, tmp_path / "o.onnx", normfuse.Config(first="fastest"), how={})  # type: ignore[arg-type]


def test_strings_are_drawn_or_given(tmp_path: Path) -> None:
    x, y = (helper.make_tensor_value_info(v, TensorProto.STRING, [2]) for v in "xy")
    graph = helper.make_graph([helper.make_node("Identity", ["x"], ["y"])], "g", [x], [y])
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    path = saved(made, tmp_path / "words.onnx")
    np.savez(tmp_path / "words.npz", x=np.array(["a", "b"]))
    for argv in (["bench", path, *QUICK], ["verify", path, path]):
        assert run(*argv)[0] == run(*argv, "--inputs", tmp_path / "words.npz")[0] == 0


def test_bad_input(model: Path, open_model: Path, tmp_path: Path) -> None:
    np.savez(tmp_path / "wrong.npz", z=np.zeros(3, np.float32))
    np.savez(tmp_path / "shape.npz", x=np.zeros((1, 2), np.float32))
    (tmp_path / "text.onnx").write_text("no model")
    for argv, word in (
        ([tmp_path / "missing.onnx"], "missing.onnx"),
        ([tmp_path / "text.onnx"], "text.onnx"),
        ([model, tmp_path / "missing.onnx"], "missing.onnx"),
        ([model, "--inputs", tmp_path / "wrong.npz"], "'z'"),
        ([model, "--inputs", tmp_path / "shape.npz"], "input 'x' is given with shape 1x2, and the model wants 2x5x64"),
        ([model, "--inputs", tmp_path / "none.npz"], "none.npz"),
        ([model, "--size", "batch"], "batch=4"),
        ([model, "--size", "batch=0"], "batch=0"),
        ([model, "--size", "batch=-1"], "batch=-1"),
        ([model, "--rounds", "2"], "3 rounds"),
        ([model, "--threads", "-1"], "--threads"),
        ([model, saved(norm_model("other_"), tmp_path / "other.onnx")], "other inputs"),
    ):  # fmt: skip
        assert word in fails(run("bench", *argv)), argv
    assert fails_json(run("bench", "missing.onnx", "--json"))


def test_provider_that_no_session_gets_is_left_out(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("normfuse.cli_env.sessions_have", lambda: ["CPUExecutionProvider", "CUDAExecutionProvider"])
    opened = sessions.open_session
    monkeypatch.setattr(bench, "open_session", lambda path, provider, *more: opened(path, "cpu", *more))
    data = json.loads(run("bench", model, *QUICK, "--json")[1])
    assert list(data["models"][0]["providers"]) == ["cpu"]
    assert data["notes"] == ["cuda: ONNX Runtime does not run it there"]


def test_numbers_are_short() -> None:
    assert [cli_bench.ms(v) for v in (0.012345, 1.2345, 123.45, 12345.6)] == ["0.0123", "1.23", "123", "12346"]
