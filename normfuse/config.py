"""What a rewrite may do; the same names serve Python, the command line and `torch.compile` options."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, fields
from numbers import Real
from typing import Any, Literal, get_args, get_type_hints

from normfuse.errors import InputError

LayerNormToRMSNorm = Literal["off", "exact", "approximate"]
Numerics = Literal["exact", "fast"]
Target = Literal["onnx", "standard", "ort-cpu", "ort-cuda", "normfuse"]
Verify = Literal["sites", "model", "off"]
OF_TORCH = ("onnx", "normfuse")
"""The targets of a model that torch runs."""
OPTIMISERS = ("onnxscript", "onnxsim")
FASTEST = "fastest"


KINDS: dict[Any, tuple[Any, str]] = {bool: (bool, "True or False"), float: (Real, "a number"), str: (str, "a text")}
"""What a value of each type is, and the words for it."""
SUCH = {"ort_version": "1.31", "norms": "*.output.LayerNorm*", "first": "onnxsim"}
"""What a text may be."""
VERSION = re.compile(r"(\d{1,3})\.(\d{1,3})(\.|$)")
"""Major and minor number, and whatever follows."""


@dataclass(frozen=True, slots=True)
class Config:
    """Options of a rewrite.

    - `layernorm_to_rmsnorm`: turn LayerNorm into RMSNorm; "exact" edits the weights ahead of a norm so that what it
      reads has mean zero, where this is proved to change nothing else; "approximate" moreover takes the other
      LayerNorms for RMSNorms whose bias is calibrated on given inputs.
    - `untie`: a weight to be edited that somebody else reads, such as a token table that is also the output layer, is
      copied; otherwise it stays, and one centring operator is put instead.
    - `fold_scale`: multiply the weight of each RMSNorm into the linear layers behind it, where nothing else reads it;
      changes roundings.
    - `force`: convert LayerNorms also where the target's table says that nothing is gained.
    - `norms`: in approximate mode, which LayerNorms may be approximated: shell patterns of their names, with commas.
    - `tolerance`: in approximate mode, how far an output may be off on held-back inputs (norm of the difference over
      the norm); beyond it nothing is done, and it is an error.
    - `numerics`: "exact" keeps every rounding of the model; "fast" may compute a norm in float32 where the model
      computes it in a narrower or mixed type.
    - `target`: where the result will run; "onnx" is standard operators and model-local functions; "standard" is
      standard operators alone, for runtimes that take no functions (OpenVINO, TVM, tract); "ort-cpu" and "ort-cuda"
      are ONNX Runtime with that provider, whose forms come from a measured table (`normfuse.targets`); "normfuse"
      also takes the additions beside a norm and pairs of norms into one operator of the family of `normfuse.ops`: in
      an ONNX model a model-local function, which any runtime that takes functions still runs.
    - `ort_version`: the ONNX Runtime of targets "ort-cpu" and "ort-cuda", such as "1.31"; "" for the one installed.
    - `first`: optimisers of others that have the model before NormFuse, with commas: "onnxsim" folds constants and
      scales, "onnxscript" (its `optimize_for_ort`) fuses attention and more into operators of ONNX Runtime's CPU
      provider, which target "onnx" cannot have. They change roundings. The result of each is compared
      with the model in ONNX Runtime, and left out with a note where it differs or does not run; models of 2 GiB and
      more they do not take. "fastest": those, of all that are installed, none or some, whose result ONNX Runtime is
      fastest with, by measuring here (`normfuse.fastest`); where the model is faster as it is, it stays.
    - `verify`: "sites" checks each replaced region against its replacement, "model" also runs the whole model
      before and after, "off" trusts the algebra.

    Raises `InputError` for a value that is none of the choices.
    """

    layernorm_to_rmsnorm: LayerNormToRMSNorm = "off"
    numerics: Numerics = "exact"
    target: Target = "onnx"
    verify: Verify = "sites"
    ort_version: str = ""
    untie: bool = False
    fold_scale: bool = False
    force: bool = False
    norms: str = "*"
    tolerance: float = 0.05
    first: str = ""

    def __post_init__(self) -> None:
        hints = get_type_hints(Config)
        for f in fields(self):
            value, known = getattr(self, f.name), get_args(hints[f.name])
            if known and value not in known:
                raise InputError(f"{f.name}={value!r} is not known; choose one of {', '.join(map(repr, known))}")
            kind, words = KINDS.get(hints[f.name], (object, ""))
            if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool and words):
                such = f", such as {SUCH[f.name]!r}" if f.name in SUCH else ""
                raise InputError(f"{f.name}={value!r} is not {words}{such}")
        if self.layernorm_to_rmsnorm == "approximate" and self.verify == "model":
            raise InputError("verify='model' asks for equal outputs, which layernorm_to_rmsnorm='approximate' does not "
                             "give; its error is measured on held-back inputs, see tolerance")  # fmt: skip
        try:
            object.__setattr__(self, "tolerance", float(self.tolerance))  # of NumPy's types, too
        except OverflowError:
            raise InputError("tolerance is larger than any number of type float; give one such as 0.05") from None
        if not 0 < self.tolerance < math.inf:
            raise InputError(f"tolerance={self.tolerance!r} is no positive, finite number, such as 0.05")
        if self.ort_version and VERSION.match(self.ort_version) is None:
            such = repr(SUCH["ort_version"])
            raise InputError(f"ort_version={self.ort_version!r} is not a version; give one such as {such}")
        if not self.norms.strip(" ,"):
            raise InputError(f"norms={self.norms!r} is not a pattern of names, such as {SUCH['norms']!r}")
        if self.first == FASTEST and self.layernorm_to_rmsnorm == "approximate":
            raise InputError(f"first={FASTEST!r} measures models of equal outputs, which layernorm_to_rmsnorm="
                             "'approximate' does not give; name the optimisers")  # fmt: skip
        if self.first and self.first != FASTEST and not self.optimisers:
            raise InputError(f"first={self.first!r} names no optimiser; choose of {', '.join(OPTIMISERS)}, or "
                             f"{FASTEST!r} alone")  # fmt: skip
        unknown = sorted(set(self.optimisers) - set(OPTIMISERS))
        if unknown:
            choices = f"choose of {', '.join(OPTIMISERS)}, or {FASTEST!r} alone"
            raise InputError(f"first={self.first!r}: {unknown[0]!r} is not known; {choices}")
        if len(set(self.optimisers)) < len(self.optimisers):
            raise InputError(f"first={self.first!r} names an optimiser twice; each runs once")
        if not all(map(self.takes, self.optimisers)):
            raise InputError("first='onnxscript' writes operators of ONNX Runtime, which not every runtime has; choose "
                             "another target")  # fmt: skip

    @property
    def optimisers(self) -> tuple[str, ...]:
        """Those of `first`, in their order; none where they are to be chosen."""
        return () if self.first == FASTEST else tuple(name.strip() for name in self.first.split(",") if name.strip())

    def takes(self, optimiser: str) -> bool:
        """Whether the target can have what an optimiser writes."""
        return optimiser != "onnxscript" or self.target not in ("onnx", "standard")

    @property
    def functions(self) -> bool:
        """Whether the target's files may have model-local functions."""
        return self.target != "standard"

    @property
    def runs(self) -> bool:
        """Whether models are run as wholes."""
        return bool(self.first) or self.verify == "model" or (self.converts and self.verify != "off")

    @property
    def converts(self) -> bool:
        """Whether weights may be edited at all."""
        return self.layernorm_to_rmsnorm != "off" or self.fold_scale


def config_of(config: Config | None) -> Config:
    """The configuration, the usual one where none is given; `InputError` for what is none."""
    if config is not None and not isinstance(config, Config):
        what = "the class" if config is Config else f"a {type(config).__name__}"
        raise InputError(f"config is {what}; give normfuse.Config(...) with the options in it")
    return config or Config()


def demand_use(config: Config, calibration: Any) -> None:
    """Raise `InputError` for calibration inputs and options that nothing would read."""
    if calibration is not None and config.layernorm_to_rmsnorm != "approximate":
        raise InputError("calibration inputs are for layernorm_to_rmsnorm='approximate'; leave them out")
    approximates = config.layernorm_to_rmsnorm == "approximate"
    conversion = config.layernorm_to_rmsnorm != "off"
    usual = Config()
    convert = "layernorm_to_rmsnorm='exact' or layernorm_to_rmsnorm='approximate'"
    for name, used, what in (
        ("norms", approximates, "layernorm_to_rmsnorm='approximate'"),
        ("tolerance", approximates, "layernorm_to_rmsnorm='approximate'"),
        ("untie", conversion, convert),
        ("force", conversion, convert),
        ("ort_version", config.target in ("ort-cpu", "ort-cuda"), "target='ort-cpu' or target='ort-cuda'"),
    ):
        value, plain = getattr(config, name), getattr(usual, name)
        same = math.isclose(value, plain, rel_tol=1e-6) if name == "tolerance" else value == plain
        if not used and not same:
            raise InputError(f"{name}={value!r} is for {what}, and means nothing here; leave it out")


def demand_torch(config: Config) -> None:
    """Raise `InputError` for a runtime that does not run what torch does."""
    if config.target not in OF_TORCH:
        raise InputError(f"target={config.target!r} is for ONNX models, and torch runs this one; leave it out, or make "
                         "an ONNX model by normfuse.export")  # fmt: skip
