"""LayerNorm to RMSNorm in an `nn.Module`: what the trace of it does not show, or shows in another form."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

import normfuse
from normfuse.errors import InputError
from normfuse.frontends.module_trial import Trial
from tests.converted import D, drawn


def test_what_cannot_be_traced() -> None:
    module, config = nn.Sequential(nn.Linear(D, D), nn.LayerNorm(D)), normfuse.Config(layernorm_to_rmsnorm="exact")
    x: Any = torch.randn(2, D)
    with pytest.raises(InputError, match="args is a Tensor; give the positional arguments"):
        normfuse.optimize(module, config, args=x)
    module, x = module.to("meta"), x.to("meta")
    with pytest.raises(InputError, match="is on the meta device and holds no numbers"):
        normfuse.optimize(module, config, args=(x,))
    with pytest.raises(InputError, match="is on the meta device and holds no numbers"):
        normfuse.optimize(torch.export.export(module, (x,)), config)


def test_a_module_that_cannot_be_copied() -> None:
    first = nn.Linear(D, D)
    module = nn.Sequential(first, nn.LayerNorm(D)).eval()
    vars(first)["kept"] = first.weight * 2
    with pytest.raises(InputError, match="Sequential cannot be copied: Only Tensors created explicitly"):
        normfuse.optimize(module, normfuse.Config(layernorm_to_rmsnorm="exact"), args=(torch.randn(2, D),))


class Early(nn.Module):
    """Gives what has to be centred in a form that a hook does not see first, or does."""

    def __init__(self, form: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.e, self.form = nn.Embedding(9, D), form

    def forward(self, i: Tensor) -> Any:
        return self.form(self.e(i).tanh())


class Towers(nn.Module):
    """Two residual streams, of which one needs a centring operator."""

    def __init__(self, form: Callable[[Tensor], Any], back: Callable[[Any], Tensor]) -> None:
        super().__init__()
        self.early, self.back, self.e = Early(form), back, nn.Embedding(9, D)
        self.n, self.f = nn.ModuleList(nn.LayerNorm(D) for _ in range(3)), nn.Linear(D, D)

    def forward(self, i: Tensor) -> Tensor:
        x = self.back(self.early(i))
        x = x + self.f(self.n[0](x))
        out: Tensor = self.n[1](x) * self.n[2](self.e(i))
        return out


@pytest.mark.parametrize(("form", "back", "converted"), [
    (lambda x: x, lambda h: h, 3), (lambda x: (x, None), lambda h: h[0], 3),
    (lambda x: (x[..., 0], x), lambda h: h[1], 1), (lambda x: (x.relu(), x), lambda h: h[1], 1),
    (lambda x: (x.detach(), x), lambda h: h[1], 1), (lambda x: {"x": x}, lambda h: h["x"], 1),
    (lambda x: [x], lambda h: h[0], 1)])  # fmt: skip
def test_a_value_that_a_hook_does_not_see_first(form: Any, back: Any, converted: int) -> None:
    """No operator can stand there, and the rest is converted."""
    module, i = drawn(Towers(form, back)), torch.randint(0, 9, (2, 3))
    made, report = normfuse.optimize(module, normfuse.Config(layernorm_to_rmsnorm="exact"), args=(i,))
    assert report.converted == converted and all(r.code != "NF304" for r in report.refusals)
    assert any("the way through the module" in note for note in report.notes)
    torch.testing.assert_close(made(i), module(i), rtol=1e-4, atol=1e-5)


class Pair(nn.Module):
    """Two tensors of one shape, of which the second is given out, or left behind."""

    def __init__(self, kept: bool) -> None:
        super().__init__()
        self.a, self.b, self.kept = nn.Linear(D, D, bias=False), nn.Linear(D, D, bias=False), kept
        self.left: list[Tensor] = []

    def forward(self, x: Tensor) -> Any:
        a, b = self.a(x).relu(), self.b(x).relu()
        if not self.kept:
            return a, b
        self.left[:] = [b]
        return a


class OfAPair(nn.Module):
    def __init__(self, which: int, kept: bool = False, branch: float = 1.0) -> None:
        super().__init__()
        self.pair, self.which, self.kept = Pair(kept), which, kept
        self.n = nn.ModuleList(nn.LayerNorm(D) for _ in range(3))
        self.branch = nn.Parameter(torch.full((D,), branch))

    def forward(self, x: Tensor) -> Tensor:
        got = self.pair(x)
        pair = (got, self.pair.left[0]) if self.kept else got
        h = pair[self.which]
        out: Tensor = (self.n[0](h) + self.n[1](h).tanh() + self.n[2](h).exp()) * self.branch + pair[1 - self.which]
        return out


@pytest.mark.filterwarnings("ignore:The tensor attribute:UserWarning")
@pytest.mark.parametrize("example", [torch.zeros, torch.randn])
@pytest.mark.parametrize(("which", "kept", "branch", "converted"), [
    (0, False, 1.0, 3), (1, False, 1.0, 0), (0, True, 1.0, 3), (1, True, 1.0, 0), (0, False, 0.0, 3),
    (0, False, 1e-5, 3)])
def test_the_first_of_two_tensors_of_one_shape(which: int, kept: bool, branch: float, converted: int,
                                               example: Callable[[int, int], Tensor]) -> None:  # fmt: skip
    """Neither inputs nor parameters that are zeros hide which of them a hook sees first."""
    module = OfAPair(which, kept, branch).eval()
    made, report = normfuse.optimize(module, normfuse.Config(layernorm_to_rmsnorm="exact"), args=(example(3, D),))
    assert report.converted == converted and all(r.code == "NF302" for r in report.refusals)
    x = torch.randn(3, D)
    torch.testing.assert_close(made(x), module(x), rtol=1e-4, atol=1e-5)


class Chosen(OfAPair):
    """It gives out numbers of tokens alone."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).argmax(-1)


def test_outputs_that_are_no_floats_show_which_is_first() -> None:
    module, x = Chosen(0).eval(), torch.randn(64, D)
    result, report = normfuse.optimize(module, normfuse.Config(layernorm_to_rmsnorm="exact"), args=(x,))
    assert report.converted == 3 and torch.equal(result(x), module(x))


def test_only_places_of_the_plan_are_tried_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each runs the module and its graph: those that a plan gives up again would take as long as the module is deep."""
    layers = [nn.TransformerEncoderLayer(D, 2, 2 * D, batch_first=True) for _ in range(8)]
    tried, same = list[str](), Trial.same

    def counted(trial: Trial, value: Any, path: str, before: bool) -> bool:
        tried.append(path)
        return same(trial, value, path, before)

    monkeypatch.setattr(Trial, "same", counted)
    module = drawn(nn.Sequential(*layers))
    _, report = normfuse.optimize(module, normfuse.Config(layernorm_to_rmsnorm="exact"), args=(torch.randn(2, 5, D),))
    assert len(report.norms) == 16 and len(tried) <= 1


class SharedScale(nn.Module):
    """One factor for each channel of two branches."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.n, self.o = (nn.Linear(D, D), nn.Linear(D, D), nn.LayerNorm(D), nn.Linear(D, 3))
        self.e, self.z, self.g = nn.Embedding(9, D), nn.Embedding(9, D), nn.Parameter(torch.rand(D))

    def forward(self, i: Tensor) -> Tensor:
        z = self.z(i)
        found: Tensor = self.o(self.n(self.e(i) + self.a(z) * self.g + self.b(z) * self.g))
        return found


def test_a_factor_of_several_branches_is_taken_out_of_all() -> None:
    module, i = drawn(SharedScale()), torch.randint(0, 9, (2, 3))
    result, report = normfuse.optimize(module, normfuse.Config(layernorm_to_rmsnorm="exact"), args=(i,))
    assert report.converted == 1 and torch.equal(result.g, torch.ones(D)), report.refusals
    torch.testing.assert_close(result(i), module(i), rtol=1e-4, atol=1e-5)


class Head(nn.Module):
    """A token table that is read for the output, too; `head`: by whom."""

    def __init__(self, head: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.e, self.f, self.other, self.head = nn.Embedding(9, D), nn.Linear(D, D), nn.Linear(D, 9, bias=False), head
        self.n, self.m = nn.LayerNorm(D), nn.LayerNorm(D)
        self.other.weight = self.weight = self.e.weight

    def forward(self, i: Tensor) -> Tensor:
        h = self.e(i)
        return self.head(self, self.m(h + self.f(self.n(h))))


@pytest.mark.parametrize(("head", "copied", "converted"), [
    (lambda s, y: s.other(y), True, 2), (lambda s, y: F.linear(y, s.e.weight), False, 2),
    (lambda s, y: F.linear(y, s.weight), False, 2), (lambda s, y: s.other(y) + y @ s.e.weight.T, False, 2),
    (lambda s, y: s.other(y) + s.e(torch.arange(9)).amax(), False, 0)])  # fmt: skip
@pytest.mark.parametrize("fresh", [False, True])
def test_a_copy_is_for_all_who_read_the_attribute(head: Any, copied: bool, converted: int, fresh: bool) -> None:
    """Else an operator follows the table, as without `untie`. Fresh norms hide what the head reads."""
    module: Any = drawn(Head(head))
    if fresh:
        module.m = nn.LayerNorm(D)
    i, made = torch.randint(0, 9, (2, 3)), dict[bool, Any]()
    for untie in (True, False):
        config = normfuse.Config(layernorm_to_rmsnorm="exact", untie=untie)
        made[untie], report = normfuse.optimize(module, config, args=(i,))
        assert report.converted == converted and not any(r.code == "NF304" for r in report.refusals)
        torch.testing.assert_close(made[untie](i), module(i), rtol=1e-4, atol=1e-5)
    assert torch.equal(made[True].e.weight, module.e.weight) is not copied
    assert torch.equal(made[True].other.weight, module.other.weight) and torch.equal(made[True].weight, module.weight)
    assert torch.equal(made[False].e.weight, module.e.weight)


class TwoTables(Head):
    """Two embeddings of one table."""

    def __init__(self) -> None:
        super().__init__(lambda s, y: s.other(y))
        self.p = nn.Embedding(9, D)
        self.p.weight = self.e.weight

    def forward(self, i: Tensor) -> Tensor:
        return self.head(self, self.n(self.e(i) - 3 * self.p(i + 1)))


def test_two_modules_get_one_copy() -> None:
    module: Any = drawn(TwoTables())
    i = torch.randint(0, 8, (2, 3))
    made: Any
    made, report = normfuse.optimize(module, normfuse.Config(layernorm_to_rmsnorm="exact", untie=True), args=(i,))
    assert report.converted == 1 and made.e.weight is made.p.weight is not made.other.weight
    torch.testing.assert_close(made(i), module(i), rtol=1e-4, atol=1e-5)


class Parts(nn.Module):
    """A norm that is made of others, `form`, ahead of a linear layer, and one that is by itself."""

    def __init__(self, form: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.i, self.f, self.k, self.form = nn.Linear(4, D), nn.Linear(D, D), nn.Linear(D, 3), form
        self.a, self.b, self.c = (nn.LayerNorm(D) for _ in range(3))
        self.bare = nn.LayerNorm(D, elementwise_affine=False)
        self.gamma, self.beta = nn.Parameter(torch.ones(D)), nn.Parameter(torch.ones(D))

    def forward(self, x: Tensor) -> Tensor:
        h = self.i(x)
        out: Tensor = self.k(self.c(h + self.f(self.form(self, h))))
        return out


@pytest.mark.parametrize(("form", "converted", "hook"), [
    (lambda s, h: s.bare(h) * s.gamma, "bare c", ""),  # as x-transformers writes it
    (lambda s, h: s.bare(h) * s.gamma + s.beta, "bare c", ""),
    (lambda s, h: s.bare(h) * (s.gamma + 1), "bare c", ""),
    (lambda s, h: s.a(h) * s.gamma, "a c", ""),
    (lambda s, h: s.a(h) + s.b(h), "a b c", ""),
    (lambda s, h: s.a(h) - s.bare(h) * s.gamma, "a bare c", ""),
    (lambda s, h: s.a(h) + F.layer_norm(h, (D,)), "a c", ""),
    (lambda s, h: s.a(h) + s.a(h * 2), "a c", ""),
    (lambda s, h: F.layer_norm(h, (D,)) * s.gamma, "c", ""),
    (lambda s, h: s.bare(h) * s.gamma, "c", "bare"),
    (lambda s, h: s.bare(h) * s.gamma + s.bare(s.b(h).tanh()), "b c", "")])  # fmt: skip
def test_a_norm_that_is_made_of_modules(form: Any, converted: str, hook: str) -> None:
    """Those are replaced, and what is done to their results stays as it is."""
    module: Any = drawn(Parts(form))
    if hook:
        module.get_submodule(hook).register_forward_hook(lambda m, given, output: None)
    x, names = torch.randn(2, 3, 4), converted.split()
    made: Any
    made, report = normfuse.optimize(module, normfuse.Config(layernorm_to_rmsnorm="exact"), args=(x,))
    assert {n for n, m in made.named_modules() if isinstance(m, normfuse.nn.RMSNorm)} == set(names)
    assert report.converted >= len(names) and not any(r.code == "NF304" for r in report.refusals)
    assert all(torch.equal(getattr(made, n), getattr(module, n)) for n in ("gamma", "beta"))
    torch.testing.assert_close(made.double()(x.double()), module.double()(x.double()), rtol=1e-6, atol=1e-6)


class Otherwise(nn.Module):
    """Its graph is off by a factor from the module itself, as where `torch.export` takes another order of steps."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor, self.l, self.n, self.o = factor, nn.Linear(D, D), nn.LayerNorm(D), nn.Linear(D, D)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.o(self.n(self.l(x)))
        return found * self.factor if torch.compiler.is_exporting() else found


class Elsewhere(Otherwise):
    """Its graph is another model's, which does not read the stream where that is large."""

    def forward(self, x: Tensor) -> Tensor:
        h = self.l(x)
        found: Tensor = self.o(self.n(h))
        return found * 2 if torch.compiler.is_exporting() else found + (h - h.clamp(-9, 9)).sum(-1, keepdim=True)


class Both(Otherwise):
    """It gives more than its graph."""

    def forward(self, x: Tensor) -> Any:
        found: Tensor = self.o(self.n(self.l(x)))
        return found if torch.compiler.is_exporting() else (found, found)


@pytest.mark.parametrize("kind", [Elsewhere, Both])
def test_a_graph_of_another_model(kind: Any) -> None:
    """Of this nothing is proved, however equal the results are for the inputs that are given."""
    module, x = drawn(kind(1.0)), torch.randn(2, D)
    result, report = normfuse.optimize(module, normfuse.Config(layernorm_to_rmsnorm="exact"), args=(x,))
    assert not report.converted and [r.code for r in report.refusals] == ["NF304"]
    torch.testing.assert_close(result(99 * x), module(99 * x), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("factor", "edits"), [(1 + 1e-9, True), (1.00001, True), (1 + 1e-9, False)])
def test_a_graph_that_rounds_otherwise(factor: float, edits: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The module that was converted is then compared with the module that was given."""
    module, x = drawn(Otherwise(factor)).double(), torch.randn(2, D, dtype=torch.float64)
    if not edits:
        monkeypatch.setattr("normfuse.frontends.module_convert._edit", lambda out, *_: out.l.weight.data.mul_(1.001))
    result, report = normfuse.optimize(module, normfuse.Config(layernorm_to_rmsnorm="exact"), args=(x,))
    assert report.converted == edits and [r.code for r in report.refusals] == ([] if edits else ["NF304"])
    torch.testing.assert_close(result(x), module(x), rtol=1e-12, atol=1e-12)


class Hiding(nn.Module):
    """A mask hides some outputs behind infinities."""

    def __init__(self) -> None:
        super().__init__()
        self.l, self.n, self.o = nn.Linear(D, D), nn.LayerNorm(D), nn.Linear(D, 5)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.o(self.n(self.l(x)))
        return out.masked_fill(torch.arange(5) > 2, -torch.inf)


@pytest.mark.parametrize("wrong", [False, True])
def test_infinities_hide_no_difference(wrong: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if wrong:
        monkeypatch.setattr("normfuse.frontends.module_convert._edit", lambda out, *_: out.o.weight.data.mul_(1.5))
    x = torch.randn(3, D)
    _, report = normfuse.optimize(drawn(Hiding()), normfuse.Config(layernorm_to_rmsnorm="exact"), args=(x,))
    assert (report.converted, [r.code for r in report.refusals]) == ((0, ["NF304"]) if wrong else (1, []))
