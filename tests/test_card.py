"""The card of a model: what its layers are is read off the graph, from ONNX and from torch alike."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor, nn

import normfuse
from normfuse.blocks import find
from normfuse.card import Card, affine, layers_text
from normfuse.config import Target
from normfuse.graph import Graph
from tests.cli_tools import fails, norm_model, run, saved
from tests.families import FAMILIES, LAYERS, cached_export, exported_program
from tests.layernorm_architectures import ARCHITECTURES
from tests.share import share

ALL = tuple(range(LAYERS))


def pre(part: str, operator: str = "RMSNorm") -> str:
    return f"x + {part}({operator}(x))"


EXPECTED: dict[str, dict[str, Any]] = {
    "llama": {
        "blocks": [(ALL, [pre("attention"), pre("feed-forward")], [[], ["gated SiLU"]])],
        "norms": {("attention", "before", 64, ALL), ("feed_forward", "before", 64, ALL), ("", "final", 64, ())},
        "eps": "1e-06",
    },
    "qwen3": {
        "blocks": [(ALL, [pre("attention"), pre("feed-forward")], [["RMSNorm of q and k, per head"], ["gated SiLU"]])],
        "norms": {("attention", "before", 64, ALL), ("attention", "q, per head", 16, ALL),
                  ("attention", "k, per head", 16, ALL), ("feed_forward", "before", 64, ALL),
                  ("", "final", 64, ())},
        "eps": "1e-06",
    },
    "deepseek_v3": {  # one dense layer, one with experts
        "blocks": [((0,), [pre("attention"), pre("feed-forward")], [["RMSNorm of q and k+v, latent"], ["gated SiLU"]]),
                   ((1,), [pre("attention"), pre("feed-forward")],
                    [["RMSNorm of q and k+v, latent"], ["gated SiLU", "experts"]])],
        "norms": {("attention", "before", 64, ALL), ("attention", "latent of q", 48, ALL),
                  ("attention", "latent of k+v", 32, ALL), ("feed_forward", "before", 64, ALL),
                  ("", "final", 64, ())},
        "eps": "1e-06",
    },
    "gpt_oss": {
        "blocks": [(ALL, [pre("attention"), pre("feed-forward")], [[], ["gated QuickGELU", "experts"]])],
        "norms": {("attention", "before", 64, ALL), ("feed_forward", "before", 64, ALL), ("", "final", 64, ())},
        "eps": "1e-05",
    },
    "gemma3": {
        "blocks": [(ALL, ["x + RMSNorm(attention(RMSNorm(x)))", "x + RMSNorm(feed-forward(RMSNorm(x)))"],
                    [["RMSNorm of q and k, per head"], ["gated GELU"]])],
        "norms": {("attention", "before", 64, ALL), ("attention", "q, per head", 16, ALL),
                  ("attention", "k, per head", 16, ALL), ("attention", "after, inside the residual", 64, ALL),
                  ("feed_forward", "before", 64, ALL), ("feed_forward", "after, inside the residual", 64, ALL),
                  ("", "final", 64, ())},
        "eps": "1e-06",
        "weight": "1 + w",
    },
    "olmo2": {
        "blocks": [(ALL, ["x + RMSNorm(attention(x))", "x + RMSNorm(feed-forward(x))"],
                    [["RMSNorm of q and k, full width"], ["gated SiLU"]])],
        "norms": {("attention", "q, full width", 64, ALL), ("attention", "k, full width", 32, ALL),
                  ("attention", "after, inside the residual", 64, ALL),
                  ("feed_forward", "after, inside the residual", 64, ALL), ("", "final", 64, ())},
        "eps": "1e-05",
    },
    "gpt2": {
        "blocks": [(ALL, [pre("attention", "LayerNorm"), pre("feed-forward", "LayerNorm")], [[], ["GELU"]])],
        "norms": {("attention", "before", 64, ALL), ("feed_forward", "before", 64, ALL), ("", "final", 64, ())},
        "eps": "1e-05",
        "bias": True,
    },
}  # fmt: skip


def card_of(name: str, door: str) -> Card:
    """The card of a family, by way of an ONNX opset or torch.export."""
    family = FAMILIES[name]
    model = exported_program(family.build(), family.args()) if door == "fx" else cached_export(name, int(door))
    card = normfuse.inspect(model).card
    assert card is not None
    return card


def blocks(card: Card) -> list[tuple[tuple[int, ...], list[str], list[list[str]]]]:
    """Each kind of layer of the only stack: which, as formulas, with remarks."""
    (stack,) = card.stacks
    return [(tuple(b.layers), [card.formula(x) for x in b.branches], [card.remarks(x) for x in b.branches])
            for b in stack.blocks]  # fmt: skip


@pytest.mark.parametrize(("name", "door"), [
    *share(((name, "18") for name in EXPECTED), 1), *share(((name, "23") for name in EXPECTED), 7, 5),
    *share(((name, "fx") for name in EXPECTED), 2),
])  # fmt: skip
def test_recipe_of_a_family(name: str, door: str) -> None:
    card, want = card_of(name, door), EXPECTED[name]
    assert blocks(card) == want["blocks"]
    assert {(u.part, u.where, u.width, tuple(u.layers)) for u in card.norms} == want["norms"]
    assert {u.operator for u in card.norms} == {"LayerNorm" if name == "gpt2" else "RMSNorm"}
    assert {f"{u.eps:.0e}" for u in card.norms} == {want["eps"]}
    assert {u.bias for u in card.norms} == {want.get("bias", False)}
    assert {u.cast for u in card.norms} == {"float32"}
    # torch.onnx.export computes 1 + w ahead: in the file there is one constant
    assert {u.weight for u in card.norms} == {want.get("weight", "w") if door == "fx" else "w"}
    assert sum(u.count for u in card.norms) == FAMILIES[name].norms
    assert card.outside == [i for i, u in enumerate(card.norms) if u.place == "final"]
    json.dumps(card.to_dict())


@pytest.mark.parametrize("door", ["18", pytest.param("fx", marks=pytest.mark.slow)])
def test_families_are_told_apart(door: str) -> None:
    told = {name: repr((blocks(card), [(u.operator, u.where, f"{u.eps:.0e}") for u in card.norms]))
            for name in EXPECTED for card in [card_of(name, door)]}  # fmt: skip
    assert len(set(told.values())) == len(EXPECTED)


@pytest.mark.parametrize(("name", "formulas"), [
    ("bert", ["LayerNorm(x + attention(x))", "LayerNorm(x + feed-forward(x))"]),
    ("gpt_neox", ["x + attention(LayerNorm(x)) + feed-forward(LayerNorm(x))"]),
    ("falcon", ["x + attention(LayerNorm(x)) + feed-forward(LayerNorm(x))"]),  # added in place by torch
    ("cohere", ["x + attention(LayerNorm(x)) + feed-forward(LayerNorm(x))"]),  # added one after the other
])  # fmt: skip
@pytest.mark.parametrize("door", ["18", pytest.param("fx", marks=pytest.mark.slow)])
def test_other_blocks(name: str, formulas: list[str], door: str) -> None:
    assert [found for _, found, _ in blocks(card_of(name, door))] == [formulas]


@pytest.mark.slow  # each is exported anew
@pytest.mark.parametrize(("kind", "name", "formulas"), [
    # a post-norm model whose embeddings are not normalised: the first norm stands in the first layer
    ("decoder", "openai_gpt", [["LayerNorm(x + attention(x))", "LayerNorm(x + feed-forward(x))"]]),
    # feed-forwards at both ends of a layer; attention multiplies queries with positions as well
    ("audio", "parakeet", [[pre("feed-forward", "LayerNorm"), pre("attention", "LayerNorm"),
                            pre("convolution", "LayerNorm"), f"LayerNorm({pre('feed-forward', 'LayerNorm')})"],
                           [pre("feed-forward", "LayerNorm"), pre("attention", "LayerNorm"),
                            pre("convolution", "LayerNorm"), pre("feed-forward", "LayerNorm")]]),
])  # fmt: skip
def test_unusual_layers(kind: str, name: str, formulas: list[list[str]]) -> None:
    case = ARCHITECTURES[kind][name]
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.export.export(case.build(), case.inputs(), strict=False)
    card = normfuse.inspect(program).card
    assert card is not None
    assert [found for _, found, _ in blocks(card)] == formulas


def test_encoder_and_decoder_are_two_stacks() -> None:
    card = card_of("t5", "18")
    shown = [[card.formula(b) for b in stack.blocks[0].branches] for stack in card.stacks]
    assert [stack.depth for stack in card.stacks] == [LAYERS, LAYERS]
    assert shown == [[pre("attention"), pre("feed-forward")],
                     [pre("attention"), pre("cross-attention"), pre("feed-forward")]]  # fmt: skip


@pytest.mark.parametrize(("read", "kind"), [
    ("GroupQueryAttention<num_heads = 4, kv_num_heads = 2>(p, , , k, v, lens, total)", "attention"),
    ("GroupQueryAttention<num_heads = 4, kv_num_heads = 2>(q, s, s, k, v, lens, total)", "attention"),
    ("GroupQueryAttention<num_heads = 4, kv_num_heads = 2>(q, t, t, k, v, lens, total)", "cross-attention"),
])
def test_attention_on_packed_rows_is_of_the_rows_themselves(read: str, kind: str) -> None:
    """What the operator has then behind its first operand is the cache."""
    cache = "float[2, 2, past, 8]"
    made = onnx.parser.parse_model(f"""<ir_version: 8, opset_import: ["": 17, "com.microsoft": 1]>
        g (float[2, 4, 32] x, float[2, 4, 16] t, {cache} k, {cache} v, int32[2] lens, int32 total, float[32] w,
           float[32, 64] P, float[32, 32] Q, float[32, 16] S, float[32, 32] O) => (float[2, 4, 32] y) {{
            n = com.microsoft.SimplifiedLayerNormalization<axis = -1, epsilon = 0.01>(x, w)
            p = MatMul(n, P) q = MatMul(n, Q) s = MatMul(n, S) a = com.microsoft.{read} o = MatMul(a, O)
            y = Add(x, o) }}""")
    rng = np.random.default_rng(0)
    for value in [v for v in made.graph.input if v.name in "wPQSO"]:
        made.graph.input.remove(value)
        shape = [d.dim_value for d in value.type.tensor_type.shape.dim]
        made.graph.initializer.append(onnx.numpy_helper.from_array(rng.random(shape, np.float32), value.name))
    card = normfuse.inspect(made).card
    assert card is not None and [formulas for _, formulas, _ in blocks(card)] == [[pre(kind)]]


class BesideTheStream(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linears = torch.nn.ModuleList([torch.nn.Linear(16, 16) for _ in range(2)])
        self.norms = torch.nn.ModuleList([torch.nn.RMSNorm(16) for _ in range(2)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for linear, norm in zip(self.linears, self.norms, strict=True):
            x = x + linear(x)
            x = x + norm(x)
        return x


class BesideABranch(BesideTheStream):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = x + self.linears[0](x)
        beside: torch.Tensor = torch.relu(self.linears[1](x)) + self.norms[0](y)
        return y + beside


@pytest.mark.parametrize(("module", "formula"), [
    (BesideTheStream, "x + linear(x)"), (BesideABranch, "x + feed-forward(x) + linear(x)"),
])
def test_a_norm_that_is_added_to_what_it_is_of(module: type[torch.nn.Module], formula: str) -> None:
    """It is no part of x + linear(x), nor is that added a second time."""
    card = normfuse.inspect(torch.export.export(module(), (torch.ones(2, 16),))).card
    assert card is not None and [formulas for _, formulas, _ in blocks(card)] == [[formula]]


@pytest.mark.parametrize("target", ["onnx", "normfuse", "ort-cpu"])
@pytest.mark.parametrize("name", ["gemma3", "olmo2", "deepseek_v3", "gpt2"])
def test_a_rewritten_model_has_the_same_blocks(name: str, target: Target, tmp_path: Path) -> None:
    """Also where one operator does the addition and the norm, or the norms of queries and keys."""
    source = cached_export(name, 18)
    normfuse.rewrite(source, tmp_path / "o.onnx", normfuse.Config(target=target, verify="off"))
    now = normfuse.inspect(tmp_path / "o.onnx").card
    assert now is not None
    assert blocks(now) == blocks(card_of(name, "18"))


# -- layers that differ -------------------------------------------------------------------------------------------


class Norm(nn.Module):
    def __init__(self, width: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(width)), eps

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps)


class Attention(nn.Module):
    """Two heads of 8, from and to any width; QK-norm per head, over the full width or not at all."""

    def __init__(self, width: int, qk: str) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(width, 16), nn.Linear(width, 16), nn.Linear(width, 16),
                                          nn.Linear(16, width))  # fmt: skip
        self.qk = qk
        size = {"head": 8, "full": 16}.get(qk)
        self.q_norm = Norm(size) if size else nn.Identity()
        self.k_norm = Norm(size) if size else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.q(x), self.k(x), self.v(x)
        if self.qk == "full":
            q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = (t.unflatten(-1, (2, 8)).transpose(1, 2) for t in (q, k, v))
        if self.qk == "head":
            q, k = self.q_norm(q), self.k_norm(k)
        scores = torch.softmax(q @ k.transpose(-1, -2), -1) @ v
        out: Tensor = self.o(scores.transpose(1, 2).flatten(2))
        return out


class Model(nn.Module):
    def __init__(self, width: int, qk: list[str], eps: dict[int, float]) -> None:
        super().__init__()
        self.attention = nn.ModuleList(Attention(width, kind) for kind in qk)
        self.first = nn.ModuleList(Norm(width) for _ in qk)
        self.second = nn.ModuleList(Norm(width, eps.get(i, 1e-6)) for i in range(len(qk)))
        self.up, self.down = nn.Linear(width, 24), nn.Linear(24, width)
        self.last = Norm(width)

    def forward(self, x: Tensor) -> Tensor:
        for attention, first, second in zip(self.attention, self.first, self.second, strict=True):
            x = x + attention(first(x))
            x = x + self.down(torch.nn.functional.gelu(self.up(second(x))))
        out: Tensor = self.last(x)
        return out


def small(qk: list[str], eps: dict[int, float] | None = None, width: int = 12) -> normfuse.Report:
    with torch.no_grad():
        program = torch.export.export(Model(width, qk, eps or {}).eval(), (torch.randn(2, 5, width),))
    return normfuse.inspect(program)


def test_layers_that_deviate() -> None:
    report = small(["" if i in (5, 11) else "head" for i in range(12)], {3: 1e-5})
    card = report.card
    assert card is not None
    (stack,) = card.stacks
    assert [layers_text(b.layers, stack.depth) for b in stack.blocks] == [
        "layers 0-11 but 3, 5 and 11", "layers 5 and 11", "layer 3"]  # fmt: skip
    assert [card.remarks(b.branches[0]) for b in stack.blocks] == [["RMSNorm of q and k, per head"], [],
                                                                  ["RMSNorm of q and k, per head"]]  # fmt: skip
    assert card.differences(stack.blocks[2], stack.blocks[0]) == ["RMSNorm before: eps 1e-05 instead of 1e-06"]
    assert card.differences(stack.blocks[1], stack.blocks[0]) == []
    q = next(u for u in card.norms if u.of == "q")
    assert q.which == "layers 0-11 but 5 and 11" and q.count == 10


@pytest.mark.parametrize(("qk", "scope"), [("head", "per head"), ("full", "over the full width")])
@pytest.mark.parametrize("width", [12, 16])
def test_the_width_of_a_qk_norm_is_that_of_the_scores(qk: str, scope: str, width: int) -> None:
    """All heads together need not be as wide as the model."""
    assert small([qk], width=width).recipe == f"RMSNorm, pre-norm, QK-norm {scope}"


ATTENTION = """q = MatMul(x, W) k = MatMul(x, K) v = MatMul(x, K) qr = Reshape(q, {query}) kr = Reshape(k, {key})
qn = SimplifiedLayerNormalization<axis = -1>(qr, wq) kn = SimplifiedLayerNormalization<axis = -1>(kr, wk)
qf = Reshape(qn, wide) kf = Reshape(kn, narrow)
y = com.microsoft.GroupQueryAttention<num_heads = 4, kv_num_heads = 2>(qf, kf, v, , , n, total)"""


@pytest.mark.parametrize(("query", "key", "scope"), [("head", "head", "per head"),
                                                     ("wide", "narrow", "over the full width")])  # fmt: skip
def test_the_width_of_a_qk_norm_where_an_operator_has_the_scores(query: str, key: str, scope: str) -> None:
    """As the model builder of onnxruntime-genai writes Qwen3."""
    made = onnx.parser.parse_model(
        '<ir_version: 8, opset_import: ["": 17, "com.microsoft": 1]> g (float[B, S, 32] x, int32[B] n, int32 total) => '
        f"(float[B, S, 32] y) {{ {ATTENTION.format(query=query, key=key)} }}")  # fmt: skip
    sizes = {"W": (32, 32), "K": (32, 16), "wq": (8 if query == "head" else 32,), "wk": (8 if key == "head" else 16,)}
    arrays = {n: np.ones(s, "f4") for n, s in sizes.items()} | {
        "head": np.array([0, -1, 8]), "wide": np.array([0, -1, 32]), "narrow": np.array([0, -1, 16])}  # fmt: skip
    made.graph.initializer.extend(onnx.numpy_helper.from_array(a, n) for n, a in arrays.items())
    report = normfuse.inspect(made)
    assert [n.placement for n in report.norms] == ["qk", "qk"] and report.recipe == f"RMSNorm, QK-norm {scope}"


@pytest.mark.parametrize(("layers", "depth", "words"), [
    ([0], 1, "the only layer"), (range(12), 12, "all 12 layers"), ([5], 12, "layer 5"),
    ([5, 11], 12, "layers 5 and 11"), ([0, 1], 12, "layers 0 and 1"),
    ([i for i in range(12) if i not in (5, 11)], 12, "layers 0-11 but 5 and 11"),
    ([i for i in range(12) if i != 0], 12, "layers 1-11"), ([0, 1, 2], 12, "layers 0-2"),
    (range(5, 60, 6), 60, "layers 5-59 in steps of 6"),
    ([i for i in range(60) if i % 6 != 5], 60, "layers 0-59 but 5-59 in steps of 6"),
    ([0, 1, 2, 7], 12, "layers 0-2 and 7"), (list(range(11)), 12, "layers 0-10"),
])  # fmt: skip
def test_layers_in_words(layers: Any, depth: int, words: str) -> None:
    assert layers_text(list(layers), depth) == words


def test_a_weight_that_is_a_product() -> None:
    graph = Graph()
    v, w = graph.leaf("v", (4,), "float32", fixed=True), graph.leaf("w", (4,), "float32", fixed=True)
    assert affine(None) == "none"
    assert affine(((1.0, ((v, 1),)),)) == "w"
    assert affine(((1.0, ((v, 1), (w, -1))),)) == "w1*w2^-1"
    assert affine(((0.5, ((v, 1),)), (1.0, ()))) == "1 + 0.5*w"
    one = graph.leaf("1", (), "float32", number=1.0, fixed=True)
    total = graph.value("t", (4,), "float32")
    graph.node("add", [one, v], [total])
    assert affine(((1.0, ((total, 1),)),)) == "1 + w"
    assert affine(((0.5, ((total, 1),)),)) == "0.5*(1 + w)"


def test_skips_over_skips_end() -> None:
    """A thousand nested skips: the walks stop in time, and say nothing rather than something wrong."""
    graph, ends = Graph(), []
    x = graph.leaf("x", (2, 8, 4), "float32")
    w = graph.leaf("w", (4, 4), "float32", fixed=True)
    for i in range(1000):
        ends.append(x)
        out = graph.value(f"l{i}", x.shape, "float32")
        graph.node("linear", [x, w], [out])
        x = out
    for i, skip in enumerate(reversed(ends)):
        out = graph.value(f"a{i}", x.shape, "float32")
        graph.node("add", [skip, x], [out])
        x = out
    stacks = find(graph, [])
    assert all(len(part.nodes) < 2000 for layers in stacks for layer in layers for b in layer for part in b.parts)


def test_a_model_without_layers_has_a_card(tmp_path: Path) -> None:
    card = normfuse.inspect(saved(norm_model(), tmp_path / "m.onnx")).card
    assert card is not None
    assert card.stacks == [] and card.outside == [0]
    (use,) = card.norms
    assert use.which == "outside the layers" and use.width == 64


# -- the command line ---------------------------------------------------------------------------------------------


def test_inspect_prints_the_layers() -> None:
    out = run("inspect", cached_export("deepseek_v3", 18))[1]
    assert "layer 0\n  x + attention(RMSNorm(x))     RMSNorm of q and k+v, latent\n" in out
    assert "layer 1\n" in out and "x + feed-forward(RMSNorm(x))  gated SiLU; experts\n" in out


def test_json_of_one_model_and_of_several(tmp_path: Path) -> None:
    one, other = cached_export("llama", 18), saved(norm_model(), tmp_path / "m.onnx")
    code, out, _ = run("inspect", one, "--json")
    alone = json.loads(out)
    assert code == 0 and set(alone) == {"schema", "norms", "refusals", "summary"}
    assert [s["depth"] for s in alone["summary"]["card"]["stacks"]] == [LAYERS]
    assert sum(alone["summary"]["operators"].values()) == alone["summary"]["nodes"]
    code, out, err = run("inspect", one, tmp_path / "none.onnx", other, "--json")
    many = json.loads(out)
    assert code == 2 and err == "" and set(many) == {"schema", "models"} and many["schema"] == 1
    first, bad, last = many["models"]
    assert first["path"] == str(one) and first["norms"] == alone["norms"]
    assert bad == {"path": str(tmp_path / "none.onnx"),
                   "error": {"kind": "InputError", "message": f"{tmp_path / 'none.onnx'}: no such file"}}  # fmt: skip
    assert len(last["norms"]) == 1


def test_a_model_that_cannot_be_read(tmp_path: Path) -> None:
    good = saved(norm_model(), tmp_path / "m.onnx")
    code, out, err = run("inspect", good, tmp_path / "none.onnx", "-q")
    assert code == 2 and out.count("\n") == 1
    assert err == f"normfuse: {tmp_path / 'none.onnx'}: no such file\n"
    fails(run("inspect", tmp_path / "none.onnx"))
