"""Models with LayerNorms for the conversion to RMSNorm: transformers' own classes, three layers, all constants random
with means that are not zero, and what is to come of each: (converted, all, operators)."""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from tests.families import _silent as quiet

D, HEADS, LAYERS, VOCABULARY, IMAGE = 64, 4, 3, 97, 32


class Wrapped(nn.Module):
    """A model called with tensors by position, that gives the first float tensor of its output, or one by name."""

    def __init__(self, model: nn.Module, names: tuple[str, ...], output: str = "", **more: Any) -> None:
        super().__init__()
        self.model, self.names, self.output, self.more = model, names, output, more

    def forward(self, *args: Tensor) -> Tensor:
        """The named output, or the logits or last hidden state."""
        out = self.model(**dict(zip(self.names, args, strict=True)), **self.more)
        found = getattr(out, self.output) if self.output else out[0]
        assert isinstance(found, Tensor)
        return found


@dataclass(frozen=True)
class Case:
    """A model, its inputs and the ruling."""

    build: Callable[[], nn.Module]
    inputs: Callable[[], tuple[Tensor, ...]]
    converted: int
    norms: int
    operators: int = 0


def offset(model: nn.Module, seed: int = 0) -> nn.Module:
    """Every parameter random with a mean that is not zero, norm weights and biases too."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            scale = 0.3 if p.dim() < 2 else 1.0 / max(p[0].numel(), 1) ** 0.5
            p.copy_(torch.randn_like(p) * scale + 0.5 * scale)
            if ("norm" in name.lower() and name.endswith("weight")) or name.endswith(("ln_1.weight", "ln_2.weight",
                                                                                  "ln_f.weight")):  # fmt: skip
                p.add_(0.7)
    return model.eval()


def ids(*shapes: tuple[int, ...]) -> Callable[[], tuple[Tensor, ...]]:
    """Token ids."""
    def make() -> tuple[Tensor, ...]:
        torch.manual_seed(1)
        return tuple(torch.randint(3, VOCABULARY, shape) for shape in shapes or ((2, 7),))

    return make


def pixels(*shape: int) -> Callable[[], tuple[Tensor, ...]]:
    """Images or spectrograms."""
    def make() -> tuple[Tensor, ...]:
        torch.manual_seed(1)
        return (torch.randn(shape),)

    return make


def model(kind: str, config: str, names: tuple[str, ...] = ("input_ids",), output: str = "",
          call: Mapping[str, Any] | None = None, **options: Any) -> Callable[[], nn.Module]:  # fmt: skip
    """A class of transformers with a small configuration."""
    def build() -> nn.Module:
        with quiet():
            torch.manual_seed(0)
            options_ = {"attn_implementation": "eager", **options}
            made = getattr(transformers, kind)(getattr(transformers, config)(**options_))
        return Wrapped(offset(made), names, output, **(call or {})).eval()

    return build


TEXT: dict[str, Any] = {"vocab_size": VOCABULARY, "hidden_size": D, "num_hidden_layers": LAYERS,
                        "num_attention_heads": HEADS}  # fmt: skip
NO_CACHE = {"use_cache": False}
VISION: dict[str, Any] = {"hidden_size": D, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS,
                          "intermediate_size": 96, "image_size": IMAGE, "patch_size": 8}  # fmt: skip

CASES: dict[str, Case] = {
    "gpt2": Case(model("GPT2LMHeadModel", "GPT2Config", call=NO_CACHE, vocab_size=VOCABULARY, n_embd=D, n_layer=LAYERS,
                       n_head=HEADS, n_positions=32), ids(), 7, 7, 1),
    "opt": Case(model("OPTForCausalLM", "OPTConfig", call=NO_CACHE, ffn_dim=96, max_position_embeddings=32,
                      word_embed_proj_dim=D, **TEXT), ids(), 7, 7, 1),
    "gpt_neox": Case(model("GPTNeoXForCausalLM", "GPTNeoXConfig", call=NO_CACHE, intermediate_size=96,
                           max_position_embeddings=32, **TEXT), ids(), 7, 7),
    "phi": Case(model("PhiForCausalLM", "PhiConfig", call=NO_CACHE, intermediate_size=96, max_position_embeddings=32,
                      **TEXT), ids(), 4, 4),
    "vit": Case(model("ViTForImageClassification", "ViTConfig", ("pixel_values",), **VISION),
                pixels(2, 3, IMAGE, IMAGE), 7, 7),
    "dinov2": Case(model("Dinov2ForImageClassification", "Dinov2Config", ("pixel_values",), mlp_ratio=2,
                         **{k: v for k, v in VISION.items() if k != "intermediate_size"}), pixels(2, 3, IMAGE, IMAGE),
                   7, 7),
    "whisper": Case(model("WhisperForConditionalGeneration", "WhisperConfig", ("input_features", "decoder_input_ids"),
                          call=NO_CACHE, vocab_size=VOCABULARY, d_model=D, encoder_layers=LAYERS, decoder_layers=LAYERS,
                          encoder_attention_heads=HEADS, decoder_attention_heads=HEADS, encoder_ffn_dim=96,
                          decoder_ffn_dim=96, max_source_positions=16, max_target_positions=16, num_mel_bins=8,
                          pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1),
                    lambda: (*pixels(2, 8, 32)(), *ids((2, 5))()), 17, 17, 2),
    "bloom": Case(model("BloomForCausalLM", "BloomConfig", call=NO_CACHE, vocab_size=VOCABULARY, hidden_size=D,
                        n_layer=LAYERS, n_head=HEADS), ids(), 8, 8, 1),
    "falcon": Case(model("FalconForCausalLM", "FalconConfig", call=NO_CACHE, **TEXT, new_decoder_architecture=False,
                         parallel_attn=False, bias=True, alibi=False), ids(), 7, 7, 1),
    "starcoder2": Case(model("Starcoder2ForCausalLM", "Starcoder2Config", call=NO_CACHE, intermediate_size=96,
                             num_key_value_heads=2, max_position_embeddings=32, **TEXT, tie_word_embeddings=True),
                       ids(), 7, 7, 1),
    "mbart": Case(model("MBartForConditionalGeneration", "MBartConfig", ("input_ids", "decoder_input_ids"),
                        call=NO_CACHE, vocab_size=VOCABULARY, d_model=D, encoder_layers=LAYERS, decoder_layers=LAYERS,
                        encoder_attention_heads=HEADS, decoder_attention_heads=HEADS, encoder_ffn_dim=96,
                        decoder_ffn_dim=96, max_position_embeddings=32), ids((2, 7), (2, 5)), 19, 19, 2),
    "clip_vision_pooled": Case(model("CLIPVisionModel", "CLIPVisionConfig", ("pixel_values",), "pooler_output",
                                     **VISION), pixels(2, 3, IMAGE, IMAGE), 8, 8, 1),
    "clip_vision_hidden": Case(model("CLIPVisionModel", "CLIPVisionConfig", ("pixel_values",), "last_hidden_state",
                                     **VISION), pixels(2, 3, IMAGE, IMAGE), 1, 7),
    "swinv2": Case(model("Swinv2Model", "Swinv2Config", ("pixel_values",), "pooler_output", image_size=64, patch_size=4,
                         embed_dim=16, depths=[2, 2, 2], num_heads=[2, 2, 4], window_size=4), pixels(2, 3, 64, 64),
                   15, 16),
    "swin": Case(model("SwinModel", "SwinConfig", ("pixel_values",), "pooler_output", image_size=64, patch_size=4,
                       embed_dim=16, depths=[2, 2, 2], num_heads=[2, 2, 4], window_size=4), pixels(2, 3, 64, 64),
                 6, 16),
    "convnext": Case(model("ConvNextModel", "ConvNextConfig", ("pixel_values",), "pooler_output", image_size=32,
                           hidden_sizes=[8, 16, 24, 32], depths=[2, 2, 2, 2]), pixels(2, 3, 32, 32), 1, 13),
    "bert": Case(model("BertForMaskedLM", "BertConfig", intermediate_size=96,
                       max_position_embeddings=32, **TEXT), ids(), 1, 8),
}  # fmt: skip


def to_onnx(module: nn.Module, args: tuple[Tensor, ...], opset: int = 18, dynamo: bool = True,
            optimize: bool = True) -> Any:  # fmt: skip
    """The ONNX program that torch exports."""
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with torch.no_grad(), warnings.catch_warnings(), contextlib.redirect_stdout(None):
        warnings.simplefilter("ignore")
        return torch.onnx.export(module, args, dynamo=dynamo, opset_version=opset, optimize=optimize, verbose=False)
