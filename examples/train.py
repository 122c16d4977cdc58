"""A small GPT, trained to continue its own source by characters: eager, and through `backend="normfuse"`.

    python examples/train.py [STEPS]
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from transformers import GPT2Config, GPT2LMHeadModel

import normfuse

LENGTH, BATCH = 64, 8


def main() -> None:
    steps = int(sys.argv[1]) if len(sys.argv) > 1 else 60
    text = torch.tensor(list(Path(__file__).read_bytes()))
    config = GPT2Config(vocab_size=256, n_positions=LENGTH, n_embd=64, n_layer=2, n_head=4, resid_pdrop=0.0,
                        embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=None, eos_token_id=None)  # fmt: skip
    losses: dict[str, list[float]] = {}
    for name in ("eager", "compiled"):
        torch.manual_seed(0)
        model = GPT2LMHeadModel(config)
        run = torch.compile(model, backend="normfuse") if name == "compiled" else model
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
        losses[name] = []
        for _ in range(steps):
            start = torch.randint(0, len(text) - LENGTH, (BATCH, 1))
            tokens = text[start + torch.arange(LENGTH)]
            logits = run(input_ids=tokens, use_cache=False).logits
            loss: Any = F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses[name].append(float(loss.detach()))

    print("step  eager   compiled")
    for step in range(0, steps, max(steps // 6, 1)):
        print(f"{step:4}  {losses['eager'][step]:.4f}  {losses['compiled'][step]:.4f}")
    report = normfuse.last_report()
    assert report is not None
    made = ", ".join(sorted({n.emitted or n.reason for n in report.norms}))
    print(f"{len(report.norms)} norms, {report.fused} in fused operators: {made}")


if __name__ == "__main__":
    main()
