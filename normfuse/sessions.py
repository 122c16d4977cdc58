"""Models in sessions of ONNX Runtime, and random inputs on which they run."""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

from normfuse.errors import InputError, UnsupportedError, first_line
from normfuse.ort_values import Array, in_numpy, onnx_runtime
from normfuse.process import available, resident

PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}


def numpy_dtype(dtype: str) -> Any:
    """The numpy type of a neutral dtype name."""
    if dtype == "bfloat16":
        import ml_dtypes

        return ml_dtypes.bfloat16
    return np.dtype(dtype)


def void(x: Any) -> bool:
    """Whether an output has elements, and these are floats of which none is finite; of a sequence, in each part."""
    if isinstance(x, (list, tuple)):
        return len(x) > 0 and all(map(void, x))
    if not isinstance(x, np.ndarray) or not x.size or not (is_float(x) or x.dtype.kind == "c"):
        return False
    return not np.isfinite(x if x.dtype.kind == "c" else x.astype(np.float64)).any()


def is_float(x: Array) -> bool:
    return x.dtype.kind == "f" or "float" in x.dtype.name


@dataclass(frozen=True, slots=True)
class Given:
    """What models are to be run on: inputs by name, and open sizes by symbol. The rest is drawn."""

    inputs: Mapping[str, Array] = field(default_factory=dict)
    sizes: Mapping[str, int] = field(default_factory=dict)


def session(model: str | Path | bytes, data: str | Path = "", without: Sequence[str] = (),
            optimise: bool = True) -> Any:  # fmt: skip
    """An ONNX Runtime session on the CPU, `without` some of its optimisers, or any where it is not to `optimise`; of a
    file, or of a message, whose external data is in the folder `data`.

    Raises `UnsupportedError` without ONNX Runtime, `InputError` for a model that it does not load.
    """
    onnxruntime = onnx_runtime()
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    if not optimise:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    if data:
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(data))
    given = model if isinstance(model, bytes) else str(model)
    if isinstance(given, str) and not _unicode(given):
        raise InputError(f"{given}: ONNX Runtime opens only files whose names are UTF-8; rename it")
    try:
        made = _opened(given, lambda path: onnxruntime.InferenceSession(
            path, options, providers=["CPUExecutionProvider"], disabled_optimizers=list(without)))
    except Exception as why:
        name = "a model" if isinstance(model, bytes) else model
        raise InputError(f"{name}: ONNX Runtime does not load it: {first_line(why)}") from why
    return in_numpy(made)


def _opened(given: str | bytes, make: Callable[[Any], Any]) -> Any:
    """A session of a file, or of what it leads to where it is a link beside which its data is not: ONNX Runtime looks
    for that beside the link alone."""
    try:
        return make(given)
    except Exception:
        if isinstance(given, bytes) or not os.path.islink(given):
            raise
        return make(os.path.realpath(given))


def _unicode(name: str) -> bool:
    return not any("\ud800" <= c <= "\udfff" for c in name)


def calls_ours(path: str | Path) -> bool:
    """Whether the model has functions that our library, which is there, has kernels for."""
    from normfuse import ort

    return not set(ort.names()).isdisjoint(ort.called(path))


def options_for(path: str | Path, provider: str, threads: int, operators: bool) -> Any:
    """Options of a session whose threads stop between runs; with `operators`, our library is loaded."""
    from normfuse.ort import register

    options = onnx_runtime().SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = threads, 4
    options.add_session_config_entry("session.force_spinning_stop", "1")
    if operators:
        register(options, path, provider)
    return options


def open_session(path: str | Path, provider: str, threads: int, operators: bool, options: Any = None) -> Any:
    """A session on a provider. Raises `InputError` for a model that ONNX Runtime does not load."""
    options = options or options_for(path, provider, threads, operators)
    wanted = dict.fromkeys([PROVIDERS[provider], PROVIDERS["cpu"]])
    try:
        return in_numpy(_opened(str(path), lambda path: onnx_runtime().InferenceSession(
            path, options, providers=list(wanted))))
    except Exception as why:
        raise InputError(f"{path}: ONNX Runtime does not load it: {first_line(why)}") from why


MOST = 2**22
"""The most elements of inputs that are to be long."""
OPEN = ((2, 2, 0), (1, 2, 0), (1, 1, 0), (1, 64, 0), (1, 224, 0), (2, 2, 2), (1, 2, 2))
"""What the sizes that a model leaves open may be: that of a first axis, the others, and those that count what is past.
Some models run with one sample only, though their file says otherwise (they were exported with one), and some read
images, but not tiny ones. With nothing in the cache of a decoder, all its tokens are as many as those it reads."""


FLOATS: tuple[Callable[[Array], Array], ...] = (
    lambda normal: normal + 0.5, lambda normal: np.abs(normal) + 0.05,
    lambda normal: 0.5 + 0.45 * np.tanh(normal),
)  # fmt: skip
"""What inputs of floats may be, of a normal distribution: all numbers, positive ones, such as a model takes logarithms
and roots of, and ones between 0 and 1."""


def run_random(runtime: Any, wanted: Sequence[str] | None, seed: int = 0, given: Mapping[str, Array] | None = None,
               sizes: Sequence[Mapping[str, int]] = ({},)) -> tuple[dict[str, Array], list[Any]]:  # fmt: skip
    """Random inputs on which a session runs, but for those given, and the outputs; what ONNX Runtime raises if none.
    Sizes that are open are the first of `sizes` with which it runs.

    Where none is given, floats are the first of `FLOATS` with which each output of floats has a finite element.
    """
    found = _run_drawn(runtime, wanted, seed, given, sizes, 0)
    for floats in range(1, len(FLOATS) * (not given and any(map(void, found[1])))):
        with contextlib.suppress(Exception):  # what ran with others may not run with these
            tried = _run_drawn(runtime, wanted, seed, given, sizes, floats)
            if not any(map(void, tried[1])):
                return tried
    return found


def _run_drawn(runtime: Any, wanted: Sequence[str] | None, seed: int, given: Mapping[str, Array] | None,
               sizes: Sequence[Mapping[str, int]], floats: int) -> tuple[dict[str, Array], list[Any]]:  # fmt: skip
    failed: Exception | None = None
    empty: tuple[dict[str, Array], list[Any]] | None = None
    tried: list[list[tuple[int, ...]]] = []
    for known, open_sizes in product(sizes, OPEN):
        feeds = feeds_for(runtime, seed, known, given, open_sizes, floats)
        shapes = [array.shape for array in feeds.values()]
        if shapes in tried:
            continue
        tried.append(shapes)
        try:
            outputs = runtime.run(wanted, feeds)
        except Exception as why:
            failed = failed or why
            continue
        if all(getattr(output, "size", 1) for output in outputs):
            return feeds, outputs
        empty = empty or (feeds, outputs)  # which says little
    if empty is not None:
        return empty
    assert failed is not None
    raise failed


def longest(runtime: Any, sizes: Sequence[int], sessions: int,
            known: Mapping[str, int] | None = None) -> dict[str, Array] | None:  # fmt: skip
    """Random inputs as long as the last of growing `sizes` with which a session runs, and with which so many more would
    in half of the memory that is left, each keeping what a run takes; None where that is none of them."""
    found, base, grown, last = None, resident(), 0, sizes[0]
    for size in sizes:
        shapes = shapes_for(runtime, known or {}, (1, size, 0))
        if sum(map(math.prod, shapes.values())) > MOST or 2 * grown * size * sessions > last * available():
            break
        try:
            for floats in range(len(FLOATS)):
                feeds = feeds_for(runtime, sizes=known, open_sizes=(1, size, 0), floats=floats)
                if not any(map(void, runtime.run(None, feeds))):
                    break
        except Exception:  # longer than its table of positions, say
            break
        grown, last = max(0, resident() - base), size
        if 2 * grown * sessions > available():
            break
        found = feeds
    return found


def shapes_for(runtime: Any, known: Mapping[str, int], open_sizes: tuple[int, int, int]) -> dict[str, tuple[int, ...]]:
    """The shapes of a session's inputs, by name, as `open_shapes` has them."""
    return open_shapes({i.name: i.shape for i in runtime.get_inputs()}, known, open_sizes)


def open_shapes(dims: Mapping[str, Sequence[Any]], known: Mapping[str, int],
                open_sizes: tuple[int, int, int]) -> dict[str, tuple[int, ...]]:  # fmt: skip
    """The shapes of inputs by name, of the sizes that they state: a symbolic one is `known`, the sum of two where it is
    named "a + b", or else of `open_sizes`. What is past is counted by that name, or by the third axis of a tensor of
    that name, unless another input has it too."""
    first = {shape[0] for shape in dims.values() if shape} - {None}
    others = {dim for name, shape in dims.items() if "past" not in name for dim in shape}  # such as the encoder's
    past = {dim for name, shape in dims.items() if len(shape) == 4 for axis, dim in enumerate(shape) if isinstance(
        dim, str) and ("past" in dim or (axis == 2 and "past" in name and dim not in others))}  # fmt: skip

    def size(dim: Any, axis: int) -> int:
        if isinstance(dim, int) and dim >= 0:
            return dim
        if dim in known:
            return known[dim]
        parts = [part.strip() for part in str(dim).split("+")]
        if len(parts) > 1 and all(part.isalnum() or part.isidentifier() for part in parts):
            return sum(int(part) if part.isdigit() else size(part, 1) for part in parts)
        return open_sizes[2 if dim in past else axis > 0 and dim not in first]

    return {name: tuple(size(dim, axis) for axis, dim in enumerate(shape)) for name, shape in dims.items()}


def names_mask(name: str) -> bool:
    """Whether an input of integers is a mask by its name, and not tokens of which some were masked."""
    return "mask" in name.replace("masked", "")


def feeds_for(runtime: Any, seed: int = 0, sizes: Mapping[str, int] | None = None,
              given: Mapping[str, Array] | None = None,
              open_sizes: tuple[int, int, int] = OPEN[0], floats: int = 0) -> dict[str, Array]:  # fmt: skip
    """Random inputs for a session, but for those given: a symbolic size is that of those, or taken from `sizes`, or
    else from `open_sizes`; floats are drawn as one of `FLOATS` says."""
    rng = np.random.default_rng(seed)
    feeds: dict[str, Array] = dict(given or {})
    known: dict[str, int] = {d: n for i in runtime.get_inputs() if i.name in feeds
                             for d, n in zip(i.shape, feeds[i.name].shape, strict=False) if isinstance(d, str)}
    shapes = shapes_for(runtime, known | dict(sizes or {}), open_sizes)
    for info in runtime.get_inputs():
        if info.name in feeds:
            continue
        shape = shapes[info.name]
        kind = info.type.removeprefix("tensor(").removesuffix(")")
        if kind in ("float", "double", "float16", "bfloat16"):
            dtype = numpy_dtype({"float": "float32", "double": "float64"}.get(kind, kind))
            feeds[info.name] = np.asarray(FLOATS[floats](rng.standard_normal(shape))).astype(dtype)
        elif kind == "bool" or ("int" in kind and names_mask(info.name)):
            feeds[info.name] = np.ones(shape, kind)
        elif "int" in kind:
            feeds[info.name] = np.asarray(rng.integers(0, 2, shape)).astype(kind)
        elif kind == "string":
            feeds[info.name] = rng.choice(np.array(["a", "b"], object), shape)
        else:
            raise UnsupportedError(f"input {info.name!r} has type {info.type}; only tensors can be given or drawn")
    return feeds
