"""The CUDA half of the operator library for ONNX Runtime: its kernels' code, and what it asks of the driver."""

from __future__ import annotations

import contextlib
import ctypes as c
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx.reference import ReferenceEvaluator

import normfuse
import normfuse.ort
from normfuse.errors import InputError
from normfuse.ops import meaning
from tests.cuda_cases import CASES, COMPUTED
from tests.cuda_tools import FORMS, ROOT, SOURCES, numbers, text_of
from tests.kernel_tools import Found
from tests.onnx_lines import MEET, QK, SANDWICH, SCORES, model, rms

triton = pytest.importorskip("triton")

from normfuse.ort import aot  # noqa: E402
from tests.ptx import TOOLS, accesses  # noqa: E402
from tests.test_ptx import SPILLED  # noqa: E402

ALL, SPARSE = numbers(), 61
LONGEST, SPILLED_LONG = 32768, 152
"""A tile of so many elements puts so many bytes by at most."""
DATA = (SOURCES / "ptx_data.h").read_text(encoding="ascii")
FLAGS = "-std=c11 -O2 -fPIC -shared -Wall -Wextra -Wpedantic -Werror".split()
C = ("cuda.c", "ptx.c")
QUICK = [name for name in CASES if name not in COMPUTED]
SAMPLED = ("every_operator", "odd_sizes", "the_bits_of_torch")
needs_compiler = pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler")


class Kernel(c.Structure):
    """`Kernel` of ptx.h."""

    _fields_ = [(name, c.c_int) for name in ("place", "length", "rows", "warps", "shared")]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the library, a driver that is none, one that is too old, and a broken one."""
    folder = tmp_path_factory.mktemp("cuda")

    def compiled(out: str, *what: str) -> None:
        (folder / out).parent.mkdir(exist_ok=True)
        subprocess.run(["cc", *FLAGS, "-o", str(folder / out), *what, "-ldl"], check=True, cwd=ROOT)

    compiled("tested/tested.so", *(str(SOURCES / name) for name in C))
    compiled("fake/libcuda.so.1", "tests/fake_cuda.c")
    compiled("old/libcuda.so.1", "tests/fake_cuda.c", "-DOLD")
    compiled("broken/libcuda.so.1", "tests/fake_cuda.c", "-DBROKEN")
    return folder


def run(built: Path, driver: str, *args: str, library: str = "tested/tested.so", **more: str) -> str:
    """What the cases print where a driver is in the loader's path."""
    env = os.environ | {"TRITON_INTERPRET": "1", "LD_LIBRARY_PATH": str(built / driver),
                        "NORMFUSE_TESTED": str(built / library)} | more  # fmt: skip
    done = subprocess.run([sys.executable, "-W", "ignore", "-m", "tests.cuda_cases", *args], cwd=ROOT, env=env,
                          capture_output=True, text=True, check=False)  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.fixture(scope="module")
def found(built: Path) -> dict[str, Found]:
    """What the cases found, with some of the types and sizes."""
    cases: dict[str, Found] = json.loads(run(built, "fake", NORMFUSE_SAMPLE="1"))
    return cases


@needs_compiler
@pytest.mark.parametrize("name", CASES)
def test_launches(name: str, found: dict[str, Found]) -> None:
    print(name, found[name])
    assert "failed" not in found[name], found[name]["failed"]


@pytest.mark.slow
@needs_compiler
@pytest.mark.parametrize("name", SAMPLED)
def test_launches_in_full(name: str, built: Path) -> None:
    done = json.loads(run(built, "fake", name))[name]
    assert "failed" not in done, done["failed"]


@needs_compiler
def test_launches_under_a_sanitizer(built: Path) -> None:
    found = [subprocess.run(["cc", f"-print-file-name=lib{name}.so"], capture_output=True, text=True, check=True).stdout
             for name in ("asan", "ubsan")]  # fmt: skip
    if not all(Path(name.strip()).is_absolute() for name in found):
        pytest.skip("the C compiler has no sanitizers")
    flags = ["-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"]
    subprocess.run(["cc", *FLAGS, *flags, "-o", "clean.so", *(str(SOURCES / name) for name in C), "-ldl"], cwd=built,
                   check=True)  # fmt: skip
    said = json.loads(run(built, "fake", *QUICK, library="clean.so", ASAN_OPTIONS="detect_leaks=0",
                          LD_PRELOAD=" ".join(map(str.strip, found))))  # fmt: skip
    assert sorted(said) == sorted(QUICK) and not any("failed" in result for result in said.values()), said


@needs_compiler
def test_drivers_that_do_not_work(built: Path) -> None:
    said = run(built, "old", "--first-message")
    assert said == "the CUDA driver is too old, it lacks: cuGetErrorString"
    said = run(built, "broken", "--first-message")
    assert said == "the CUDA driver does not start: the words of the driver"


@needs_compiler
def test_no_driver(built: Path) -> None:
    try:
        c.CDLL("libcuda.so.1")
    except OSError:
        said = run(built, "none", "--first-message")
        assert said == "the CUDA driver cannot be loaded: libcuda.so.1"
    else:
        pytest.skip("this machine has a CUDA driver")


# -- the code of the kernels -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def library(built: Path) -> c.CDLL:
    """The library, in this process."""
    lib = c.CDLL(str(built / "tested/tested.so"))
    lib.nf_ptx_text.restype, lib.nf_ptx_kernel.restype = c.c_void_p, c.POINTER(Kernel)
    return lib


def variant_of(arch: int, number: int) -> aot.Variant:
    """What the kernel of a number is."""
    rest, form = divmod(number, FORMS)
    rest, types = divmod(rest, len(aot.TYPES))
    op, kind = divmod(rest, 2)
    return aot.Variant(aot.OPS[op], aot.KINDS[kind], aot.TYPES[types], aot.FORMS[form], aot.ARCHITECTURES[arch])


def kernels(library: c.CDLL, step: int, start: int = 0) -> Iterator[tuple[aot.Variant, aot.Kernel]]:
    """Some of the kernels as they are in the library."""
    existing = [at for at in ALL if variant_of(*at).exists()]
    for at in existing[start::step]:
        it = library.nf_ptx_kernel(*at)[0]
        yield variant_of(*at), aot.Kernel(text_of(library, *at), it.rows, it.warps, it.shared)


def assert_good(variant: aot.Variant, ptx: str) -> None:
    """Rows read and written 128 bits at a time, float32 throughout, nothing in local memory, no rounding skipped."""
    loads, stores = accesses(ptx, "ld"), accesses(ptx, "st")
    if variant.form.aligned:
        assert loads.get("128") and set(stores) == {"128"}, (variant, loads, stores)
    else:
        assert set(stores) <= {"16", "32"}, (variant, stores)
    assert ".f64" not in ptx and ".local" not in ptx, variant
    # without its .rn a product may be contracted with the sum that it goes into
    assert not re.search(r"\b(add|sub|mul|fma|mad)(\.ftz)?\.f32\b|\b(fma|mad)\.rn(\.ftz)?\.f32\b", ptx), variant
    assert ptx.startswith(f".version 8.0\n.target sm_{variant.arch}\n") and "/" not in ptx, variant


def assert_accepted(variant: aot.Variant, ptx: str, folder: Path, gpu: str) -> None:
    """ptxas takes it, and keeps everything in registers."""
    (folder / "kernel.ptx").write_text(ptx)
    tool = TOOLS / ("ptxas" if int(gpu) < 100 else "ptxas-blackwell")
    done = subprocess.run([tool, "-v", f"--gpu-name=sm_{gpu}", "kernel.ptx", "-o", "kernel.cubin"], cwd=folder,
                          capture_output=True, text=True, check=False)  # fmt: skip
    assert done.returncode == 0, (variant, done.stderr)
    (stack,) = map(int, re.findall(r"(\d+) bytes stack frame", done.stderr))
    most = SPILLED[min(int(gpu), 100)] if variant.form.block < LONGEST else SPILLED_LONG
    assert stack <= most, (variant, done.stderr)


@needs_compiler
def test_code(library: c.CDLL) -> None:
    for variant, kernel in kernels(library, 7):
        assert_good(variant, kernel.ptx)


@needs_compiler
@pytest.mark.parametrize("op", aot.OPS)
def test_each_row_is_read_and_written_once(library: c.CDLL, op: str) -> None:
    form = next(f for f in aot.FORMS if f.block == 4096)
    variant = aot.Variant(op, "layer", aot.Types(aot.BF16, True, aot.BF16), form, 90)
    at = next(at for at in ALL if variant_of(*at) == variant)
    ptx, kernel = text_of(library, *at), library.nf_ptx_kernel(*at)[0]
    per_tensor = 4096 * 16 // (128 * 32 * kernel.warps)
    tensors = {"norm": (3, 1), "norm_add": (4, 1), "norm_add_norm": (6, 2)}.get(op, (5, 2))
    assert accesses(ptx, "ld") == {"128": tensors[0] * per_tensor}
    assert accesses(ptx, "st") == {"128": tensors[1] * per_tensor}


@needs_compiler
@pytest.mark.parametrize("gpu", ["80", "90", "100", "120"])
def test_code_is_accepted(library: c.CDLL, tmp_path: Path, gpu: str) -> None:
    for variant, kernel in kernels(library, 2 * SPARSE, int(gpu) % 90):
        if variant.arch <= int(gpu):
            assert_accepted(variant, kernel.ptx, tmp_path, gpu)


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize("arch", [80, 90])
def test_all_code(library: c.CDLL, tmp_path: Path, arch: int) -> None:
    for variant, kernel in kernels(library, 1):
        if variant.arch == arch:
            assert_good(variant, kernel.ptx)
            assert_accepted(variant, kernel.ptx, tmp_path, str(arch))


def test_the_data_is_of_these_kernels() -> None:
    head = aot.written({}).split("/* Of each architecture")[0].splitlines()
    kernels = [lines[0].split(", triton ")[0] for lines in (head, DATA.splitlines())]
    assert kernels[0] == kernels[1], "the kernels have changed: python -m normfuse.ort.aot"
    assert DATA.splitlines()[1 : len(head)] == head[1:]
    assert len(DATA) < 2_000_000
    assert str(Path.home()) not in DATA and str(ROOT) not in DATA


def compiled_again(library: c.CDLL, step: int) -> None:
    """Kernels compiled now have the text in the library."""
    if f"triton {triton.__version__} */" not in DATA.splitlines()[0]:
        pytest.skip("the kernels in the library are of another Triton")
    for variant, kernel in kernels(library, step, 5):
        assert aot.build(variant) == kernel, variant


@needs_compiler
def test_some_compiled_again(library: c.CDLL) -> None:
    compiled_again(library, SPARSE)


@needs_compiler
@pytest.mark.slow
def test_all_compiled_again(library: c.CDLL) -> None:
    compiled_again(library, 1)


def test_packing() -> None:
    text = ".reg .b32 %r<9>;\nmov.b32 %r1, %r2;\nadd.s32 %rd1, %r1, %r3;\nld.param.b64 %tid.x;\n"
    back = aot.relative(text)
    assert back == ".reg .b32 %r<9>;\nmov.b32 %r0, %r0;\nadd.s32 %rd0, %r2, %r0;\nld.param.b64 %tid.x;\n"
    assert [aot.digits(n) for n in (0, 27, 28, 28 * 28 + 1)] == ["#", ">", "@$", "A@$"]
    assert aot.packed("abcdefabcdefabcdef!") == ")abcdef)/$!"


# -- ONNX Runtime ------------------------------------------------------------------------------------------------------

UP, DOWN = "Cast<to=1>", "Cast<to=10>"
GRAPHS = {
    "add_rms_norm": "s = Add(x, r) h = {up}(s) " + rms("h", "n") + "y = {down}(n)",
    "norm_add": "h = {up}(x) " + rms("h", "n") + "o = {down}(n) s = Add(r, o) y = Identity(s)",
}
WHOLE = {"norm_add_norm": (SANDWICH.replace("EPS", "eps"), {}), "qk_norm": (QK.replace("EPS", "eps") + MEET, SCORES)}


def on_the_gpu(made: onnx.ModelProto, op: str, folder: Path, feeds: dict[str, Any]) -> list[Any]:
    """What a model gives on the GPU when it is rewritten, where its operators of a name really run."""
    ort = pytest.importorskip("onnxruntime")
    if "CUDAExecutionProvider" not in ort.get_available_providers() or not torch.cuda.is_available():
        pytest.skip("no CUDA GPU, or an ONNX Runtime without CUDA")
    onnx.save(made, folder / "in.onnx")
    normfuse.rewrite(folder / "in.onnx", folder / "out.onnx", normfuse.Config(target="normfuse"))
    options = ort.SessionOptions()
    options.enable_profiling, options.profile_file_prefix = True, str(folder / "profile")
    normfuse.ort.register(options, folder / "out.onnx", "cuda")
    session = ort.InferenceSession(folder / "out.onnx", options, providers=[("CUDAExecutionProvider", {"use_tf32": 0})])
    assert session.get_providers()[0] == "CUDAExecutionProvider"
    found: list[Any] = session.run(None, feeds)
    events = [e.get("args", {}) for e in json.loads(Path(session.end_profiling()).read_text())]
    where = {e["provider"] for e in events if e.get("op_name", "").startswith(op) and "provider" in e}
    assert where == {"CUDAExecutionProvider"}
    return found


@pytest.mark.gpu
@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("op", GRAPHS)
def test_an_operator_on_a_gpu(op: str, half: bool, tmp_path: Path) -> None:
    names = {"up": UP, "down": DOWN} if half else dict.fromkeys(("up", "down"), "Identity")
    types = dict.fromkeys("xrys", f"{'float16' if half else 'float'}[2,3,16]")
    feeds = {v: np.random.default_rng(i).standard_normal((2, 3, 16)).astype("f2" if half else "f4")
             for i, v in enumerate("xr")}  # fmt: skip
    y, s = map(torch.from_numpy, on_the_gpu(model(GRAPHS[op].format(**names), "y s", types=types), op, tmp_path, feeds))
    x, r, w = (*(torch.from_numpy(feeds[v]) for v in "xr"), torch.linspace(0.5, 1.5, 16))
    how = (1e-6, 0.0, "last", x.dtype)
    want = meaning.add_norm(x, r, w, None, *how) if op == "add_rms_norm" else (
        meaning.norm_add(x, r, w, None, *how),) * 2  # fmt: skip
    close = 2e-3 if half else 1e-5
    torch.testing.assert_close((y, s), want, rtol=close, atol=close)


@pytest.mark.gpu
@pytest.mark.parametrize("op", WHOLE)
def test_a_model_on_a_gpu(op: str, tmp_path: Path) -> None:
    lines, types = WHOLE[op]
    made = model(lines, "y", inputs="x", types=types)
    feeds = {"x": np.random.default_rng(0).standard_normal((2, 3, 16)).astype("f4")}
    (found,) = on_the_gpu(made, op, tmp_path, feeds)
    want: Any = ReferenceEvaluator(made).run(None, feeds)
    np.testing.assert_allclose(found, want[0], rtol=1e-4, atol=1e-5)


# -- what a session with the CUDA provider is given --------------------------------------------------------------------


def calls(*axes: list[int]) -> onnx.ModelProto:
    """A model that calls the function of a float32 RMSNorm along axes, and has one of a norm in half precision."""
    text = " ".join(f"y{i} = normfuse.rms_norm<axes={a}, epsilon=1e-6>(x, w)" for i, a in enumerate(axes))
    functions = " ".join(f"""
        <domain: "normfuse", opset_import: ["": 18]> {name} <axes, epsilon> (x, scale) => (y) {{ y = Mul(x, scale) }}"""
                         for name in ("rms_norm", "rms_norm_f16"))  # fmt: skip
    return onnx.parser.parse_model(f'''<ir_version: 8, opset_import: ["": 18, "normfuse": 1]>
        g (float[2,3,4] x, float[4] w) => (float[2,3,4] y0) {{ {text} }} {functions}''')


def test_only_operators_with_a_cuda_kernel_are_registered_for_cuda() -> None:
    if normfuse.ort.library_path() is None:
        pytest.skip("the library is not compiled")
    every, cuda = (set(normfuse.ort.names(provider)) for provider in ("cpu", "cuda"))
    assert cuda < every and len(every) == len(normfuse.ort.names())
    assert {"rms_norm", "add_rms_norm", "qk_norm_layer_norm", "norm_add_norm_bf16_in_f32_last"} <= cuda
    assert "rms_norm_f16" in every - cuda

    class Options:
        """What session options are told."""

        def __init__(self) -> None:
            self.entries: list[str] = []

        def add_session_config_entry(self, key: str, value: str) -> None:
            assert key in ("normfuse.operators", "normfuse.registered", "optimization.disable_specified_optimizers")
            self.entries += [value] if key == "normfuse.operators" else []

        def get_session_config_entry(self, key: str) -> str:
            raise RuntimeError(f"no entry {key}")

        def register_custom_ops_library(self, path: str) -> None:
            assert path == str(normfuse.ort.library_path())

    def told(model: onnx.ModelProto | None, provider: str) -> list[str]:
        options = Options()
        normfuse.ort.register(options, model, provider)
        return options.entries

    assert told(None, "cpu") == [] and told(None, "cuda") == ["cuda"]
    assert told(calls([-1]), "cpu") == ["rms_norm rms_norm_f16"] and told(calls([-1]), "cuda") == ["rms_norm"]
    assert told(calls([-2, -1]), "cuda") == ["rms_norm"]
    assert told(calls([-1], [-2]), "cuda") == [""] and told(calls([-2]), "cpu") == ["rms_norm rms_norm_f16"]
    with pytest.raises(InputError, match="provider='gpu' is not known"):
        normfuse.ort.register(Options(), None, "gpu")


@pytest.mark.parametrize(("op", "kind", "there"), [("rms_norm", "float", True), ("rms_norm_f16", "float16", False)])
def test_all_with_a_cuda_kernel_at_once(op: str, kind: str, there: bool) -> None:
    """Their names are longer than a session option may be. The others are not there, not on the CPU either."""
    ort = pytest.importorskip("onnxruntime")
    if normfuse.ort.library_path() is None:
        pytest.skip("the library is not compiled")
    made = onnx.parser.parse_model(f'''<ir_version: 8, opset_import: ["": 18, "normfuse": 1]>
        g ({kind}[2,3,4] x, {kind}[4] w) => ({kind}[2,3,4] y) {{ y = normfuse.{op}<axes=[-1], epsilon=1e-6>(x, w) }}''')
    for provider, loads in (("cpu", True), ("cuda", there)):
        options = ort.SessionOptions()
        options.log_severity_level = 4
        normfuse.ort.register(options, None, provider)
        with contextlib.nullcontext() if loads else pytest.raises(Exception, match=op):
            ort.InferenceSession(made.SerializeToString(), options, providers=["CPUExecutionProvider"])
