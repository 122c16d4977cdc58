"""Each norm that is found in a neutral graph has, in float64, the value of the nodes it stands for."""

from __future__ import annotations

import math
from collections import Counter
from functools import cache

import numpy as np
import onnx_ir as ir
import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from normfuse.frontends.fx import Lowering
from normfuse.frontends.onnx import lower
from normfuse.graph import Graph
from normfuse.placement import place, recipe
from normfuse.recognise import Recognition, recognise
from tests.families import FAMILIES, RECIPES, cached_export, often
from tests.near_misses import CODES, NEAR_MISSES, TORCH_EQUAL_OK, TORCH_NEAR_MISSES, TORCH_RANDOM
from tests.neutral import compare
from tests.spelling_files import EXPORTERS, SINGLE, exported, marks
from tests.spellings import CANNOT_EXPORT, LOSES_EPS, SPELLINGS, Exporter, Spelling, parameters

IN_PLACE = {"rms_functional", "rms_functional_no_weight", "rms_functional_two_axes", "rms_functional_default_eps",
            "ln_centred_then_rms"}  # fmt: skip
"""torch's own rms_norm, which this tracer takes apart into an add_ of eps."""


@cache
def spelled(exporter: Exporter, opset: int, dtype: torch.dtype, name: str) -> Graph:
    (low,) = lower(ir.load(exported(exporter, opset, dtype, name)))
    return low.graph


@cache
def traced(name: str) -> Graph:
    spelling = SPELLINGS[name]
    x = torch.zeros(spelling.shape)
    made = make_fx(spelling.fn, tracing_mode="fake")(x, *parameters())
    return Lowering(made, made.graph).graph


@cache
def family(name: str, opset: int) -> list[Graph]:
    return [low.graph for low in lower(ir.load(cached_export(name, opset)))]


def is_spelling(found: Recognition, spelling: Spelling) -> None:
    """One norm, of the kind, axes, eps and factor that the spelling says."""
    (site,) = found.sites
    norm, rank = site.norm, len(spelling.shape)
    assert norm.kind == spelling.kind and not found.refusals
    assert norm.eps == pytest.approx(spelling.eps * spelling.prescale**2, rel=1e-5)
    assert norm.size == math.prod(spelling.shape[a] for a in spelling.axes)
    if norm.x.rank == rank:
        assert norm.axes == tuple(sorted(a % rank for a in spelling.axes))


@pytest.mark.parametrize(("exporter", "opset", "name"), [
    pytest.param(e, o, n, marks=marks(e, SINGLE, i, o)) for e, o in EXPORTERS for i, n in enumerate(SPELLINGS)
    if n not in CANNOT_EXPORT[e, o] and n not in LOSES_EPS[e]
])  # fmt: skip
def test_onnx_spelling(exporter: Exporter, opset: int, name: str) -> None:
    graph = spelled(exporter, opset, SINGLE, name)
    found = recognise(graph)
    is_spelling(found, SPELLINGS[name])
    assert compare(found, graph) == 1


@pytest.mark.parametrize("name", [n for n in SPELLINGS if n not in IN_PLACE])
def test_torch_spelling(name: str) -> None:
    graph = traced(name)
    found = recognise(graph)
    is_spelling(found, SPELLINGS[name])
    assert compare(found, graph) == 1


@pytest.mark.parametrize("name", NEAR_MISSES)
def test_near_miss(name: str) -> None:
    case = NEAR_MISSES[name]
    model = case.build()
    feeds = case.inputs(np.random.default_rng(0))
    dims = {d.dim_param: n for i in model.graph.input if i.name in feeds
            for d, n in zip(i.type.tensor_type.shape.dim, feeds[i.name].shape, strict=True)}  # fmt: skip
    dims.pop("", None)
    refused, sites = set[str](), 0
    for low in lower(ir.serde.deserialize_model(model)):
        found = recognise(low.graph)
        compare(found, low.graph, dims)
        refused |= {r.code for r in found.refusals}
        sites += sum(site.norm.cast != "mixed" for site in found.sites)
    assert case.equal_ok or not sites or CODES.get(name) == "NF116", case.why
    if name in CODES:
        assert CODES[name] in refused | {"NF116"}


@cache
def traced_near_miss(name: str) -> Graph:
    function, shape = TORCH_NEAR_MISSES[name]
    made = make_fx(function, tracing_mode="fake")(torch.zeros(shape), torch.zeros(64))
    return Lowering(made, made.graph).graph


@pytest.mark.parametrize("name", [n for n in TORCH_NEAR_MISSES if n not in TORCH_RANDOM])
def test_torch_near_miss(name: str) -> None:
    found = recognise(traced_near_miss(name))
    assert name in TORCH_EQUAL_OK or not [site for site in found.sites if site.norm.cast != "mixed"]


@pytest.mark.parametrize(("name", "opset"), [
    pytest.param(name, opset, marks=() if often(name, opset) else pytest.mark.slow)
    for name in FAMILIES for opset in (18, 23)
])  # fmt: skip
def test_family(name: str, opset: int) -> None:
    (graph,) = family(name, opset)
    found = recognise(graph)
    place(graph, found.sites)
    assert dict(Counter(site.placement for site in found.sites)) == FAMILIES[name].placements
    assert compare(found, graph) == len(found.sites) and not found.refusals
    assert name not in RECIPES or recipe(found.sites) == RECIPES[name]
