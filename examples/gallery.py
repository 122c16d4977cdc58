"""A page that draws how seven model families normalise, read off the graphs of tiny members with random weights.

    python examples/gallery.py [gallery.html]
"""

from __future__ import annotations

import os
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch

from normfuse.cli import main as normfuse

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
import transformers

DECODER: dict[str, Any] = {
    "vocab_size": 1000, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
LATENT = {"num_key_value_heads": 4, "head_dim": 8, "kv_lora_rank": 32, "q_lora_rank": 48, "qk_rope_head_dim": 8,
          "qk_nope_head_dim": 16, "v_head_dim": 24}  # fmt: skip
EXPERTS = {"n_routed_experts": 8, "num_experts_per_tok": 2, "n_group": 2, "topk_group": 1, "moe_intermediate_size": 32,
           "first_k_dense_replace": 1, "n_shared_experts": 1}  # fmt: skip
MODELS: dict[str, dict[str, Any]] = {
    "Llama": DECODER,
    "Qwen3": DECODER,
    "DeepseekV3": DECODER | LATENT | EXPERTS,
    "GptOss": DECODER | {"num_local_experts": 4, "num_experts_per_tok": 2},
    "Gemma3": DECODER,
    "Olmo2": {k: v for k, v in DECODER.items() if k != "head_dim"},
    "GPT2": {"vocab_size": 1000, "n_embd": 64, "n_layer": 2, "n_head": 4},
}


def main() -> None:
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as folder:
        paths = []
        for name, options in MODELS.items():
            torch.manual_seed(0)
            config = getattr(transformers, f"{name}TextConfig" if name == "Gemma3" else f"{name}Config")
            model_class = getattr(transformers, f"{name}LMHeadModel" if name == "GPT2" else f"{name}ForCausalLM")
            model = model_class(config(**options, use_cache=False, attn_implementation="eager")).eval()
            if name in ("DeepseekV3", "GptOss"):
                model.set_experts_implementation("batched_mm")  # what torch.export takes
            paths.append(Path(folder) / f"{name}.pt2")
            torch.export.save(torch.export.export(model, (torch.ones(1, 8).long(),), strict=False), paths[-1])
        target = (sys.argv[1:] or ["gallery.html"])[0]
        raise SystemExit(normfuse(["inspect", *map(str, paths), "--report", target, "--overwrite"]))


if __name__ == "__main__":
    main()
