"""LayerNorm to RMSNorm over transformers' architectures: how many norms are converted, that the models give the same,
and what stood in the way of one or another of them."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor, nn

import normfuse
from normfuse.convert import LIMIT
from normfuse.distance import relative
from normfuse.frontends import onnx_kernels
from normfuse.frontends.onnx_certify import OPERATORS
from tests.layernorm_architectures import ARCHITECTURES, CASES, EXACT, Outcome, converted, outcome_of
from tests.layernorm_models import CASES as OTHERS
from tests.layernorm_models import to_onnx
from tests.share import share

CLOSE = 1e-4
SLOW = frozenset(
    """segformer pvt hiera dpt depth_anything convnextv2 cvt yolos focalnet wav2vec2_bert clap_audio parakeet
    speech_to_text moonshine deberta_v2 esm perceiver gptj stablelm_qk cohere_qk persimmon phimoe rwkv
    marian pegasus""".split()
)
ONNX = {"clip_text": (5, 5, 0), "hubert": (8, 9, 1), "beit": (5, 5, 0), "convnextv2": (1, 10, 0), "vit_mae": (8, 8, 0),
        "roberta": (1, 6, 0), "deberta_v2": (2, 7, 0), "cohere_qk": (7, 7, 0)}  # fmt: skip
"""(converted, norms, operators): the exporter gives each reader of a tied weight a copy, and folds what is constant."""


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Models so small gain nothing from threads, which on a busy machine wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def _holds(found: Outcome, counts: tuple[int, int, int]) -> None:
    assert (found.converted, found.norms, found.operators) == counts, found
    assert found.apart <= CLOSE
    assert (found.checked is None) == (found.converted == 0)
    assert found.checked is None or found.checked <= LIMIT


def test_names() -> None:
    assert not set(CASES) & set(OTHERS)
    assert len(CASES) == sum(len(group) for group in ARCHITECTURES.values())
    assert set(CASES) >= SLOW | set(ONNX)


@pytest.mark.parametrize("name", [
    *share((name for name in CASES if name not in SLOW), 3),
    *(pytest.param(name, marks=pytest.mark.slow) for name in CASES if name in SLOW),
])  # fmt: skip
def test_architecture(name: str) -> None:
    case = CASES[name]
    _holds(converted(case), (case.converted, case.norms, case.operators))


@pytest.mark.parametrize("name", share(ONNX, 4))
def test_onnx(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    module, args = case.build(), case.inputs()
    to_onnx(module, args).save(str(tmp_path / "a.onnx"))
    report = normfuse.rewrite(tmp_path / "a.onnx", tmp_path / "b.onnx", EXACT)
    with torch.no_grad():
        want = module(*args).numpy()
    _holds(outcome_of(report, relative(want, _run(tmp_path / "b.onnx", args))), ONNX[name])


def _run(path: Path, args: tuple[Tensor, ...]) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    names = [value.name for value in session.get_inputs()]
    found = session.run(None, {name: value.numpy() for name, value in zip(names, args, strict=True)})[0]
    assert isinstance(found, np.ndarray)
    return found


# -- what the architectures showed ------------------------------------------------------------------------------------


class Stream(nn.Module):
    """A residual stream with a norm ahead of each layer, and what a test does before the end."""

    def __init__(self) -> None:
        super().__init__()
        self.start, self.layers = nn.Linear(6, 8), nn.ModuleList(nn.Linear(8, 8) for _ in range(2))
        self.norms = nn.ModuleList(nn.LayerNorm(8) for _ in range(2))
        self.last, self.head = nn.LayerNorm(8), nn.Linear(8, 3)

    def body(self, x: Tensor) -> Tensor:
        """The stream after both layers."""
        x = self.start(x)
        for norm, layer in zip(self.norms, self.layers, strict=True):
            x = x + layer(torch.relu(norm(x)))
        return x

    def forward(self, x: Tensor) -> Tensor:
        """The head's result."""
        found = self.head(self.last(self.body(x)))
        assert isinstance(found, Tensor)
        return found


class Saturated(Stream):
    """The result says nothing of the norms."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.sign(super().forward(x) + 1e6)


class DropsInPlace(Stream):
    """A dropout in place, in evaluation mode."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.dropout(super().forward(x), 0.1, self.training, inplace=True)


class Forgets(Stream):
    """A norm that no output depends on."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.body(x)
        self.head(self.norms[0](x))
        found = self.head(self.last(x))
        assert isinstance(found, Tensor)
        return found


class Pooled(nn.Module):
    """An RMSNorm of a mean over other axes."""

    def forward(self, x: Tensor) -> Tensor:
        """The mean over the first axis but one, normalised over the last."""
        x = x.mean(1)
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5)


def _optimized(made: nn.Module) -> tuple[Outcome, normfuse.Report]:
    torch.manual_seed(0)
    module, args = made.eval(), (torch.randn(2, 6),)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        want = module(*args)
        done, report = normfuse.optimize(torch.export.export(module, args, strict=False), EXACT)
        return outcome_of(report, relative(want.numpy(), done.module()(*args).numpy())), report


def test_a_check_that_nothing_feels_is_none() -> None:
    made = Saturated()
    found, _ = _optimized(made)
    assert (found.converted, found.norms) == (0, 3)
    assert all("hide the norms" in reason for reason in found.reasons)
    with torch.no_grad():
        made.last.bias.fill_(0.5)
    found, _ = _optimized(made)
    assert (found.converted, found.norms) == (3, 3)  # the layer that the bias goes into tells


def test_dropout_in_place_in_evaluation_mode() -> None:
    found, _ = _optimized(DropsInPlace())
    _holds(found, (3, 3, 0))


def test_dead_norms_stay() -> None:
    found, _ = _optimized(Forgets())
    _holds(found, (3, 4, 0))
    assert found.reasons == ("no output of the graph depends on it",)


def test_norm_of_a_mean_over_other_axes() -> None:
    program = torch.export.export(Pooled(), (torch.randn(2, 5, 8),), strict=False)
    assert [norm.kind for norm in normfuse.inspect(program).norms] == ["rms_norm"]


def test_operators_of_the_check_that_the_reference_lacks() -> None:
    """Picking by an index that is smaller than the data, and padding by a negative width, as ONNX Runtime does."""
    import onnxruntime
    from onnx import TensorProto, helper, numpy_helper
    from onnx.reference import ReferenceEvaluator

    pads, value = np.array([0, -1, 1, 0, 2, -2], np.int64), np.array(0.5, np.float32)
    index = np.array([[[1, -1, 0, 2]]], np.int64)
    nodes = [helper.make_node("Pad", ["x", "pads", "value"], ["y"]),
             helper.make_node("GatherElements", ["x", "index"], ["z"], axis=1)]  # fmt: skip
    graph = helper.make_graph(
        nodes, "g", [helper.make_tensor_value_info("x", TensorProto.FLOAT, [2, 3, 4])],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in ("y", "z")],
        [numpy_helper.from_array(a, n) for n, a in (("pads", pads), ("value", value), ("index", index))],
    )  # fmt: skip
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    x = np.arange(24, dtype=np.float32).reshape(2, 3, 4)
    session = onnxruntime.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    want = session.run(None, {"x": x})
    got = ReferenceEvaluator(proto, new_ops=OPERATORS).run(None, {"x": x})
    assert all(np.array_equal(a, b) for a, b in zip(want, got, strict=True))


@pytest.mark.parametrize("few", [0, 100])
def test_the_error_function_in_float64(few: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of few elements, and of as many as are given to torch."""
    monkeypatch.setattr(onnx_kernels, "FEW", few)
    x = np.array([[0.0, -1e-9], [0.5, -2.0], [30.0, np.nan]])
    want = np.array([[0.0, -1.1283791670955126e-9], [0.5204998778130465, -0.9953222650189527], [1.0, np.nan]])
    np.testing.assert_allclose(onnx_kernels.erf(x), want, rtol=3e-16)
    np.testing.assert_allclose(onnx_kernels.erf(x.astype(np.float32).T), want.T, rtol=1e-7)
    assert onnx_kernels.erf(np.zeros((2, 0, 4))).shape == (2, 0, 4)


@pytest.mark.parametrize("line", [
    "FusedMatMul <alpha = 0.3> (x, w)", "FusedMatMul <transA = 1, transB = 1> (x, t)",
    "FastGelu (x)", "FastGelu (x, b)", "QuickGelu <alpha = 1.5> (x)", "QuickGelu (x)", "Gelu (x)", "BiasGelu (x, b)",
])  # fmt: skip
def test_operators_of_onnx_runtime_in_the_check(line: str) -> None:
    """As it computes them, and in float64."""
    import onnxruntime
    from onnx.reference import ReferenceEvaluator

    text = '<ir_version: 10, opset_import: ["": 18, "com.microsoft": 1]> g (TYPE[2,3,4] x, TYPE[4,6] w, TYPE[5,3] t, ' \
           f"TYPE[4] b) => (TYPE[a,c,d] y) {{ y = com.microsoft.{line} }}"
    rng = np.random.default_rng(0)
    feeds = {n: rng.standard_normal(s) for n, s in {"x": (2, 3, 4), "w": (4, 6), "t": (5, 3), "b": (4,)}.items()}
    single, double = (onnx.parser.parse_model(text.replace("TYPE", kind)) for kind in ("float", "double"))
    session = onnxruntime.InferenceSession(single.SerializeToString(), providers=["CPUExecutionProvider"])
    want = session.run(None, {n: a.astype("f4") for n, a in feeds.items()})[0]
    for made, dtype in ((single, "f4"), (double, "f8")):
        given = {n: a.astype(dtype) for n, a in feeds.items()}
        (got,) = ReferenceEvaluator(made, new_ops=OPERATORS).run(None, given)
        assert isinstance(got, np.ndarray) and got.dtype == dtype
        np.testing.assert_allclose(got, want, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("name", [
    "olmo",  # its norms cast to float32 and back
    "nemotron",  # 1 + weight
])  # fmt: skip
def test_modules(name: str) -> None:
    case = CASES[name]
    module, args = case.build(), case.inputs()
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        want = module(*args)
        done, report = normfuse.optimize(module, EXACT, args=args)
        found = outcome_of(report, relative(want.numpy(), done(*args).numpy()))
    _holds(found, (5, 5, 0))
