"""Whole models of transformers under ``torch.compile``: how long they run and compile with Inductor and with NormFuse.

python -m tests.bench.models [--device cuda|cpu] [--models NAME ...] [--quick] [--mode MODE] [--out FILE.json]

Random weights, static shapes, the classes and default attention of transformers. `prefill` is a forward pass over a
prompt, `decode` one over a single token of eight sequences without a cache (what is left is the model but for its
attention), `train` forward, cross entropy, backward and a step of AdamW (foreach, not compiled, the same code for all).
Its learning rate is 0: the step does all its work, and every contender sees the same weights. Every contender runs the
same parameters in the same process; they take turns, the first one last in the next round, so that drift hits all
alike.

Compile time is that of the first call after `torch._dynamo.reset()` with empty caches, again in alternating order,
after both backends have compiled something else. NormFuse's own Triton kernels stay compiled from one mode to the next.

On the CPU all is done by one thread, Inductor's compilations too, and the clock counts processor time, of this process
and of the compilers that it starts: what other programs take of the machine is not counted. On a GPU it is the time on
the wall.
"""

from __future__ import annotations

import argparse
import gc
import logging
import resource
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FunctionType
from typing import Any

import torch
import transformers
from torch import Tensor, nn

import normfuse
from tests.bench.common import merged, save, table

BACKENDS = ("inductor", "normfuse")
WARM = 3
LIMITS = {"run": 1.03, "compile": 1.15}
_CLASSES = {"llama": ("LlamaConfig", "LlamaForCausalLM"), "qwen3": ("Qwen3Config", "Qwen3ForCausalLM"),
            "gemma3": ("Gemma3TextConfig", "Gemma3ForCausalLM"), "olmo2": ("Olmo2Config", "Olmo2ForCausalLM"),
            "gpt2": ("GPT2Config", "GPT2LMHeadModel")}  # fmt: skip


def _decoder(hidden: int, inner: int, layers: int, heads: int, kv: int, **more: Any) -> dict[str, Any]:
    return {"hidden_size": hidden, "intermediate_size": inner, "num_hidden_layers": layers,
            "num_attention_heads": heads, "num_key_value_heads": kv, "max_position_embeddings": 2048,
            **more}  # fmt: skip


def _gpt2(hidden: int, layers: int, heads: int) -> dict[str, Any]:
    return {"n_embd": hidden, "n_layer": layers, "n_head": heads, "n_positions": 2048,
            "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}  # fmt: skip


@dataclass(frozen=True)
class Setting:
    """What is measured on a kind of device."""

    dtype: torch.dtype
    vocabulary: int
    options: dict[str, dict[str, Any]]
    shapes: dict[str, tuple[int, int]]
    rounds: int
    compiles: int


# The widths of Llama 3.2 1B, Qwen3 0.6B, Gemma 3 1B, OLMo 2 1B and GPT-2 medium, with eight layers of each (depth only
# repeats) and a smaller vocabulary: 136 to 668 million parameters.
CUDA = Setting(
    torch.bfloat16, 32000,
    {"llama": _decoder(2048, 8192, 8, 32, 8), "qwen3": _decoder(1024, 3072, 8, 16, 8, head_dim=128),
     "gemma3": _decoder(1152, 6912, 8, 4, 1, head_dim=256, query_pre_attn_scalar=256, sliding_window=512),
     "olmo2": _decoder(2048, 8192, 8, 16, 16), "gpt2": _gpt2(1024, 8, 16)},
    {"prefill 1x2048": (1, 2048), "prefill 8x1024": (8, 1024), "decode 8x1": (8, 1), "train 8x1024": (8, 1024)},
    30, 2,
)  # fmt: skip
CPU = Setting(
    torch.float32, 1024,
    {"llama": _decoder(256, 768, 4, 4, 2), "qwen3": _decoder(256, 768, 4, 4, 2, head_dim=64),
     "gemma3": _decoder(256, 768, 4, 4, 2, head_dim=64, query_pre_attn_scalar=64, sliding_window=64,
                        layer_types=["sliding_attention", "full_attention"] * 2),
     "olmo2": _decoder(256, 768, 4, 4, 4), "gpt2": _gpt2(256, 4, 4)},
    {"prefill 1x128": (1, 128), "decode 8x1": (8, 1), "train 2x64": (2, 64)},
    60, 2,
)  # fmt: skip


class _Model(nn.Module):
    """A model of token ids: its logits, or the loss of the next token."""

    def __init__(self, model: nn.Module, loss: bool) -> None:
        super().__init__()
        self.model, self.loss = model, loss

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits or loss."""
        logits: Tensor = self.model(input_ids=tokens, use_cache=False).logits
        if self.loss:
            return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), tokens[:, 1:].flatten())
        return logits


@dataclass
class Job:
    """One model in one mode; `step` runs it in a contender's way."""

    name: str
    mode: str
    module: _Model
    tokens: Tensor
    optimizer: torch.optim.Optimizer | None = None

    def step(self, call: Callable[[Tensor], Tensor]) -> Tensor:
        """One forward pass, or one of forward, backward and optimizer, to its end."""
        if self.module.loss:
            self.module.zero_grad(set_to_none=True)
            found = call(self.tokens)
            found.backward()  # type: ignore[no-untyped-call]
            if self.optimizer is not None:
                self.optimizer.step()
        else:
            with torch.no_grad():
                found = call(self.tokens)
        if found.is_cuda:
            torch.cuda.synchronize()
        return found

    def results(self, call: Callable[[Tensor], Tensor]) -> list[Tensor]:
        """The logits, or the loss and every gradient."""
        found = [self.step(call)]
        if self.module.loss:
            found += [p.grad for p in self.module.parameters() if p.grad is not None]
        return [t.detach().clone() for t in found]


def build(name: str, setting: Setting, device: str) -> nn.Module:
    """A model with random weights, the same at every call."""
    config, model = (getattr(transformers, c) for c in _CLASSES[name])
    torch.manual_seed(0)
    tokens = {"vocab_size": setting.vocabulary, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    made: nn.Module = model(config(**setting.options[name], **tokens, use_cache=False))
    return made.to(device, setting.dtype)


def jobs(names: list[str], setting: Setting, device: str, only: list[str] | None = None) -> Iterator[Job]:
    """Every model in every mode, or in those that start with one of `only`, made as it is asked for."""
    for name in names:
        model = build(name, setting, device)
        for mode, shape in setting.shapes.items():
            if only and not mode.startswith(tuple(only)):
                continue
            loss = mode.startswith("train")
            tokens = torch.randint(3, setting.vocabulary, shape, generator=torch.Generator().manual_seed(1))
            adam = torch.optim.AdamW(model.parameters(), lr=0.0, foreach=True) if loss else None
            yield Job(name, mode, _Model(model, loss).train(loss), tokens.to(device), adam)


def clock(device: str) -> float:
    """Seconds since some time: on a GPU those on the wall, on the CPU those that were worked."""
    if device == "cuda":
        return time.perf_counter()
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(u.ru_utime + u.ru_stime for u in used)


def compiled(job: Job, backend: str, mode: str | None) -> tuple[Callable[[Tensor], Tensor], float]:
    """A contender compiled without the help of any cache, and the seconds it took."""
    from torch._inductor.utils import fresh_cache

    gc.collect()
    with fresh_cache():
        started = clock(job.tokens.device.type)
        call: Callable[[Tensor], Tensor] = torch.compile(
            _own(job.module, backend), backend=backend, dynamic=False, mode=mode
        )
        job.step(call)
        return call, clock(job.tokens.device.type) - started


def _own(module: _Model, name: str) -> _Model:
    """The same model with code of its own: with one for all, Dynamo finds the contender compiled last the quickest."""
    forward = FunctionType(_Model.forward.__code__.replace(co_name=f"forward_{name}"), globals())
    made: _Model = type(name, (_Model,), {"forward": forward})(module.model, module.loss)
    return made.train(module.training)


def measure(job: Job, contenders: tuple[str, ...], mode: str | None, rounds: int, compiles: int) -> dict[str, Any]:
    """Compile and run the contenders in turns."""
    calls: dict[str, Callable[[Tensor], Tensor]] = {"eager": job.module}
    ms: dict[str, list[float]] = {c: [] for c in contenders}
    seconds: dict[str, list[float]] = {c: [] for c in contenders if c in BACKENDS}
    for i in range(compiles):
        torch._dynamo.reset()
        for name in list(seconds)[:: -1 if i % 2 else 1]:
            calls[name], taken = compiled(job, name, mode)
            seconds[name].append(taken)
        for name, some in race(job, {c: calls[c] for c in contenders}, rounds // compiles).items():
            ms[name] += some  # after each, for what was compiled last has a small advantage
    report = normfuse.last_report() if "normfuse" in seconds else None
    wanted = job.results(job.module)
    error = {c: _error(job.results(calls[c]), wanted) for c in seconds}
    del wanted
    found: dict[str, Any] = {
        "model": job.name,
        "mode": job.mode,
        "parameters": sum(p.numel() for p in job.module.parameters()),
        "norms": report and len(report.norms),
        "fused": report and report.fused,
        "emitted": report and sorted({n.emitted for n in report.norms if n.action == "fused"}),
        "ms": {c: _spread(v, 3) for c, v in ms.items()},
        "rewrite_s": report and round(sum(report.seconds.values()), 3),
        "compile_s": {c: _spread(v, 2) for c, v in seconds.items()},
        "error": error,
    }
    if len(seconds) == len(BACKENDS):
        for key in ("ms", "compile_s"):
            ours, theirs = found[key]["normfuse"], found[key]["inductor"]
            found[f"{key}_ratio"] = {k: round(ours[k] / theirs[k], 3) for k in ("median", "min")}
    return found


def race(job: Job, calls: dict[str, Callable[[Tensor], Tensor]], rounds: int) -> dict[str, list[float]]:
    """Milliseconds of a step of each contender; short steps are repeated for a clock's sake."""
    ms: dict[str, list[float]] = {name: [] for name in calls}
    repeat = 1
    for i in range(WARM + rounds):
        for name in list(calls)[:: -1 if i % 2 else 1]:
            job.step(calls[name])  # what another left in the caches is not this one's to clear
            started = clock(job.tokens.device.type)
            for _ in range(repeat):
                job.step(calls[name])
            ms[name].append((clock(job.tokens.device.type) - started) * 1e3 / repeat)
        if i == WARM - 1:
            repeat = max(1, round(5 / min(v[-1] for v in ms.values())))
    return {name: v[WARM:] for name, v in ms.items()}


def _error(found: list[Tensor], wanted: list[Tensor]) -> float:
    """The largest difference, relative to the largest value of each tensor."""
    pairs = ((a.float(), b.float()) for a, b in zip(found, wanted, strict=True))
    return float(f"{max(float((a - b).abs().max() / b.abs().max().clamp(min=1e-30)) for a, b in pairs):.2g}")


def _spread(values: list[float], digits: int) -> dict[str, float]:
    low, middle, high = statistics.quantiles(values, n=4) if len(values) > 1 else values * 3
    numbers = {"min": min(values), "q1": low, "median": middle, "q3": high}
    return {k: round(v, digits) for k, v in numbers.items()}


def row(found: dict[str, Any]) -> list[object]:
    """One line of the table."""
    cells: list[object] = [found["model"], found["mode"], f"{found['fused']}/{found['norms']}"]
    for key, pick in (("ms", "median"), ("ms", "min"), ("compile_s", "median"), ("compile_s", "min")):
        cells += [f"{found[key][c][pick]:.2f}" if c in found[key] else "-" for c in BACKENDS]
        cells.append(f"{found[f'{key}_ratio'][pick]:.3f}" if f"{key}_ratio" in found else "-")
    eager = found["ms"].get("eager")
    return [*cells, f"{eager['median']:.2f}" if eager else "-"]


HEAD = ["model", "mode", "fused", "inductor ms", "normfuse", "ratio", "least", "normfuse", "ratio",
        "compile s", "normfuse", "ratio", "least", "normfuse", "ratio", "eager ms"]  # fmt: skip


def warm_up(device: str, mode: str | None) -> None:
    """Let each backend import, start and initialise what it needs."""
    module = nn.Sequential(nn.Linear(32, 32), nn.GELU(), nn.RMSNorm(32), nn.Linear(32, 32)).to(device)
    for backend in BACKENDS * 2:
        torch._dynamo.reset()
        torch.compile(module, backend=backend, mode=mode)(torch.randn(4, 32, device=device)).sum().backward()


def main() -> None:
    """Measure, print, and write the result if asked."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--models", nargs="+", default=list(_CLASSES), choices=list(_CLASSES))
    parser.add_argument("--only", nargs="+", choices=["prefill", "decode", "train"])
    parser.add_argument("--contenders", nargs="+", default=["eager", *BACKENDS], choices=["eager", *BACKENDS])
    parser.add_argument("--mode", help="of torch.compile, such as reduce-overhead")
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--compiles", type=int)
    parser.add_argument("--quick", action="store_true", help="few rounds, one compilation each")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    if given.device == "cuda" and not torch.cuda.is_available():
        print("--device cuda needs a CUDA GPU, and torch finds none")
        return
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    setting = CUDA if given.device == "cuda" else CPU
    about: dict[str, Any] = {"device": given.device, "type": str(setting.dtype).removeprefix("torch."),
                             "torch.compile mode": given.mode, "limits": LIMITS}  # fmt: skip
    if given.device == "cuda":
        about |= {"gpu": torch.cuda.get_device_name(), "cuda": torch.version.cuda}
    else:
        torch.set_num_threads(1)
        torch._inductor.config.compile_threads = 1
    rounds = given.rounds or (5 if given.quick else setting.rounds)
    compiles = given.compiles or (1 if given.quick else setting.compiles)
    warm_up(given.device, given.mode)
    results = []
    counts = {"rounds": rounds, "compiles": compiles}
    for job in jobs(given.models, setting, given.device, given.only):
        results.append(measure(job, tuple(given.contenders), given.mode, rounds, compiles) | counts)
        print(*row(results[-1]), flush=True)
        # at once: the next may run out of time
        save(given.out, merged(given.out, {"about": about}, results, ("model", "mode")))
    print("\n" + table(HEAD, [row(r) for r in results], left=2))


if __name__ == "__main__":
    main()
