"""Torch graphs: Dynamo, torch.export and AOTAutograd. Every spelling and family found and fused, and right.

Each graph is rewritten where a user's would be: inside a `torch.compile` backend, or as an exported program. An
output may be no further from float64 than the model's own was, give or take a few roundings of the input.
"""

from __future__ import annotations

import contextlib
import io
import operator
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, fx, nn
from torch._dynamo.backends.common import aot_autograd
from torch._inductor.decomposition import select_decomp_table
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.passes.shape_prop import ShapeProp

import normfuse
from normfuse.frontends import fx_emit
from normfuse.frontends.fx_effects import name_of
from normfuse.norm import Norm
from normfuse.report import Report
from tests.families import FAMILIES, aot_graphs, exported_program
from tests.near_misses import TORCH_EQUAL_OK, TORCH_NEAR_MISSES, TORCH_RANDOM
from tests.share import share
from tests.spellings import SPELLINGS, Spelling, SpellingModule, hostile_inputs, reference

SINGLE, BRAIN = torch.float32, torch.bfloat16
ULP = {SINGLE: 2.0**-23, BRAIN: 2.0**-7}
REDUCTIONS = frozenset("mean sum var std var_mean std_mean norm linalg_vector_norm linalg_norm einsum bmm".split())
MIXED = frozenset({"rms_rounded_rstd"})
LESS_EXACT = {
    # torch's layer_norm on the CPU is up to 3e-5 off on rows with a mean of 100, where these are below 1e-5
    SINGLE: frozenset({"ln_centred_twice", "ln_var_mean", "ln_std_mean"}),
    BRAIN: frozenset(),
}
"""Upcast, and yet with an order of roundings that no operator has."""


class Rewritten:
    """A module with its graphs rewritten at one level, and what was done."""

    def __init__(self, module: nn.Module, args: tuple[Tensor, ...], how: str, config: normfuse.Config | None = None,
                 dynamic: bool | None = None) -> None:  # fmt: skip
        self.config = config
        self.before: list[Any] = []
        self.after: list[Any] = []
        self.reports: list[Report] = []
        with silent(), torch.no_grad():
            if how == "export":
                new = self._optimize(exported_program(module, args, dynamic=bool(dynamic)))
                self.run: Callable[..., Any] = new.module()
            else:
                torch._dynamo.reset()
                backend = self._dynamo if how == "dynamo" else self._aot()
                self.run = torch.compile(module, backend=backend, dynamic=dynamic)
                self.run(*args)

    def _optimize(self, model: Any) -> Any:
        text = str(model.graph)
        new, report = normfuse.optimize(model, self.config)
        assert str(model.graph) == text
        self.before.append(model)
        self.after.append(new)
        self.reports.append(report)
        return new

    def _dynamo(self, graph: fx.GraphModule, _inputs: list[Any]) -> Any:
        return self._optimize(graph).forward

    def _aot(self) -> Callable[..., Any]:
        def compiler(graph: fx.GraphModule, _inputs: list[Any]) -> Callable[..., Any]:
            new = self._optimize(graph)

            def boxed(arguments: list[Any]) -> Any:
                values = list(arguments)
                arguments.clear()
                return new(*values)

            boxed._boxed_call = True  # type: ignore[attr-defined]
            return boxed

        return aot_autograd(fw_compiler=compiler, inference_compiler=compiler)

    def __call__(self, *args: Tensor) -> Tensor:
        """The result of the rewritten module."""
        with silent(), torch.no_grad():
            out: Tensor = self.run(*args)
            return out

    @property
    def norms(self) -> list[Any]:
        """The records of all graphs."""
        return [norm for report in self.reports for norm in report.norms]

    @property
    def codes(self) -> list[str]:
        """The codes of all refusals."""
        return [refusal.code for report in self.reports for refusal in report.refusals]


@contextlib.contextmanager
def silent() -> Iterator[None]:
    """No warnings of the tracers."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def names(graph: fx.Graph) -> Counter[str]:
    """The bare names of what a graph calls."""
    found = (name_of(n) or str(n.target) for n in graph.nodes if n.op.startswith("call"))
    return Counter(found)


def dangling(graph: fx.Graph) -> int:
    """How many nodes nobody uses."""
    return sum(not n.users and n.op not in ("output", "placeholder") for n in graph.nodes)


def trailing(spelling: Spelling) -> bool:
    """Whether the normalised axes are the last ones."""
    rank = len(spelling.shape)
    return sorted(a % rank for a in spelling.axes) == list(range(rank - len(spelling.axes), rank))


CASES = [("dynamo", SINGLE), ("dynamo", BRAIN), ("export", SINGLE), ("aot", SINGLE)]


def cases() -> Iterator[Any]:
    """Each spelling as Dynamo gives it, every fourth in one of the other ways, too; with the rest of them if slow."""
    for i, name in enumerate(SPELLINGS):
        for k, (how, dtype) in enumerate(CASES):
            yield pytest.param(name, how, dtype, id=f"{name}-{how}-{str(dtype)[6:]}",
                               marks=() if k in (0, i % 12 + 1) else pytest.mark.slow)  # fmt: skip


@pytest.mark.parametrize(("name", "how", "dtype"), list(cases()))
def test_spelling(name: str, how: str, dtype: torch.dtype) -> None:
    spelling = SPELLINGS[name]
    module = SpellingModule(spelling, dtype).eval()
    x = torch.randn(spelling.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    found = Rewritten(module, (x,), how)
    assert [norm.kind for norm in found.norms] == [spelling.kind], found.reports[0].refusals
    norm = found.norms[0]
    assert norm.eps == pytest.approx(spelling.eps * spelling.prescale**2, rel=1e-5 if dtype == SINGLE else 0.05)
    if not trailing(spelling):
        assert found.codes == ["NF202"]
    elif name in LESS_EXACT[dtype]:
        assert found.codes == ["NF202"] and "further from float64" in found.reports[0].refusals[0].message
    elif dtype == SINGLE or (spelling.upcast and name not in MIXED):
        assert norm.action in ("fused", "kept"), found.reports[0].refusals
    elif norm.action == "refused":  # computed in bfloat16
        assert found.codes[-1] in ("NF202", "NF117")
        fast = normfuse.optimize(found.before[0], normfuse.Config(numerics="fast"))[1]
        assert [n.action for n in fast.norms] == ["fused"]
    if norm.action == "fused":
        assert norm.verified and norm.emitted
        assert not REDUCTIONS & set(names(found.after[0].graph))
        assert dangling(found.after[0].graph) <= dangling(found.before[0].graph)
    compare(spelling, module, found)


def compare(spelling: Spelling, module: SpellingModule, found: Rewritten) -> None:
    """Model and rewrite against float64, on inputs that are hard on norms."""
    parameters = module.weight, module.bias
    for name, x in hostile_inputs(spelling.shape, module.weight.dtype).items():
        want, new = reference(spelling, x, *parameters), found(x)
        with torch.no_grad():
            old = module(x)
        assert new.dtype == old.dtype and new.stride() == old.stride()
        was, off = (old.double() - want).abs().max(), (new.double() - want).abs().max()
        allowed = 2 * was + 4 * ULP[x.dtype] * want.abs().max()
        assert off <= allowed or not was.isfinite(), f"{name}: off by {off:.3g}, was {was:.3g}"


# -- near misses -------------------------------------------------------------------------------------------------------


class NearMissModule(nn.Module):
    """A near miss with its weight as a parameter."""

    def __init__(self, fn: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.fn = fn
        self.w = nn.Parameter(1.5 + 0.5 * torch.randn(64, generator=torch.Generator().manual_seed(3)), False)

    def forward(self, x: Tensor) -> Tensor:
        """Call the function."""
        return self.fn(x, self.w)


@pytest.mark.parametrize(("name", "how"), share(
    ((name, how) for name in TORCH_NEAR_MISSES for how in ("dynamo", "export", "aot")), 2),
)  # fmt: skip
def test_near_miss(name: str, how: str) -> None:
    fn, shape = TORCH_NEAR_MISSES[name]
    module, x = NearMissModule(fn), torch.randn(shape, generator=torch.Generator().manual_seed(2))
    found = Rewritten(module, (x,), how)
    if name not in TORCH_EQUAL_OK:
        assert not any(report.fused for report in found.reports)
    if name not in TORCH_RANDOM:
        for scale in (1.0, 1e-3, 30.0):
            want, got = module(x * scale), found(x * scale)
            assert torch.equal(got.isnan(), want.isnan())
            gap, top = (torch.nan_to_num(t).abs().max() for t in (got - want, want))
            assert gap <= 16 * ULP[SINGLE] * top


# -- families ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "how"), [
    *share(((name, "dynamo") for name in FAMILIES), 4), *share(((name, "export") for name in FAMILIES), 4, 2),
])  # fmt: skip
def test_family(name: str, how: str) -> None:
    family = FAMILIES[name]
    module, args = family.build(), family.args()
    found = Rewritten(module, args, how)
    assert len(found.norms) == family.norms and not found.codes
    assert dict(Counter(n.placement for n in found.norms)) == family.placements
    assert all(n.action == "kept" or (n.action == "fused" and n.verified) for n in found.norms)
    with torch.no_grad():
        want = module(*args)
    assert (found(*args) - want).abs().max() <= 64 * ULP[SINGLE] * want.abs().max()


@pytest.mark.parametrize("name", ["llama", "gemma3", "t5", "phi"])
def test_half_family_keeps_every_bit(name: str) -> None:
    """Llama rounds before the weight, Gemma after it, T5 by promotion; layer_norm is an operator already."""
    family = FAMILIES[name]
    module, args = family.build().to(BRAIN), family.args()
    found = Rewritten(module, args, "export")
    assert len(found.norms) == family.norms and not found.codes
    with torch.no_grad():
        assert torch.equal(found(*args), module(*args))


@pytest.mark.parametrize("name", ["gpt2", *(pytest.param(n, marks=pytest.mark.slow) for n in ("llama", "t5"))])
def test_dynamic_sizes(name: str) -> None:
    """With dynamic=True even eps is open; it is read, with a guard, while compiling."""
    family = FAMILIES[name]
    module = family.build()
    for how in ("dynamo", "export"):
        found = Rewritten(module, family.args(), how, dynamic=True)
        assert len(found.norms) == family.norms and not found.codes
        args = family.args(batch=3, seq=5)
        with torch.no_grad():
            want = module(*args)
        assert (found(*args) - want).abs().max() <= 64 * ULP[SINGLE] * want.abs().max()


def test_aot_in_training_keeps_what_the_backward_needs() -> None:
    family = FAMILIES["llama"]
    module, args = family.build(), family.args()
    reports: list[Report] = []

    def compiler(graph: fx.GraphModule, _inputs: list[Any]) -> Any:
        new, report = normfuse.optimize(graph)
        reports.append(report)
        return new.forward

    with silent():
        torch._dynamo.reset()
        out = torch.compile(module, backend=aot_autograd(fw_compiler=compiler, bw_compiler=compiler))(*args)
        out.sum().backward()
    assert len(reports[0].norms) == family.norms
    assert all(p.grad is not None for p in module.parameters() if p.requires_grad)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_graphs_with_the_decompositions_of_inductor(name: str) -> None:
    """There layer_norm is spelled out too, and casts are prims.convert_element_type."""
    family = FAMILIES[name]
    module = family.build().to(BRAIN)
    ((graph, _),) = aot_graphs(module, family.args(), decompositions=select_decomp_table())
    report = normfuse.optimize(graph)[1]
    assert report.fused == family.norms and not report.refusals
    assert dict(Counter(n.placement for n in report.norms)) == family.placements


# -- exported programs -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_exported_program_is_saved_loaded_and_left_alone(name: str) -> None:
    family = FAMILIES[name]
    module = family.build()
    source = exported_program(module, family.args(), dynamic=True)
    program, report = normfuse.optimize(source)
    assert type(program) is torch.export.ExportedProgram and report.format == "exported"
    assert program.graph_signature == source.graph_signature
    assert report.nodes_after <= report.nodes_before
    buffer = io.BytesIO()
    with silent():
        torch.export.save(program, buffer)
        buffer.seek(0)
        back = torch.export.load(buffer).module()
    args = family.args(batch=3, seq=9)
    with torch.no_grad():
        want = module(*args)
        assert (back(*args) - want).abs().max() <= 64 * ULP[SINGLE] * want.abs().max()


def test_decomposed_program_gets_the_core_operator() -> None:
    family = FAMILIES["llama"]
    module, args = family.build(), family.args()
    with silent():
        program = exported_program(module, args).run_decompositions()
    new, report = normfuse.optimize(program)
    assert report.fused == family.norms
    made = names(new.graph)
    assert made["_fused_rms_norm"] == 1 and made["normfuse::add_rms_norm"] == family.norms - 1
    with torch.no_grad():
        want = module(*args)
        assert (new.module()(*args) - want).abs().max() <= 64 * ULP[SINGLE] * want.abs().max()


def test_the_module_of_a_program() -> None:
    """Its call of a guard function reads the inputs and leaves them as they are."""
    program = torch.export.export(NearMissModule(lambda x, w: rms(x) * w), (torch.randn(2, 64),))
    new, report = normfuse.optimize(program.module())
    x = torch.randn(2, 64)
    assert report.fused == 1 and isinstance(new, fx.GraphModule)
    assert (new(x) - program.module()(x)).abs().max() < 1e-5


def test_asserts_on_dead_values_go_and_others_stay() -> None:
    def fn(x: Tensor, w: Tensor) -> Tensor:
        h = x.to(torch.float32)
        y = h * torch.rsqrt(h.to(torch.float32).pow(2).mean(-1, keepdim=True) + 1e-6)
        return w * y.to(x.dtype)

    found = Rewritten(NearMissModule(fn), (torch.randn(2, 64),), "export")
    assert names(found.before[0].graph)["_assert_tensor_metadata"] == 3
    assert found.norms[0].action == "fused"
    left = [n.args[0].name for n in found.after[0].graph.nodes if "_assert_tensor_metadata" in str(n.target)]
    assert left == ["x"]


def test_submodules_are_rewritten_too() -> None:
    def fn(x: Tensor, w: Tensor) -> Tensor:
        with torch.no_grad():
            y = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * w
        return y + x

    module, x = NearMissModule(fn), torch.randn(2, 64)
    with silent():
        program = torch.export.export(module, (x,))
        new, report = normfuse.optimize(program)
    assert report.fused == 1
    assert (new.module()(x) - module(x)).abs().max() < 1e-5
    assert (program.module()(x) == module(x)).all()


# -- forms -------------------------------------------------------------------------------------------------------------


def rms(x: Tensor, eps: float = 1e-6) -> Tensor:
    """x over its root mean square, in its own type."""
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)


FORMS: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], torch.dtype, str]] = {
    "weight after the cast": (lambda x, w: w.bfloat16() * rms(x.float()).bfloat16(), BRAIN, "rms_norm, mul"),
    "weight before the cast": (lambda x, w: (w * rms(x.float())).to(x.dtype), BRAIN, "to, rms_norm, to"),
    "half weight before the cast": (
        lambda x, w: (w.bfloat16().float() * rms(x.float())).to(x.dtype), BRAIN, "rms_norm",
    ),
    "stays in float32": (lambda x, w: w * rms(x.float()), BRAIN, "to, rms_norm"),
    "no weight": (lambda x, w: rms(x.float()).to(x.dtype), BRAIN, "rms_norm"),
    "bias": (lambda x, w: rms(x) * w + w, SINGLE, "rms_norm, add"),
    "constant weight": (lambda x, w: rms(x) * 3.0, SINGLE, "rms_norm, mul"),
    "scaled weight": (lambda x, w: rms(x) * w * 3.0, SINGLE, "mul, rms_norm"),
    "half weight": (lambda x, w: rms(x) * w.bfloat16(), SINGLE, "to, rms_norm"),
    "weight in a row": (lambda x, w: rms(x) * w.view(1, 1, 64), SINGLE, "reshape, rms_norm"),
    "two axes, one weighted": (
        lambda x, w: x * torch.rsqrt(x.pow(2).mean((1, 2), keepdim=True) + 1e-6) * w, SINGLE, "expand, rms_norm",
    ),
    "float64 inside": (lambda x, w: rms(x.double()).float() * w, SINGLE, "to, rms_norm, to, mul"),
    "permuted": (lambda x, w: rms(x.view(2, 5, 4, 16).transpose(1, 2)), SINGLE, "permute, rms_norm, permute"),
}  # fmt: skip


@pytest.mark.parametrize("how", ["dynamo", "export", "aot"])
@pytest.mark.parametrize("form", FORMS)
def test_form(form: str, how: str) -> None:
    """Each order of casts has its own nodes, and keeps types, strides and, for half types, every bit."""
    fn, dtype, emitted = FORMS[form]
    module, x = NearMissModule(fn), torch.randn(2, 5, 64, generator=torch.Generator().manual_seed(4)).to(dtype)
    found = Rewritten(module, (x,), how)
    assert [n.action for n in found.norms] == ["fused"], found.reports[0].refusals
    core = {"_to_copy": "to", "_fused_rms_norm": "rms_norm", "view": "reshape"}
    assert ", ".join(core.get(op, op) for op in found.norms[0].emitted.split(", ")) == emitted
    want, got = module(x), found(x)
    assert (got.dtype, got.stride()) == (want.dtype, want.stride())
    if dtype == BRAIN and want.dtype == BRAIN:
        assert torch.equal(want, got)
    assert (got - want).abs().max() <= 8 * ULP[SINGLE] * want.abs().max()


def test_a_norm_over_the_last_axis_of_open_size() -> None:
    program = torch.export.export(
        NearMissModule(lambda x, w: rms(x)), (torch.randn(3, 5),),
        dynamic_shapes={"x": {1: torch.export.Dim("width", min=2)}},
    )  # fmt: skip
    new, report = normfuse.optimize(program)
    assert report.fused == 1 and report.norms[0].size is None
    x = torch.randn(3, 11)
    assert (new.module()(x) - rms(x)).abs().max() < 1e-6


def test_operators_state_their_fact() -> None:
    """layer_norm and rms_norm as functions, modules and aten operators are norms already."""

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.linear = nn.LayerNorm(64), nn.RMSNorm(64), nn.Linear(64, 64)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.second(x + self.linear(self.first(x)))
            return out

    module, x = Two().eval(), torch.randn(2, 64)
    traced = fx.symbolic_trace(module)
    ShapeProp(traced).propagate(x)
    for graph in (traced, Rewritten(module, (x,), "dynamo").before[0], torch.export.export(module, (x,))):
        report = normfuse.inspect(graph)
        assert [(n.kind, n.form) for n in report.norms] == [("layer_norm", "op"), ("rms_norm", "op")]
        assert [n.eps for n in report.norms] == [1e-5, pytest.approx(2.0**-23)]


def test_scaled_module_takes_its_parameter_from_the_module() -> None:
    norm = nn.LayerNorm(64).eval()
    nn.init.normal_(norm.weight)
    module, x = nn.Sequential(norm), torch.randn(3, 64)
    graph = fx.Graph()
    graph.output(graph.call_function(operator.mul, (graph.call_module("0", (graph.placeholder("x"),)), 2.0)))
    traced = fx.GraphModule(module, graph)
    ShapeProp(traced).propagate(x)
    new, report = normfuse.optimize(traced)
    assert report.fused == 1 and "call_module" not in {n.op for n in new.graph.nodes}
    assert (new(x) - traced(x)).abs().max() < 1e-5


# -- what is refused ---------------------------------------------------------------------------------------------------


def test_a_graph_without_shapes_is_refused() -> None:
    traced = fx.symbolic_trace(NearMissModule(lambda x, w: rms(x) * w))
    new, report = normfuse.optimize(traced)
    assert [r.code for r in report.refusals] == ["NF115"] and not report.norms
    assert str(new.graph) == str(traced.graph)


def no_grad_half(x: Tensor, w: Tensor) -> Tensor:
    """The statistics without a gradient."""
    with torch.no_grad():
        rstd = torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)
    return x * rstd * w


def inner_output(x: Tensor, w: Tensor) -> Tensor:
    """The root mean square is used again."""
    rstd = torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)
    return x * rstd * w + rstd


def weight_written_later(x: Tensor, w: Tensor) -> Tensor:
    """The weight is multiplied in, then overwritten, before the norm is complete."""
    k = w.clone()
    y = x * k
    k.zero_()
    return y * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)


def added_in_place(x: Tensor, w: Tensor) -> Tensor:
    """What an embedding with positions added in place gives."""
    h = x.clone()
    h += 1.5
    return rms(h) * w


def filled_by_parts(x: Tensor, w: Tensor) -> Tensor:
    """A view of what a loop has filled, as of linear attention in chunks."""
    h = torch.zeros_like(x)
    for i in range(2):
        h[i] = x[i] * (i + 1)
    return rms(h.reshape(-1, 64)) * w


def filled_after_the_view(x: Tensor, w: Tensor) -> Tensor:
    """The same view, made before the last part is there, and read after it."""
    h = torch.zeros_like(x)
    h[0] = x[0]
    view = h.view(-1, 64)
    square = view.pow(2)
    h[1] = x[1]
    return view * torch.rsqrt(square.mean(-1, keepdim=True) + 1e-6) * w


def scaled_in_place(x: Tensor, w: Tensor) -> Tensor:
    """The result of a norm is written over, and read before and after that."""
    y = (rms(x) * w).type_as(x)
    before = y * 2
    y *= 0.5
    y += x
    return y + before


def normalised_and_written(x: Tensor, w: Tensor) -> Tensor:
    """The same of an operator."""
    y = nn.functional.layer_norm(x, (64,), w)
    y += x
    return y


@pytest.mark.parametrize("how", ["dynamo", "export"])
@pytest.mark.parametrize(("fn", "count"), [
    (added_in_place, 1), (filled_by_parts, 1), (filled_after_the_view, 0), (scaled_in_place, 1),
])  # fmt: skip
def test_a_norm_beside_writes_in_place(fn: Callable[..., Any], count: int, how: str) -> None:
    module, x = NearMissModule(fn), torch.randn(2, 5, 64, generator=torch.Generator().manual_seed(5))
    found = Rewritten(module, (x,), how)
    assert [n.action for n in found.norms] == ["fused"] * count
    assert (found(x) - module(x)).abs().max() <= 8 * ULP[SINGLE] * module(x).abs().max()
    assert [n.action for n in Rewritten(NearMissModule(normalised_and_written), (x,), how).norms] == ["kept"]


REFUSED = {
    "no_grad inside": (no_grad_half, True, "NF202"),
    "an inner value is used": (inner_output, False, "NF116"),
    "the weight is written": (weight_written_later, False, "NF120"),
    "detached statistics": (lambda x, w: x * torch.rsqrt(x.detach().pow(2).mean(-1, keepdim=True) + 1e-6) * w,
                            True, "NF106"),
    "computed in bfloat16": (lambda x, w: rms(x.bfloat16() * 2.5) * w, False, "NF202"),
    "inner axes": (lambda x, w: x * torch.rsqrt(x.pow(2).mean(0, keepdim=True) + 1e-6), False, "NF202"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case: str) -> None:
    fn, grad, code = REFUSED[case]
    module, x = NearMissModule(fn), torch.randn(4, 64)
    reports: list[Report] = []

    def backend(graph: fx.GraphModule, _inputs: list[Any]) -> Any:
        new, report = normfuse.optimize(graph)
        reports.append(report)
        return new.forward

    torch._dynamo.reset()
    with silent(), torch.set_grad_enabled(grad):
        got = torch.compile(module, backend=backend)(x.requires_grad_(grad))
        assert torch.equal(got, module(x))
    assert not reports[0].fused
    assert code in {r.code for r in reports[0].refusals}


def test_a_wrong_replacement_is_rolled_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """The check runs the model's own nodes, so that it sees a mistake of the recogniser too."""
    emit = fx_emit.Emitter.emit

    def wrong(self: fx_emit.Emitter, graph: fx.Graph, norm: Norm, *rest: Any) -> list[fx.Node]:
        nodes = emit(self, graph, norm, *rest)
        target = nodes[0]
        target.args = (*target.args[:-1], 0.5)
        return nodes

    monkeypatch.setattr(fx_emit.Emitter, "emit", wrong)
    module, x = NearMissModule(lambda x, w: rms(x) * w), torch.randn(4, 64)
    found = Rewritten(module, (x,), "dynamo")
    assert found.codes == ["NF201"] and found.norms[0].action == "refused"
    assert torch.equal(found(x), module(x))


def test_a_guard_on_eps() -> None:
    """What was read while compiling is compiled again when it changes."""

    class Norm(nn.Module):
        eps = 1e-5

        def forward(self, x: Tensor) -> Tensor:
            return rms(x, self.eps)

    module, x = Norm(), torch.randn(3, 64) * 1e-2
    found = Rewritten(module, (x,), "dynamo", dynamic=True)
    assert found.norms[0].eps == 1e-5 and found.norms[0].action == "fused"
    module.eps = 1e-2
    assert (found(x) - rms(x, 1e-2)).abs().max() < 1e-6


@pytest.mark.parametrize("how", ["dynamo", "export"])
def test_a_rewritten_graph_is_left_alone(how: str) -> None:
    module = FAMILIES["qwen3"].build()
    found = Rewritten(module, FAMILIES["qwen3"].args(), how)
    again, report = normfuse.optimize(found.after[0])
    assert not report.fused and len(report.norms) == FAMILIES["qwen3"].norms
    assert str(again.graph) == str(found.after[0].graph)


@pytest.mark.parametrize("how", ["dynamo", "aot", "export"])
@pytest.mark.parametrize(
    "after", [lambda y, w: y * 1000.0, lambda y, w: y * w, lambda y, w: y + w], ids=["number", "weight", "bias"]
)
def test_a_norm_that_is_scaled_in_a_wider_type_behind_the_cast_back(how: str, after: Any) -> None:
    """It keeps that type, which a number alone does not give, and does not overflow where the model does not."""

    def spell(x: Tensor, w: Tensor) -> Tensor:
        y = x.float()
        out: Tensor = after((y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + 1e-6)).half().float(), 100 * w)
        return out

    module, x = NearMissModule(spell), torch.randn(4, 64).half()
    x[0, 1:] = 0  # a spike: 8 in the norm
    x[1, 0] = 1000
    found, want = Rewritten(module, (x,), how, normfuse.Config(verify="off")), module(x)
    got = found(x)
    assert found.norms[0].action == "fused" and got.dtype == want.dtype == SINGLE
    assert ((got - want).abs() <= 2.0**-10 * want.abs() + 1e-6).all()


def test_a_replacement_of_another_type_is_rolled_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """Although its numbers are near enough."""
    emit = fx_emit.Emitter.emit

    def wrong(self: Any, graph: fx.Graph, *args: Any) -> list[fx.Node]:
        nodes = emit(self, graph, *args)
        return [*nodes, graph.call_method("double", (nodes[-1],))]

    monkeypatch.setattr(fx_emit.Emitter, "emit", wrong)
    found = Rewritten(NearMissModule(lambda x, w: F.silu(rms(x) * w)), (torch.randn(4, 64),), "export")
    assert found.codes == ["NF201"] and found.norms[0].action == "refused"
    assert "gives torch.float64 instead of torch.float32" in found.reports[0].refusals[0].message


def scaled(x: Tensor, w: Tensor) -> Tensor:
    """Unbiased: torch's operator, and a factor."""
    c = x - x.mean(-1, keepdim=True)
    return F.silu(c / (c.pow(2).sum(-1, keepdim=True) / 63 + 1e-3).sqrt())


def widened(x: Tensor, w: Tensor) -> Tensor:
    """A cast, torch's operator with a weight in float32, a cast."""
    y = x.bfloat16().float()
    return F.silu((y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + 1e-6) * w).bfloat16())


def doubled(x: Tensor, w: Tensor) -> Tensor:
    """A factor of two behind the cast back, which is read again as one before it."""
    y = x.double()
    n = (y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + 1e-6)).float()
    return F.silu(n + n)


@pytest.mark.parametrize("form", [scaled, widened, doubled])
@pytest.mark.parametrize("how", ["shapes", "values", "fake", "export"])
def test_a_norm_in_several_nodes_is_left_alone(form: Callable[[Tensor, Tensor], Tensor], how: str) -> None:
    """It is found again, whatever kind of metadata the graph has, and stays as it was written."""
    module, x = NearMissModule(form), torch.randn(2, 64)
    model: Any
    if how == "export":
        model = torch.export.export(module, (x,))
    else:
        model = fx.symbolic_trace(module)
        ShapeProp(model).propagate(x)
        with FakeTensorMode() if how == "fake" else contextlib.nullcontext():
            for node in model.graph.nodes:
                if how != "shapes" and "tensor_meta" in node.meta:
                    meta = node.meta["tensor_meta"]
                    node.meta["val"] = torch.ones(meta.shape, dtype=meta.dtype)
    first, before = normfuse.optimize(model)
    second, after = normfuse.optimize(first)
    assert before.fused == 1 and "," in str(before.norms[0].emitted)
    assert (after.fused, [n.action for n in after.norms]) == (0, ["kept"])
    assert str(second.graph) == str(first.graph)


def test_gradients_flow_through_the_operator() -> None:
    module, x = NearMissModule(lambda x, w: F.silu(rms(x) * w)), torch.randn(4, 64, requires_grad=True)
    module.w.requires_grad_(True)
    module(x).sum().backward()
    want = (x.grad, module.w.grad)
    x.grad = module.w.grad = None
    reports: list[Report] = []

    def backend(graph: fx.GraphModule, _inputs: list[Any]) -> Any:
        new, report = normfuse.optimize(graph)
        reports.append(report)
        return new.forward

    torch._dynamo.reset()
    with silent():
        torch.compile(module, backend=backend)(x).sum().backward()
    assert reports[0].fused == 1
    for a, b in zip(want, (x.grad, module.w.grad), strict=True):
        assert a is not None and b is not None and (a - b).abs().max() < 1e-4


@pytest.mark.parametrize("number", [float("inf"), float("-inf"), float("nan"), 1e308, 1e-320])
def test_numbers_beyond_all_arithmetic(number: float) -> None:
    """A norm times such a number, to its power, or with it added is read without an error."""

    class Beyond(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, ...]:
            s = x.pow(2).mean(-1, keepdim=True)
            y = x * torch.rsqrt(s + 1e-5)
            return y * number, (s * number * number) ** -2, s**number, x / torch.sqrt(s + number), y + number

    report = normfuse.inspect(torch.export.export(Beyond(), (torch.ones(2, 8),)))
    assert len(report.norms) >= 1
