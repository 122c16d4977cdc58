"""LayerNorm to RMSNorm, exactly, in a ViT and a GPT-2 (random weights) as modules of torch, with the error of both.

    python examples/convert_exact.py
"""

from __future__ import annotations

import copy
import os
from collections import Counter

import torch
from torch import Tensor, nn

import normfuse

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
from transformers import GPT2Config, GPT2Model, ViTConfig, ViTModel


def vit() -> tuple[nn.Module, Tensor]:
    config = ViTConfig(hidden_size=64, intermediate_size=128, num_hidden_layers=3, num_attention_heads=4,
                       image_size=32, patch_size=8)  # fmt: skip
    return ViTModel(config, add_pooling_layer=False), torch.randn(2, 3, 32, 32)


def gpt2() -> tuple[nn.Module, Tensor]:
    config = GPT2Config(vocab_size=1000, n_embd=64, n_layer=3, n_head=4, n_positions=64, use_cache=False)
    return GPT2Model(config), torch.randint(0, 1000, (2, 16))


def hidden(model: nn.Module, inputs: Tensor) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(inputs).last_hidden_state
    return found.double()


def main() -> None:
    torch.manual_seed(0)
    for name, (model, inputs) in (("ViT", vit()), ("GPT-2", gpt2())):
        model.eval()
        for module in model.modules():
            if isinstance(module, nn.LayerNorm):  # as trained ones are: far from one and zero
                nn.init.uniform_(module.weight, 0.5, 1.5)
                nn.init.normal_(module.bias, std=0.3)
        converted, report = normfuse.optimize(model, normfuse.Config(layernorm_to_rmsnorm="exact"), args=(inputs,))
        classes = Counter(type(m).__name__ for m in converted.modules() if "Norm" in type(m).__name__)
        print(f"{name}: {report.converted} of {len(report.norms)} LayerNorms converted; "
              f"now {', '.join(f'{count} {kind}' for kind, count in classes.items())}")  # fmt: skip
        wide = inputs.double() if inputs.is_floating_point() else inputs
        exact = hidden(copy.deepcopy(model).double(), wide)
        for label, one in (("original", model), ("converted", converted)):
            error = (hidden(one, inputs) - exact).abs().max() / exact.abs().max()
            print(f"  {label}: largest distance to float64 {float(error):.1e} of the largest value")


if __name__ == "__main__":
    main()
