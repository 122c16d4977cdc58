"""What the benchmark of the kernels measures is one thing, and it measures it, as far as that shows without a GPU."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from tests.bench import kernels


@pytest.fixture(autouse=True)
def without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each call once and no clock; Inductor's part is not compiled."""

    def once(calls: list[Callable[[], object]], repeats: int = 20) -> dict[str, float]:
        for call in calls:
            call()
        return {"ms": 1.0, "q1": 1.0, "q3": 1.0, "graph": 0.0}

    monkeypatch.setattr(kernels, "milliseconds", once)
    monkeypatch.setattr(kernels, "FLUSH", 1)
    monkeypatch.setattr(torch, "compile", lambda function, dynamic: function)


@pytest.mark.parametrize("kind", kernels.KINDS)
def test_contenders_agree(kind: str) -> None:
    data, weights = kernels.drawn(kind, 20, 16, torch.float32, "cpu")
    leaves = [t.detach().requires_grad_() for t in (*data, *weights)]
    results = {who: kernels.tuples(run(*leaves)) for who, run in kernels.contenders(kind).items()}
    seeds = [torch.randn_like(y) for y in results["eager"]]
    gradients = {who: torch.autograd.grad(ys, leaves, seeds) for who, ys in results.items()}
    assert {"eager", "torch", "inductor", "normfuse"} <= set(results)
    for who in results:
        torch.testing.assert_close(results[who], results["eager"])
        torch.testing.assert_close(gradients[who], gradients["eager"], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", kernels.TYPES)
@pytest.mark.parametrize("kind", kernels.KINDS)
def test_measures(kind: str, name: str) -> None:
    rows = list(kernels.measure(kind, 20, 16, name, "cpu"))
    assert not [r["error"] for r in rows if "error" in r]
    assert {r["who"] for r in rows} >= {"copy", "eager", "torch", "inductor", "normfuse"}
    size = 20 * 16 * kernels.TYPES[name].itemsize
    for what, factor in zip(("forward", "backward"), kernels.KINDS[kind], strict=True):
        assert {r["GB/s"] for r in rows if r["what"] == what} == {factor * size / 1e6}
    assert kernels.show(rows).count("\n") > len(rows)


def test_query_and_key_are_not_copied_together() -> None:
    (q, k), _ = kernels.drawn("qk_norm", 40, 16, torch.float32, "cpu")
    assert (q.shape, k.shape) == ((1, 8, 4, 16), (1, 2, 4, 16))
    assert not q.is_contiguous() and q.stride() == k.stride()
    assert q.untyped_storage().data_ptr() == k.untyped_storage().data_ptr()


def test_shapes() -> None:
    for kind in kernels.KINDS:
        m, n = zip(*kernels.shapes(kind, kernels.WIDTHS, kernels.ROWS), strict=True)
        least, widest = (16, 128) if kind == "qk_norm" else (1, 65536)
        assert (min(m), max(m), min(n), max(n)) == (least, 65536, 64, widest)
