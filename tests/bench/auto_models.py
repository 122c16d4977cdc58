"""Every architecture that transformers' AutoModel makes: its norms, and which of them NormFuse finds.

python -m tests.bench.auto_models [--only TYPE ...] [--jobs 2] [--seconds 60] [--out FILE.json]

Each has the sizes of its default configuration, but at most four layers, and no weights (torch's meta device). It is
exported by `torch.export` for eight tokens, an image or a second of sound. Its norms are the calls of modules with Norm
in the name of their class, batch, instance and group norms aside; one is found where a norm that NormFuse finds is made
in that module, or of its result. `more` are those that NormFuse finds besides: functions, and modules of other names.
"""

from __future__ import annotations

import argparse
import inspect
import logging
import multiprocessing
import warnings
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
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

AUTO = "tests.bench.auto_models"
RESULT = ROOT / "tests/bench/results/auto-models.json"
DEPTHS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "encoder_layers", "decoder_layers", "depth",
          "num_encoder_layers", "num_decoder_layers", "encoder_num_hidden_layers", "decoder_num_hidden_layers",
          "num_transformer_layers", "num_blocks")  # fmt: skip
LAYERS, REACH = 4, 4
"""REACH: among how many nodes at the end of a norm one of its module has to be: the result may be scaled outside."""
OTHERS = ("BatchNorm", "InstanceNorm", "GroupNorm")


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


def inputs(model: nn.Module, config: Any) -> dict[str, Any]:
    """Something for each input that the model wants."""
    parameters = inspect.signature(model.forward).parameters
    main = getattr(model, "main_input_name", "input_ids")
    found: dict[str, Any] = {}
    vision = getattr(config, "vision_config", config)
    if main == "pixel_values" or ("pixel_values" in parameters and hasattr(config, "projection_dim")):
        size = getattr(vision, "image_size", None) or getattr(vision, "img_size", None) or 224
        height, width = size[:2] if isinstance(size, list | tuple) else (size, size)
        found["pixel_values"] = torch.zeros(1, getattr(vision, "num_channels", None) or 3, height, width)
    if main == "input_values":
        found["input_values"] = torch.zeros(1, 16000)
    if main == "input_features":
        bins = getattr(config, "num_mel_bins", None) or getattr(config, "input_feat_per_channel", None) or 80
        found["input_features"] = torch.zeros(1, bins, 3000) if "whisper" in config.model_type else torch.zeros(
            1, 100, bins)  # fmt: skip
    if not found or ("input_ids" in parameters and hasattr(config, "text_config")):
        found["input_ids"] = torch.zeros(1, 8, dtype=torch.long)
    if "bbox" in parameters:
        found["bbox"] = torch.zeros(1, 8, 4, dtype=torch.long)
    if getattr(config, "is_encoder_decoder", False) and "decoder_input_ids" in parameters:
        found["decoder_input_ids"] = torch.zeros(1, 4, dtype=torch.long)
    return found | ({"use_cache": False} if "use_cache" in parameters else {})


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


def look(kind: str) -> dict[str, Any]:
    """What there is of one architecture."""
    config = short(type(transformers.CONFIG_MAPPING[kind]()))
    with torch.device("meta"), torch.no_grad():
        auto = AutoModel if kind in MODEL_MAPPING_NAMES else AutoModelForCausalLM
        model: nn.Module = auto.from_config(config).eval()  # type: ignore[no-untyped-call]
        if hasattr(model, "set_experts_implementation"):
            model.set_experts_implementation("batched_mm")
        called: list[str] = []
        for path, module in norms(model):
            module.register_forward_hook(lambda *_, path=path: called.append(path))
        program = torch.export.export(model, (), inputs(model, config), strict=False)
    report, calls = normfuse.inspect(program), Counter(called)
    found = made(program, report, calls)
    missing = [f"{type(model.get_submodule(path)).__name__} {path}" for path in sorted((calls - found).elements())]
    return {"norms": len(called), "found": found.total(), "more": len(report.norms) - found.total(), "missing": missing}


def child(kind: str, out: Connection) -> None:
    """Look at one, in a process of its own."""
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    masking_utils.find_packed_sequence_indices = lambda *_, **__: None  # it looks at values, and there are none
    try:
        out.send(look(kind))
    except Exception as why:
        out.send({"not tried": f"{type(why).__name__}: {why}".splitlines()[0][:160]})


def apart(kind: str, seconds: float) -> dict[str, Any]:
    """The same, within a time."""
    context = multiprocessing.get_context("forkserver")
    receive, send = context.Pipe(False)
    process = context.Process(target=child, args=(kind, send))
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
    parser.add_argument("--only", nargs="+", default=[])
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--out", type=Path, default=RESULT)
    given = parser.parse_args()
    kinds = given.only or sorted({*MODEL_MAPPING_NAMES, *MODEL_FOR_CAUSAL_LM_MAPPING_NAMES})
    multiprocessing.get_context("forkserver").set_forkserver_preload([AUTO])
    rows: list[dict[str, Any]] = []
    with ThreadPoolExecutor(given.jobs) as pool:
        for row in pool.map(lambda kind: apart(kind, given.seconds), kinds):
            rows.append(row)
            print(*row.values(), flush=True)
            tried = [r for r in rows if "norms" in r]
    sums = {key: sum(r[key] for r in tried) for key in ("norms", "found", "more")}
    print(f"{len(tried)} of {len(rows)} tried: {sums['found']} of {sums['norms']} norms found, {sums['more']} more")
    save(given.out, merged(given.out, {"layers": LAYERS}, rows, ["model"]))


if __name__ == "__main__":
    main()
