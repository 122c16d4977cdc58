"""More architectures with LayerNorms for the conversion to RMSNorm, by kind: transformers' own classes, two layers, all
constants random with means that are not zero, what is to come of each, and how to find that out."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import normfuse
from normfuse.distance import relative
from tests.layernorm_models import NO_CACHE, Case, ids, model, pixels

Builder = Callable[[], nn.Module]
Inputs = Callable[[], tuple[Tensor, ...]]

D, INNER, VOCABULARY, IMAGE = 32, 48, 97, 32
EXACT = normfuse.Config(layernorm_to_rmsnorm="exact")

TEXT: dict[str, Any] = {"vocab_size": VOCABULARY, "hidden_size": D, "num_hidden_layers": 2, "num_attention_heads": 2,
                        "intermediate_size": INNER, "max_position_embeddings": 32, "pad_token_id": 0}  # fmt: skip
GPT: dict[str, Any] = {"vocab_size": VOCABULARY, "n_embd": D, "n_layer": 2, "n_head": 2, "n_positions": 32}
BART: dict[str, Any] = {"vocab_size": VOCABULARY, "d_model": D, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
                        "decoder_start_token_id": 1, "encoder_layers": 2, "decoder_layers": 2,
                        "encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": INNER,
                        "decoder_ffn_dim": INNER}  # fmt: skip
VISION: dict[str, Any] = {"hidden_size": D, "num_hidden_layers": 2, "num_attention_heads": 2,
                          "intermediate_size": INNER, "image_size": IMAGE, "patch_size": 8}  # fmt: skip
STAGES: dict[str, Any] = {"depths": [1, 1, 1, 1], "hidden_sizes": [16, 16, 32, 32],
                          "num_attention_heads": [1, 2, 2, 4], "mlp_ratios": [2, 2, 2, 2]}  # fmt: skip
SPEECH: dict[str, Any] = {"vocab_size": VOCABULARY, "hidden_size": D, "num_hidden_layers": 2, "num_attention_heads": 2,
                          "intermediate_size": INNER, "conv_dim": [16, 16, 16], "conv_stride": [5, 2, 2],
                          "conv_kernel": [10, 3, 2], "num_feat_extract_layers": 3, "num_conv_pos_embeddings": 8,
                          "num_conv_pos_embedding_groups": 2, "apply_spec_augment": False}  # fmt: skip
STABLE: dict[str, Any] = {"do_stable_layer_norm": True, "feat_extract_norm": "layer"}
BACKBONE: dict[str, Any] = {"model_type": "dinov2", "hidden_size": D, "num_hidden_layers": 4, "num_attention_heads": 2,
                            "image_size": IMAGE, "patch_size": 8, "mlp_ratio": 2, "out_indices": [1, 2, 3, 4],
                            "apply_layernorm": True, "reshape_hidden_states": False}  # fmt: skip
CONFORMER: dict[str, Any] = {"hidden_size": D, "num_hidden_layers": 2, "num_attention_heads": 2, "num_mel_bins": 16,
                             "intermediate_size": INNER, "subsampling_conv_channels": 8}  # fmt: skip
PIXELS, WAVE, SPECTRUM = ("pixel_values",), ("input_values",), ("input_features",)


def both(*made: Inputs) -> Inputs:
    """Inputs one after the other."""
    return lambda: tuple(v for make in made for v in make())


def less(options: dict[str, Any], *names: str) -> dict[str, Any]:
    """Options without some."""
    return {k: v for k, v in options.items() if k not in names}


def images(kind: str, config: str, *counts: int, size: int = IMAGE, batch: int = 2, output: str = "",
           **options: Any) -> Case:  # fmt: skip
    """A model of images."""
    return Case(model(kind, config, PIXELS, output, **options), pixels(batch, 3, size, size), *counts)


def speech(kind: str, config: str, *counts: int, **options: Any) -> Case:
    """A model of sound waves."""
    return Case(model(kind, config, WAVE, **(SPEECH | options)), pixels(2, 800), *counts)


def encoder(kind: str, config: str, *counts: int, output: str = "", **options: Any) -> Case:
    """A model of token ids, without a cache."""
    return Case(model(kind, config, ("input_ids",), output, **options), ids(), *counts)


def decoder(kind: str, config: str, *counts: int, **options: Any) -> Case:
    """A model of token ids, its cache off."""
    return Case(model(kind, config, call=NO_CACHE, **options), ids(), *counts)


def pair(kind: str, config: str, *counts: int, **options: Any) -> Case:
    """An encoder and a decoder of token ids."""
    names = ("input_ids", "decoder_input_ids")
    return Case(model(kind, config, names, call=NO_CACHE, **options), ids((2, 7), (2, 5)), *counts)


def heard(kind: str, config: str, inputs: Inputs, *counts: int, name: str = "input_features", **options: Any) -> Case:
    """An encoder of sound and a decoder of token ids."""
    names = (name, "decoder_input_ids")
    return Case(model(kind, config, names, call=NO_CACHE, **options), both(inputs, ids((2, 5))), *counts)


ARCHITECTURES: dict[str, dict[str, Case]] = {
    "vision": {
        "beit": images("BeitForImageClassification", "BeitConfig", 5, 5, **VISION, use_relative_position_bias=True),
        "deit": images("DeiTForImageClassification", "DeiTConfig", 5, 5, **VISION),
        "segformer": images("SegformerForSemanticSegmentation", "SegformerConfig", 19, 19, 4, size=64, **STAGES,
                            sr_ratios=[8, 4, 2, 1], decoder_hidden_size=16),
        "pvt": images("PvtForImageClassification", "PvtConfig", 10, 16, 1, size=64, **STAGES, image_size=64,
                      sequence_reduction_ratios=[8, 4, 2, 1]),
        "vit_mae": Case(model("ViTMAEForPreTraining", "ViTMAEConfig", ("pixel_values", "noise"), "logits", **VISION,
                              decoder_hidden_size=D, decoder_num_hidden_layers=1, decoder_num_attention_heads=2,
                              decoder_intermediate_size=INNER),
                        both(pixels(2, 3, IMAGE, IMAGE), pixels(2, 16)), 8, 8, 1),
        "siglip_vision": images("SiglipVisionModel", "SiglipVisionConfig", 5, 6, output="pooler_output", **VISION),
        "hiera": images("HieraForImageClassification", "HieraConfig", 11, 11, 3, size=64, image_size=[64, 64],
                        embed_dim=16, depths=[1, 1, 2, 1], num_heads=[1, 2, 2, 4], mlp_ratio=2.0),
        "dpt": images("DPTForDepthEstimation", "DPTConfig", 0, 9, **less(VISION, "num_hidden_layers"),
                      num_hidden_layers=4, backbone_out_indices=[0, 1, 2, 3], neck_hidden_sizes=[8, 8, 16, 16],
                      fusion_hidden_size=16, is_hybrid=False),
        "depth_anything": images("DepthAnythingForDepthEstimation", "DepthAnythingConfig", 12, 12, patch_size=8,
                                 backbone_config=BACKBONE, reassemble_hidden_size=D, head_hidden_size=8,
                                 neck_hidden_sizes=[8, 8, 16, 16], fusion_hidden_size=16),
        "convnextv2": images("ConvNextV2ForImageClassification", "ConvNextV2Config", 1, 10, image_size=IMAGE,
                             hidden_sizes=[8, 16, 24, 32], depths=[1, 1, 2, 1]),
        "cvt": images("CvtForImageClassification", "CvtConfig", 10, 16, 1, size=64, embed_dim=[16, 32, 32],
                      num_heads=[1, 2, 2], depth=[1, 2, 3]),
        "yolos": images("YolosForObjectDetection", "YolosConfig", 5, 5, **less(VISION, "image_size"),
                        image_size=[IMAGE, IMAGE], num_detection_tokens=5),
        "focalnet": images("FocalNetForImageClassification", "FocalNetConfig", 7, 13, 1, image_size=IMAGE,
                           patch_size=4, embed_dim=16, depths=[1, 1, 1, 1], focal_levels=[2, 2, 2, 2],
                           focal_windows=[3, 3, 3, 3]),
        "dinov3": images("DINOv3ViTModel", "DINOv3ViTConfig", 5, 5, output="pooler_output", **VISION),
        "sam": images("SamVisionModel", "SamVisionConfig", 2, 6, output="last_hidden_state",
                      **less(VISION, "intermediate_size"), mlp_dim=INNER, output_channels=16, window_size=2,
                      global_attn_indexes=[1]),
    },
    "audio": {
        "wav2vec2": speech("Wav2Vec2ForCTC", "Wav2Vec2Config", 0, 6),
        "hubert": speech("HubertForCTC", "HubertConfig", 8, 9, 1, **STABLE, conv_bias=True),
        "sew": speech("SEWForCTC", "SEWConfig", 0, 6, squeeze_factor=2),
        "wavlm": speech("WavLMForCTC", "WavLMConfig", 8, 9, 1, **STABLE),
        "wav2vec2_bert": Case(model("Wav2Vec2BertForCTC", "Wav2Vec2BertConfig", SPECTRUM,
                                    **less(TEXT, "max_position_embeddings", "pad_token_id"),
                                    feature_projection_input_dim=16, apply_spec_augment=False),
                              pixels(2, 12, 16), 10, 13, 1),
        "ast": Case(model("ASTForAudioClassification", "ASTConfig", WAVE, **less(VISION, "image_size"),
                          frequency_stride=8, time_stride=8, max_length=32, num_mel_bins=16), pixels(2, 32, 16), 5, 6),
        "clap_audio": Case(model("ClapAudioModel", "ClapAudioConfig", SPECTRUM, "pooler_output", window_size=4,
                                 num_mel_bins=16, spec_size=64, patch_size=4, patch_stride=[4, 4], num_classes=5,
                                 hidden_size=D, depths=[1, 2], num_attention_heads=[2, 2], patch_embeds_hidden_size=16,
                                 enable_fusion=False), pixels(2, 1, 250, 16), 6, 9),
        "parakeet": Case(model("ParakeetForCTC", "ParakeetCTCConfig", SPECTRUM, vocab_size=VOCABULARY,
                               encoder_config=CONFORMER), pixels(2, 64, 16), 10, 10, 1),
        "speech_to_text": heard("Speech2TextForConditionalGeneration", "Speech2TextConfig", pixels(2, 24, 8), 12, 12, 2,
                                **BART, max_source_positions=64, max_target_positions=32, num_conv_layers=2,
                                conv_channels=24, input_feat_per_channel=8, input_channels=1),
        "moonshine": heard("MoonshineForConditionalGeneration", "MoonshineConfig", pixels(2, 2000), 12, 13, 2,
                           name="input_values", vocab_size=VOCABULARY, hidden_size=D, intermediate_size=INNER,
                           encoder_num_hidden_layers=2, decoder_num_hidden_layers=2, encoder_num_attention_heads=2,
                           decoder_num_attention_heads=2, encoder_num_key_value_heads=2,
                           decoder_num_key_value_heads=2, max_position_embeddings=32),
        "musicgen_decoder": Case(model("MusicgenForCausalLM", "MusicgenDecoderConfig", call=NO_CACHE,
                                       **less(TEXT, "intermediate_size"), ffn_dim=INNER, num_codebooks=2,
                                       bos_token_id=0), ids((4, 7)), 5, 5),
    },
    "encoder": {
        "roberta": encoder("RobertaForMaskedLM", "RobertaConfig", 0, 6, **TEXT),
        "roberta_prelayernorm": encoder("RobertaPreLayerNormForMaskedLM", "RobertaPreLayerNormConfig", 5, 7, 1, **TEXT),
        "deberta_v2": encoder("DebertaV2ForMaskedLM", "DebertaV2Config", 1, 7, **TEXT, relative_attention=True,
                              pos_att_type=["c2p", "p2c"], position_buckets=4, norm_rel_ebd="layer_norm",
                              share_att_key=True, position_biased_input=False),
        "electra": encoder("ElectraForPreTraining", "ElectraConfig", 1, 5, **TEXT, embedding_size=16),
        "modernbert": encoder("ModernBertForMaskedLM", "ModernBertConfig", 4, 6, 1, **TEXT,
                              global_attn_every_n_layers=2, local_attention=4),
        "distilbert": encoder("DistilBertForMaskedLM", "DistilBertConfig", 0, 6, vocab_size=VOCABULARY, dim=D,
                              n_layers=2, n_heads=2, hidden_dim=INNER, max_position_embeddings=32),
        "xlm": encoder("XLMWithLMHeadModel", "XLMConfig", 0, 5, vocab_size=VOCABULARY, emb_dim=D, n_layers=2, n_heads=2,
                       max_position_embeddings=32, n_langs=1),
        "mpnet": encoder("MPNetForMaskedLM", "MPNetConfig", 0, 6, **TEXT),
        "esm": encoder("EsmForMaskedLM", "EsmConfig", 5, 6, 1, **TEXT, position_embedding_type="rotary",
                       mask_token_id=96, token_dropout=False, emb_layer_norm_before=False),
        "nomic_bert": encoder("NomicBertModel", "NomicBertConfig", 1, 5, output="last_hidden_state", **TEXT),
        "megatron_bert": encoder("MegatronBertForMaskedLM", "MegatronBertConfig", 5, 6, 1, **TEXT),
        "fnet": encoder("FNetForMaskedLM", "FNetConfig", 0, 6, **TEXT),
        "clip_text": encoder("CLIPTextModel", "CLIPTextConfig", 5, 5, output="last_hidden_state", **TEXT,
                             eos_token_id=2, bos_token_id=1),
        "perceiver": Case(model("PerceiverForMaskedLM", "PerceiverConfig", ("inputs",), d_latents=D, d_model=D,
                                num_latents=8, num_blocks=1, num_self_attends_per_block=2, num_self_attention_heads=2,
                                num_cross_attention_heads=2, vocab_size=VOCABULARY, max_position_embeddings=16),
                          ids((2, 16)), 8, 10),
    },
    "decoder": {
        "gptj": decoder("GPTJForCausalLM", "GPTJConfig", 3, 3, **GPT, rotary_dim=8),
        "gpt_bigcode": decoder("GPTBigCodeForCausalLM", "GPTBigCodeConfig", 5, 5, 1, **GPT),
        "gpt_neo": decoder("GPTNeoForCausalLM", "GPTNeoConfig", 5, 5, 1, vocab_size=VOCABULARY, hidden_size=D,
                           num_layers=2, num_heads=2, attention_types=[[["global", "local"], 1]], window_size=4,
                           max_position_embeddings=32),
        "mpt": decoder("MptForCausalLM", "MptConfig", 5, 5, 1, vocab_size=VOCABULARY, d_model=D, n_heads=2, n_layers=2,
                       max_seq_len=32, expansion_ratio=2),
        "stablelm_qk": decoder("StableLmForCausalLM", "StableLmConfig", 13, 13, **TEXT, num_key_value_heads=2,
                               qk_layernorm=True),
        "cohere_qk": decoder("CohereForCausalLM", "CohereConfig", 7, 7, 1, **TEXT, num_key_value_heads=2,
                             use_qk_norm=True),
        "olmo": decoder("OlmoForCausalLM", "OlmoConfig", 5, 5, **TEXT),
        "persimmon": decoder("PersimmonForCausalLM", "PersimmonConfig", 9, 9, 0, **TEXT),
        "nemotron": decoder("NemotronForCausalLM", "NemotronConfig", 5, 5, **TEXT, num_key_value_heads=2),
        "phimoe": decoder("PhimoeForCausalLM", "PhimoeConfig", 5, 5, **TEXT, num_key_value_heads=2, num_local_experts=2,
                          num_experts_per_tok=2),
        "biogpt": decoder("BioGptForCausalLM", "BioGptConfig", 5, 5, 1, **TEXT),
        "xglm": decoder("XGLMForCausalLM", "XGLMConfig", 5, 5, 1, vocab_size=VOCABULARY, d_model=D, num_layers=2,
                        attention_heads=2, ffn_dim=INNER, max_position_embeddings=32),
        "ctrl": decoder("CTRLLMHeadModel", "CTRLConfig", 5, 5, 1, **GPT, dff=INNER),
        "openai_gpt": encoder("OpenAIGPTLMHeadModel", "OpenAIGPTConfig", 0, 4, **GPT),
        "rwkv": decoder("RwkvForCausalLM", "RwkvConfig", 6, 6, 3, vocab_size=VOCABULARY, hidden_size=D,
                        num_hidden_layers=2, attention_hidden_size=D, intermediate_size=INNER, context_length=16),
    },
    "encoder-decoder": {
        "bart": pair("BartForConditionalGeneration", "BartConfig", 0, 12, **BART, max_position_embeddings=32),
        "marian": pair("MarianMTModel", "MarianConfig", 0, 10, **BART, max_position_embeddings=32),
        "pegasus": pair("PegasusForConditionalGeneration", "PegasusConfig", 12, 12, 2, **BART,
                        max_position_embeddings=32),
    },
}  # fmt: skip

CASES: dict[str, Case] = {name: case for group in ARCHITECTURES.values() for name, case in group.items()}


@dataclass(frozen=True)
class Outcome:
    """What the conversion of one model came to.

    `operators`: how many were put; `reasons`: those of the norms that were kept; `checked`: the certificate's largest
    difference in float64; `apart`: that of the outputs in float32, relative.
    """

    converted: int
    norms: int
    operators: int
    reasons: tuple[str, ...]
    checked: float | None
    apart: float


def outcome_of(report: normfuse.Report, apart: float) -> Outcome:
    """The counts of a report."""
    found = [norm["conversion"] for norm in report.to_dict()["norms"] if norm.get("conversion")]
    done = [c for c in found if c["verdict"] != "kept"]
    return Outcome(len(done), len(found), len({line for c in done for line in c["operators"]}),
                   tuple(c["reason"] for c in found if c["verdict"] == "kept"),
                   max((c["check"]["max_rel"] for c in done), default=None), apart)  # fmt: skip


def converted(case: Case) -> Outcome:
    """Export a model, convert the program and compare what it gives with what the model gives."""
    logging.getLogger("torch.export").setLevel(logging.ERROR)
    module, args = case.build(), case.inputs()
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        want = module(*args)
        program = torch.export.export(module, args, strict=False)
        done, report = normfuse.optimize(program, EXACT)
        got = done.module()(*args)
    return outcome_of(report, relative(want.numpy(), got.numpy()))
