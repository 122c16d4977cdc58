"""Compiles the kernels of `normfuse.ops.kernels_aot` to PTX for the operator library, where no GPU has to be.

    python -m normfuse.ort.aot

writes `ptx_data.h`, which is committed, so that building the library needs neither Triton nor CUDA. A variant is
compiled for an operator, kind, types and form: the form is the length of the rows. The tiles and warps are those that
`normfuse.ops.launch` takes for the same rows, so that both runtimes give the same bits.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import triton
import triton.language as tl
from triton import knobs
from triton._C.libtriton import ir
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.compiler.compiler import make_backend

from normfuse.ops import kernels, kernels_aot, launch
from normfuse.ops.kernels import How

ARCHITECTURES = (80, 90)
"""Compute capabilities times ten; a GPU takes the PTX of the last that it is not older than."""
PTX_VERSION = 80
"""The instruction set of CUDA 12.0: a driver refuses PTX that is newer than itself."""
OPS = ("norm", "add_norm", "norm_add", "norm_add_norm", "add_norm_unrounded")
KINDS = ("rms", "layer")
F32, F16, BF16 = tl.float32, tl.float16, tl.bfloat16
NAMES = {F32: "F32", F16: "F16", BF16: "BF16"}
POINTERS = {F32: "*fp32", F16: "*fp16", BF16: "*bf16"}


class Types(NamedTuple):
    """x, whether it is rounded before the weight, and the result."""

    x: Any
    first: bool
    result: Any


TYPES = (Types(F32, False, F32), Types(F32, False, F16), Types(F32, False, BF16),
         *(Types(h, first, result) for h in (F16, BF16) for first in (True, False) for result in (h, F32)))  # fmt: skip


class Form(NamedTuple):
    """An entry, its columns, and whether rows and tensors begin at multiples of 16 bytes."""

    entry: str
    block: int
    aligned: bool


FORMS = (*(Form("tile", 1 << i, True) for i in range(6, 16)), Form("row", 8192, True), Form("row", 1024, False))
"""Rows that fit on chip, longer ones, and all others."""


class Variant(NamedTuple):
    """What a kernel is compiled for."""

    op: str
    kind: str
    types: Types
    form: Form
    arch: int

    def config(self) -> launch.Config:
        """The tile and the warps."""
        n = 2 * launch.ON_CHIP if self.form == FORMS[-2] else self.form.block
        return launch.config(n, self.types.x.primitive_bitwidth // 8, self.tensors())

    def tensors(self) -> int:
        """How many tiles a program holds at once."""
        return 2 if self.op == "norm_add_norm" else 1

    def exists(self) -> bool:
        """A sandwich's two norms are alike, so that its results are of the type of x; it has no form in blocks."""
        (x, _, result), (entry, block, _) = self.types, self.form
        if self.op == "add_norm_unrounded" and x == F32:
            return False  # a sum in float32 is not rounded
        if self.op == "norm_add_norm":
            return x == result and entry == "tile" and block * self.tensors() <= launch.ON_CHIP
        # a sum in float32 and a result in a half type are too much for the registers of a program on sm_80
        return not (self.op == "add_norm" and x == F32 != result and block == launch.ON_CHIP)


class Kernel(NamedTuple):
    """The text of a kernel, and how to launch it."""

    ptx: str
    rows: int
    warps: int
    shared: int


def variants() -> Iterator[Variant]:
    """All of them, those together that are alike."""
    found = (Variant(*values) for values in product(OPS, KINDS, TYPES, FORMS, ARCHITECTURES))
    return (variant for variant in found if variant.exists())


# -- compilation -------------------------------------------------------------------------------------------------------

TENSORS = ("x", "r", "y", "s", "w", "b", "w2", "b2", "x2", "y2")
NUMBERS = ("m", "n", "m2", "n2", "tiles")
PARAMETERS = [*["u64"] * len(TENSORS), *["u32"] * len(NUMBERS), "f32", *["u64"] * 2]
"""Those of every kernel: the last are eps and two pointers to scratch memory, of which no kernel of ours has any."""


MOST_SHARED = 48 * 1024
"""What a kernel gets without asking."""


def how_of(variant: Variant) -> How:
    """What a variant's kernel is compiled for."""
    op, (x, first, result), form = variant.op, variant.types, variant.form
    rows = variant.config().rows if form.entry == "tile" else 1
    weight = result if first else F32
    what = op.removesuffix("_unrounded")
    return How(0, rows, form.block, 0.0, 0.0, variant.kind == "layer", F32, what, first, op == what, x, weight, result,
               weight, optional=True)  # fmt: skip


def tensor_types(variant: Variant) -> dict[str, Any]:
    """The types of the tensors."""
    x, first, result = variant.types
    sums, weight = x if variant.op.startswith("add_norm") else result, result if first else F32
    second = x if variant.op.startswith("add_norm") else weight  # there w2 is a bias of x
    types = (x, sums, result, sums, weight, weight, second, weight, x, result)
    return dict(zip(TENSORS, types, strict=True))


def source(variant: Variant) -> ASTSource:
    """The entry, the types of its arguments, and what is known of them."""
    signature = {name: POINTERS[t] for name, t in tensor_types(variant).items()}
    signature |= dict.fromkeys(NUMBERS, "i32") | {"eps": "fp32", "how": "constexpr"}
    known = {}
    if variant.form.aligned:
        known = {(i,): [["tt.divisibility", 16 if name in TENSORS else 8]]
                 for i, name in enumerate(signature) if name in (*TENSORS, "n", "n2")}  # fmt: skip
    return ASTSource(getattr(kernels_aot, variant.form.entry), signature, {"how": how_of(variant)}, known)


def build(variant: Variant) -> Kernel:
    """Compile a variant, as far as PTX."""
    target, warps = GPUTarget("cuda", variant.arch, 32), variant.config().warps
    backend = make_backend(target)
    options = backend.parse_options({"num_warps": warps, "enable_fp_fusion": False, "ptx_version": PTX_VERSION})
    stages: dict[str, Any] = {}
    made, metadata, context = source(variant), {"target": target, **vars(options)}, ir.context()
    ir.load_dialects(context)
    backend.load_dialects(context)
    backend.add_stages(stages, options, made.language)
    code = made.make_ir(target, options, backend.get_codegen_implementation(options), backend.get_module_map(), context)
    with knobs.compilation.scope():
        knobs.compilation.disable_line_info = True  # it holds the paths of this machine
        for name in ("ttir", "ttgir", "llir", "ptx"):
            code = stages[name](code, metadata)
    found = re.findall(r"^\s*\.param \.(\w+)", code, re.MULTILINE)
    if found != PARAMETERS or metadata["global_scratch_size"] or metadata["profile_scratch_size"]:
        raise RuntimeError(f"cuda.c does not pass what this kernel takes: {variant}, {found}, {metadata}")
    if metadata["shared"] > MOST_SHARED:
        raise RuntimeError(f"cuda.c does not ask for so much shared memory: {variant}, {metadata['shared']} bytes")
    return Kernel(clean(code, variant.arch), how_of(variant).rows, warps, metadata["shared"])


def clean(ptx: str, arch: int) -> str:
    """The text without comments, for all later GPUs ("sm_90a" is for one), registers numbered as they appear."""
    ptx = re.sub(r"\.target sm_\w+", f".target sm_{arch}", re.sub("//.*", "", ptx))
    head, brace, body = "\n".join(filter(None, map(str.strip, ptx.splitlines()))).partition("\n{\n")
    numbers: dict[str, dict[str, int]] = {}

    def number(found: re.Match[str]) -> str:
        seen = numbers.setdefault(found[1], {})
        return f"%{found[1]}{seen.setdefault(found[2], len(seen) + 1)}"

    return head + brace + REGISTER.sub(number, body) + "\n"


# -- packing: see ptx.c ------------------------------------------------------------------------------------------------

REGISTER = re.compile(r"%([a-z]+)(\d+)\b")


def relative(ptx: str) -> str:
    """Registers numbered back from the next new one, so that alike code has alike text wherever it stands."""
    newest: dict[str, int] = {}

    def number(found: re.Match[str]) -> str:
        kind, n = found[1][-1], int(found[2])
        back = newest.get(kind, 0) + 1 - n
        newest[kind] = max(newest.get(kind, 0), n)
        return f"%{found[1]}{back}"

    return REGISTER.sub(number, ptx)


def digits(n: int) -> str:
    """A number to the base 28, its lowest digit first: '#' and on, '@' and on for all but the highest digit."""
    text = ""
    while n >= 28:
        text += chr(64 + n % 28)
        n //= 28
    return text + chr(35 + n)


SHORTEST, CANDIDATES, LINE = 6, 16, 2000


def packed(text: str) -> str:
    """Of a text, by turns: a length and so many new letters, a distance and a length to repeat from there."""
    places: dict[str, list[int]] = {}
    out, new, here = [], 0, 0
    while here < len(text):
        length, start = 0, 0
        for place in reversed(places.get(text[here : here + SHORTEST], ())):
            common = _common(text, place, here)
            if common > length:
                length, start = common, place
        if length >= SHORTEST:
            out += [digits(here - new), text[new:here], digits(here - start), digits(length)]
        end = here + max(length, 1)
        for i in range(here, end, 1 if length < 64 else 4):
            kept = places.setdefault(text[i : i + SHORTEST], [])
            kept.append(i)
            del kept[:-CANDIDATES]
        here, new = end, end if length >= SHORTEST else new
    return "".join([*out, digits(len(text) - new), text[new:]])


def _common(text: str, place: int, here: int) -> int:
    """How long the texts at two places are the same."""
    length, step = 0, 1 << 14
    while step:
        a, b = place + length, here + length
        if b + step <= len(text) and text[a : a + step] == text[b : b + step]:
            length += step
        else:
            step >>= 1
    return length


# -- the file ----------------------------------------------------------------------------------------------------------

SOURCES = (kernels.__file__, kernels_aot.__file__)
OUTPUT = Path(__file__).with_name("ptx_data.h")


def fingerprint() -> str:
    """What a file was made from."""
    data = b"".join(Path(source).read_bytes().replace(b"\r\n", b"\n") for source in SOURCES)
    return f"kernels {hashlib.sha256(data).hexdigest()}, triton {triton.__version__}"


def written(made: dict[Variant, Kernel]) -> str:
    """The contents of `ptx_data.h`: a table, and the texts of each operator and kind as a pack."""
    cells, packs, chunks = dict.fromkeys(made, ""), [], list[str]()
    for op, kind in product(OPS, KINDS):
        places: dict[str, int] = {}
        size = 0
        for variant, kernel in made.items():
            if (variant.op, variant.kind) == (op, kind):
                text = relative(kernel.ptx)
                if text not in places:
                    places[text] = size
                    size += len(text)
                cells[variant] = f"{{{places[text]}, {len(text)}, {kernel.rows}, {kernel.warps}, {kernel.shared}}}"
        packs.append(f"{{{len(chunks)}, {size}}}")
        whole = packed("".join(places))
        chunks += [whole[i : i + LINE] for i in range(0, len(whole), LINE)]
    rows = []
    for arch, op, kind, types in product(ARCHITECTURES, OPS, KINDS, TYPES):
        found = (cells.get(Variant(op, kind, types, form, arch), "{0}") for form in FORMS)
        rows.append(f"{{{', '.join(found)}}}")
    counts = {"ARCHITECTURES": ARCHITECTURES, "OPS": OPS, "TYPES": TYPES, "FORMS": FORMS}
    return "\n".join((
        f"/* Written by normfuse/ort/aot.py. {fingerprint()} */",
        f"enum {{ {', '.join(f'{name} = {len(values)}' for name, values in counts.items())} }};",
        array("int architectures[ARCHITECTURES]", map(str, ARCHITECTURES)),
        array("Types types[TYPES]", (f"{{{NAMES[t.x]}, {t.first:d}, {NAMES[t.result]}}}" for t in TYPES)),
        array("Form forms[FORMS]", (f'{{"{f.entry}", {f.block}, {f.aligned:d}}}' for f in FORMS)),
        "/* Of each architecture, operator, kind, types and form: place and length in the pack, how to launch. */",
        array("Kernel kernels[ARCHITECTURES * OPS * 2 * TYPES][FORMS]", rows),
        "/* Of each operator and kind: the first of the chunks, and how long the text is. */",
        array("Pack packs[OPS * 2]", packs),
        array("char *const chunks[]", (f'"{chunk}"'.replace("\n", "\\n") for chunk in chunks)),
        ""))  # fmt: skip


def array(declaration: str, elements: Iterable[str]) -> str:
    """A constant array in C."""
    return f"static const {declaration} = {{\n" + "".join(f"{element},\n" for element in elements) + "};"


def main() -> None:
    """Compile everything, and write the file."""
    OUTPUT.write_text(written({variant: build(variant) for variant in variants()}), encoding="ascii")


if __name__ == "__main__":
    main()
