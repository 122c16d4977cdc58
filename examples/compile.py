"""A training step of Gemma 3 (random weights) through `torch.compile(..., backend="normfuse")`, with what it did.

    python examples/compile.py             # the backend
    python examples/compile.py --plugin    # the same passes for those who keep backend="inductor"
"""

from __future__ import annotations

import sys
from collections import Counter

import torch
from transformers import Gemma3ForCausalLM, Gemma3TextConfig

import normfuse


def main() -> None:
    torch.manual_seed(0)
    config = Gemma3TextConfig(
        vocab_size=1000, hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=32, layer_types=["full_attention"] * 2,
    )  # fmt: skip
    model = Gemma3ForCausalLM(config)
    tokens = torch.randint(0, 1000, (2, 32))

    if "--plugin" in sys.argv[1:]:
        compiled = torch.compile(model, options={"pre_grad_custom_pass": normfuse.InductorPass()})
    else:
        compiled = torch.compile(model, backend="normfuse")

    losses = {}
    for name, run in (("eager", model), ("compiled", compiled)):
        model.zero_grad()
        losses[name] = run(input_ids=tokens, labels=tokens, use_cache=False).loss
        losses[name].backward()
        steepest = max(float(p.grad.abs().max()) for p in model.parameters() if p.grad is not None)
        print(f"{name}: loss {float(losses[name].detach()):.6f}, largest gradient {steepest:.6f}")

    report = normfuse.last_report()
    if report is None:  # with the plugin Inductor asks its cache first
        sys.exit("Inductor had the code from an earlier run: TORCHINDUCTOR_FORCE_DISABLE_CACHES=1 compiles it again")
    print(f"{len(report.norms)} norms: {report.recipe}")
    for (placement, made), count in Counter((n.placement, n.emitted or n.reason) for n in report.norms).items():
        print(f"  {count} x {placement}: {made}")
    for note in report.notes:
        print(f"note: {note}")


if __name__ == "__main__":
    main()
