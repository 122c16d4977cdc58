"""Tiny models of the families that NormFuse must know, and the ways to turn each into a graph.

Every family is transformers' own configuration and model class: two layers, hidden size 64, random norm
parameters, evaluation mode, float32, made without network. ``FAMILIES[name].build()`` is a module that takes
tensors only and returns one tensor; ``norms`` and ``placements`` say what is to be found in its graph.
"""

from __future__ import annotations

import contextlib
import copy
import io
import logging
import os
import tempfile
import warnings
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

Placements = Mapping[str, int]
Captured = list[tuple[torch.fx.GraphModule, list[Any]]]

VOCABULARY = 128
HIDDEN = 64
LAYERS = 2
IMAGE = 16

# Norm classes that scale by 1 + weight.
_OFFSET_NORMS = frozenset({"GemmaRMSNorm", "Gemma2RMSNorm", "Gemma3RMSNorm", "NemotronLayerNorm1P"})


class _Tokens(nn.Module):
    """A model of token ids, called as ``m(input_ids)``."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor) -> Tensor:
        """The logits, or the last hidden state of a model without a head."""
        return _first(self.model(input_ids=input_ids, use_cache=False))


class _Encoder(_Tokens):
    """A model of token ids that has no ``use_cache``."""

    def forward(self, input_ids: Tensor) -> Tensor:
        """The last hidden state."""
        return _first(self.model(input_ids=input_ids))


class _Pixels(nn.Module):
    """A model of images, called as ``m(pixel_values)``."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixel_values: Tensor) -> Tensor:
        """The last hidden state."""
        return _first(self.model(pixel_values=pixel_values))


class _EncoderDecoder(nn.Module):
    """An encoder-decoder of token ids, called as ``m(input_ids, decoder_input_ids)``."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, decoder_input_ids: Tensor) -> Tensor:
        """The decoder's logits."""
        return _first(self.model(input_ids=input_ids, decoder_input_ids=decoder_input_ids, use_cache=False))


def _first(output: Any) -> Tensor:
    """The logits of a model's output, or its last hidden state."""
    found = output.logits if hasattr(output, "logits") else output.last_hidden_state
    assert isinstance(found, Tensor)
    return found


@dataclass(frozen=True)
class Family:
    """One model family: how to make a small member of it, and the norms that its graph holds."""

    name: str
    config: str
    model: str
    norms: int
    placements: Placements
    options: Mapping[str, Any] = field(default_factory=dict)
    wrap: Callable[[nn.Module], nn.Module] = _Tokens
    sdpa: bool = True
    experts: bool = False

    def build(self, attn: str = "eager") -> nn.Module:
        """A new module in evaluation mode; the same parameters at every call, whatever the global seed."""
        with torch.random.fork_rng(devices=[]), _silent():
            torch.manual_seed(0)
            options = copy.deepcopy(dict(self.options))  # transformers fills in some of them in place
            config = getattr(transformers, self.config)(**options, attn_implementation=attn)
            model = getattr(transformers, self.model)(config)
        if self.experts:  # the default loops over the experts that were hit: no exporter takes that
            model.set_experts_implementation("batched_mm")
        _randomise(model, zlib.crc32(self.name.encode()))
        return self.wrap(model.eval().float()).eval()

    def args(self, batch: int = 2, seq: int = 7) -> tuple[Tensor, ...]:
        """Inputs for the module, the same at every call."""
        generator = torch.Generator().manual_seed(1)
        if self.wrap is _Pixels:
            return (torch.randn(batch, 3, IMAGE, IMAGE, generator=generator),)
        count = 2 if self.wrap is _EncoderDecoder else 1
        lengths = [seq + 2 * index for index in range(count)]
        return tuple(torch.randint(3, VOCABULARY, (batch, n), generator=generator) for n in lengths)


def _randomise(model: nn.Module, seed: int) -> None:
    """Give every parameter a value from ``seed``: a norm's far from trivial, the others of unit gain."""
    generator = torch.Generator().manual_seed(seed)
    done: set[int] = set()
    with torch.no_grad():
        for module in _norm_modules(model):
            low = -0.5 if type(module).__name__ in _OFFSET_NORMS else 0.5
            for name, parameter in module.named_parameters(recurse=False):
                done.add(id(parameter))
                if name == "weight":
                    parameter.uniform_(low, low + 1.0, generator=generator)
                else:
                    parameter.normal_(0.0, 0.3, generator=generator)
        for module in model.modules():
            for parameter in module.parameters(recurse=False):
                if id(parameter) in done:
                    continue
                done.add(id(parameter))
                if isinstance(module, nn.Embedding):
                    std = 1.0
                elif parameter.dim() >= 2:
                    std = float(parameter.shape[-1]) ** -0.5
                else:
                    std = 0.1
                parameter.normal_(0.0, std, generator=generator)


def _norm_modules(model: nn.Module) -> list[nn.Module]:
    """The modules whose class is a norm's: its name says so."""
    return [
        module
        for module in model.modules()
        if "Norm" in type(module).__name__ and not any(True for _ in module.children())
    ]


# ---- the table ---------------------------------------------------------------------------------------------

_COMMON: dict[str, Any] = {"vocab_size": VOCABULARY, "use_cache": False, "pad_token_id": 0}
_TOKENS: dict[str, Any] = {"bos_token_id": 1, "eos_token_id": 2}
_DECODER: dict[str, Any] = {
    **_COMMON,
    **_TOKENS,
    "hidden_size": HIDDEN,
    "intermediate_size": 128,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
_GROUPED: dict[str, Any] = {**_DECODER, "num_key_value_heads": 2}
_HEADS: dict[str, Any] = {**_GROUPED, "head_dim": 16}

_PRE: Placements = {"pre": 2 * LAYERS, "final": 1}
_PARALLEL: Placements = {"pre": LAYERS, "final": 1}
_PRE_QK: Placements = {"pre": 2 * LAYERS, "qk": 2 * LAYERS, "final": 1}
_SANDWICH: Placements = {"sandwich_pre": 2 * LAYERS, "sandwich_post": 2 * LAYERS, "final": 1}

_LIST = [
    Family("llama", "LlamaConfig", "LlamaForCausalLM", 5, _PRE, _GROUPED),
    Family("mistral", "MistralConfig", "MistralForCausalLM", 5, _PRE, {**_HEADS, "sliding_window": 4}),
    Family("qwen2", "Qwen2Config", "Qwen2ForCausalLM", 5, _PRE, _GROUPED),
    Family("qwen3", "Qwen3Config", "Qwen3ForCausalLM", 9, _PRE_QK, _HEADS),
    Family(
        "deepseek_v3",
        "DeepseekV3Config",
        "DeepseekV3ForCausalLM",
        9,
        {"pre": 2 * LAYERS, "latent": 2 * LAYERS, "final": 1},
        {
            **_DECODER,
            "num_key_value_heads": 4,
            "moe_intermediate_size": 32,
            "first_k_dense_replace": 1,  # one dense layer, one with experts
            "n_shared_experts": 1,
            "n_routed_experts": 8,
            "num_experts_per_tok": 2,
            "n_group": 2,
            "topk_group": 1,
            "kv_lora_rank": 32,
            "q_lora_rank": 48,
            "qk_rope_head_dim": 8,
            "qk_nope_head_dim": 16,
            "v_head_dim": 24,
        },
        experts=True,
    ),
    Family(
        "gpt_oss",
        "GptOssConfig",
        "GptOssForCausalLM",
        5,
        _PRE,
        {
            **_HEADS,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "sliding_window": 4,
            "layer_types": ["sliding_attention", "full_attention"],
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 10000.0,
                "factor": 2.0,
                "original_max_position_embeddings": 32,
            },
        },
        sdpa=False,
        experts=True,
    ),
    Family("gemma", "GemmaConfig", "GemmaForCausalLM", 5, _PRE, _HEADS),
    Family(
        "gemma2",
        "Gemma2Config",
        "Gemma2ForCausalLM",
        9,
        _SANDWICH,
        {
            **_HEADS,
            "query_pre_attn_scalar": 16,
            "sliding_window": 4,
            "layer_types": ["sliding_attention", "full_attention"],
        },
        sdpa=False,
    ),
    Family(
        "gemma3",
        "Gemma3TextConfig",
        "Gemma3ForCausalLM",
        13,
        {**_SANDWICH, "qk": 2 * LAYERS},
        {
            **_HEADS,
            "query_pre_attn_scalar": 16,
            "sliding_window": 4,
            "layer_types": ["sliding_attention", "full_attention"],
        },
    ),
    Family("olmo", "OlmoConfig", "OlmoForCausalLM", 5, _PRE, _DECODER),
    Family(
        "olmo2",
        "Olmo2Config",
        "Olmo2ForCausalLM",
        9,
        {"post": 2 * LAYERS, "qk": 2 * LAYERS, "final": 1},
        _GROUPED,
    ),
    Family(
        "olmoe",
        "OlmoeConfig",
        "OlmoeForCausalLM",
        9,
        _PRE_QK,
        {**_GROUPED, "intermediate_size": 32, "num_experts": 8, "num_experts_per_tok": 2},
        experts=True,
    ),
    Family("phi", "PhiConfig", "PhiForCausalLM", 3, _PARALLEL, _GROUPED),
    Family("phi3", "Phi3Config", "Phi3ForCausalLM", 5, _PRE, _GROUPED),
    Family("cohere", "CohereConfig", "CohereForCausalLM", 3, _PARALLEL, {**_GROUPED, "use_qk_norm": False}),
    Family(
        "cohere_qk",
        "CohereConfig",
        "CohereForCausalLM",
        7,
        {**_PARALLEL, "qk": 2 * LAYERS},
        {**_GROUPED, "use_qk_norm": True},
    ),
    Family("nemotron", "NemotronConfig", "NemotronForCausalLM", 5, _PRE, _HEADS),
    Family("glm4", "Glm4Config", "Glm4ForCausalLM", 9, _SANDWICH, _HEADS),
    Family(
        "gpt_neox",
        "GPTNeoXConfig",
        "GPTNeoXForCausalLM",
        5,
        _PRE,
        {**_DECODER, "use_parallel_residual": True},
    ),
    Family(
        "falcon",
        "FalconConfig",
        "FalconForCausalLM",
        5,
        _PRE,
        {
            **_COMMON,
            **_TOKENS,
            "hidden_size": HIDDEN,
            "num_hidden_layers": LAYERS,
            "num_attention_heads": 4,
            "num_kv_heads": 2,
            "ffn_hidden_size": 128,
            "new_decoder_architecture": True,
            "max_position_embeddings": 64,
        },
    ),
    Family(
        "bloom",
        "BloomConfig",
        "BloomForCausalLM",
        6,
        {**_PRE, "embedding": 1},
        {**_COMMON, **_TOKENS, "hidden_size": HIDDEN, "n_layer": LAYERS, "n_head": 4},
        sdpa=False,
    ),
    Family(
        "gpt2",
        "GPT2Config",
        "GPT2LMHeadModel",
        5,
        _PRE,
        {
            **_COMMON,
            **_TOKENS,
            "n_embd": HIDDEN,
            "n_layer": LAYERS,
            "n_head": 4,
            "n_inner": 128,
            "n_positions": 64,
        },
    ),
    Family(
        "opt",
        "OPTConfig",
        "OPTForCausalLM",
        5,
        _PRE,
        {
            **_COMMON,
            **_TOKENS,
            "hidden_size": HIDDEN,
            "ffn_dim": 128,
            "num_hidden_layers": LAYERS,
            "num_attention_heads": 4,
            "max_position_embeddings": 64,
            "word_embed_proj_dim": HIDDEN,
        },
    ),
    Family(
        "bert",
        "BertConfig",
        "BertModel",
        5,
        {"embedding": 1, "post_residual": 2 * LAYERS},
        _DECODER,
        wrap=_Encoder,
    ),
    Family(
        "vit",
        "ViTConfig",
        "ViTModel",
        5,
        _PRE,
        {
            "hidden_size": HIDDEN,
            "intermediate_size": 128,
            "num_hidden_layers": LAYERS,
            "num_attention_heads": 4,
            "image_size": IMAGE,
            "patch_size": 4,
        },
        wrap=_Pixels,
    ),
    Family(
        "t5",
        "T5Config",
        "T5ForConditionalGeneration",
        12,
        {"pre": 5 * LAYERS, "final": 2},
        {
            **_COMMON,
            "eos_token_id": 1,
            "d_model": HIDDEN,
            "d_kv": 16,
            "d_ff": 128,
            "num_layers": LAYERS,
            "num_heads": 4,
            "decoder_start_token_id": 0,
        },
        wrap=_EncoderDecoder,
    ),
]

FAMILIES: dict[str, Family] = {family.name: family for family in _LIST}


def count_norm_calls(module: nn.Module, args: tuple[Tensor, ...]) -> int:
    """How many times one forward pass applies a norm, by hooks on every norm module."""
    calls: list[str] = []

    def note(norm: nn.Module, _inputs: Any, _output: Any) -> None:
        calls.append(type(norm).__name__)

    handles = [norm.register_forward_hook(note) for norm in _norm_modules(module)]
    try:
        with torch.no_grad():
            module(*args)
    finally:
        for handle in handles:
            handle.remove()
    return len(calls)


def check(family: Family) -> None:
    """Assert that a family's numbers are those of its model."""
    calls = count_norm_calls(family.build(), family.args())
    assert calls == family.norms, f"{family.name}: {calls} norm calls, the table says {family.norms}"
    total = sum(family.placements.values())
    assert total == family.norms, f"{family.name}: placements add up to {total}, not {family.norms}"


# ---- graphs ------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """No warnings, log lines or prints from the exporters."""
    previous = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        with (
            warnings.catch_warnings(),
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(previous)


def _dynamic_shapes(args: tuple[Tensor, ...], named: bool) -> tuple[dict[int, Any], ...]:
    """Batch and, of token ids, sequence as free dimensions; named ones are for ``torch.onnx.export``."""
    auto = torch.export.Dim.AUTO
    shapes = []
    for index, arg in enumerate(args):
        names = ["batch"] + ([f"sequence_{index}" if index else "sequence"] if arg.dim() == 2 else [])
        shapes.append({axis: name if named else auto for axis, name in enumerate(names)})
    return tuple(shapes)


def export_onnx(
    module: nn.Module,
    args: tuple[Tensor, ...],
    path: str | os.PathLike[str],
    opset: int = 18,
    optimize: bool = True,
    dynamic: bool = False,
) -> Path:
    """Write ``module`` as one ONNX file at ``path``, without a word, and return the path."""
    target = Path(path)
    with _silent(), torch.no_grad():
        torch.onnx.export(
            module,
            args,
            str(target),
            dynamo=True,
            opset_version=opset,
            external_data=False,
            optimize=optimize,
            verbose=False,
            dynamic_shapes=_dynamic_shapes(args, named=True) if dynamic else None,
        )
    return target


def exported_program(
    module: nn.Module, args: tuple[Tensor, ...], dynamic: bool = False
) -> torch.export.ExportedProgram:
    """``torch.export.export`` of ``module``, without a word."""
    shapes = _dynamic_shapes(args, named=False) if dynamic else None
    with _silent(), torch.no_grad():
        return torch.export.export(module, args, dynamic_shapes=shapes)


def dynamo_graphs(
    module: nn.Module, args: tuple[Tensor, ...], dynamic: bool | None = None, training: bool = False
) -> Captured:
    """The graphs that Dynamo hands to a backend, with example inputs; a second one means a graph break."""
    found: Captured = []

    def capture(graph: torch.fx.GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
        found.append((graph, list(example_inputs)))
        return graph.forward

    _run_compiled(module, args, capture, dynamic, training)
    return found


def aot_graphs(
    module: nn.Module,
    args: tuple[Tensor, ...],
    training: bool = False,
    decompositions: Mapping[Any, Callable[..., Any]] | None = None,
    dynamic: bool | None = None,
) -> Captured:
    """The forward graphs after AOTAutograd, with inputs; in training they also save for the backward."""
    from torch._dynamo.backends.common import aot_autograd

    found: Captured = []

    def forward(graph: torch.fx.GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
        found.append((graph, list(example_inputs)))
        return _boxed(graph)

    def backward(graph: torch.fx.GraphModule, _example_inputs: list[Any]) -> Callable[..., Any]:
        return _boxed(graph)

    backend = aot_autograd(
        fw_compiler=forward,
        bw_compiler=backward,
        inference_compiler=forward,
        decompositions=dict(decompositions or {}),
    )
    _run_compiled(module, args, backend, dynamic, training)
    return found


def _boxed(graph: torch.fx.GraphModule) -> Callable[..., Any]:
    """``graph`` with the calling convention that AOTAutograd wants."""

    def boxed(arguments: list[Any]) -> Any:
        values = list(arguments)
        arguments.clear()  # whoever boxes its arguments expects them to be freed
        return graph(*values)

    boxed._boxed_call = True  # type: ignore[attr-defined]
    return boxed


def _run_compiled(
    module: nn.Module,
    args: tuple[Tensor, ...],
    backend: Callable[..., Any],
    dynamic: bool | None,
    training: bool,
) -> None:
    """Compile ``module`` with ``backend`` and run it once, leaving no compiled code behind."""
    torch._dynamo.reset()
    try:
        with _silent(), torch.set_grad_enabled(training):
            torch.compile(module, backend=backend, dynamic=dynamic)(*args)
    finally:
        torch._dynamo.reset()


# ---- cache -------------------------------------------------------------------------------------------------


def cache_folder() -> Path:
    """Where exported models are kept: ``NORMFUSE_TEST_CACHE``, or a temporary folder for these versions."""
    given = os.environ.get("NORMFUSE_TEST_CACHE")
    versions = f"{torch.__version__}-{transformers.__version__}"
    folder = Path(given) if given else Path(tempfile.gettempdir()) / f"normfuse-families-{versions}"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def digest(family: Family) -> str:
    """Eight digits for all that an exported file depends on, so that a changed table finds no old one."""
    words = [family.name, family.config, family.model, repr(family.options), family.wrap.__name__]
    words += [str(torch.__version__), str(transformers.__version__)]
    return f"{zlib.crc32(' '.join(words).encode()):08x}"


FUSED = {  # operators that take in a neighbour, a layer
    "gemma2": {"norm_add_norm": 2},
    "gemma3": {"norm_add_norm": 2, "qk_norm": 1},
    "glm4": {"norm_add_norm": 2},
    "olmo2": {"norm_add": 2, "qk_norm": 1},
    "qwen3": {"add_rms_norm": 2, "qk_norm": 1},
    "olmoe": {"add_rms_norm": 2, "qk_norm": 1},
    "t5": {"add_rms_norm": 5},
    "phi": {"add_layer_norm": 1},
    "cohere": {"add_layer_norm": 1},
    "cohere_qk": {"add_layer_norm": 1, "qk_norm": 1},
    "gpt_neox": {"add_layer_norm": 1},
    "falcon": {"add_layer_norm": 1},
}
OTHERS = {"rms_norm": {"add_rms_norm": 2}, "layer_norm": {"add_layer_norm": 2}}
MORE = {"opt": Counter(add_layer_norm=1)}  # OPT projects into its stream with an addition
BIASED = {"gpt_oss": 1, "bloom": 2, "opt": 1, "bert": 2, "vit": 2}
"""How many operators of an addition and a norm take in a linear layer's bias in ONNX, a layer."""
RECIPES = {
    "llama": "RMSNorm, pre-norm",
    "qwen3": "RMSNorm, pre-norm, QK-norm per head",
    "deepseek_v3": "RMSNorm, pre-norm, latent norms",
    "gpt_oss": "RMSNorm, pre-norm",
    "gemma3": "RMSNorm, sandwich, QK-norm per head",
    "olmo2": "RMSNorm, post-norm inside the residual, QK-norm over the full width",
    "gpt2": "LayerNorm, pre-norm",
    "bert": "LayerNorm, post-norm after the residual, embedding norm",
    "bloom": "LayerNorm, pre-norm, embedding norm",
}


def cached(name: str, write: Callable[[Path], Any]) -> Path:
    """The cached file ``name``, made by ``write`` the first time; it appears whole or not at all."""
    target = cache_folder() / name
    if not target.exists():
        with tempfile.TemporaryDirectory(dir=target.parent) as folder:
            part = Path(folder) / name
            write(part)
            part.replace(target)
    return target


def often(name: str, opset: int, optimize: bool = True) -> bool:
    """Whether a family is tested in this form by default: at opset 18, and one in each other form."""
    other = {0: (23, True), 6: (18, False)}.get(list(FAMILIES).index(name))
    return (opset, optimize) in ((18, True), other)


def cached_export(
    name: str, opset: int = 18, optimize: bool = True, dynamic: bool = False, attn: str = "eager"
) -> Path:
    """The ONNX file of a family, exported once."""
    family = FAMILIES[name]
    marks = ["" if optimize else "raw", "dynamic" if dynamic else "", "" if attn == "eager" else attn]
    label = "-".join([name, str(opset), *filter(None, marks), digest(family)])

    def write(path: Path) -> None:
        export_onnx(family.build(attn), family.args(), path, opset, optimize, dynamic)

    return cached(f"{label}.onnx", write)
