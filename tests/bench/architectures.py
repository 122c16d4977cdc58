"""A table of architectures: how many of their LayerNorms become RMSNorms exactly, with what, and what keeps the others.

python -m tests.bench.architectures [--names NAME ...] [--out docs/layernorm-architectures.md]

transformers' own classes, two or three layers, exported by `torch.export`; every constant is random.
"""

from __future__ import annotations

import argparse
import logging
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
import transformers

from tests.layernorm_architectures import ARCHITECTURES, Outcome, converted
from tests.layernorm_models import CASES, Case

KINDS = {"vit": "vision", "dinov2": "vision", "clip_vision_pooled": "vision", "clip_vision_hidden": "vision",
         "swinv2": "vision", "swin": "vision", "convnext": "vision", "whisper": "audio", "bert": "encoder",
         "mbart": "encoder-decoder"}  # fmt: skip
"""What the models of `tests.layernorm_models` are, the decoders aside."""
HEAD = ("architecture", "kind", "LayerNorms", "converted", "operators", "why others stay", "max_rel")
TITLE = """# LayerNorm to RMSNorm: architectures

Written by `python -m tests.bench.architectures --out docs/layernorm-architectures.md`. The classes are those of
transformers {version}, with two or three layers and random constants whose means are not zero, as `torch.export` gives
them. *converted* of the *LayerNorms* are RMSNorms in the result, which has so many centring *operators*
(`x - mean(x)`) more. *max_rel* is the certificate's largest difference between the two in float64 with random
constants, relative to the largest element of the output. For the norms that stay LayerNorms the first reason is given:
a norm ahead of which nothing can take the mean away would need an operator of its own, which is no gain.

A table that the embedding shares with the output costs an operator here; torch's exporter to ONNX has made two of it.

In all: {converted} of {norms} LayerNorms in {models} models, with {operators} operators.

"""
PLAIN = (
    (r"no output of the graph depends", "no output depends on it"),
    (r"is an input of the graph", "it normalises an input of the model"),
    (r"is an output of the graph", "its input is an output of the model"),
    (r"written in place", "its input is written in place"),
    (r"joins channels", "several vectors are joined to one before it"),
    (r"works in groups", "a convolution in groups stands before it"),
    (r"regroups the channels", "a reshape mixes channels and positions before it"),
    (r"draws random numbers|for training", "the graph draws random numbers"),
    (r"part of one operator|inside another operator", "it is a part of an operator"),
    (r"layer_norm\S* mixes|LayerNorm\S* mixes", "another norm stands before it, with a weight"),
)
"""What the refusals' messages come to."""


def plain(reason: str) -> str:
    """A refusal in words for people."""
    for pattern, words in PLAIN:
        if re.search(pattern, reason):
            return words
    if found := re.search(r": (\S+): (\w+) \S+ reads it as it is", reason):
        value, reader = found.groups()
        shared = value.startswith("p_")
        return "it shares a table with another layer" if shared else f"its input is read by `{reader}` too"
    if found := re.search(r"(\w+?)(_\d+)? (mixes or bends|multiplies two values|picks channel)", reason):
        return f"`{found[1]}` stands before it"
    return reason


def cases() -> Iterator[tuple[str, str, Case]]:
    """(kind, name, case) of both files, by kind."""
    for kind, group in ARCHITECTURES.items():
        found = group | {name: case for name, case in CASES.items() if KINDS.get(name, "decoder") == kind}
        yield from ((kind, name, found[name]) for name in sorted(found))


def table(rows: Iterable[tuple[str, str, Outcome]]) -> str:
    """Markdown."""
    lines = ["| " + " | ".join(HEAD) + " |", "|---|---|---:|---:|---:|---|---:|"]
    for kind, name, found in rows:
        checked = "" if found.checked is None else f"{found.checked:.1e}"
        reason = plain(found.reasons[0]) if found.reasons else ""
        cells = (name, kind, found.norms, found.converted, found.operators, reason, checked)
        lines.append("| " + " | ".join(str(cell) for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Convert them all and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--names", nargs="*", help="of which architectures; all without this")
    parser.add_argument("--out", type=Path, help="where to; on the screen without this")
    args = parser.parse_args()
    logging.getLogger("transformers").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    rows = [(kind, name, converted(case)) for kind, name, case in cases() if not args.names or name in args.names]
    found = [row for _, _, row in rows]
    sums = {field: sum(getattr(f, field) for f in found) for field in ("norms", "converted", "operators")}
    text = TITLE.format(version=transformers.__version__, models=len(found), **sums) + table(rows)
    if args.out is None:
        print(text)
    else:
        args.out.write_text(text)
        print(f"written: {args.out}")


if __name__ == "__main__":
    main()
