"""LayerNorm to RMSNorm, approximately: what calibration gains, what is measured, and what is refused."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
import transformers
from torch import Tensor, nn

import normfuse
from normfuse.cli import main
from normfuse.cli_report import bar
from normfuse.config import Config
from normfuse.errors import InputError, VerificationError
from normfuse.nn import RMSNorm
from normfuse.sessions import session
from tests.families import _silent, cached
from tests.layernorm_models import Wrapped, to_onnx
from tests.converted import drawn

VOCABULARY, LENGTH = 500, 12
LOOSE = Config(layernorm_to_rmsnorm="approximate", tolerance=0.5)


def bert(layers: int = 2, width: int = 48, heads: int = 4) -> nn.Module:
    """A post-norm encoder whose stream carries a mean, as trained ones do: norm biases and output biases not centred, a
    few large norm weights."""
    with _silent():
        torch.manual_seed(0)
        options: dict[str, Any] = {"vocab_size": VOCABULARY, "hidden_size": width, "num_hidden_layers": layers,
                                   "num_attention_heads": heads, "intermediate_size": 4 * width,
                                   "max_position_embeddings": 64, "attn_implementation": "eager"}  # fmt: skip
        model: Any = transformers.BertModel(transformers.BertConfig(**options), add_pooling_layer=False)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, p in model.named_parameters():
            noise = torch.randn(p.shape, generator=generator)
            if name.endswith("LayerNorm.weight"):
                p.copy_(0.85 + 0.1 * noise)
                p[torch.randperm(width, generator=generator)[:3]] *= 3
            elif name.endswith("LayerNorm.bias"):
                p.copy_(0.04 + 0.15 * noise)
            elif name.endswith("output.dense.bias"):
                p.copy_(0.2 + 0.1 * noise)
            elif p.dim() > 1:
                p.copy_((0.05 if width > 100 else 0.15) * noise + (0.03 if "word" in name else 0.0))
    return Wrapped(model, ("input_ids",)).eval()


def tokens(sets: int = 8, rows: int = 4) -> np.ndarray[Any, Any]:
    """Token ids of which some are much more frequent than others."""
    ids = np.random.default_rng(0).zipf(1.3, (sets, rows, LENGTH)) % (VOCABULARY - 3) + 3
    return ids.astype(np.int64)


@pytest.fixture(scope="module")
def model() -> Path:
    return cached("approximate-bert", lambda path: to_onnx(bert(), (torch.from_numpy(tokens()[0]),)).save(path))


def names_of(path: Path) -> str:
    return str(onnx.load(path).graph.input[0].name)


def feeds(path: Path) -> list[dict[str, Any]]:
    return [{names_of(path): ids} for ids in tokens()]


def run(path: Path, ids: Any) -> Any:
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return session.run(None, {names_of(path): ids})[0]


def test_an_onnx_model_is_calibrated(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.onnx"
    report = normfuse.rewrite(model, out, LOOSE, calibration=feeds(model))
    data = report.to_dict()
    verdicts = [n["conversion"]["verdict"] for n in data["norms"]]
    assert (verdicts.count("exact"), verdicts.count("approximate")) == (1, 4)
    cost = data["summary"]["approximation"]
    assert cost["error"] < cost["naive_error"] / 5
    assert cost["cosine"] < cost["naive_cosine"] / 10
    assert 0 < cost["noise_floor"] < 1e-5
    assert (cost["calibrated"], cost["held_back"]) == (6, 2)
    rough = [n["conversion"] for n in data["norms"] if n["conversion"]["verdict"] == "approximate"]
    assert all(0.05 < c["mean_over_rms"] < 1 and c["error"] < c["naive_error"] for c in rough)
    held = tokens()[-1]
    want, got = run(model, held), run(out, held)
    assert np.linalg.norm(want - got) / np.linalg.norm(want) == pytest.approx(cost["error"], rel=0.3)
    onnx.checker.check_model(str(out), full_check=True)


@pytest.mark.slow
def test_all_norms_of_a_model_of_the_size_of_minilm(tmp_path: Path) -> None:
    """6 layers of 384: 13 norms, the cosine distance of the embedding ten times smaller than without calibration."""
    module = bert(6, 384, 12)
    sets = [(torch.from_numpy(ids),) for ids in tokens(12, 8)]
    result, report = normfuse.optimize(module, LOOSE, args=sets[0], calibration=sets)
    cost = report.approximation
    assert cost is not None
    assert report.converted == 13
    assert cost.cosine < cost.naive_cosine / 10
    fresh = torch.from_numpy(np.random.default_rng(9).zipf(1.3, (8, LENGTH)) % (VOCABULARY - 3) + 3)
    with torch.no_grad():
        want, got = (m(fresh).mean(1) for m in (module, result))
        naive = copy.deepcopy(module)
        for path, layer in list(naive.named_modules()):
            if isinstance(layer, nn.LayerNorm):
                above, _, last = path.rpartition(".")
                setattr(naive.get_submodule(above), last, RMSNorm.of(layer, 384, layer.eps))
        dropped = naive(fresh).mean(1)

    def cosine(a: Tensor, b: Tensor) -> float:
        return float((1 - torch.nn.functional.cosine_similarity(a.double(), b.double())).mean())

    assert cosine(want, got) < cosine(want, dropped) / 10


def test_a_module_and_a_program_are_calibrated_alike() -> None:
    module, sets = bert(), [(torch.from_numpy(ids),) for ids in tokens()]
    result, report = normfuse.optimize(module, LOOSE, args=sets[0], calibration=sets)
    assert report.converted == 5
    assert sum(isinstance(m, RMSNorm) for m in result.modules()) == 5
    assert list(result.state_dict()) == list(module.state_dict())
    program, other = normfuse.optimize(torch.export.export(module, sets[0]), LOOSE, calibration=sets)
    assert report.approximation is not None
    assert other.approximation is not None
    assert report.approximation.error == pytest.approx(other.approximation.error)
    with torch.no_grad():
        torch.testing.assert_close(result(*sets[-1]), program.module()(*sets[-1]))


def test_only_the_norms_that_are_named(model: Path) -> None:
    labels = [n.name for n in normfuse.inspect(model).norms]
    config = Config(layernorm_to_rmsnorm="approximate", tolerance=0.5, norms=f"{labels[1]}, *_4")
    report = normfuse.optimize(model, config, calibration=feeds(model))[1]
    done = {n.name for n in report.norms if (n.conversion or {}).get("verdict") == "approximate"}
    assert done == {labels[1], labels[4]}


def test_beyond_the_tolerance_nothing_is_written_and_the_worst_are_named(model: Path, tmp_path: Path) -> None:
    config = Config(layernorm_to_rmsnorm="approximate", tolerance=1e-6)
    with pytest.raises(VerificationError, match=r"1e-06; the worst norms: node_layer_norm_\d"):
        normfuse.rewrite(model, tmp_path / "out.onnx", config, calibration=feeds(model))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("given", "message"), [
    (None, "needs calibration inputs"), (3, "not a int"), ([{"nothing": 1}], "no input is named 'nothing'"),
    ([{}, {}], "is missing"), ("/no/such/folder.npz", "No such file"),
])  # fmt: skip
def test_calibration_inputs_that_do_not_fit(given: Any, message: str, model: Path, tmp_path: Path) -> None:
    with pytest.raises((InputError, OSError), match=message):
        normfuse.rewrite(model, tmp_path / "out.onnx", LOOSE, calibration=given)
    assert not list(tmp_path.iterdir())


def test_calibration_inputs_of_another_shape_or_too_few(model: Path) -> None:
    name = names_of(model)
    with pytest.raises(InputError, match=rf"{name}.*shape 4x3, the model wants 4x12"):
        normfuse.optimize(model, LOOSE, calibration=[{name: tokens()[0][:, :3]}] * 2)
    with pytest.raises(InputError, match="at least two sets"):
        normfuse.optimize(model, LOOSE, calibration=feeds(model)[:1])
    program = torch.export.export(bert(), (torch.from_numpy(tokens()[0]),))
    with pytest.raises(InputError, match="the model does not run on the calibration inputs: index out of range"):
        normfuse.optimize(program, LOOSE, calibration=[(torch.full((4, 12), 10**6),)] * 2)
    with pytest.raises(InputError, match="an iterable of tuples of tensors, or for a"):
        normfuse.optimize(program, LOOSE, calibration=Path("inputs"))
    with pytest.raises(InputError, match="is a int, the program takes 4x12 of int64"):
        normfuse.optimize(program, LOOSE, calibration=[(1,)] * 2)
    with pytest.raises(InputError, match="is 4x12 of float32, the program takes 4x12 of int64"):
        normfuse.optimize(program, LOOSE, calibration=[(torch.zeros(4, 12),)] * 2)
    with pytest.raises(InputError, match="takes 1"):
        normfuse.optimize(program, LOOSE, calibration=[()] * 2)


@pytest.mark.parametrize(("given", "message"), [
    ([[1, 2], [3, 4]], "set 0 is a list; give dicts"), ([3, 3], "set 0 is a int"),
    ([{"ids": np.array([["a"] * 12] * 4)}] * 2, "holds <U1, the model wants int64"),
    ([{"ids": np.ones((4, 12)) * 1j}] * 2, "holds complex128, the model wants int64"),
])  # fmt: skip
def test_calibration_inputs_of_another_kind(given: Any, message: str, model: Path) -> None:
    given = [{names_of(model): one["ids"]} if isinstance(one, dict) else one for one in given]
    with pytest.raises(InputError, match=message):
        normfuse.optimize(model, LOOSE, calibration=given)


class Mixed(torch.nn.Module):
    """A norm that has to be approximated, of two inputs."""

    def __init__(self, whole: bool = False) -> None:
        super().__init__()
        self.n, self.whole = torch.nn.LayerNorm(8), whole

    def forward(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.n(torch.relu(a) + b.exp())
        return y.argmax(-1) if self.whole else y


def two(rows: int = 4, **more: Any) -> list[dict[str, torch.Tensor]]:
    torch.manual_seed(0)
    return [{"a": torch.randn(rows, 8), "b": torch.randn(rows, 8), **more} for _ in range(4)]


def program(whole: bool = False) -> torch.export.ExportedProgram:
    given, rows = (torch.ones(4, 8), torch.ones(4, 8)), {0: torch.export.Dim.DYNAMIC}
    return torch.export.export(Mixed(whole), given, dynamic_shapes=(rows, rows))


def test_inputs_by_name_are_taken_by_name() -> None:
    errors = [normfuse.optimize(program(), LOOSE, calibration=given)[1].approximation for given in (
        two(), [dict(reversed(one.items())) for one in two()], [(one["a"], one["b"]) for one in two()])]
    assert errors[0] is not None and len({e.error for e in errors if e is not None}) == 1
    with pytest.raises(InputError, match="set 0 has inputs named a, b, c; the program takes a, b"):
        normfuse.optimize(program(), LOOSE, calibration=two(c=torch.ones(4, 8)))
    for bad, message in ((3, "not a int"), ([3, 4], "set 0 is a int; give tuples of tensors")):
        with pytest.raises(InputError, match=message):
            normfuse.optimize(program(), LOOSE, calibration=bad)


def test_an_error_that_cannot_be_measured() -> None:
    """No rows, no floats, or no numbers."""
    empty, spoiled = two(0), two()
    spoiled[-1]["a"][0, 0] = float("nan")
    for given, whole, error, message in (
        (empty, False, InputError, "no rows"), ([*two()[:3], empty[0]], False, InputError, "no output of floats"),
        (two(), True, InputError, "no output of floats"), (spoiled, False, VerificationError, "nan"),
    ):  # fmt: skip
        with pytest.raises(error, match=message):
            normfuse.optimize(program(whole), LOOSE, calibration=given)


def test_a_pattern_that_names_no_norm(model: Path) -> None:
    with pytest.raises(InputError, match=r"no LayerNorm is named like 'nix\*'; there are node_layer_norm"):
        normfuse.optimize(model, Config(layernorm_to_rmsnorm="approximate", norms="nix*"), calibration=feeds(model))
    with pytest.raises(InputError, match=r"no LayerNorm is named like 'nix'; there are node_layer_norm"):
        normfuse.optimize(model, Config("approximate", norms="node_*, nix"), calibration=feeds(model))


def test_the_command_line(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for i, one in enumerate(feeds(model)):
        np.savez(tmp_path / f"{i}.npz", **one)
    args = ["rewrite", str(model), str(tmp_path / "out.onnx"), "--layernorm-to-rmsnorm", "approximate"]
    assert main([*args, "--calibration", str(tmp_path), "--tolerance", "0.5"]) == 0
    text = capsys.readouterr().out
    assert "approximated 4 on 6 sets of inputs; on 2 held back" in text
    assert "█" in text
    assert main([*args, "--overwrite", "--json"]) == 2
    assert "calibration" in json.loads(capsys.readouterr().out)["error"]["message"]


def test_a_bar_is_as_long_as_its_share() -> None:
    assert [bar(x, 2) for x in (0.0, 0.25, 0.5, 0.75, 1.0, 9.0)] == ["", "▌", "█", "█▌", "██", "██"]


class Bloom(nn.Module):
    """A norm behind the embedding, whose result is the stream: an operator takes its mean away."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.embedding = nn.Embedding(20, width)
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(4))
        self.inner = nn.ModuleList(nn.Linear(width, width) for _ in range(2))

    def forward(self, ids: Tensor) -> Tensor:
        x = self.norms[0](self.embedding(ids))
        for norm, layer in zip(self.norms[1:], self.inner, strict=False):
            x = x + layer(norm(x).tanh())
        out: Tensor = self.norms[-1](x)
        return out


def saved(module: nn.Module, ids: Tensor, folder: Path) -> Path:
    to_onnx(module, (ids,)).save(folder / "m.onnx")
    return folder / "m.onnx"


def test_what_is_converted_exactly_is_not_approximated(tmp_path: Path) -> None:
    """What was made of it, with the operator that takes the mean away, is a LayerNorm again by the algebra."""
    module, ids = drawn(Bloom()), torch.randint(0, 20, (8, 4, 5))
    sets = [(one,) for one in ids]
    program = torch.export.export(module, sets[0])
    path = saved(module, ids[0], tmp_path)
    (name,) = [v.name for v in onnx.load(path).graph.input]
    names = ",".join(n.name for n in normfuse.inspect(path).norms[:2])
    for pattern in ("*", names):
        loose = Config(layernorm_to_rmsnorm="approximate", tolerance=0.5, norms=pattern)
        exact = Config(layernorm_to_rmsnorm="exact")
        told = [normfuse.rewrite(path, tmp_path / f"{one.layernorm_to_rmsnorm}.onnx", one, overwrite=True,
                                 calibration=None if one is exact else [{name: i.numpy()} for i in ids])
                for one in (exact, loose)]  # fmt: skip
        assert (tmp_path / "exact.onnx").read_bytes() == (tmp_path / "approximate.onnx").read_bytes()
        assert [n.conversion for n in told[0].norms] == [n.conversion for n in told[1].norms]
        assert {n.action for n in told[1].norms} == {"converted"}
    given: Any
    for given, args in ((program, ()), (module, sets[0])):
        for config, calibration in ((exact, None), (LOOSE, sets)):
            made, report = normfuse.optimize(given, config, args=args, calibration=calibration)
            verdicts = [(n.action, (n.conversion or {})["verdict"][:5]) for n in report.norms]
            assert verdicts == [("converted", "exact")] * 4
            got = made.module()(ids[0]) if given is program else made(ids[0])
            torch.testing.assert_close(got, module(ids[0]), rtol=1e-4, atol=1e-5)


def test_a_converted_model_is_read_as_what_it_is(tmp_path: Path) -> None:
    """And may be rewritten again: the norm behind the operator is an RMSNorm of what others read as well."""
    module, ids = drawn(Bloom()), torch.randint(0, 20, (4, 5))
    path, out = saved(module, ids, tmp_path), tmp_path / "out.onnx"
    normfuse.rewrite(path, out, Config(layernorm_to_rmsnorm="exact"))
    assert {n.kind for n in normfuse.inspect(out).norms} == {"rms_norm"}
    assert main(["rewrite", str(out), str(tmp_path / "again.onnx"), "--strict", "-q"]) == 0
    assert out.read_bytes() == (tmp_path / "again.onnx").read_bytes()
    made, _ = normfuse.optimize(torch.export.export(module, (ids,)), Config(layernorm_to_rmsnorm="exact"))
    assert {n.kind for n in normfuse.inspect(made).norms} == {"rms_norm"}
    assert not normfuse.optimize(made)[1].refusals


class Shared(nn.Module):
    """Two norms, of which a part that the inputs do not reach shares the bias of the first."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.n = nn.Embedding(9, 16), nn.LayerNorm(16)
        self.m, self.other = nn.LayerNorm(16), nn.LayerNorm(16)
        self.l, self.other.bias = nn.Linear(16, 16), self.n.bias

    def forward(self, ids: Tensor, more: bool = False) -> Tensor:
        h: Tensor = self.first(ids)
        y: Tensor = self.other(torch.relu(h)) if more else self.m(torch.relu(self.l(self.n(torch.relu(h)))))
        return y


def test_a_bias_that_a_part_shares_which_is_not_reached_keeps_its_own_norm_only() -> None:
    torch.manual_seed(0)
    module, sets = Shared().eval(), [(torch.randint(9, (4, 8)),) for _ in range(4)]
    result, report = normfuse.optimize(module, LOOSE, args=sets[0], calibration=sets)
    assert [(r.code, "other.bias, which these inputs do not reach" in r.message) for r in report.refusals] == [
        ("NF301", True)]  # fmt: skip
    assert report.converted == 1 and isinstance(result.m, RMSNorm) and isinstance(result.n, nn.LayerNorm)
    torch.testing.assert_close(result(*sets[0], True), module(*sets[0], True))


def test_a_norm_that_no_output_reads_is_left() -> None:
    made = onnx.parser.parse_model('''<ir_version: 8, opset_import: ["": 17]>
        g (float[B, S, 16] x) => (float[B, S, 16] y) {
        y = LayerNormalization(x, w, b) dead = LayerNormalization(x, w, b) }''')
    rng = np.random.default_rng(0)
    made.graph.initializer.extend(
        onnx.numpy_helper.from_array(rng.standard_normal(16).astype("f4"), name) for name in "wb")
    feeds = [{"x": rng.standard_normal((2, 3, 16)).astype("f4")} for _ in range(6)]
    config = normfuse.Config(layernorm_to_rmsnorm="approximate", tolerance=9.0)
    result, report = normfuse.optimize(made, config, calibration=feeds)
    assert report.approximation is not None
    assert [n.action for n in report.norms] == ["converted", "left"] and len(report.approximation.layers) == 1
    assert session(result.SerializeToString()).run(None, feeds[0])[0].shape == (2, 3, 16)


SAVED = """e = Gather(table, ids) n, mean, inv = LayerNormalization<epsilon = 1e-5>(e, w, b) d = MatMul(n, k)
f = Add(d, e) y = LayerNormalization(f, w, b)"""


def given(lines: str, inputs: str, outputs: str) -> onnx.ModelProto:
    """A graph with a table, a matrix, a weight and a bias."""
    made = onnx.parser.parse_model(f'''<ir_version: 8, opset_import: ["": 17, "com.microsoft": 1]>
        g ({inputs}) => ({outputs}) {{ {lines} }}''')
    rng = np.random.default_rng(0)
    held = {"table": rng.normal(0.5, 1, (20, 16)), "k": rng.normal(0.3, 1, (16, 16)), "w": rng.random(16) + 0.5,
            "b": rng.random(16)}  # fmt: skip
    made.graph.initializer.extend(
        onnx.numpy_helper.from_array(array.astype("f4"), name) for name, array in held.items() if name in lines)
    return made


@pytest.mark.parametrize("mode", ["exact", "approximate"])
@pytest.mark.parametrize("read", ["mean", "inv"])
def test_an_operator_whose_statistics_are_read_stays(mode: str, read: str, tmp_path: Path) -> None:
    """It would be there twice, with two results of one name."""
    source = tmp_path / "in.onnx"
    onnx.save(given(SAVED, "int64[2, 3] ids", f"float[2, 3, 16] y, float[2, 3, 1] {read}"), source)
    feeds = [{"ids": np.random.default_rng(i).integers(0, 20, (2, 3))} for i in range(8)]
    config = (normfuse.Config(layernorm_to_rmsnorm="exact") if mode == "exact" else
              normfuse.Config(layernorm_to_rmsnorm="approximate", tolerance=9.0))
    report = normfuse.rewrite(source, tmp_path / "out.onnx", config, calibration=None if mode == "exact" else feeds)
    assert any("has other results that are read" in r.message for r in report.refusals) and len(report.norms) == 2
    before, after = (session(tmp_path / name).run(None, feeds[0]) for name in ("in.onnx", "out.onnx"))
    np.testing.assert_allclose(after[1], before[1], rtol=1e-5)


@pytest.mark.parametrize("lines", [
    """r = Relu(x) n, , , s = com.microsoft.SkipLayerNormalization(r, x, w, b) d = MatMul(n, k) y = Add(d, s)""",
    """i = Cast<to = 6>(ids) n, , s = com.microsoft.EmbedLayerNormalization(i, , table, table, , w, b)
    d = MatMul(n, k) y = Add(d, s)"""])
def test_an_operator_that_gives_its_sum_is_left(lines: str) -> None:
    words, rng = "ids" in lines, np.random.default_rng(1)
    made = given(lines, "int64[2, 3] ids" if words else "float[2, 3, 16] x", "float[2, 3, 16] y")
    feeds: list[dict[str, Any]] = [{"ids": rng.integers(0, 20, (2, 3))} if words else
                                   {"x": rng.standard_normal((2, 3, 16)).astype("f4")} for _ in range(8)]  # fmt: skip
    config = normfuse.Config(layernorm_to_rmsnorm="approximate", tolerance=9.0)
    report = normfuse.optimize(made, config, calibration=feeds)[1]
    assert [n.action for n in report.norms] == ["kept"] and [r.code for r in report.refusals] == ["NF301"]


class Hidden(nn.Module):
    """A mask hides some outputs behind infinities; another output is empty."""

    def __init__(self) -> None:
        super().__init__()
        self.n, self.o = nn.LayerNorm(16), nn.Linear(16, 5)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = self.o(self.n(x.relu()))
        return h.masked_fill(torch.arange(5) > 2, -torch.inf), h[..., :0]


@pytest.mark.parametrize("door", ["module", "program", "onnx"])
def test_infinities_that_stay_and_empty_outputs(door: str) -> None:
    torch.manual_seed(0)
    module, sets = Hidden().eval(), [(torch.randn(4, 16),) for _ in range(8)]
    config = normfuse.Config(layernorm_to_rmsnorm="approximate", tolerance=9.0)
    if door == "module":
        report = normfuse.optimize(module, config, args=sets[0], calibration=sets)[1]
    elif door == "program":
        report = normfuse.optimize(torch.export.export(module, sets[0]), config, calibration=sets)[1]
    else:
        source = to_onnx(module, sets[0]).model_proto
        named = [{source.graph.input[0].name: x.numpy()} for (x,) in sets]
        report = normfuse.optimize(source, config, calibration=named)[1]
    assert report.converted == 1 and report.approximation is not None
    assert 0.001 < report.approximation.error < 1


def test_an_input_whose_rank_is_not_known() -> None:
    made = given("n = LayerNormalization(x, w, b) y = Mul(n, m)", "float[2, 3, 16] x, float m", "float[2, 3, 16] y")
    made.graph.input[1].type.tensor_type.ClearField("shape")
    rng = np.random.default_rng(1)
    feeds = [{"x": rng.standard_normal((2, 3, 16)).astype("f4"), "m": np.ones(16, "f4")} for _ in range(8)]
    config = normfuse.Config(layernorm_to_rmsnorm="approximate", tolerance=9.0)
    assert normfuse.optimize(made, config, calibration=feeds)[1].converted == 1
