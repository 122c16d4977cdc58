"""The fused operators: torch's own checks of a custom operator, derivatives, the models' own norms, bad input."""

from __future__ import annotations

import contextlib
import random
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

import normfuse.ops  # noqa: F401  registers the operators
from normfuse.errors import InputError
from normfuse.ops import meaning
from normfuse.ops.checks import KINDS

BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
FORWARD = ("rms_norm", "layer_norm", "add_rms_norm", "add_layer_norm", "norm_add", "norm_add_norm", "qk_norm")
BACKWARD = ("norm_backward", "norm_add_norm_backward", "qk_norm_backward")

def op(name: str) -> Any:
    return getattr(torch.ops.normfuse, name).default


def outputs(found: Any) -> tuple[Tensor, ...]:
    return found if isinstance(found, tuple) else (found,)


# -- opcheck -----------------------------------------------------------------------------------------------------------


def rows(r: random.Random, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Random rows of a shape, laid out in one of the ways that models have them."""
    *lead, n = shape
    match 5 if 0 in shape else r.randrange(6):  # opcheck cannot copy an empty slice, nor a tensor that is empty twice
        case 0 if len(shape) > 2:  # heads, transposed
            return torch.randn(*lead[:-2], lead[-1], lead[-2], n, dtype=dtype).transpose(-2, -3)
        case 1:  # a part of a fused projection
            return torch.randn(*lead, 3 * n, dtype=dtype)[..., n : 2 * n]
        case 2 if lead:
            return torch.randn(1, *lead[1:], n, dtype=dtype).expand(shape)
        case 3 if lead:  # the normalised axis is not the innermost
            return torch.randn(*lead[:-1], n, lead[-1], dtype=dtype).transpose(-1, -2)
        case 4:
            return torch.randn(*lead, 2 * n, dtype=dtype)[..., ::2]
    return torch.randn(shape, dtype=dtype)


def draw(seed: int) -> tuple[str, tuple[Any, ...]]:
    """An operator and arguments for it."""
    r = random.Random(seed)
    torch.manual_seed(seed)
    name = (FORWARD + BACKWARD)[seed % 10]
    dtype = r.choice((FP32, FP32, FP64, BF16, FP16))
    lead = [r.choice((1, 2, 3, 3)) for _ in range(r.randrange(4))]
    if lead and r.random() < 0.15:
        lead[r.randrange(len(lead))] = 0
    shape = (*lead, r.choice((1, 2, 5, 16)))
    grad = name in FORWARD and r.random() < 0.6

    def leaf(t: Tensor, p: float = 0.8) -> Tensor:
        return t.requires_grad_(grad and r.random() < p)

    def affine() -> list[Tensor | None]:
        """Weight and bias."""
        kind = r.choice((dtype, FP32))
        return [leaf(torch.randn(shape[-1], dtype=kind)) if r.random() < p else None for p in (0.75, 0.4)]

    def beside() -> Tensor:
        return leaf(rows(r, shape, r.choice((dtype, dtype, FP32))))

    def other_shape() -> tuple[int, ...]:
        """k has fewer heads, and here another width too."""
        return (*shape[:-2], 2, shape[-1]) if len(shape) > 2 else shape

    eps, offset, kind = r.choice((1e-6, 1e-5, 0.1)), r.choice((0.0, 1.0)), r.choice(KINDS)
    how = [eps, offset, r.choice(("first", "last")), r.choice((None, None, None, FP32, dtype))]
    x, many = leaf(rows(r, shape, dtype), 0.9), [r.random() < 0.6 for _ in range(4)]
    if name in KINDS:
        return name, (x, *affine(), *how)
    if name.startswith("add_"):
        return name, (x, beside(), *affine(), *how, r.random() < 0.5)
    if name == "norm_add":
        return name, (x, beside(), *affine(), *how, kind)
    if name == "norm_add_norm":
        return name, (x, beside(), *affine(), *affine(), *how, kind)
    if name == "qk_norm":
        return name, (x, leaf(rows(r, other_shape(), dtype)), *affine(), *affine(), *how, kind)
    if name == "norm_backward":
        ds = beside() if r.random() < 0.5 else None
        return name, (beside(), x, *affine(), ds, eps, offset, kind, *many[:2])
    if name == "norm_add_norm_backward":
        return name, (beside(), beside(), x, beside(), *affine(), *affine(), eps, offset, kind, many)
    k = other_shape()
    return name, (beside(), rows(r, k, dtype), x, rows(r, k, dtype), *affine(), *affine(), eps, offset, kind, many)


@pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning")  # by the checker itself, from torch 2.15
@pytest.mark.parametrize("seed", [pytest.param(s, marks=() if s < 20 else pytest.mark.slow) for s in range(240)])
def test_opcheck(seed: int) -> None:
    name, args = draw(seed)
    assert set(torch.library.opcheck(op(name), args).values()) == {"SUCCESS"}


# -- derivatives -------------------------------------------------------------------------------------------------------

OF_KIND: list[tuple[str, dict[str, Any]]] = [
    *((name, {}) for name in FORWARD[:4]),
    *((name, {"round_sum": False}) for name in FORWARD[2:4]),
    *((name, {"kind": kind}) for name in FORWARD[4:] for kind in KINDS),
]


def leaves(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> list[Tensor]:
    """The tensor arguments of a forward operator, all of them leaves; the second of `qk_norm` has another shape."""
    many = {"rms_norm": 3, "layer_norm": 3, "norm_add_norm": 6, "qk_norm": 6}.get(name, 4)
    tall = 1 if many == 3 else 2
    second = (shape[0] + 1, *shape[1:]) if name == "qk_norm" else shape
    shapes = [shape, second][:tall] + [shape[-1:]] * (many - tall)
    return [torch.randn(s, dtype=dtype, requires_grad=True) for s in shapes]


@pytest.mark.parametrize("offset", [0.0, 1.0])
@pytest.mark.parametrize(("name", "how"), OF_KIND, ids=str)
def test_first_and_second_derivatives(name: str, how: dict[str, Any], offset: float) -> None:
    torch.manual_seed(1)
    args = leaves(name, (2, 3, 4), FP64)

    def fn(*args: Tensor) -> Any:
        return op(name)(*args, 0.1, offset, **how)

    assert torch.autograd.gradcheck(fn, args, fast_mode=False)
    assert torch.autograd.gradgradcheck(fn, args, fast_mode=True)


@pytest.mark.parametrize("name", ["add_rms_norm", "add_layer_norm", "norm_add_norm", "qk_norm"])
@pytest.mark.parametrize("used", [0, 1])
def test_derivatives_where_one_result_is_not_read(name: str, used: int) -> None:
    torch.manual_seed(2)
    args = [t.detach().requires_grad_(i % 2 == 0) for i, t in enumerate(leaves(name, (3, 4), FP64))]

    def fn(*args: Tensor) -> Any:
        return op(name)(*args, 0.1)[used]

    assert torch.autograd.gradcheck(fn, args)
    assert torch.autograd.gradgradcheck(fn, args)


@pytest.mark.parametrize(("name", "used", "none"), [
    ("qk_norm", 0, {1, 4, 5}), ("qk_norm", 1, {0, 2, 3}), ("norm_add_norm", 0, set()), ("norm_add_norm", 1, {4, 5})])
def test_who_is_not_read_has_no_gradient(name: str, used: int, none: set[int]) -> None:
    """None as in torch, and not zero: an optimiser's weight decay changes parameters whose gradient is zero."""
    args = leaves(name, (3, 4), FP32)
    op(name)(*args, 0.1)[used].sum().backward()
    plain = leaves(name, (3, 4), FP32)
    definition(name, plain, 0.1)[used].sum().backward()
    found, wanted = ({i for i, v in enumerate(given) if v.grad is None} for given in (args, plain))
    assert found == wanted == none


def definition(name: str, args: list[Any], eps: float, **how: Any) -> Any:
    """The definition of a forward operator."""
    if name in FORWARD[:4]:
        how["kind"] = name.removeprefix("add_")
    return getattr(meaning, {"rms_norm": "norm", "layer_norm": "norm"}.get(name, name.replace("_rms", "").replace(
        "add_layer", "add")))(*args, eps, **how)  # fmt: skip


@pytest.mark.parametrize(("name", "how"), OF_KIND, ids=str)
def test_gradients_in_float32(name: str, how: dict[str, Any]) -> None:
    """Against autograd of the definition in float64: no term of the fused backward is missing or rounded too early."""
    torch.manual_seed(3)
    args = leaves(name, (37, 2, 256), FP32)
    exact = [t.detach().double().requires_grad_() for t in args]
    found, expected = outputs(op(name)(*args, 1e-6, **how)), outputs(definition(name, exact, 1e-6, **how))
    seeds = [torch.randn_like(t) for t in found]
    for argument, a, b in zip(
        args, torch.autograd.grad(found, args, seeds),
        torch.autograd.grad(expected, exact, [s.double() for s in seeds]), strict=True,
    ):  # fmt: skip
        assert a.shape == argument.shape and a.dtype == FP32
        assert (a - b).abs().max() < 1e-6 * b.abs().max()


# -- the models' own norms ---------------------------------------------------------------------------------------------


def own(label: str) -> Any:
    """A model's own norm."""
    from transformers.models.cohere.modeling_cohere import CohereLayerNorm
    from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm
    from transformers.models.gpt_oss.modeling_gpt_oss import GptOssRMSNorm
    from transformers.models.llama.modeling_llama import LlamaRMSNorm
    from transformers.models.olmo2.modeling_olmo2 import Olmo2RMSNorm
    from transformers.models.t5.modeling_t5 import T5LayerNorm

    return {"llama": LlamaRMSNorm, "gemma3": Gemma3RMSNorm, "olmo2": Olmo2RMSNorm, "gpt_oss": GptOssRMSNorm,
            "t5": T5LayerNorm, "cohere": CohereLayerNorm}[label]  # fmt: skip


OWN: tuple[tuple[str, bool, str, dict[str, Any]], ...] = (
    ("llama", True, "rms_norm", {"cast": "first"}),
    ("llama", False, "rms_norm", {"cast": "first"}),  # a float32 result
    ("gemma3", True, "rms_norm", {"offset": 1.0}),
    ("gemma3", False, "rms_norm", {"offset": 1.0}),
    ("olmo2", True, "rms_norm", {}),
    ("olmo2", False, "rms_norm", {}),
    ("gpt_oss", True, "rms_norm", {}),
    ("gpt_oss", False, "rms_norm", {}),
    ("t5", True, "rms_norm", {"cast": "first"}),
    ("t5", False, "rms_norm", {"dtype": FP32}),  # rounded nowhere
    ("cohere", True, "layer_norm", {}),
    ("cohere", False, "layer_norm", {}),
)
"""(model, whether the weight is in half precision too, operator, how)."""


@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
@pytest.mark.parametrize(("model", "half", "name", "how"), OWN, ids=str)
def test_bit_for_bit_a_models_own(model: str, half: bool, name: str, how: dict[str, Any], dtype: torch.dtype) -> None:
    torch.manual_seed(4)
    for n in (96, 1024):
        module = own(model)(n, eps=1e-5).to(dtype if half else FP32).requires_grad_(False)
        module.weight.copy_(torch.randn(n) * 0.3 + (model != "gemma3"))
        x = (torch.randn(-(-(1 << 20) // n), n) * torch.rand(n) * 4 + 0.2).to(dtype)
        expected, found = module(x), op(name)(x, module.weight, None, 1e-5, **how)
        assert found.dtype == expected.dtype and x.numel() >= 1_000_000
        assert torch.equal(found, expected)


@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
def test_bit_for_bit_the_sums_around_a_models_own(dtype: torch.dtype) -> None:
    """A Llama, an OLMo 2 and a Gemma 3 layer's residuals, and the norms of q and k."""
    torch.manual_seed(5)
    x, residual = torch.randn(2, 4, 256, 512).to(dtype).unbind(0)
    modules = [own(m)(512, eps=1e-5).to(dtype).requires_grad_(False) for m in ("llama", "olmo2", "gemma3", "gemma3")]
    llama, olmo, gemma, second = modules
    for module in modules:
        module.weight.normal_(1.0, 0.3)

    found = op("add_rms_norm")(x, residual, llama.weight, None, 1e-5, cast="first")
    assert torch.equal(found[1], x + residual) and torch.equal(found[0], llama(x + residual))
    assert torch.equal(op("norm_add")(x, residual, olmo.weight, None, 1e-5), residual + olmo(x))
    y, s = op("norm_add_norm")(x, residual, gemma.weight, None, second.weight, None, 1e-5, 1.0)
    assert torch.equal(s, residual + gemma(x)) and torch.equal(y, second(s))
    q, k = x.view(4, 256, 1, 512).transpose(1, 2), residual[:2]
    a, b = op("qk_norm")(q, k, llama.weight, None, olmo.weight, None, 1e-5, cast="first")
    assert torch.equal(a, llama(q)) and a.stride() == llama(q).stride()
    assert torch.equal(b, op("rms_norm")(k, olmo.weight, None, 1e-5, cast="first"))


@pytest.mark.parametrize("name", BACKWARD)
def test_gradients_lie_as_their_inputs_do(name: str) -> None:
    """The strides that the fake kernels promise to Inductor are those that the kernels on a GPU give."""
    heads = torch.randn(2, 3, 4, 8).transpose(1, 2)
    dy, other, w = torch.randn(2, 4, 3, 8), torch.randn(4, 3, 2, 8).transpose(0, 2), torch.randn(8)
    args, of = {
        "norm_backward": ((dy, heads, w, w, dy, 1e-6, 0.0, "rms_norm", True, True), (heads,)),
        "norm_add_norm_backward": ((dy, dy, heads, other.transpose(1, 2), w, None, w, w, 1e-6, 0.0, "rms_norm",
                                    [True] * 4), (heads, other.transpose(1, 2))),
        "qk_norm_backward": ((dy, dy, heads, other.transpose(1, 2), w, None, w, None, 1e-6, 0.0, "rms_norm",
                              [True] * 4), (heads, other.transpose(1, 2))),
    }[name]  # fmt: skip
    assert all(not t.is_contiguous() and t.shape == dy.shape for t in of)
    for device in ("cpu", "meta"):
        found = op(name)(*(a.to(device) if isinstance(a, Tensor) else a for a in args))
        assert [t.stride() for t in found[: len(of)]] == [torch.empty_like(t).stride() for t in of]


def ulps(a: Tensor, b: Tensor) -> Tensor:
    """How many numbers of their type lie between each two elements."""
    bits = {2: torch.int16, 4: torch.int32}[a.element_size()]

    def place(t: Tensor) -> Tensor:
        v = t.view(bits).long()
        return torch.where(v < 0, torch.iinfo(bits).min - v, v)

    return (place(a) - place(b)).abs()


@pytest.mark.parametrize("dtype", [BF16, FP16, FP32], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_the_norms_of_torch(kind: str, dtype: torch.dtype) -> None:
    """Within one ulp; near zero, where LayerNorm's difference cancels, as far as torch is from float64 itself."""
    torch.manual_seed(6)
    module: Any = (nn.RMSNorm if kind == "rms_norm" else nn.LayerNorm)(1024, eps=1e-5, dtype=dtype)
    for parameter in module.parameters():
        nn.init.normal_(parameter, 0.5, 0.2)
    module.requires_grad_(False)
    x, bias = (torch.randn(1024, 1024) * 2 + 0.3).to(dtype), getattr(module, "bias", None)
    found, theirs = op(kind)(x, module.weight, bias, 1e-5), module(x)
    exact = definition(kind, [t if t is None else t.double() for t in (x, module.weight, bias)], 1e-5)
    apart = ulps(found, theirs)
    assert (found - exact).abs().max() <= (theirs - exact).abs().max() * 1.25
    if kind == "rms_norm":
        assert torch.equal(found, theirs)
    elif dtype == FP32:
        assert (found - theirs).abs().max() < 2e-6
    else:
        assert (apart == 0).sum() > 0.999 * x.numel()
        assert ((apart <= 1) | (found.abs() < 1e-3)).all()


# -- hostile numbers ---------------------------------------------------------------------------------------------------

HOSTILE: tuple[tuple[torch.dtype, float, float, float], ...] = (
    (FP32, 1e3, 1.0, 1e-4), (BF16, 1e3, 20.0, 2.0**-8), (FP16, 1e3, 5.0, 2.0**-10),
    (FP32, 0.0, 1e-12, 1e-6), (FP16, 0.0, 1e-6, 2.0**-11), (FP16, 0.0, 2e4, 2.0**-10),
    (BF16, 0.0, 1e15, 2.0**-8), (FP32, 0.0, 1e15, 1e-6),
)  # fmt: skip
"""(type, mean, deviation, largest error as a part of the largest result)."""


@pytest.mark.parametrize(("dtype", "mean", "deviation", "allowed"), HOSTILE)
@pytest.mark.parametrize("kind", KINDS)
def test_hostile_numbers(kind: str, dtype: torch.dtype, mean: float, deviation: float, allowed: float) -> None:
    torch.manual_seed(7)
    x = torch.randn(64, 512, dtype=FP64) * deviation + mean
    x = (x.clamp(-6e4, 6e4) if dtype == FP16 else x).to(dtype).requires_grad_()
    wide = x.detach().double().requires_grad_()
    found, exact = op(kind)(x, None, None, 1e-6), definition(kind, [wide, None, None], 1e-6)
    assert (found - exact).abs().max() <= allowed * exact.abs().max()
    (dx,) = torch.autograd.grad(found, x, torch.randn(64, 512).to(dtype))
    assert dx.isfinite().all()


@pytest.mark.parametrize("dtype", [FP32, BF16, FP16], ids=str)
@pytest.mark.parametrize("value", [0.0, 3.0, 6e4])
def test_rows_of_one_number(value: float, dtype: torch.dtype) -> None:
    x = torch.full((3, 64), value, dtype=dtype, requires_grad=True)
    for kind, expected in (("rms_norm", min(value, 1.0)), ("layer_norm", 0.0)):
        y = op(kind)(x, None, None, 1e-6)
        torch.testing.assert_close(y, torch.full_like(y, expected), atol=1e-6, rtol=1e-6)
        (dx,) = torch.autograd.grad(y.sum(), x)
        assert dx.isfinite().all()


# -- bad input ---------------------------------------------------------------------------------------------------------


def zeros(*shape: int, dtype: torch.dtype = FP32, device: str = "cpu") -> Tensor:
    return torch.zeros(shape, device=device).to(dtype)


X, W = (2, 3, 8), (8,)
FLOAT = "expected float16, bfloat16, float32 or float64"
WRONG: tuple[tuple[str, str, str, dict[str, Any]], ...] = (
    *(
        (op_, argument, f"{argument} is {str(dtype)[6:]}, {FLOAT}", {argument: lambda s, d=dtype: zeros(*s, dtype=d)})
        for op_, argument in (("rms_norm", "x"), ("layer_norm", "weight"), ("add_rms_norm", "residual"),
                              ("norm_add_norm", "bias2"), ("qk_norm", "q"), ("qk_norm", "k"))
        for dtype in (torch.int32, torch.bool, torch.complex64, torch.float8_e4m3fn, torch.float8_e5m2)
    ),
    *(
        (op_, argument, f"{argument} has shape {shape}, expected (8,), the length of the last axis of {rows_}",
         {argument: lambda _, s=shape: zeros(*s)})
        for op_, argument, rows_ in (("rms_norm", "weight", "x"), ("add_layer_norm", "bias", "x"),
                                     ("norm_add", "weight", "x"), ("norm_add_norm", "weight2", "x"),
                                     ("qk_norm", "k_weight", "k"), ("qk_norm", "q_bias", "q"))
        for shape in ((7,), (1,), (3, 8), ())
    ),
    *(
        (op_, argument, f"{argument} is on meta and {first} on cpu; expected one device",
         {argument: lambda s: zeros(*s, device="meta")})
        for op_, argument, first in (("layer_norm", "weight", "x"), ("rms_norm", "bias", "x"),
                                     ("add_rms_norm", "residual", "x"), ("qk_norm", "k_weight", "k"),
                                     ("qk_norm", "k", "q"))
    ),
    *(
        (op_, "residual", f"residual has shape {shape}, expected (2, 3, 8), that of x",
         {"residual": lambda _, s=shape: zeros(*s)})
        for op_ in ("add_rms_norm", "add_layer_norm", "norm_add", "norm_add_norm")
        for shape in ((3, 8), (1, 3, 8), (2, 3, 1), (2, 3, 9))
    ),
    *(
        (op_, argument, f"{argument} has shape {shape}; its last axis is normalised",
         {argument: lambda _, s=shape: zeros(*s)})
        for op_, argument in (("rms_norm", "x"), ("norm_add", "x"), ("qk_norm", "k"))
        for shape in ((), (2, 0), (0,))
    ),
    *((op_, argument, f"{argument} is sparse_coo; call to_dense() first",
       {argument: lambda s: zeros(*s).to_sparse()})
      for op_, argument in (("rms_norm", "x"), ("layer_norm", "weight"), ("norm_add", "residual"), ("qk_norm", "k"))),
    *((op_, "eps", f"eps is {eps}; it has to be greater than 0", {"eps": eps})
      for op_ in FORWARD for eps in (0.0, -1e-6, float("nan"), float("inf"))),
    *((op_, "dtype", "dtype is int32, expected float16, bfloat16", {"dtype": torch.int32}) for op_ in FORWARD),
    *((op_, "cast", "cast is 'never'; choose one of 'first', 'last'", {"cast": "never"}) for op_ in FORWARD),
    *((op_, "kind", "kind is 'batch_norm'; choose one of 'rms_norm', 'layer_norm'", {"kind": "batch_norm"})
      for op_ in FORWARD[4:]),
)  # fmt: skip
"""(operator, argument, what the message says, the argument itself)."""


@pytest.mark.parametrize("fake", [False, True], ids=["real", "fake"])
@pytest.mark.parametrize(("name", "argument", "message", "wrong"), WRONG)
def test_bad_input(name: str, argument: str, message: str, wrong: dict[str, Any], fake: bool) -> None:
    """Refused in words, by the operator itself and where it is only traced."""
    with FakeTensorMode() if fake else contextlib.nullcontext():
        args: dict[str, Any] = {"eps": 1e-6}
        for parameter in op(name)._schema.arguments:
            if "Tensor" in str(parameter.type):
                shape = W if "weight" in parameter.name or "bias" in parameter.name else X
                args[parameter.name] = wrong[argument](shape) if parameter.name == argument else zeros(*shape)
        args |= {k: v for k, v in wrong.items() if not callable(v)}
        with pytest.raises(InputError) as caught:
            op(name)(**args)
    assert str(caught.value).startswith(f"normfuse::{name}: {message}")
