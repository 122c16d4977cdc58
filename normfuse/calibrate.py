"""LayerNorm to RMSNorm, approximately: what is lost is, to first order, a constant, and goes into the bias.

For rows with mean m and deviation s, layer_norm(x) - rms_norm(x) is about -g*m/s: a direction that hardly depends on
the row where m/s does not. So with g the weight and b the bias,

    b' = mean over rows of layer_norm(x)  -  mean over rows of g * rms_norm(x')

where x is what the norm reads in the original and x' what it reads in the model whose norms before it are converted
already. Norm by norm, in one pass over the calibration inputs. On inputs held back from that, the outputs are compared
with the original's: converted with the old biases (naive), calibrated, and the original's own distance to float64.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from normfuse.distance import alike, largest, normwise
from normfuse.errors import InputError, VerificationError, first_line
from normfuse.ort_values import Array

Hook = Callable[[list[Array]], list[Array] | None]
"""Sees a value of all batches, and may give others in their place."""
Batch = Any
HELD_BACK = 0.25


class Runner(Protocol):
    """A model to be run on batches at once, node by node."""

    def __call__(self, batches: Sequence[Batch], watch: Mapping[str, Hook]) -> list[list[Array]]:
        """The outputs of each batch; `watch` has hooks by the name of a value."""


@dataclass(slots=True)
class Layer:
    """One norm on its way: names of its input and result in the original and of its result in the converted model.

    `mean_over_rms` is the mean over rows of |mean(x)|/rms(x); `naive` and `error` are the distances of its result to
    the original's on held-back inputs, relative to the original's, with the old bias and with the new one.
    """

    label: str
    x: str
    y: str
    new: str
    axis: int
    bias: Array
    mean_over_rms: float = 0.0
    naive: float = 0.0
    error: float = 0.0


@dataclass(slots=True)
class Approximation:
    """What an approximate conversion costs, on inputs held back from calibration.

    `error`, `naive`: largest distance of an output to the original's, as the norm of the difference over the norm;
    `cosine`, `naive_cosine`: the largest mean of 1 - cos of the rows of an output; `floor`: the original's own distance
    to float64.
    """

    layers: list[Layer] = field(default_factory=list)
    calibrated: int = 0
    held_back: int = 0
    tolerance: float = 0.0
    error: float = 0.0
    naive: float = 0.0
    cosine: float = 0.0
    naive_cosine: float = 0.0
    floor: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """For JSON: the totals; the layers are told with the norms."""
        return {"error": self.error, "naive_error": self.naive, "cosine": self.cosine,
                "naive_cosine": self.naive_cosine, "noise_floor": self.floor, "tolerance": self.tolerance,
                "calibrated": self.calibrated, "held_back": self.held_back}  # fmt: skip


def matching(names: Sequence[str], pattern: str, done: Sequence[str] = ()) -> list[bool]:
    """Which names a comma-separated list of shell patterns takes; raises `InputError` where one of them takes none, and
    none of those that are `done` already."""
    parts = [p.strip() for p in pattern.split(",") if p.strip()]
    every = [*names, *done]
    for part in parts:
        if names and not any(fnmatchcase(name, part) for name in every):
            some = ", ".join(every[:4]) + (", ..." if len(every) > 4 else "")
            raise InputError(f"no LayerNorm is named like {part!r}; there are {some}")
    return [any(fnmatchcase(name, p) for p in parts) for name in names]


def calibrate(original: Runner, converted: Runner, wide: Runner | None, layers: Sequence[Layer],
              batches: Sequence[Batch], tolerance: float) -> Approximation:  # fmt: skip
    """Set the bias of each layer, and measure what the conversion costs.

    `converted` has the layers without a bias: what it computes there gets `Layer.bias` added by the hooks. The last
    quarter of the batches, one at least, is held back. Raises `VerificationError` where an output is further off than
    `tolerance`.
    """
    kept = max(1, round(HELD_BACK * len(batches)))
    seen, held = batches[:-kept], batches[-kept:]
    if not seen:
        raise InputError("calibration needs at least two sets of inputs: one is held back to measure the error")
    means: dict[str, Array] = {}

    def statistics(layer: Layer) -> Hook:
        def hook(values: list[Array]) -> None:
            rows = [_wide(v) for v in values if v.size]
            if not rows:
                raise InputError("the calibration inputs have no rows to take a mean of")
            ratios = [np.abs(v.mean(layer.axis)) / np.sqrt((v * v).mean(layer.axis) + 1e-30) for v in rows]
            layer.mean_over_rms = float(np.mean(np.concatenate([r.reshape(-1) for r in ratios])))

        return hook

    def target(layer: Layer) -> Hook:
        return lambda values: means.update({layer.y: _channel_mean(values, layer.axis)})

    def fit(layer: Layer) -> Hook:
        def hook(values: list[Array]) -> list[Array]:
            layer.bias = means[layer.y] - _channel_mean(values, layer.axis)
            return shifted(values, layer.bias, layer.axis)

        return hook

    old = {layer.label: layer.bias.copy() for layer in layers}
    watched = [(layer.x, statistics(layer)) for layer in layers] + [(layer.y, target(layer)) for layer in layers]
    original(seen, _merge(watched))
    converted(seen, {layer.new: fit(layer) for layer in layers})

    found = Approximation(list(layers), len(seen), len(held), tolerance)
    truth: dict[str, list[Array]] = {}
    want = original(held, {layer.y: _keep(truth, layer.y) for layer in layers})
    if not any(v.dtype.kind == "f" and v.size for some in want for v in some):
        raise InputError("the inputs that are held back give no output of floats with elements in it, so that no error "
                         "can be measured")  # fmt: skip
    for naive in (True, False):
        after: dict[str, list[Array]] = {}
        watch = {layer.new: _shift(after, layer, old[layer.label] if naive else layer.bias) for layer in layers}
        got = converted(held, watch)
        error = largest(normwise(a, b) for a, b in zip(want, got, strict=True))
        cosine = largest(_cosine(a, b) for a, b in zip(want, got, strict=True))
        if naive:
            found.naive, found.naive_cosine = error, cosine
        else:
            found.error, found.cosine = error, cosine
        for layer in layers:
            gap = normwise([np.concatenate([v.reshape(-1) for v in truth[layer.y]])],
                           [np.concatenate([v.reshape(-1) for v in after[layer.new]])])  # fmt: skip
            layer.naive, layer.error = (gap, layer.error) if naive else (layer.naive, gap)
    if wide is not None:
        found.floor = largest(normwise(a, b) for a, b in zip(wide(held, {}), want, strict=True))
    if not found.error <= tolerance:
        worst = sorted(layers, key=lambda layer: -layer.error)[:3]
        names = ", ".join(f"{layer.label} ({layer.error:.2g}, mean/rms {layer.mean_over_rms:.2f})" for layer in worst)
        raise VerificationError(f"approximated, an output is off by {found.error:.2g} of its size on held-back inputs, "
                                f"more than the tolerance of {tolerance:g}; the worst norms: {names}; leave some out "
                                "by name, or allow more; nothing was written")  # fmt: skip
    return found


def _wide(v: Array) -> Array:
    return v.astype(np.float64)


def _channel_mean(values: Sequence[Array], axis: int) -> Array:
    """The mean over everything but an axis, over all batches."""
    rows = np.concatenate([np.moveaxis(_wide(v), axis, -1).reshape(-1, v.shape[axis]) for v in values])
    return np.asarray(rows.mean(axis=0))


def shifted(values: Sequence[Array], bias: Array, axis: int) -> list[Array]:
    """Values plus a bias along an axis, in their own type."""
    shape = [1] * values[0].ndim
    shape[axis] = -1
    return [np.asarray((_wide(v) + bias.reshape(shape)).astype(v.dtype)) for v in values]


def _keep(into: dict[str, list[Array]], name: str) -> Hook:
    return lambda values: into.update({name: [_wide(v) for v in values]})


def _shift(into: dict[str, list[Array]], layer: Layer, bias: Array) -> Hook:
    def hook(values: list[Array]) -> list[Array]:
        moved = shifted(values, bias, layer.axis)
        into[layer.new] = [_wide(v) for v in moved]
        return moved

    return hook


def _merge(hooks: Sequence[tuple[str, Hook]]) -> dict[str, Hook]:
    """Several hooks on one value become one."""
    found: dict[str, list[Hook]] = {}
    for name, hook in hooks:
        found.setdefault(name, []).append(hook)

    def all_of(some: list[Hook]) -> Hook:
        def hook(values: list[Array]) -> None:
            for one in some:
                one(values)

        return hook

    return {name: all_of(some) for name, some in found.items()}


def _cosine(want: Sequence[Array], got: Sequence[Array]) -> float:
    """The largest mean of 1 - cos over the rows of an output."""
    out = 0.0
    for a, b in zip(want, got, strict=True):
        if a.dtype.kind != "f" or a.ndim == 0 or not a.size:
            continue
        p, q = (_wide(v).reshape(-1, v.shape[-1]) for v in alike(a, b))
        scale = np.linalg.norm(p, axis=1) * np.linalg.norm(q, axis=1)
        cos = np.where(scale > 0, (p * q).sum(axis=1) / np.where(scale > 0, scale, 1), 1.0)
        out = largest([out, float(np.mean(1 - cos))]) if cos.size else out
    return out


# -- inputs -----------------------------------------------------------------------------------------------------------


def read_batches(path: str | Path) -> list[dict[str, Array]]:
    """Calibration inputs from an .npz file, or from a folder of them in the order of their names."""
    if not str(path):
        raise InputError("calibration is an empty path; give the name of an .npz file, or of a folder of them")
    where = Path(path)
    if where.is_dir():
        files = sorted(where.glob("*.npz"))
        if not files:
            raise InputError(f"{where} holds no .npz file; make some with numpy.savez(path, input_name=array, ...)")
        return [load(f) for f in files]
    return [load(where)]


def load(path: str | Path) -> dict[str, Array]:
    """The arrays of an .npz file by name; pickled objects in it are refused."""
    import stat
    import zipfile
    import zlib

    advice = "make it with numpy.savez(path, input_name=array, ...)"
    try:
        if not stat.S_ISREG(Path(path).stat().st_mode):
            raise InputError(f"{path} is not a regular file; {advice}")
        with Path(path).open("rb") as handle:
            start = handle.read(6)
            handle.seek(0)
            if not start.startswith(b"PK") and start != np.lib.format.MAGIC_PREFIX:
                raise InputError(f"{path} is no .npz file; {advice}")  # NumPy would take it for pickled objects
            file = np.load(handle, allow_pickle=False)
            if not isinstance(file, np.lib.npyio.NpzFile):
                raise InputError(f"{path} holds one array without a name; {advice}")
            with file:
                if not file.files:
                    raise InputError(f"{path} holds no arrays; {advice}")
                return {name: file[name] for name in file.files}
    except (ValueError, EOFError, OSError, RuntimeError, MemoryError, zipfile.BadZipFile, zlib.error) as why:
        raise InputError(f"{path} is not a readable .npz file ({first_line(why)}); {advice}") from why


def named_batches(given: Any, inputs: Mapping[str, tuple[Sequence[Any] | None, Any]],
                  what: str = "calibration set") -> list[dict[str, Array]]:  # fmt: skip
    """Calibration inputs by name, checked against a model's: {name: (shape, numpy dtype)}, a shape None where
    its rank is not known; `what` messages call them.

    `given`: a path, or dicts of arrays. A single set is split along its first axis, where the model leaves that open.
    """
    if given is None:
        raise InputError("layernorm_to_rmsnorm='approximate' needs calibration inputs: an .npz file, a folder of them, "
                         "or an iterable")  # fmt: skip
    batches = read_batches(given) if isinstance(given, (str, Path)) else [dict(b) for b in each(given, Mapping)]
    known = ", ".join(inputs)
    for i, batch in enumerate(batches):
        for name in batch:
            if name not in inputs:
                raise InputError(f"{what} {i}: no input is named {name!r}; the model has {known}")
        for name, (shape, dtype) in inputs.items():
            if name not in batch:
                raise InputError(f"{what} {i}: input {name!r} is missing; the model has {known}")
            array = np.asarray(batch[name])
            if shape is not None and (array.ndim != len(shape) or any(
                    isinstance(d, int) and d != n for d, n in zip(shape, array.shape, strict=True))):
                wanted = "x".join(str(d) for d in shape)
                got = "x".join(map(str, array.shape))
                raise InputError(f"{what} {i}: input {name!r} has shape {got or '()'}, the model wants {wanted}")
            real = array.dtype.kind in "biuf" or "float" in array.dtype.name
            if not real and array.dtype.kind != np.dtype(dtype).kind:
                raise InputError(f"{what} {i}: input {name!r} holds {array.dtype}, the model wants {np.dtype(dtype)}")
            with np.errstate(invalid="ignore"):
                batch[name] = array.astype(dtype)
            if batch[name].dtype.kind in "biu" and not np.array_equal(batch[name], array):
                raise InputError(f"{what} {i}: input {name!r} holds numbers that {batch[name].dtype} does not, "
                                 "which the model wants")  # fmt: skip
    return _split(batches, inputs) if len(batches) == 1 else batches


def each(given: Any, kinds: Any, words: str = "dicts of arrays by the names of inputs") -> list[Any]:
    """The sets of an iterable, each of these kinds; `InputError`, which has words for them, for what is none."""
    try:
        found = [given] if isinstance(given, Mapping) else list(given)
    except TypeError:
        raise InputError(f"calibration inputs are an .npz file, a folder of them, or an iterable, not a "
                         f"{type(given).__name__}") from None  # fmt: skip
    for i, one in enumerate(found):
        if not isinstance(one, kinds):
            raise InputError(f"calibration set {i} is a {type(one).__name__}; give {words}")
    return found


def _split(batches: list[dict[str, Array]],
           inputs: Mapping[str, tuple[Sequence[Any] | None, Any]]) -> list[dict[str, Array]]:  # fmt: skip
    (batch,) = batches
    sizes = {a.shape[0] for a in batch.values() if a.ndim}
    free = all(shape and not isinstance(shape[0], int) for shape, _ in inputs.values())
    if not free or len(sizes) != 1 or next(iter(sizes)) < 2:
        return batches
    n = next(iter(sizes))
    cut = n - max(1, round(HELD_BACK * n))
    return [{k: v[:cut] for k, v in batch.items()}, {k: v[cut:] for k, v in batch.items()}]
