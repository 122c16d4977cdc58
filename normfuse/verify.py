"""Checking that two computations agree: a region against its replacement, a model against its rewrite.

A region is compared on random and adversarial rows, first in float64, where both must be the same function, then in
its own types, where the replacement may be no further from float64 than the region itself was, give or take a few
roundings. In half precision it must moreover round in the same places: see `DIFFERENT`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from normfuse.distance import distance
from normfuse.errors import InputError, UnsupportedError, VerificationError, first_line
from normfuse.ort_values import Array
from normfuse.sessions import OPEN, Given, is_float, numpy_dtype, run_random, session, shapes_for, void

EPSILON = {"float16": 2.0**-10, "bfloat16": 2.0**-7, "float32": 2.0**-23, "float64": 2.0**-52}

FLOAT64_TOLERANCE = 1e-5
"""Relative to the largest element of a row block. Constants in a float32 graph (1/N, sqrt(N)) are off by up to 6e-8,
which a mean of 100 standard deviations amplifies; everything else agrees to 1e-12."""


DIFFERENT = 0.05
"""The share of a half-precision result that may differ in its last bit, because float32 sums were made in another order
(seen: below 0.001). A rounding in another place changes 0.2 of it."""


@dataclass(frozen=True, slots=True)
class Check:
    """Result of comparing a region with its replacement.

    `before` and `after` are their largest distances to float64, in units of the type's rounding at the largest
    element. `same` says that they agree in float64, so that only roundings differ, `proved` that `normfuse.field` has
    shown them equal exactly.
    """

    ok: bool
    before: float = 0.0
    after: float = 0.0
    message: str = ""
    same: bool = False
    proved: bool = False


def rows(shape: tuple[int, ...], dtype: str, seed: int = 0) -> Iterator[tuple[str, Array]]:
    """Inputs in float64, exactly representable in the dtype: random, offset, large mean, tiny, large, zero, a spike; of
    float16 also some whose squares it has not, which what keeps them finite has to do still."""
    rng = np.random.default_rng(seed)
    normal = rng.standard_normal(shape)
    large = 1e4 if dtype != "float16" else 100.0
    spike = np.zeros(shape)
    spike.reshape(-1)[:: max(7, shape[-1] + 1 if shape else 7)] = 3.0
    for name, array in (
        ("random", normal),
        ("offset", normal + 3.0),
        ("large mean", normal + 100.0),
        ("tiny", normal * 1e-3),
        ("large", normal * large),
        ("zero", np.zeros(shape)),
        ("spike", spike),
    ):
        yield name, representable(array, dtype)
    if dtype == "float16":
        yield "very large", representable(normal * 5e3, dtype)


def representable(array: Array, dtype: str) -> Array:
    """The nearest values of a dtype, as float64."""
    return array.astype(numpy_dtype(dtype)).astype(np.float64)


def compare(region: Callable[[Array, bool], Array], replacement: Callable[[Array, bool], Array],
            shape: tuple[int, ...], dtype: str, out: str, exact: bool = False) -> Check:  # fmt: skip
    """Run both on all rows. The callables take x in float64 and whether to compute all in float64 too.

    `exact`: a half-precision result has to be rounded in the same places.
    """
    before = after = 0.0
    differ = count = 0
    if dtype == out == "float64":  # in its own type it is what it is in float64, and its errors would be none at all:
        own = region  # they are taken to be what one rounding of x does to it

        def region(x: Array, wide: bool) -> Array:
            signs = np.random.default_rng(0).choice((-1.0, 1.0), x.shape)
            return own(x if wide else x * (1 + EPSILON[out] * signs), wide)

    for name, x in rows(shape, dtype):
        with np.errstate(all="ignore"):
            want, got = region(x, True).astype(np.float64), replacement(x, True).astype(np.float64)
        if want.shape != got.shape:
            return Check(False, message=f"shape {got.shape} instead of {want.shape}")
        top = float(np.max(np.abs(want), initial=0.0))
        if not _close(want, got, FLOAT64_TOLERANCE * top):
            gap = distance(want, got)
            return Check(False, message=f"differs in float64 on {name} rows by {gap:.2g} of {top:.2g}")
        with np.errstate(all="ignore"):
            old, new = region(x, False).astype(np.float64), replacement(x, False).astype(np.float64)
        unit = EPSILON.get(out, 2.0**-23)
        allowed = 2 * distance(want, old) + 4 * unit * top
        gap = distance(want, new)
        if np.isfinite(old).all() and not gap <= allowed:
            worse, was = _more_rows(region, replacement, shape, dtype, name)  # few rows say little of a largest error
            if not worse <= 2 * was + 4 * unit * top:
                message = f"further from float64 on {name} rows: {worse:.2g}, was {was:.2g}"
                return Check(False, message=message, same=True)
        differ, count = differ + int(np.sum((old != new) & ~(np.isnan(old) & np.isnan(new)))), count + old.size
        if top and np.isfinite(gap):
            before, after = max(before, distance(want, old) / (unit * top)), max(after, gap / (unit * top))
    if exact and out in ("float16", "bfloat16") and differ > DIFFERENT * count:
        return Check(False, message=f"rounds in other places: {differ / count:.0%} of the result differ", same=True)
    return Check(True, before, after, same=True)


DRAWS = 24


def _more_rows(region: Callable[[Array, bool], Array], replacement: Callable[[Array, bool], Array],
               shape: tuple[int, ...], dtype: str, kind: str) -> tuple[float, float]:  # fmt: skip
    """The largest distances to float64, of replacement and region, over many draws of one kind of rows."""
    after = before = 0.0
    for seed in range(DRAWS):
        x = next(array for name, array in rows(shape, dtype, seed) if name == kind)
        with np.errstate(all="ignore"):
            want, old, new = (f(x, wide).astype(np.float64) for f, wide in
                              ((region, True), (region, False), (replacement, False)))  # fmt: skip
        after, before = max(after, distance(want, new)), max(before, distance(want, old))
    return after, before


def _close(a: Array, b: Array, tolerance: float) -> bool:
    return distance(a, b) <= max(tolerance, 1e-300)


ROUNDINGS = 64.0
"""How far two models may differ in an output, in roundings of its type at the largest element."""
CONVERTED = 256.0
"""The same where LayerNorms were converted: the original is itself far from float64 where a mean is large (seen: 64,
the conversion 5), and the edited weights are rounded anew."""


def roundings_for(converts: bool) -> float:
    """Which of the two a rewrite has to keep to: `converts` where it turns LayerNorms into RMSNorms."""
    return CONVERTED if converts else ROUNDINGS


# -- whole models ------------------------------------------------------------------------------------------------


def compare_models(path_a: str | Path, path_b: str | Path, *, seed: int = 0, inputs: Mapping[str, Array] | None = None,
                   sizes: Mapping[str, int] | None = None, roundings: float = ROUNDINGS) -> dict[str, Any]:
    """Run two ONNX models on the same inputs in ONNX Runtime (CPU) and compare each output.

    `inputs` by name; those not given are drawn from the seed: floats as the first of `FLOATS` with which each output of
    floats has a finite element, integers small and not negative, masks all one; `sizes` that are open by name, those
    not given are the first of `OPEN` with which the first model runs. An output agrees when no element differs by more
    than `roundings` of its type times the largest element. Returns {"equal", "outputs", "tolerance", "provider"}, and
    "flags" where there are some: see `either_way`.

    Raises `InputError` where a model does not load or run, the two have other inputs or outputs, or no output has
    anything to compare, and `UnsafeModelError` for external data that are outside a model's folder.
    """

    def compare(given: Mapping[str, Array] | None) -> tuple[dict[str, Array], dict[str, Any]]:
        feeds, names, first, second, provider = run_both(path_a, path_b, seed, Given(given or {}, sizes or {}))
        return feeds, compare_outputs(names, first, second, roundings, provider)

    found = either_way(compare, inputs)
    demand_compared(found)
    return found


class DoesNotRun(InputError):
    """The first of two models does not run on its inputs."""


def either_way(compare: Callable[[Mapping[str, Array] | None], tuple[dict[str, Array], dict[str, Any]]],
               inputs: Mapping[str, Array] | None) -> dict[str, Any]:  # fmt: skip
    """The verdict on inputs, those not given drawn, and on others in which the flags, single bools that are drawn true,
    are false: nothing is seen of a branch that is not taken. Of each output what is further apart; "flags" names them.
    """
    feeds, found = compare(inputs)
    drawn = {name: v for name, v in feeds.items() if name not in (inputs or {})}
    flags = {name: np.asarray(~v) for name, v in drawn.items() if v.dtype == bool and v.size == 1}
    if not flags or not found["equal"]:
        return found
    try:
        other = compare({**(inputs or {}), **flags})[1]
    except DoesNotRun:
        return found
    pairs = zip(found["outputs"], other["outputs"], strict=True)
    outputs = [max(pair, key=lambda o: ("not_compared" not in o, o["max_rel"] or 0.0)) for pair in pairs]
    return (other if not other["equal"] else found | {"outputs": outputs}) | {"flags": sorted(flags)}


def run_both(path_a: str | Path, path_b: str | Path, seed: int, given: Given
             ) -> tuple[dict[str, Array], list[str], list[Any], list[Any], str]:  # fmt: skip
    """The inputs on which `compare_models` runs two models, the names of the outputs, the outputs of both, and the
    provider. It raises what that does."""
    from normfuse.frontends.onnx_open import demand_given, possible_sizes
    from normfuse.io.files import read_onnx

    model = read_onnx(path_a)[0]
    read_onnx(path_b)
    demand_given(model, given)
    sizes = [one | dict(given.sizes) for one in possible_sizes(model)]
    a, b = session(path_a), session(path_b)
    names = [i.name for i in a.get_inputs()]
    if sorted(names) != sorted(i.name for i in b.get_inputs()):
        raise InputError(f"the models have other inputs: {names} and {[i.name for i in b.get_inputs()]}")
    wanted = [o.name for o in a.get_outputs()]
    if sorted(wanted) != sorted(o.name for o in b.get_outputs()):
        raise InputError(f"the models have other outputs: {wanted} and {[o.name for o in b.get_outputs()]}")
    kind: type[InputError] = DoesNotRun
    try:
        feeds, first = run_random(a, wanted, seed, given.inputs, sizes)
        kind = InputError
        second = b.run(wanted, feeds)
    except UnsupportedError:
        raise
    except Exception as why:
        drawn = {n: shape for n, shape in shapes_for(a, sizes[0], OPEN[0]).items() if n not in given.inputs}
        tried = ", ".join(f"{n} {'x'.join(map(str, shape)) or 'scalar'}" for n, shape in drawn.items())
        also = f"; drawn were {tried}, and others: {GIVE}" if drawn and kind is DoesNotRun else ""
        also = also or "; give others" * (kind is DoesNotRun and bool(given.inputs))
        raise kind(f"the models do not run on these inputs: {first_line(why)}{also}") from why
    return feeds, wanted, first, second, a.get_providers()[0]


def compare_outputs(names: Sequence[str], first: Sequence[Any], second: Sequence[Any], roundings: float,
                    provider: str) -> dict[str, Any]:  # fmt: skip
    """What `compare_models` says of two sets of outputs: arrays, and anything else by its text.

    Of an output that has another shape or type in the second, `other` is what it has there. `not_finite` is the share
    of NaN and infinities in the first's, where it has any; `not_compared` says why equal ones tell nothing.
    """
    outputs, equal = [], True
    for name, x, y in zip(names, first, second, strict=True):
        record, same = _compare_output(name, x, y, roundings)
        outputs.append(record)
        equal = equal and same
    return {"equal": equal, "outputs": outputs, "tolerance": roundings, "provider": provider}


def difference(found: dict[str, Any]) -> str:
    """What `compare_models` found to differ, in words; empty where nothing does."""
    if found["equal"]:
        return ""
    return _difference(found) + "".join(f", with {name} false" for name in found.get("flags", ()))


def _difference(found: dict[str, Any]) -> str:
    worst = max(found["outputs"], key=lambda o: o["max_rel"] or 0.0)
    kinds = [o["name"] for o in found["outputs"] if o["max_rel"] is None]
    name, gap = worst["name"], worst["max_rel"]
    for o in found["outputs"]:
        if other := o.get("other"):
            a, b = (f"{v['dtype']} of shape {'x'.join(map(str, v['shape'])) or '()'}" for v in (o, other))
            return f"output {o['name']!r} is {a}, and {b} in the second"
    return (f"output {name!r} differs by {gap:.2g} of its largest element" if gap or not kinds else
            f"output {kinds[0]!r} has another shape, type or text")  # fmt: skip


def demand_equal(found: dict[str, Any], where: str | Path) -> None:
    """Raise `VerificationError` where a model and its rewrite differ; it is said before anything is written.

    Raises `InputError` where they cannot be compared.
    """
    if words := difference(found):
        raise VerificationError(f"{where}: after the rewrite, {words}; nothing was written")
    demand_compared(found, f"{where}: verify='model': ", f"{GIVE}, or use verify='sites'; nothing was written")


GIVE = "give --inputs FILE.npz, or --size NAME=N (in Python inputs and sizes)"


def demand_compared(found: dict[str, Any], where: str = "", advice: str = GIVE) -> None:
    """Raise `InputError` where equal outputs say nothing: none of them has elements that were compared."""
    outputs = found["outputs"]
    if found["equal"] and outputs and all(o.get("not_compared") for o in outputs):
        first = next((o for o in outputs if o["not_compared"] == VOID), outputs[0])
        more = "" if len(outputs) == 1 else ", and no other says more"
        raise InputError(f"{where}the models cannot be compared: output {first['name']!r} has {first['not_compared']}"
                         f"{more} on the inputs tried; {advice}")  # fmt: skip


VOID, EMPTY = "no finite element", "no element"
"""Why two outputs are called not compared though no element differs."""


def _alike(x: Any, y: Any, roundings: float) -> bool:
    """Whether two outputs that are no arrays of numbers agree: sequences and maps by element, the rest exactly."""
    if isinstance(x, (list, tuple)) and isinstance(y, (list, tuple)):
        return len(x) == len(y) and all(_alike(a, b, roundings) for a, b in zip(x, y, strict=True))
    if isinstance(x, dict) and isinstance(y, dict):
        return x.keys() == y.keys() and all(_alike(x[key], y[key], roundings) for key in x)
    if not isinstance(x, np.ndarray) or not isinstance(y, np.ndarray):
        return type(x) is type(y) and repr(x) == repr(y)
    if x.dtype.kind == "c" and x.dtype == y.dtype:
        return all(_compare_output("", getattr(x, p), getattr(y, p), roundings)[1] for p in ("real", "imag"))
    if x.dtype.kind in "iub" or is_float(x):
        return _compare_output("", x, y, roundings)[1]
    return x.shape == y.shape and x.dtype == y.dtype and bool((x == y).all())


def _compare_output(name: str, x: Any, y: Any, roundings: float) -> tuple[dict[str, Any], bool]:
    record: dict[str, Any]
    if not isinstance(x, np.ndarray) or not (x.dtype.kind in "iub" or is_float(x)):
        same = _alike(x, y, roundings)
        record = {"name": name, "max_abs": None, "max_rel": None, "shape": None, "dtype": type(x).__name__}
        return record | ({"not_compared": VOID} if same and void(x) else {}), same
    record = {"name": name, "shape": list(x.shape), "dtype": str(x.dtype)}
    if x.shape != y.shape or x.dtype != y.dtype:
        other = {"shape": list(y.shape), "dtype": str(y.dtype)}
        return record | {"max_abs": None, "max_rel": None, "other": other}, False
    p, q = x.astype(np.float64), y.astype(np.float64)
    gap, top = distance(p, q), float(np.max(np.abs(p[np.isfinite(p)]), initial=0.0))
    unit = EPSILON.get(str(x.dtype), 0.0)
    if not unit and not gap and not np.array_equal(x, y):
        gap = 1.0  # integers beyond 2^53, of which float64 sees no difference
    if strange := np.count_nonzero(~np.isfinite(p)):
        record["not_finite"] = strange / p.size
    if not gap and (not p.size or void(x)):
        record["not_compared"] = EMPTY if not p.size else VOID
    return record | {"max_abs": gap, "max_rel": gap / top if top else gap}, gap <= roundings * unit * top
