"""What the CUDA half of the operator library asks of a driver, and what comes out.

python -m tests.cuda_cases [CASE...]

prints what each case found, as JSON, in Triton's interpreter and with a stand-in of the driver in the loader's path.
"""

from __future__ import annotations

import ctypes as c
import itertools
import json
import sys
import threading
import time
import traceback
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from normfuse.ops import meaning
from tests.cuda_tools import ALL_TYPES, KINDS, OPS, TENSORS, Driver, Interpreted, Launch, Types, named, spec
from tests.kernel_tools import (BF16, FP16, FP32, Found, assert_bits, assert_close, doubled, draw, kernels, mismatches,
                                some, tensors)  # fmt: skip

CASES: dict[str, Callable[[Driver], Found]] = {}
EPS = 1e-5


def case(function: Callable[[Driver], Found]) -> Callable[[Driver], Found]:
    """Register a case: it raises or says what it found."""
    CASES[function.__name__] = function
    return function


def fits(op: str, types: Types) -> bool:
    """A sandwich's norms are alike, so that its sum has the type of x; a sum in float32 is not rounded."""
    x, _, result = types
    return x == result if op == "norm_add_norm" else x != FP32 or not op.endswith("_unrounded")


def inputs(op: str, types: Types, m: int, n: int, weights: str, k: tuple[int, int] = (0, 0),
           shift: int = 0) -> dict[str, Tensor | None]:  # fmt: skip
    """The tensors of an operator, `shift` elements from where memory is aligned; results hold NaN."""
    x, first, result = types
    sums, weight = x if named(op) == "add_norm" else result, result if first else FP32
    seeds = itertools.count()

    def made(dtype: torch.dtype, *shape: int) -> Tensor:
        whole = torch.empty(shift + shape[0] * (shape[1] if len(shape) > 1 else 1), dtype=dtype)
        view = whole[shift:].view(shape)
        assert (view.data_ptr() % 16 == 0) == (shift == 0)
        return view.copy_(draw(*shape, dtype=dtype, seed=next(seeds)))

    found: dict[str, Tensor | None] = {"x": made(x, m, n)}
    if op != "norm_add":
        found["y"] = made(result, m, n).fill_(torch.nan)
    if op not in ("norm", "qk_norm"):
        found |= {"r": made(sums, m, n), "s": made(sums, m, n).fill_(torch.nan)}
    if op == "qk_norm":
        found |= {"x2": made(x, *k), "y2": made(result, *k).fill_(torch.nan)}
    for name, size in (("w", n), ("b", n), *((("w2", k[1] or n), ("b2", k[1] or n)) if op.startswith(("q", "norm_add_"))
                                             else ())):  # fmt: skip
        found[name] = made(weight, size) if name[0] in weights else None
    return found | ({"x_bias": made(x, n)} if op.startswith("bias_") else {})


def wanted(module: Any, op: str, kind: str, types: Types, given: dict[str, Tensor | None], exact: bool = False,
           ) -> tuple[Tensor, ...]:  # fmt: skip
    """An operator's results, by its definition or by the kernels that torch gets."""
    names = {"norm": "x w b", "qk_norm": "x x2 w b w2 b2", "norm_add_norm": "x r w b w2 b2"}.get(op, "x r w b")
    rounds = [not op.endswith("_unrounded")] if named(op) == "add_norm" else []
    how = (EPS, 0.0, "first" if types[1] else "last", types[2], *rounds, kind)
    bias = [given["x_bias"]] if op.startswith("bias_") else []
    args = (*(given[name] for name in names.split()), *how, *bias)
    return tensors(getattr(module, named(op))(*(doubled(args) if exact else args)))


def results(given: dict[str, Tensor | None]) -> tuple[Tensor, ...]:
    """The results of an operator, in the order of its definition."""
    return tuple(t for t in (given.get(name) for name in ("y", "s", "y2")) if t is not None)


def compare(run: Interpreted, op: str, kind: str, types: Types, weights: str, given: dict[str, Tensor | None],
            ) -> list[Launch]:  # fmt: skip
    """Run an operator and compare its results to the definition."""
    done = run(op, kind, types, given, EPS, weights)
    want, exact = wanted(meaning, op, kind, types, given), wanted(meaning, op, kind, types, given, True)
    about = (op, kind, types, weights, [t.shape for t in given.values() if t is not None])
    for g, w, e in zip(results(given), want, exact, strict=True):
        if w.dtype.itemsize == 2:
            mismatches(g, w, 8.0, *about)
        else:
            assert_close(g, w, e, *about)
    return done


# -- results -----------------------------------------------------------------------------------------------------------


@case
def every_operator(driver: Driver) -> Found:
    """Each operator, kind and types, for rows that are odd and not, with the weights there and not."""
    run, count = Interpreted(driver), 0
    sizes = itertools.cycle([(1, 7), (5, 100), (5, 64), (1, 1), (5, 24), (5, 1), (1, 2000)])
    weights = itertools.cycle(["wb", "", "w", "b", "wb"])
    there = [what for what in itertools.product(OPS, KINDS, ALL_TYPES) if fits(what[0], what[2])]
    for op, kind, types in some((what for what in there for _ in range(2)), 9):
        (m, n), given = next(sizes), next(weights)
        compare(run, op, kind, types, given, inputs(op, types, m, n, given, (m + 2, n)))
        count += 1
    return {"operators": count}


@case
def odd_sizes(driver: Driver) -> Found:
    """Each operator in each type of x, for every odd size."""
    run = Interpreted(driver)
    three: list[Types] = [(FP32, False, FP32), (FP16, True, FP16), (BF16, False, BF16)]
    for op, kind, types, m, n in some(itertools.product(OPS, KINDS, three, (1, 5), (1, 7, 100, 4099)), 9):
        if fits(op, types) and (n < 4099 or op == "norm" or (m == 1 and kind == "layer_norm")):
            compare(run, op, kind, types, "wb", inputs(op, types, m, n, "wb", (1, n)))
    return {}


@case
def the_bits_of_torch(driver: Driver) -> Found:
    """Where rows are multiples of 16 bytes, the results have the bits that torch's operators give."""
    run = Interpreted(driver)
    forms = set()
    for i, (op, kind, types) in enumerate(some(itertools.product(OPS, KINDS, ALL_TYPES), 2)):
        n = (64, 72, 256, 1000, 2048, 4096)[i % 6] if i % 11 else (40000, 20000)[i % 2]
        weights = "wb" if kind == "layer_norm" else "w"
        if fits(op, types) and not op.startswith("bias_"):  # these only ONNX has
            given = inputs(op, types, 2 if n > 4096 else 5, n, weights, (3, n))
            forms |= {(launch.entry, launch.shape[3]) for launch in run(op, kind, types, given, EPS, weights)}
            want = wanted(kernels(), op, kind, types, given)
            for got, w in zip(results(given), want, strict=True):
                assert_bits(got, w, op, kind, types, n)
    return {"forms": sorted(forms)}


@case
def memory_that_is_not_aligned(driver: Driver) -> Found:
    """Tensors that start anywhere are taken by the kernels for rows of any length."""
    run = Interpreted(driver)
    for op, kind in itertools.product(OPS, KINDS):
        types = (BF16, True, BF16)
        done = compare(run, op, kind, types, "wb", inputs(op, types, 3, 64, "wb", (2, 64), shift=1))
        assert {launch.entry for launch in done} == {"row"}
        only = inputs(op, types, 3, 64, "wb", (2, 64))
        name = {"qk_norm": "b2", "norm_add_norm": "w2", "bias_add_norm": "x_bias"}.get(op, "b")
        only[name] = inputs(op, types, 3, 64, "wb", (2, 64), shift=3)[name]
        assert "row" in {launch.entry for launch in compare(run, op, kind, types, "wb", only)}
    return {}


@case
def missing_parameters_change_nothing(driver: Driver) -> Found:
    """A norm without a bias keeps the sign of its zeros, as its definition does."""
    run, types = Interpreted(driver), (FP32, False, FP32)
    for n in (64, 7):
        given = inputs("norm", types, 2, n, "")
        assert given["x"] is not None and given["y"] is not None
        given["x"][0] = -0.0
        run("norm", "rms_norm", types, given, EPS, "")
        assert bool(given["y"][0].signbit().all())
    return {}


COMPUTED = tuple(CASES)
"""The cases that compute what is launched."""


# -- launches ----------------------------------------------------------------------------------------------------------


def addresses(*names: str) -> dict[str, int]:
    """Aligned addresses that nothing lies at."""
    return {name: 4096 * (i + 1) for i, name in enumerate(names)}


@case
def arguments_and_grids(driver: Driver) -> Found:
    """Each argument stands where the kernels have it, and the grid covers the rows."""
    every = addresses("x", "r", "y", "s", "w", "b", "w2", "b2", "x2", "y2", "x_bias")
    uses = {"norm": "x y w b", "add_norm": "x r y s w b", "norm_add": "x r s w b",
            "norm_add_norm": "x r y s w b w2 b2", "qk_norm": "x y w b w2 b2 x2 y2",
            "add_norm_unrounded": "x r y s w b", "bias_add_norm": "x r y s w b x_bias",
            "bias_add_norm_unrounded": "x r y s w b x_bias"}  # fmt: skip
    for op, n, m in itertools.product(OPS, (8, 64, 768, 4096, 16384), (1, 31, 33, 5000)):
        given = {name: every[name] for name in uses[op].split()}
        size = {"m": m, "n": n} | ({"m2": 2 * m + 1, "n2": n} if op == "qk_norm" else {})
        (launch,) = driver.run(spec(op, "rms_norm", (BF16, True, BF16)), **given, **size, stream=77, eps=0.25)
        x, y, z, threads, *rest = launch.shape
        rows = max(1, 2048 // max(64, 1 << (n - 1).bit_length()))
        tiles = -(-m // rows)
        assert (x, y, z) == (tiles + (-(-(2 * m + 1) // rows) if op == "qk_norm" else 0), 1, 1), launch.shape
        assert rest[:2] == [1, 1] and launch.stream == 77 and launch.entry == "tile"
        assert f".reqntid {threads}\n" in launch.text
        zeros = dict.fromkeys(TENSORS, 0)
        if op == "norm_add":
            given["y"] = given.pop("s")
        if op.startswith("bias_"):
            given["w2"] = given.pop("x_bias")
        assert {name: launch.values[name] for name in TENSORS} == zeros | given, op
        assert {name: launch.values[name] for name in ("m", "n", "m2", "n2", "tiles", "eps")} == {
            "m2": 0, "n2": 0, "tiles": tiles, "eps": 0.25} | size  # fmt: skip
        assert launch.hidden == [0, 0]
    return {}


@case
def the_texts_ask_for_their_shared_memory(driver: Driver) -> Found:
    """What a kernel is given is a multiple of what its reductions of float32 need, and is there where they need it."""
    shared = set()
    for kind, types in itertools.product(KINDS, ALL_TYPES):
        given = addresses("x", "y", "w", "b")
        for n in (64, 512, 4096, 32768):
            (launch,) = driver.run(spec("norm", kind, types), **given, m=9, n=n, eps=EPS)
            shared.add(launch.shape[6])
            assert launch.shape[6] % 4 == 0 and launch.shape[6] <= 48 * 1024
            assert launch.shape[6] or "global_smem+" not in launch.text.replace(" ", "")
            if n >= 4096:
                assert launch.shape[6] >= launch.shape[3] // 32 * 4
    return {"shared": sorted(shared)}


@case
def pairs(driver: Driver) -> Found:
    """q and k have one launch where one kernel suits both, and else two."""
    given, what = addresses("x", "y", "x2", "y2", "w", "w2"), spec("qk_norm", "rms_norm", (BF16, True, BF16), "w")
    for n, n2, m2, count in ((128, 128, 7, 1), (128, 72, 7, 1), (128, 64, 7, 2), (4096, 1024, 7, 2), (7, 7, 7, 2),
                             (128, 7, 7, 2), (40000, 40000, 7, 2), (128, 128, 0, 1)):  # fmt: skip
        done = driver.run(what, **given, m=3, n=n, m2=m2, n2=n2, eps=EPS)
        assert len(done) == count, (n, n2, m2, len(done))
        last = done[-1].values
        if count == 2:
            assert [last[name] for name in ("x", "y", "w", "m", "n")] == [
                given["x2"], given["y2"], given["w2"], m2, n2]  # fmt: skip
            assert [last[name] for name in ("x2", "y2", "w2", "m2", "n2")] == [0] * 5
    assert driver.run(what, **given, m=0, n=128, m2=2, n2=128, eps=EPS)[0].values["x"] == given["x2"]
    return {}


@case
def sandwiches(driver: Driver) -> Found:
    """Rows that do not fit on chip twice, and odd ones, are normalised in two launches."""
    given = addresses("x", "r", "y", "s", "w", "b", "w2", "b2")
    what = spec("norm_add_norm", "layer_norm", (FP16, True, FP16))
    for n, count in ((16384, 1), (16392, 2), (32768, 2), (40000, 2), (100, 2), (104, 1)):
        done = driver.run(what, **given, m=3, n=n, eps=EPS)
        assert len(done) == count, (n, len(done))
        if count == 2:
            tensors = [[launch.values[name] for name in ("x", "r", "y", "s", "w", "b", "w2", "b2")] for launch in done]
            at = given
            assert tensors == [[at["x"], at["r"], at["s"], 0, at["w"], at["b"], 0, 0],
                               [at["s"], 0, at["y"], 0, at["w2"], at["b2"], 0, 0]]  # fmt: skip
    return {}


@case
def long_rows(driver: Driver) -> Found:
    """Each row that does not fit on chip has a program, up to 2^24 elements; there may be no rows at all."""
    given, what = addresses("x", "y", "w"), spec("norm", "rms_norm", (BF16, False, BF16), "w")
    for n, aligned in ((32776, True), (262144, True), (1 << 24, True), (32775, False), (9, False)):
        (launch,) = driver.run(what, **given, m=12345, n=n, eps=EPS)
        assert (launch.entry, launch.shape[0]) == ("row", 12345)
        assert ("v4.b32" in launch.text) == aligned
    for m, n in ((0, 64), (4, 0), (0, 0)):
        assert driver.run(what, **given, m=m, n=n, eps=EPS) == []
    for m, n, why in ((1, (1 << 24) + 8, "rows of more than 2^24 elements"), (1 << 31, 8, "more than 2^31 rows")):
        assert refusal(driver, what, **given, m=m, n=n, eps=EPS) == why
    return {}


# -- the driver --------------------------------------------------------------------------------------------------------


def refusal(driver: Driver, what: Any, **args: Any) -> str:
    """The message of a run that fails."""
    try:
        driver.run(what, **args)
    except RuntimeError as error:
        return str(error)
    raise AssertionError("it ran")


GIVEN = {**addresses("x", "y", "w", "b"), "m": 2, "n": 64, "eps": EPS}
WHAT = spec("norm", "layer_norm", (FP16, False, FP16))


@case
def kernels_are_loaded_once_in_each_context(driver: Driver) -> Found:
    """By the first that needs one, however many come at the same time."""
    for context in (101, 102):
        driver.set("fake_context", context)
        start, errors = len(driver.texts), list[BaseException]()
        gate = threading.Barrier(8)

        def work(gate: threading.Barrier = gate, errors: list[BaseException] = errors) -> None:
            try:
                gate.wait()
                for n in (64, 128, 64):
                    driver.run(WHAT, **GIVEN | {"n": n})
            except BaseException as error:
                errors.append(error)

        threads = [threading.Thread(target=work) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not errors, errors
        assert len(driver.texts) - start == 2
        assert len(set(driver.texts[start:])) == 2
    driver.set("fake_context", 1)
    return {}


@case
def each_gpu_gets_its_code(driver: Driver) -> Found:
    """The newest that it can run; one that is too old gets none."""
    for context, (capability, arch) in enumerate({80: 80, 86: 80, 89: 80, 90: 90, 100: 90, 121: 90}.items(), 200):
        driver.set("fake_context", context)
        driver.set("fake_capability", capability)
        (launch,) = driver.run(WHAT, **GIVEN)
        assert f".target sm_{arch}\n" in launch.text
    driver.set("fake_context", 300)
    driver.set("fake_capability", 75)
    assert "older than compute capability 8.0" in refusal(driver, WHAT, **GIVEN)
    driver.set("fake_capability", 90)
    driver.set("fake_context", 1)
    return {}


@case
def failures_of_the_driver(driver: Driver) -> Found:
    """Each says what failed and why; afterwards everything works."""
    said = {}
    for i, name in enumerate(("cuCtxGetCurrent", "cuCtxGetDevice", "cuDeviceGetAttribute", "cuModuleLoadDataEx",
                              "cuModuleGetFunction", "cuLaunchKernel")):  # fmt: skip
        driver.set("fake_context", 400 + i)
        driver.fail(name.encode())
        said[name] = refusal(driver, WHAT, **GIVEN)
        assert said[name].endswith(": the words of the driver"), said
        driver.fail(name.encode(), 999)
        assert refusal(driver, WHAT, **GIVEN).endswith("an error that the driver does not know")
        driver.fail(b"")
        assert len(driver.run(WHAT, **GIVEN)) == 1
    assert len(set(said.values())) == 6
    driver.set("fake_context", 0)
    assert refusal(driver, WHAT, **GIVEN) == "no CUDA context is current in this thread"
    driver.set("fake_context", 1)
    return said


@case
def operators_that_there_are(driver: Driver) -> Found:
    """float32 arithmetic on the types that the kernels know; whatever is not there is not run."""
    has = driver.lib.nf_cuda_has
    for op, kind, types in itertools.product(OPS, KINDS, ALL_TYPES):
        what = spec(op, kind, types)
        assert bool(has(c.byref(what))) == fits(op, types), (op, kind, types)
    assert has(c.byref(spec("norm", "rms_norm", (FP32, True, FP32))))  # nothing is rounded to float32
    no = [spec("norm", "rms_norm", (FP16, True, BF16)), spec("norm", "rms_norm", (FP16, True, FP16), compute=FP16)]
    for what in no:
        assert not has(c.byref(what))
        assert refusal(driver, what, **GIVEN) == "no CUDA kernel for these types"
    return {}


def first_message() -> str:
    """What the first run of an operator says where the driver does not start."""
    from tests.cuda_tools import Args, library

    said: bytes | None = library().nf_cuda_run(c.byref(WHAT), c.byref(Args(**GIVEN)))
    return "" if said is None else said.decode()


def run_all(names: list[str]) -> dict[str, Found]:
    """What each case found, or how it failed."""
    driver, out = Driver(), {}
    for name in names or CASES:
        started = time.perf_counter()
        try:
            found = CASES[name](driver)
        except Exception:
            found = {"failed": traceback.format_exc()}
        out[name] = found | {"seconds": round(time.perf_counter() - started, 1)}
    return out


if __name__ == "__main__":
    if sys.argv[1:] == ["--first-message"]:
        print(first_message())
    else:
        from tests.kernel_cases import loops_with_new_numpy

        loops_with_new_numpy()
        print(json.dumps(run_all(sys.argv[1:])))
