"""Latency in ONNX Runtime on the CPU of models as exported, as other tools optimise them, and as NormFuse does.

python -m tests.bench.latency [--only NAME ...] [--types fp32 fp16] [--threads 1 2] [--seconds 10] [--out FILE.json]

Transformers' own classes, 4 layers, hidden size 1024, random weights, dynamic shapes, sequences of 1 and 512 tokens,
and the PP-OCRv4 recogniser that rapidocr-onnxruntime holds. Every contender is a file, run by a session with ONNX
Runtime's default optimisations; the sessions take turns in one process. `ratio` is our median in parts of the best
median of the others; a file that is the same as another's is not run twice. `normfuse` is target "normfuse" with the
library of operators loaded, where this installation has one. --provider cuda measures on a GPU, with targets for it.
"""

from __future__ import annotations

import argparse
import importlib.util
import logging
import statistics
import tempfile
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import torch

import normfuse
from normfuse import ort as library
from normfuse.bench import PROVIDERS, open_session, spread, turns
from tests.bench.common import save, table
from tests.bench.peers import onnxscript_ort, onnxsim
from tests.families import FAMILIES, VOCABULARY, Family, cached, digest, export_onnx
from tests.node_cases import Arrays

HIDDEN, LAYERS, HEADS, INNER = 1024, 4, 16, 2816
SEQUENCES = (1, 512)
LIMIT = 1.02
OCR = "models/ch_PP-OCRv4_rec_infer.onnx"
TYPES = {"fp32": torch.float32, "fp16": torch.float16}

_GATED = {
    "hidden_size": HIDDEN, "intermediate_size": INNER, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS,
    "num_key_value_heads": 4, "max_position_embeddings": 512,
}  # fmt: skip
_PATTERN = {"layer_types": ["sliding_attention", "full_attention"] * 2, "sliding_window": 64}
WIDER: dict[str, dict[str, Any]] = {
    "llama": _GATED,
    "qwen3": {**_GATED, "head_dim": 64},
    "gemma3": {**_GATED, **_PATTERN, "head_dim": 64, "query_pre_attn_scalar": 64},
    "olmo2": _GATED,
    "gpt2": {"n_embd": HIDDEN, "n_layer": LAYERS, "n_head": HEADS, "n_inner": 4 * HIDDEN, "n_positions": 512},
    "bert": {"hidden_size": HIDDEN, "intermediate_size": 4 * HIDDEN, "num_hidden_layers": LAYERS,
             "num_attention_heads": HEADS, "max_position_embeddings": 512},
}  # fmt: skip
Tool = Callable[[Path, Path], None]


@dataclass(frozen=True)
class Job:
    """One model, its type and its inputs by name."""

    name: str
    dtype: str
    path: Path
    inputs: dict[str, Arrays]


def wide(name: str) -> Family:
    """A family at realistic width."""
    family = FAMILIES[name]
    return replace(family, options={**family.options, **WIDER[name]})


def jobs(only: list[str], types: list[str]) -> Iterator[Job]:
    """Every model, made as it is asked for."""
    for name in WIDER:
        for dtype in types if not only or name in only else ():
            family = wide(name)

            def write(path: Path, family: Family = family, dtype: str = dtype) -> None:
                export_onnx(family.build().to(TYPES[dtype]), family.args(1, 8), path, 18, optimize=True, dynamic=True)

            path = cached(f"latency-{name}-{dtype}-{digest(family)}.onnx", write)
            feed = onnx.load(path, load_external_data=False).graph.input[0].name
            rng = np.random.default_rng(1)
            yield Job(name, dtype, path, {f"{n}": {feed: rng.integers(3, VOCABULARY, (1, n))} for n in SEQUENCES})
    found = importlib.util.find_spec("rapidocr_onnxruntime")
    if found is not None and found.origin is not None and (not only or "ocr" in only) and "fp32" in types:
        image = np.random.default_rng(0).uniform(-1, 1, (1, 3, 48, 320)).astype(np.float32)
        yield Job("PP-OCRv4 recogniser", "fp32", Path(found.origin).parent / OCR, {"image": {"x": image}})


# -- contenders --------------------------------------------------------------------------------------------------------


def runtime(provider: str) -> Tool:
    """ONNX Runtime's own optimiser, saved."""

    def run(source: Path, target: Path) -> None:
        options = ort.SessionOptions()
        options.log_severity_level = 4
        options.optimized_model_filepath = str(target)
        ort.InferenceSession(str(source), options, providers=[provider])

    return run


def ours(target: Any) -> Tool:
    """NormFuse for a target."""
    return lambda source, out: void(normfuse.rewrite(source, out, normfuse.Config(target=target)))


def void(_: object) -> None:
    """Nothing."""


def contenders(provider: str) -> dict[str, Tool]:
    """Whoever makes a file, by name; those with "normfuse" in it are ours."""
    others: dict[str, Tool] = {"onnxruntime": runtime(PROVIDERS[provider]), "onnxscript": onnxscript_ort,
                               "onnxsim": onnxsim}  # fmt: skip
    return others | {f"normfuse {t}": ours(t) for t in ("onnx", f"ort-{provider}", "normfuse")}


def session(path: Path, threads: int, provider: str, operators: bool) -> ort.InferenceSession:
    """A session as `normfuse bench` makes it; with `operators`, the library is loaded."""
    made = open_session(path, provider, threads, operators)
    assert made.get_providers()[0] == PROVIDERS[provider]
    return made


@dataclass
class Files:
    """The file of each contender, whose file some others share, and why there is none of some."""

    made: dict[str, Path]
    same: dict[str, str]
    lost: dict[str, str]


def files(job: Job, provider: str, folder: Path) -> Files:
    """What the contenders make of a model."""
    out = Files({"input": job.path}, {}, {})
    for name, tool in contenders(provider).items():
        path = folder / f"{name.replace(' ', '-')}.onnx"
        path.unlink(missing_ok=True)
        try:
            tool(job.path, path)
            session(path, 1, provider, False).run(None, next(iter(job.inputs.values())))
        except Exception as why:  # a tool that does not take the model, or breaks it, is no reason to stop
            out.lost[name] = f"{type(why).__name__}: {str(why).splitlines()[0][:100]}"
            continue
        same = next((n for n, p in out.made.items() if p.read_bytes() == path.read_bytes()), None)
        if same is None:
            out.made[name] = path
        else:
            out.same[name] = same
    return out


def race(job: Job, files: Files, threads: int, provider: str, seconds: float) -> Iterator[dict[str, Any]]:
    """Run all contenders in turns, for each input."""
    ours = "normfuse normfuse" if library.library_path() is not None else ""
    sessions = {name: session(path, threads, provider, name == ours) for name, path in files.made.items()}
    for label, inputs in job.inputs.items():
        first = {name: s.run(None, inputs)[0] for name, s in sessions.items()}
        top = float(np.abs(first["input"].astype(np.float64)).max())
        times = dict(zip(sessions, turns([partial(s.run, None, inputs) for s in sessions.values()], seconds=seconds),
                         strict=True))  # fmt: skip
        results = {}
        for name, found in times.items():
            one = spread(found)
            gap = float(np.abs(first[name].astype(np.float64) - first["input"].astype(np.float64)).max())
            results[name] = {"ms": round(one["median"], 4), "q1": round(one["q1"], 4), "q3": round(one["q3"], 4),
                             "difference": float(f"{gap / top:.2g}")}  # fmt: skip
        results |= {name: results[same] for name, same in files.same.items()}
        best = min(r["ms"] for name, r in results.items() if "normfuse" not in name)
        ratios = {name: round(r["ms"] / best, 4) for name, r in results.items() if "normfuse" in name}
        yield {"model": job.name, "type": job.dtype, "tokens": label, "threads": threads, "rounds": len(times["input"]),
               "results": results, "ratios": ratios}  # fmt: skip


def row(found: dict[str, Any], names: list[str]) -> list[str]:
    """One line of the table: milliseconds, ours with the ratio to the best of the others."""
    cells = [f"{found['model']} {found['type']}", found["tokens"], str(found["threads"])]
    for name in names:
        result = found["results"].get(name)
        ratio = found["ratios"].get(name)
        cells.append("" if result is None else f"{result['ms']:.2f}" + (f" ({ratio:.3f})" if ratio else ""))
    return cells


def main() -> None:
    """Measure, print, and write the result if asked."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", nargs="+", default=[], choices=[*WIDER, "ocr"])
    parser.add_argument("--types", nargs="+", default=list(TYPES), choices=TYPES)
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--seconds", type=float, default=10)
    parser.add_argument("--provider", default="cpu", choices=PROVIDERS)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    if PROVIDERS[given.provider] not in ort.get_available_providers():
        print(f"this ONNX Runtime has no {PROVIDERS[given.provider]}")
        return
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    results: list[dict[str, Any]] = []
    notes: dict[str, dict[str, str]] = {}
    names = ["input", *contenders(given.provider)]
    with tempfile.TemporaryDirectory() as folder:
        for job in jobs(given.only, given.types):
            found_files = files(job, given.provider, Path(folder))
            notes[f"{job.name} {job.dtype}"] = found_files.lost | {
                name: f"the same file as {same}" for name, same in found_files.same.items()}  # fmt: skip
            for threads in given.threads:
                for found in race(job, found_files, threads, given.provider, given.seconds):
                    results.append(found)
                    print(*row(found, names), flush=True)
    print("\n" + table(["model", "tokens", "threads", *names], [row(r, names) for r in results]))
    for name, why in notes.items():
        print(f"{name}: " + "; ".join(f"{tool}: {reason}" for tool, reason in why.items()))
    for name in names:
        ratios = [r["ratios"][name] for r in results if name in r["ratios"]]
        if ratios:
            print(f"{name}: ratio {min(ratios):.3f} to {max(ratios):.3f}, median {statistics.median(ratios):.3f}; "
                  f"over {LIMIT} in {sum(x > LIMIT for x in ratios)} of {len(ratios)}")  # fmt: skip
    about = {"hidden": HIDDEN, "layers": LAYERS, "inner": INNER, "library": library.library_path() is not None}
    save(given.out, {"shapes": about, "notes": notes, "models": results})


if __name__ == "__main__":
    main()
