"""Plans for graphs written by hand."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from normfuse.graph import Value
from normfuse.plan import Abilities, Plan
from normfuse.recognise import recognise
from tests.build import Build, leaf, rms

ROWS = ("B", "S", 64)


def able(operator: Any = lambda edit: None, **more: Any) -> Abilities:
    """A front end that has every operator, unless it is told otherwise."""
    return Abilities(more.pop("expressible", lambda norm, value: None), operator=operator, **more)


def rows(g: Build, name: str = "r", dtype: str = "float32") -> Value:
    return leaf(g, *ROWS, name=name, dtype=dtype)


def start(g: Build, *outputs: Value, places: Sequence[str] = ()) -> Plan:
    """A plan without edits, whose norms stand where it is said."""
    for value in outputs:
        value.kept = True
    out = Plan(g.graph, recognise(g.graph))
    for site, place in zip(out.found.sites, places, strict=False):
        site.placement = place
    return out


def shown(plan: Plan) -> list[tuple[str, list[str], list[str], list[str]]]:
    """The fused operators: op, values of the sites, inputs, outputs."""
    return [(e.op, [s.value.name for s in e.sites], [v.name for v in e.inputs], [v.name for v in e.outputs])
            for e in plan.fused]  # fmt: skip


def scaled(g: Build, v: Value) -> Value:
    return g.op("mul", rms(g, v), g.w)


def native(value: Value, what: Any = True) -> Value:
    value.native = what
    return value


def sandwich() -> tuple[Build, list[Value]]:
    g = Build()
    f, r = rows(g, "f"), rows(g)
    n = scaled(g, f)
    s = native(g.op("add", r, n))
    y = scaled(g, s)
    return g, [f, r, n, s, y]


def in_float32(change: Callable[[Build, dict[str, Value]], None] = lambda g, v: None,
               rounded: bool = True) -> tuple[Plan, dict[str, Value]]:  # fmt: skip
    """The norm of a sum of casts, and the sum cast back."""
    g = Build(dtype="bfloat16")
    x, r = rows(g, "x16", "bfloat16"), rows(g, "r16", "bfloat16")
    made = {"x": x, "r": r}
    made["x32"], made["r32"] = g.op("cast", x, dtype="float32"), g.op("cast", r, dtype="float32")
    made["s"] = native(g.op("add", made["x32"], made["r32"]))
    made["y"] = g.op("cast", rms(g, made["s"]), dtype="bfloat16")
    if rounded:
        made["narrow"] = g.op("cast", made["s"], dtype="bfloat16")
    change(g, made)
    return start(g, *(made[name] for name in ("y", "narrow") if name in made)), made


def single(spell: Callable[[Build, Value], Value] = scaled, **more: Any) -> tuple[Build, Value, Plan]:
    """A plan of one norm, and its graph and result."""
    g = Build(**more)
    y = spell(g, g.x)
    return g, y, start(g, y)
