"""Streams that lie in memory as a transposed convolution left them: which sums may lie in another way."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import normfuse
from normfuse.frontends.fx_layout import Layouts, key
from tests.compiling import compiled, last, run

Tail = Callable[[Tensor, Tensor], Any]


class ViT(nn.Module):
    """A vision transformer without a token for the class; `tail` makes the output of the last stream and its norm."""

    def __init__(self, tail: Tail = lambda h, y: y) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.patches, self.places = nn.Conv2d(3, 16, 8, 8), nn.Parameter(torch.randn(1, 16, 16))
        self.norms = nn.ModuleList(nn.LayerNorm(16) for _ in range(3))
        self.layers = nn.ModuleList(nn.Linear(16, 16) for _ in range(2))
        self.tail = tail

    def forward(self, image: Tensor) -> Any:
        h = self.patches(image).flatten(2).transpose(1, 2) + self.places
        for norm, linear in zip(self.norms, self.layers, strict=False):
            h = h + linear(norm(h))
        return self.tail(h, self.norms[-1](h))


def image(batch: int = 2) -> Tensor:
    return torch.randn(batch, 3, 32, 32, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("inner", ["eager", "aot_eager"])
def test_sums_of_a_vision_transformer_are_fused(inner: str) -> None:
    model = ViT()
    parameters, wide = dict(model.named_parameters()), ViT().double()
    eager, got = run(model, (image(),), parameters), run(compiled(model, inner), (image(),), parameters)
    assert [n.emitted for n in last().norms] == ["", "normfuse.add_layer_norm", "normfuse.add_layer_norm"]
    exact = run(wide, (image().double(),), dict(wide.named_parameters()))
    for a, b, c in zip(eager, got, exact, strict=True):
        most = max(float(v.abs().max()) for v in exact)  # a gradient of places is a sum of what cancels
        assert float((b - c).abs().max()) <= max(2 * float((a - c).abs().max()), 1e-6 * most)
    assert got[0].stride() == eager[0].stride()


READ: dict[str, Tail] = {
    "one more addition": lambda h, y: y + torch.relu(h).sum(-1, keepdim=True),
    "a view": lambda h, y: (y, h[:, 1:].transpose(1, 2).sum(-1)),
    "a copy": lambda h, y: (y, torch.relu(h).contiguous() * 2),
    "products": lambda h, y: (y, torch.matmul(h, h.transpose(1, 2))),
    "parts": lambda h, y: (y, torch.matmul(h.chunk(2, -1)[1], y[..., :8].transpose(1, 2))),
    "a mean": lambda h, y: (y, h.mean(1)),
}


@pytest.mark.parametrize("tail", READ.values(), ids=READ)
@pytest.mark.parametrize("dynamic", [False, True])
def test_readers_that_take_a_sum_as_it_lies(tail: Tail, dynamic: bool) -> None:
    model = ViT(tail).eval()
    shapes = ({0: torch.export.Dim("batch", min=2, max=64)},) if dynamic else None
    program = torch.export.export(model, (image(),), dynamic_shapes=shapes)
    made, report = normfuse.optimize(program)
    assert [n.action for n in report.norms] == ["kept", "fused", "fused"]
    x = image(5 if dynamic else 2)
    for want, got in zip(*(torch.utils._pytree.tree_leaves(f(x)) for f in (model, made.module())), strict=True):
        assert want.stride() == got.stride()
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    if not dynamic:
        check_metas(made, x)


def check_metas(program: torch.export.ExportedProgram, x: Tensor) -> None:
    """What the program says of its tensors is what they are."""
    class Strides(torch.fx.Interpreter):
        def run_node(self, n: torch.fx.Node) -> Any:
            got = super().run_node(n)
            if isinstance(got, Tensor) and n.op != "placeholder":
                assert key(got) == key(n.meta["val"]), n.name
            return got

    state = program.state_dict | program.constants
    inputs = [state[s.target] if s.target is not None else x for s in program.graph_signature.input_specs]
    Strides(program.graph_module).run(*inputs)


MINDS: dict[str, Tail] = {
    "it is an output": lambda h, y: (y, h),
    "a view of it is": lambda h, y: (y, h[:, 1:]),
    "what is computed of it is": lambda h, y: (y, torch.relu(h) * 2),
    "a copy that would be a view": lambda h, y: y + h.reshape(len(h), 2, -1).sum(),
    "a view that would be a copy": lambda h, y: y + h.transpose(1, 2).reshape(len(h), -1)[:, :16].unsqueeze(1),
    "a copy beside a write": lambda h, y: y + h.contiguous().sum() + put(y.detach().clone()),
    "a given copy": lambda h, y: (y, torch.relu(h).contiguous()[:, 1:]),
    "one written in place": lambda h, y: y + put(torch.relu(h).reshape(len(h), -1)),
    "one that autograd keeps": lambda h, y: y + torch.sigmoid(h).contiguous().mul_(2).sum(),
    "a given copy that would be a view": lambda h, y: (y, h.reshape(len(h), 2, -1)[:, 1]),
    "a view that would be none": lambda h, y: y + h.transpose(1, 2).view(len(h), 256)[:, :16].unsqueeze(1),
    "memory as it is": lambda h, y: y + torch.as_strided(h, (16,), (1,)),
    "numbers drawn": lambda h, y: y + torch.rand_like(h).sum(-1, keepdim=True),
    "values dropped": lambda h, y: y + nn.functional.dropout(h, 0.5).sum(-1, keepdim=True),
    "channels dropped": lambda h, y: y + nn.functional.dropout1d(h, 0.5).sum(-1, keepdim=True),
    "attention of it": lambda h, y: y + nn.functional.scaled_dot_product_attention(h, h, h).sum(-1, keepdim=True),
    "groups of it": lambda h, y: y + nn.functional.group_norm(h.transpose(1, 2), 4).sum(1)[..., None],
    "a convolution": lambda h, y: y + torch.conv1d(h, torch.ones(16, 16, 1)),
    "another library": lambda h, y: y + torch.ops.normfuse_tests.as_it_lies(h),
    "in place": lambda h, y: y + h.mul_(2).sum(-1, keepdim=True),
}


def put(v: Tensor) -> Tensor:
    v[:, :3] = 7.0
    return v.sum()


@torch.library.custom_op("normfuse_tests::as_it_lies", mutates_args=())
def as_it_lies(h: Tensor) -> Tensor:
    return h.clone()


@as_it_lies.register_fake
def _(h: Tensor) -> Tensor:
    return torch.empty_like(h)


@pytest.mark.parametrize("tail", MINDS.values(), ids=MINDS)
def test_readers_that_mind(tail: Tail) -> None:
    model = ViT(tail)
    made = compiled(model, "eager")
    torch.manual_seed(1)
    want = model(image())
    torch.manual_seed(1)
    for a, b in zip(*map(torch.utils._pytree.tree_leaves, (want, made(image()))), strict=True):
        assert a.stride() == b.stride()
        torch.testing.assert_close(b, a)
    assert not any(n.emitted for n in last().norms)


class Pinned(ViT):
    """What its last norm gives lies as the model says, whatever the norm reads."""

    def forward(self, image: Tensor) -> Any:
        h = self.patches(image).flatten(2).transpose(1, 2) + self.places
        for norm, linear in zip(self.norms, self.layers, strict=False):
            h = h + linear(norm(h))
        return self.tail(h, self.norms[-1](h).transpose(1, 2).contiguous().transpose(1, 2))


@pytest.mark.parametrize("inner", ["eager", "aot_eager"])
@pytest.mark.parametrize("tail", [lambda h, y: y, lambda h, y: y.transpose(1, 2).view(len(y), -1).sum()])
def test_a_result_that_lies_as_an_operand_which_may_lie_in_another_way(inner: str, tail: Tail) -> None:
    model = Pinned(tail)
    with torch.no_grad():
        want, got = model(image()), compiled(model, inner)(image())
    assert want.stride() == got.stride()
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def test_sizes_that_are_one_for_small_numbers() -> None:
    """(height - 8) // 8 + 1 patches: one of 11 or 13 pixels."""
    model, x = ViT(lambda h, y: (y, h[:, 12:].sum(1))).eval(), torch.randn(2, 3, 48, 40)
    model.places = nn.Parameter(torch.randn(1, 1, 16))
    auto = torch.export.Dim.AUTO
    made, _ = normfuse.optimize(torch.export.export(model, (x,), dynamic_shapes=({2: auto, 3: auto},)))
    for want, got in zip(model(x), made.module()(x), strict=True):
        assert want.stride() == got.stride()
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def test_sizes_below_zero_for_small_numbers() -> None:
    model, x = ViT(lambda h, y: y[4:] + torch.relu(h)[1200:].sum()).eval(), image(1300)
    shapes = ({0: torch.export.Dim("batch", min=1250, max=1500)},)
    made, report = normfuse.optimize(torch.export.export(model, (x,), dynamic_shapes=shapes))
    assert [n.action for n in report.norms] == ["kept"] * 3
    torch.testing.assert_close(made.module()(x), model(x), rtol=1e-5, atol=1e-5)


def test_a_sum_that_is_looked_at_by_way_of_a_view() -> None:
    """OPT normalises rows; what stands between is a view of the sum, which then may not lie in another way."""
    model = ViT(lambda h, y: y).eval()
    model.forward = lambda x: viewed(model, x)  # type: ignore[method-assign, assignment]
    with torch.no_grad():
        want, got = model(image(1)), compiled(model, "eager")(image(1))
    assert [n.emitted for n in last().norms] == ["", "normfuse.add_layer_norm", "normfuse.add_layer_norm"]
    assert want.stride() == got.stride()
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def viewed(m: ViT, x: Tensor) -> Tensor:
    h = (m.patches(x).flatten(2).transpose(1, 2) + m.places).clone(memory_format=torch.contiguous_format)
    for norm, linear in zip(m.norms, m.layers, strict=False):
        h = h + linear(norm(h.view(-1, 16)).view(h.shape))
    out: Tensor = m.norms[-1](h.view(-1, 16)).view(h.shape)
    return out


@pytest.mark.parametrize("kind", [nn.LayerNorm, nn.RMSNorm])
def test_decomposed_programs(kind: Any) -> None:
    """There a norm may be an operator of three results, or many nodes."""
    model = ViT(lambda h, y: y + h.mean(1, keepdim=True)).eval()
    model.norms = nn.ModuleList(kind(16) for _ in range(3))
    program = torch.export.export(model, (image(),)).run_decompositions()
    made, _ = normfuse.optimize(program)
    want, got = program.module()(image()), made.module()(image())
    assert want.stride() == got.stride()
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def test_results_that_follow_one_another_are_followed_to_the_end() -> None:
    graph = torch.fx.Graph()
    lies, contiguous = torch.empty(2, 4, 3).transpose(1, 2), torch.empty(2, 3, 4)
    source, layouts = graph.placeholder("x"), Layouts(False)
    source.meta["val"] = contiguous
    nodes = [graph.call_function(torch.ops.aten.neg.default, (source,)) for _ in range(3000)]
    for node, before in zip(nodes, [source, *nodes], strict=False):
        node.meta["val"] = lies
        if before is not source:
            layouts.follow(node, before)
    assert layouts.allow([(nodes[0], source)]) and len(layouts.ways) == 3000
    assert layouts.fix(source) and not layouts.fix(nodes[-1])


def test_a_stream_of_a_size_below_zero_for_small_numbers() -> None:
    class Part(ViT):
        def forward(self, image: Tensor) -> Any:
            h = (self.patches(image).flatten(2).transpose(1, 2) + self.places)[1200:]
            for norm, linear in zip(self.norms, self.layers, strict=False):
                h = h + linear(norm(h))
            return self.norms[-1](h)

    model, x = Part().eval(), image(1300)
    shapes = ({0: torch.export.Dim("batch", min=1250, max=1500)},)
    made, report = normfuse.optimize(torch.export.export(model, (x,), dynamic_shapes=shapes))
    assert [n.action for n in report.norms] == ["kept"] * 3
    torch.testing.assert_close(made.module()(x), model(x), rtol=1e-5, atol=1e-5)
