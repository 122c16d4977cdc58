"""Every architecture that transformers' AutoModel or timm makes: its norms, and which of them NormFuse finds.

python -m tests.bench.auto_models [--timm] [--only NAME ...] [--jobs 2] [--seconds 60] [--out FILE.json]

Each of transformers has the sizes of its default configuration, but at most four layers; of timm, of each of its
modules, those models are taken whose names begin otherwise, the shortest of each, three at most. None has weights
(torch's meta device). It is exported by `torch.export` for eight tokens, an image or a second of sound. Its norms are
the calls of modules with Norm in the name of their class (batch, instance, group and weight norms aside, MobileBERT's
NoNorm, and what holds a convolution as well); one is found where a norm that NormFuse finds ends in that module, or a
few nodes behind it. `more` are those that NormFuse finds besides: functions, and modules of other names.
"""

from __future__ import annotations

import argparse
import inspect
import logging
import multiprocessing
import os
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM, masking_utils
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, MODEL_MAPPING_NAMES

import normfuse
from tests.bench.common import ROOT, merged, save

RESULT, TIMM = (ROOT / f"tests/bench/results/{name}.json" for name in ("auto-models", "timm-models"))
DEPTHS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "encoder_layers", "decoder_layers", "depth",
          "num_encoder_layers", "num_decoder_layers", "encoder_num_hidden_layers", "decoder_num_hidden_layers",
          "num_transformer_layers", "num_blocks")  # fmt: skip
LAYERS, REACH = 4, 4
"""REACH: among how many nodes at the end of a norm one of its module has to be: the result may be scaled outside."""
OTHERS = ("BatchNorm", "InstanceNorm", "GroupNorm", "WeightNorm", "NoNorm", "NormAct", "ConvNorm")
OF_A_MODULE = 3


def short(kind: type[Any]) -> Any:
    """A configuration with few layers, in its parts too; as it is where it does not take that."""
    default = kind()
    less: dict[str, Any] = {}
    for name in DEPTHS:
        depth = default.__dict__.get(name)
        if isinstance(depth, int) and not isinstance(depth, bool) and depth:
            less[name] = min(LAYERS, depth)
    for name in getattr(kind, "sub_configs", {}):
        part = getattr(default, name, None)
        if part is not None and not isinstance(part, dict):
            less[name] = short(type(part))
    try:
        return kind(**less)
    except Exception:
        return default


def inputs(model: nn.Module, config: Any) -> Iterator[dict[str, Any]]:
    """Something for each input that the model wants, in each layout that models have for it."""
    parameters = inspect.signature(model.forward).parameters
    main = getattr(model, "main_input_name", "input_ids")
    vision = getattr(config, "vision_config", config)
    size = getattr(vision, "image_size", None) or getattr(vision, "img_size", None) or 224
    height, width = size[:2] if isinstance(size, list | tuple) else (size, size)
    channels = getattr(vision, "num_channels", None) or 3
    bins = getattr(config, "num_mel_bins", None) or getattr(config, "input_feat_per_channel", None) or 80
    frames = getattr(config, "num_frames", None) or 8
    shapes: dict[str, list[tuple[int, ...]]] = {
        "pixel_values": [(1, channels, height, width), (1, frames, channels, height, width)],
        "pixel_values_videos": [(1, frames, channels, height, width)],
        "input_values": [(1, 16000), (1, 1, 16000)],
        "input_features": [(1, 104, bins), (1, bins, 104), (1, bins, 3000), (1, 104, 2 * bins)],
        "input_ids": [(1, 8)],
    }  # fmt: skip
    tries = [{main: shape} for shape in shapes.get(main, []) if main in parameters]
    both = {name: shapes[name][0] for name in ("pixel_values", "input_ids") if name in parameters}
    for found in [*tries, both] if not hasattr(config, "projection_dim") else [both, *tries]:
        if "bbox" in parameters:
            found["bbox"] = (1, 8, 4)
        if getattr(config, "is_encoder_decoder", False) and "decoder_input_ids" in parameters:
            found["decoder_input_ids"] = (1, 4)
        tensors = {name: torch.zeros(shape, dtype=torch.long if name.endswith(("ids", "bbox")) else None)
                   for name, shape in found.items()}  # fmt: skip
        yield tensors | ({"use_cache": False} if "use_cache" in parameters else {})


def exported(model: nn.Module, tries: Iterable[dict[str, Any]]) -> torch.export.ExportedProgram:
    """The program of a model for the first inputs that it takes; the first error where it takes none."""
    first: Exception | None = None
    for given in tries:
        try:
            return torch.export.export(model, (), given, strict=False)
        except Exception as why:
            first = first or why
    assert first is not None
    raise first


def norms(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The modules that are norms, by their class, with their paths."""
    for path, module in model.named_modules():
        kind = type(module).__name__
        if "norm" in kind.lower() and not any(o in kind for o in OTHERS) and not any(True for _ in module.children()):
            yield path, module


def scope(node: torch.fx.Node) -> str:
    """The path of the module that a node of an exported program comes from."""
    stack = list(node.meta.get("nn_module_stack", {}).values())
    return str(stack[-1][0]).removeprefix("L['self'].").replace("L['self']", "") if stack else ""


def made(program: torch.export.ExportedProgram, report: normfuse.Report, called: Counter[str]) -> Counter[str]:
    """How many calls of each module have a norm that NormFuse found."""
    nodes = {node.name: node for node in program.graph.nodes}
    left, ends = Counter(called), [nodes[norm.name.rpartition("/")[2].partition(".")[0]] for norm in report.norms]
    for reach in (1, REACH):
        others = []
        for end in ends:
            todo, seen = [end], set[torch.fx.Node]()
            while todo and len(seen) < reach:
                seen.add(node := todo.pop(0))
                if left[scope(node)]:
                    left[scope(node)] -= 1
                    break
                todo += [n for n in node.all_input_nodes if n not in seen and n.op == "call_function"]
            else:
                others.append(end)
        ends = others
    return called - left


def transformer(kind: str) -> tuple[nn.Module, Iterable[dict[str, Any]]]:
    """A model of AutoModel, and inputs to try."""
    config = short(type(transformers.CONFIG_MAPPING[kind]()))
    for part in (config, *(getattr(config, name, None) for name in getattr(config, "sub_configs", {}))):
        if hasattr(part, "use_cache"):
            part.use_cache = False
    auto = AutoModel if kind in MODEL_MAPPING_NAMES else AutoModelForCausalLM
    model: Any = auto.from_config(config).eval()
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("batched_mm")
    return model, inputs(model, config)


def timm_model(name: str) -> tuple[nn.Module, Iterable[dict[str, Any]]]:
    """A model of timm, and an image of the size that it is for."""
    import timm

    model: Any = timm.create_model(name).eval()
    return model, [{"x": torch.zeros(1, *model.default_cfg["input_size"])}]


def timm_names() -> list[str]:
    """Some models of each module of timm."""
    import timm

    found: dict[str, dict[str, str]] = {}
    for name in sorted(timm.list_models(), key=lambda name: (len(name), name)):
        module = timm.model_entrypoint(name).__module__
        found.setdefault(module, {}).setdefault(name.split("_")[0], name)
    return [name for module in sorted(found) for name in [*found[module].values()][:OF_A_MODULE]]


def look(kind: str, of_timm: bool = False) -> dict[str, Any]:
    """What there is of one architecture."""
    with torch.device("meta"), torch.no_grad():
        model, tries = (timm_model if of_timm else transformer)(kind)
        called: list[str] = []

        def start(*_: Any) -> None:
            called.clear()  # of an attempt with other inputs

        model.register_forward_pre_hook(start)
        for path, module in norms(model):
            module.register_forward_hook(lambda *_, path=path: called.append(path))
        program = exported(model, tries)
    report, calls = normfuse.inspect(program), Counter(called)
    found = made(program, report, calls)
    missing = [f"{type(model.get_submodule(path)).__name__} {path}" for path in sorted((calls - found).elements())]
    return {"norms": len(called), "found": found.total(), "more": len(report.norms) - found.total(), "missing": missing}


def child(kind: str, of_timm: bool, out: Connection) -> None:
    """Look at one, in a process of its own."""
    warnings.simplefilter("ignore")
    logging.disable(logging.ERROR)
    for stream in (1, 2):  # torch prints the graphs that it cannot export
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream)
    torch.set_num_threads(1)
    masking_utils.find_packed_sequence_indices = lambda *_, **__: None  # it looks at values, and there are none
    try:
        out.send(look(kind, of_timm))
    except Exception as why:
        out.send({"not tried": f"{type(why).__name__}: {why}".splitlines()[0][:80]})


def apart(kind: str, of_timm: bool, seconds: float) -> dict[str, Any]:
    """The same, within a time."""
    context = multiprocessing.get_context("forkserver")
    receive, send = context.Pipe(False)
    process = context.Process(target=child, args=(kind, of_timm, send))
    process.start()
    send.close()
    try:
        found = receive.recv() if receive.poll(seconds) else {"not tried": f"took more than {seconds:g} s"}
    except EOFError:
        found = {"not tried": "the process died"}
    process.kill()
    process.join()
    return {"model": kind} | found


def main() -> None:
    """Look at all, print those of which something is missing, and save."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--timm", action="store_true")
    parser.add_argument("--only", nargs="+", default=[])
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    kinds = given.only or (timm_names() if given.timm else
                           sorted({*MODEL_MAPPING_NAMES, *MODEL_FOR_CAUSAL_LM_MAPPING_NAMES}))  # fmt: skip
    out = given.out or (TIMM if given.timm else RESULT)
    rows: list[dict[str, Any]] = []
    with ThreadPoolExecutor(given.jobs) as pool:
        for row in pool.map(lambda kind: apart(kind, given.timm, given.seconds), kinds):
            rows.append(row)
            print(*row.values(), flush=True)
            tried = [r for r in rows if "norms" in r]
    sums = {key: sum(r[key] for r in tried) for key in ("norms", "found", "more")}
    print(f"{len(tried)} of {len(rows)} tried: {sums['found']} of {sums['norms']} norms found, {sums['more']} more")
    made_of = {"timm": version("timm")} if given.timm else {"layers": LAYERS}
    save(out, merged(out, made_of, rows, ["model"]))


if __name__ == "__main__":
    main()
