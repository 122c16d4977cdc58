"""LayerNorm to RMSNorm in a post-norm encoder, which only works approximately: with calibrated biases.

    python examples/approximate.py
"""

from __future__ import annotations

import os

import torch
from torch import Tensor, nn

import normfuse

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
from transformers import BertConfig, BertModel


class Encoder(nn.Module):
    """A small BERT whose stream carries a mean, as that of a trained one does."""

    def __init__(self) -> None:
        super().__init__()
        config = BertConfig(vocab_size=500, hidden_size=48, num_hidden_layers=2, num_attention_heads=4,
                            intermediate_size=192)  # fmt: skip
        self.model = BertModel(config, add_pooling_layer=False)
        for name, parameter in self.model.named_parameters():
            if name.endswith("LayerNorm.bias"):
                nn.init.normal_(parameter, 0.04, 0.15)
            elif name.endswith("output.dense.bias"):
                nn.init.normal_(parameter, 0.2, 0.1)
            elif parameter.dim() > 1:
                nn.init.normal_(parameter, std=0.15)

    def forward(self, tokens: Tensor) -> Tensor:
        found: Tensor = self.model(input_ids=tokens).last_hidden_state
        return found


def main() -> None:
    torch.manual_seed(0)
    model = Encoder().train(False)
    calibration = [(torch.randint(3, 500, (4, 12)),) for _ in range(16)]
    config = normfuse.Config(layernorm_to_rmsnorm="approximate", tolerance=0.2)
    converted, report = normfuse.optimize(model, config, args=calibration[0], calibration=calibration)

    verdicts = [(n.conversion or {})["verdict"] for n in report.norms]
    print(", ".join(f"{verdicts.count(v)} of {len(verdicts)} LayerNorms: {v}" for v in sorted(set(verdicts))))
    cost = report.approximation
    assert cost is not None
    print(f"calibrated on {cost.calibrated} sets of inputs, measured on {cost.held_back} held back")
    print(f"  hidden states off by {cost.error:.3f}; with the old biases by {cost.naive:.3f}")
    with torch.no_grad():
        before, after = (one(calibration[0][0].flip(1)) for one in (model, converted))
    print(f"the same tokens backwards: off by {float((after - before).norm() / before.norm()):.3f}")


if __name__ == "__main__":
    main()
