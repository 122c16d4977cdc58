"""LayerNorm to RMSNorm where only a part of a tensor is to be centred: of query, key and value side by side, which
are taken apart, the first two (ViT with norms of these, Persimmon)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

import normfuse
from normfuse.centring import Blocked, Centre, joined, regrouped
from normfuse.graph import Value
from tests.converted import converted_all, drawn

HEADS, WIDTH = 2, 6
D = HEADS * WIDTH

SIDE_BY_SIDE: dict[str, Callable[[Tensor], Any]] = {
    "unbind": lambda h: h.view(2, 3, 3, HEADS, WIDTH).permute(2, 0, 3, 1, 4).unbind(0),
    "index": lambda h: list(h.view(2, 3, 3, HEADS, WIDTH).permute(2, 0, 3, 1, 4)),
    "heads first": lambda h: [part.transpose(1, 2) for part in h.view(2, 3, HEADS, 3, WIDTH).unbind(3)],
    "chunk": lambda h: [part.squeeze(3) for part in h.view(2, 3, HEADS, 3, WIDTH).transpose(1, 2).chunk(3, 3)],
    "narrow": lambda h: narrow(h.view(2, 3, 3, D)),
    "two and one": lambda h: [*h.view(2, 3, 3, HEADS, WIDTH).permute(2, 0, 3, 1, 4).narrow(0, 0, 2).unbind(0),
                              h.view(2, 3, 3, HEADS, WIDTH)[:, :, -1].transpose(1, 2)],
}  # fmt: skip


def narrow(h: Tensor) -> list[Tensor]:
    return [h.narrow(2, i, 1).reshape(2, 3, HEADS, WIDTH).transpose(1, 2) for i in range(3)]


class Attention(nn.Module):
    """Attention with norms of some of query, key and value."""

    def __init__(self, take: Callable[[Tensor], Any], normed: str, width: int = WIDTH) -> None:
        super().__init__()
        self.norms: Any
        self.take, self.normed = take, normed
        self.qkv, self.out = nn.Linear(D, 3 * D), nn.Linear(D, D)
        self.norms = nn.ModuleDict({name: nn.LayerNorm(width) for name in normed})

    def forward(self, x: Tensor) -> Tensor:
        parts = dict(zip("qkv", self.take(self.bend(self.qkv(x))), strict=True))
        parts |= {name: self.norms[name](parts[name]) for name in self.normed}
        mixed = F.softmax(parts["q"] @ parts["k"].transpose(-1, -2), -1) @ parts["v"]
        out: Tensor = self.out(mixed.transpose(1, 2).reshape(2, 3, D))
        return out

    def bend(self, h: Tensor) -> Tensor:
        return h


@pytest.mark.parametrize("normed", ["qk", "k", "qkv"])
@pytest.mark.parametrize("way", SIDE_BY_SIDE)
@pytest.mark.parametrize("opset", [0, 13, 17])
def test_norms_of_query_and_key_side_by_side_with_the_value(way: str, normed: str, opset: int) -> None:
    """A part of a part is not asked for."""
    converted = 0 if (way, normed) == ("two and one", "k") else len(normed)
    converted_all(drawn(Attention(SIDE_BY_SIDE[way], normed)), converted, opset, D)


def test_the_value_stays_as_it_is() -> None:
    module: Any = drawn(Attention(SIDE_BY_SIDE["unbind"], "qk"))
    x = torch.randn(2, 3, D) * 3 + 50
    made: Any
    made, report = normfuse.optimize(module, normfuse.Config(layernorm_to_rmsnorm="exact"), args=(x,))
    assert report.converted == 2
    for old, new in ((module.qkv.weight, made.qkv.weight), (module.qkv.bias, made.qkv.bias)):
        assert torch.equal(new[2 * D :], old[2 * D :])
        assert new[: 2 * D].view(2 * HEADS, WIDTH, -1).mean(1).abs().max() < 1e-6
    exact = module.double()(x.double())
    assert (made(x) - exact).abs().max() <= 2 * (module.float()(x) - exact).abs().max()


class Bent(Attention):
    """Nothing ahead of it can take the mean away."""

    def bend(self, h: Tensor) -> Tensor:
        return h.tanh()


class Shown(Attention):
    """All three are read together as well."""

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = super().forward(x) + self.qkv(x).view(2, 3, 3, D).amax(2)
        return out


class Seen(Attention):
    """One of the tensors that they are taken from is read by another node, which no part is enough for."""

    def forward(self, x: Tensor) -> Tensor:
        h = self.qkv(x).view(2, 3, 3, HEADS, WIDTH).permute(2, 0, 3, 1, 4)
        q, k, v = h.unbind(0)
        mixed = F.softmax(self.norms["q"](q) @ self.norms["k"](k).transpose(-1, -2), -1) @ v + h.amax(0)
        out: Tensor = self.out(mixed.transpose(1, 2).reshape(2, 3, D))
        return out


class Last(Attention):
    """The last position of all three is read as it is: a slice along an axis of which no part is asked for."""

    def forward(self, x: Tensor) -> Tensor:
        h = self.qkv(x).view(2, 3, 3, HEADS, WIDTH).permute(2, 0, 3, 1, 4)
        q, k, v = h.unbind(0)
        mixed = F.softmax(self.norms["q"](q) @ self.norms["k"](k).transpose(-1, -2), -1) @ v + h[:, :, :, 2:].amax(0)
        out: Tensor = self.out(mixed.transpose(1, 2).reshape(2, 3, D))
        return out


class Twice(Attention):
    """The query is read as it is, too."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.take(self.qkv(x))
        mixed = F.softmax(self.norms["q"](q) @ self.norms["k"](k).transpose(-1, -2), -1) @ v + q.tanh()
        out: Tensor = self.out(mixed.transpose(1, 2).reshape(2, 3, D))
        return out


def strided(h: Tensor) -> Any:
    """The channels of a head are not side by side."""
    return h.view(2, 3, 3, WIDTH, HEADS).permute(2, 0, 4, 1, 3).unbind(0)


def across(h: Tensor) -> Any:
    """The parts are heads of other rows."""
    return h.view(2, 3, 3, HEADS, WIDTH).flatten(0, 1).reshape(3, 2, 3, HEADS, WIDTH).transpose(2, 3).unbind(0)


@pytest.mark.parametrize(("module", "converted"), [
    (Bent(SIDE_BY_SIDE["unbind"], "qk"), 0), (Seen(SIDE_BY_SIDE["unbind"], "qk"), 0),
    (Last(SIDE_BY_SIDE["unbind"], "qk"), 0),
    (Twice(SIDE_BY_SIDE["unbind"], "qk"), 1), (Attention(strided, "qk"), 0), (Attention(across, "qk"), 0)])  # fmt: skip
@pytest.mark.parametrize("opset", [0, 17])
def test_what_is_read_as_it_is(module: Attention, converted: int, opset: int) -> None:
    converted_all(drawn(module), converted, opset, D)


def test_a_linear_layer_that_is_computed_twice() -> None:
    """Its weight is read as it is, by the other of its two results."""
    converted_all(drawn(Shown(SIDE_BY_SIDE["unbind"], "qk")), 0, 0, D)


ONLY = (0, (0, 1))


@pytest.mark.parametrize(("source", "target", "axis", "only", "expected"), [
    # one axis becomes three: blocks for the query and the key
    ((2, 3, 36), (2, 3, 3, 2, 6), 4, (2, (0, 1)), Centre(2, ((0, 6), (6, 6), (12, 6), (18, 6)))),
    ((2, 3, 36), (2, 3, 2, 3, 6), 4, (3, (0,)), Centre(2, ((0, 6), (18, 6)))),
    (("b", "n", 36), ("b", "n", 2, 3, 6), 4, (3, (2,)), Centre(2, ((12, 6), (30, 6)))),
    # the other axis stays one
    ((3, 2, 12), (3, 2, 2, 6), 3, ONLY, Centre(2, ((0, 6), (6, 6)), only=ONLY)),
    ((3, 4, 6), (3, 1, 4, 6), 3, ONLY, Centre(2, ((0, 6),), only=ONLY)),
    ((1, 3, 4, 6), (3, 4, 6), 2, ONLY, Centre(3, ((0, 6),), only=(1, (0, 1)))),
    ((6, 3, 4), (6, 4, 3), 0, (2, (1,)), None),
    ((3, 2, 6), (3, 12), 1, ONLY, None),
    # and what cannot be told
    ((2, 3, 3, 12), (3, 6, 12), 2, ONLY, None),
    (("n", 12), (3, "m", 12), 2, ONLY, None),
    ((36,), (2, 3, 6), 2, (1, (0,)), Centre(0, ((0, 6), (18, 6)))),
    (("n", 36), (2, "n", 3, 6), 3, (0, (0,)), None),
])  # fmt: skip
def test_a_part_behind_a_reshape(source: Any, target: Any, axis: int, only: Any, expected: Centre | None) -> None:
    want = Centre(axis, ((0, target[axis]),), only=only)
    assert regrouped(source, target, want) == expected


def test_what_is_wanted_of_one_value() -> None:
    value = Value("v", (3, 4, 6), "float32", index=0)
    one = Centre(2, ((0, 6),))

    def part(*indices: int, axis: int = 0, blocks: Any = ((0, 6),)) -> Centre:
        return Centre(2, blocks, only=(axis, indices))

    assert joined(value, [part(0), part(2), part(0)]) == part(0, 2)
    assert joined(value, [part(0), part(1, 2)]) == one == joined(value, [part(1), one])
    for other in (part(0, axis=1), part(1, blocks=((0, 3), (3, 3))), Centre(1, ((0, 4),))):
        with pytest.raises(Blocked, match="in two ways"):
            joined(value, [part(0), other])


class Held(nn.Module):
    """The three tensors are rows of one parameter."""

    def __init__(self, first: int = 0) -> None:
        super().__init__()
        self.rows, self.first = nn.Parameter(torch.randn(3, 3, D)), first
        self.norms = nn.ModuleList(nn.LayerNorm(D) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.rows.reshape(3, 1, 3, D).unbind(0)
        out: Tensor = self.norms[0](q) * x + self.norms[1](k) + v
        return out


def test_a_part_of_a_parameter() -> None:
    module: Any = drawn(Held())
    converted_all(module, 2, 0, D)
    converted_all(module, 2, 17, D)
    made: Any
    exact = normfuse.Config(layernorm_to_rmsnorm="exact")
    made, report = normfuse.optimize(module, exact, args=(torch.randn(2, 3, D),))
    assert report.converted == 2 and torch.equal(made.rows[2], module.rows[2])
    told = [edit for norm in report.norms for edit in (norm.conversion or {})["edits"]]
    assert told and told[0].endswith("mean taken away along axis 2, at 0, 1 of axis 0")
    assert made.rows[:2].mean(-1).abs().max() < 1e-6


@pytest.mark.parametrize("verify", ["off", "sites"])
def test_a_copy_only_where_all_that_a_reader_gives_was_asked_for(verify: Any) -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rows, self.norm = nn.Parameter(torch.randn(2, 3, D)), nn.LayerNorm(D)

        def forward(self, x: Tensor) -> Tensor:
            first, second = self.rows.unbind(0)
            out: Tensor = self.norm(first) * x + second
            return out

    module, x = drawn(Two()), torch.randn(2, 3, D)
    config = normfuse.Config(layernorm_to_rmsnorm="exact", untie=True, verify=verify)
    made, _ = normfuse.optimize(torch.export.export(module, (x,)), config)
    torch.testing.assert_close(made.module()(x), module(x), rtol=1e-4, atol=1e-5)
