"""Which LayerNorms of which architectures can be RMSNorms: the table of docs/layernorm-architectures.md.

python -m tests.bench.architectures [--out FILE.md]

Each model of `tests.layernorm_models` and `tests.layernorm_architectures` (transformers' own classes, two or three
layers, random weights whose means are not zero) is exported by torch.export and converted.
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path

from tests.bench.common import ROOT
from tests.layernorm_architectures import ARCHITECTURES, Outcome, converted
from tests.layernorm_models import CASES

RESULT = ROOT / "docs/layernorm-architectures.md"
HEAD = """# LayerNorms that can be RMSNorms, by architecture

Made by `python -m tests.bench.architectures`: transformers' own classes, two or three layers, random weights whose
means are not zero, exported by `torch.export`, `layernorm_to_rmsnorm="exact"`. A token table that is also the output
layer's is not edited. "max diff" is the certificate's largest difference in float64 with random constants. The reason
is that of the first norm that stays a LayerNorm.

| architecture | kind | LayerNorms | converted | operators | max diff | why not the others |
|---|---|---|---|---|---|---|
"""


def line(name: str, kind: str, found: Outcome) -> str:
    """A row of the table."""
    reason = re.sub(r"^\d+ centring operators? would be needed for \d+ norms?: ", "", (found.reasons or ("",))[0])
    gap = "" if found.checked is None else f"{found.checked:.0e}"
    return f"| {name} | {kind} | {found.norms} | {found.converted} | {found.operators} | {gap} | {plain(reason)} |"


def plain(reason: str) -> str:
    """A reason without the names of nodes."""
    for pattern, text in (
        (r"the same for all channels", "adds one number to all channels"),
        (r"reads it as it is|is also read by", "something else reads the value as it is"),
        (r"is an output of the graph", "the stream is an output"),
        (r"layer_norm\S* mixes or bends", "post-norm: reads the norm before, which has a weight"),
        (r"(gelu|relu|silu|tanh|sigmoid|mul|where|max)\S* \S*\s*mixes or bends", "an activation ahead of it"),
        (r"groups of channels", "a depthwise convolution ahead of it"),
        (r"normalised together", "channels joined from several values"),
    ):
        if re.search(pattern, reason):
            return text
    return re.sub(r"\S*/", "", reason)


def main() -> None:
    """Convert all, print, and write the file."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=RESULT)
    given = parser.parse_args()
    groups = {"in the tests": CASES, **ARCHITECTURES}
    lines = []
    for kind, cases in groups.items():
        for name, case in cases.items():
            lines.append(line(name, kind, converted(case)))
            print(lines[-1], flush=True)
    given.out.write_text(HEAD + "\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
