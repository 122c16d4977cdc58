"""Damaged model files: mutated bytes, messages and archives, given to the command line.

Each file is read by `inspect` or `rewrite`, with and without a conversion. The answer has to be a result, or one line
and exit code 2; within seconds, within memory, and without a part of an output. What fails is printed with its seed.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import random
import resource
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.parser
from google.protobuf.descriptor import FieldDescriptor as Field
from onnx import numpy_helper

from normfuse.cli import main
from tests.attacks import ATTACKS
from tests.cli_tools import norm_model
from tests.near_misses import NEAR_MISSES

SECONDS, MEBIBYTES = 10, 512
NUMBERS = (0, 1, -1, 2, 7, 8, 127, 128, 255, 2**15, 2**16, 2**31 - 1, -(2**31), 2**32, 2**40, 2**62, 2**63 - 1,
           -(2**63))  # fmt: skip
FLOATS = (0.0, -0.0, 1.0, -1.0, 1e-45, 1e38, float("inf"), float("-inf"), float("nan"))
TEXTS = ("", "x", "y", "Add", "../secret", "\x1b[2J", "<b>", "n" * 5000, "ai.onnx", "com.microsoft", "normfuse",
         "\ud7ff")  # fmt: skip
COMMANDS = (["inspect"], ["rewrite"], ["rewrite", "--verify", "off"], ["rewrite", "--target", "normfuse"],
            ["rewrite", "--target", "ort-cpu"], ["rewrite", "--layernorm-to-rmsnorm", "exact", "--force"],
            ["rewrite", "--fold-scale", "--numerics", "fast"])  # fmt: skip


def corpus() -> list[bytes]:
    """Small models to start from: with norms, near misses, branches, functions, weights in another file."""
    made: list[bytes] = [norm_model().SerializeToString(), *[stream().SerializeToString()] * 8,
                         *[optimised().SerializeToString()] * 8]
    made += [case.build().SerializeToString() for case in NEAR_MISSES.values()]
    here = Path.cwd()
    with tempfile.TemporaryDirectory() as folder:
        for attack in ATTACKS.values():
            (Path(folder) / attack.name / "in").mkdir(parents=True)
            os.chdir(Path(folder) / attack.name)
            with contextlib.suppress(OSError):
                model = attack.build(Path("in"), Path("in"))
                data: bytes = model if isinstance(model, bytes) else model.SerializeToString()
                if len(data) < 2**16:
                    made.append(data)
            os.chdir(here)
    external = norm_model()
    tensor = external.graph.initializer[1]
    tensor.ClearField("raw_data")
    tensor.data_location = onnx.TensorProto.EXTERNAL
    for key, value in (("location", "weights.bin"), ("offset", "0"), ("length", "256")):
        tensor.external_data.add(key=key, value=value)
    return [*made, *[external.SerializeToString()] * 8]


def stream() -> onnx.ModelProto:
    """Two LayerNorms on a residual stream that linear layers write: they can become RMSNorms."""
    model = onnx.parser.parse_model("""
        <ir_version: 10, opset_import: ["" : 18, "acme" : 1]>
        stream (float[2, 5, 8] x) => (float[2, 5, 4] y) {
            h0 = MatMul (x, w0)
            h = Add (h0, b0)
            n = LayerNormalization <axis = -1, epsilon = 1e-5> (h, g, b)
            m = MatMul (n, w1)
            t = acme.Same (m)
            f = MatMul (t, w2)
            r = Add (h, f)
            k = LayerNormalization <axis = -1, epsilon = 1e-5> (r, g, b)
            y = MatMul (k, w3)
        }
        <domain: "acme", opset_import: ["" : 18]>
        Same (a) => (c) { d = Tanh (a) c = Identity (d) }
    """)
    return _weighted(model, w0=(8, 8), b0=(8,), g=(8,), b=(8,), w1=(8, 16), w2=(16, 8), w3=(8, 4))


def optimised() -> onnx.ModelProto:
    """As ONNX Runtime's optimiser leaves a model: norms in its own operators, with the additions in front of them."""
    model = onnx.parser.parse_model("""
        <ir_version: 10, opset_import: ["" : 18, "com.microsoft" : 1]>
        optimised (float[2, 5, 8] x) => (float[2, 5, 8] y) {
            n = SimplifiedLayerNormalization <axis = -1, epsilon = 1e-5> (x, g)
            m = MatMul (n, w0)
            k, , , s = com.microsoft.SkipLayerNormalization <epsilon = 1e-5> (m, x, g, b, b0)
            t = com.microsoft.QuickGelu <alpha = 1.7> (k)
            y = com.microsoft.SkipSimplifiedLayerNormalization <epsilon = 1e-5> (t, s, g)
        }
    """)
    return _weighted(model, w0=(8, 8), g=(8,), b=(8,), b0=(8,))


def _weighted(model: onnx.ModelProto, **shapes: tuple[int, ...]) -> onnx.ModelProto:
    rng = np.random.default_rng(0)
    for name, shape in shapes.items():
        model.graph.initializer.append(numpy_helper.from_array(rng.standard_normal(shape).astype("f4"), name))
    return model


# --- mutations ----------------------------------------------------------------------------------------------


def of_bytes(data: bytes, rng: random.Random) -> bytes:
    """Flip, drop, repeat, insert or splice bytes."""
    out = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 5, 20))):
        if not out:
            break
        i, n = rng.randrange(len(out)), rng.choice((1, 1, 2, 8, 64))
        match rng.randrange(6):
            case 0:
                out[i] ^= 1 << rng.randrange(8)
            case 1:
                out[i] = rng.choice((0, 1, 0x7F, 0x80, 0xFF, rng.randrange(256)))
            case 2:
                del out[i : i + n]
            case 3:
                out[i:i] = out[i : i + n] * rng.choice((1, 2, 50))
            case 4:
                out[i:i] = rng.randbytes(n)
            case 5:
                del out[rng.randrange(len(out)) :]
    return bytes(out)


def of_message(data: bytes, rng: random.Random) -> bytes:
    """Change fields of the message: numbers, names, edges, repeated and missing parts."""
    try:
        model = onnx.ModelProto.FromString(data)
    except Exception:
        return of_bytes(data, rng)
    for _ in range(rng.choice((1, 1, 1, 2, 3, 6))):
        with contextlib.suppress(ValueError, TypeError):
            _change(model, rng)
    made: bytes = model.SerializePartialToString()
    return made


def _change(message: Any, rng: random.Random) -> None:
    """Go down a random way, and change the field at its end."""
    while True:
        fields = [f for f, _ in message.ListFields()]
        if not fields or rng.random() < 0.03:
            fields = list(message.DESCRIPTOR.fields)
        field = rng.choice(fields)
        value = getattr(message, field.name)
        if field.is_repeated:
            if not value or rng.random() < 0.25:
                return _resize(message, field, value, rng)
            i = rng.randrange(len(value))
            if field.type != Field.TYPE_MESSAGE:
                value[i] = _other(field, value[i], message, rng)
                return None
            message = value[i]
        elif field.type == Field.TYPE_MESSAGE:
            if rng.random() < 0.05:
                return message.ClearField(field.name)  # type: ignore[no-any-return]
            message = value
        else:
            if rng.random() < 0.1:
                return message.ClearField(field.name)  # type: ignore[no-any-return]
            setattr(message, field.name, _other(field, value, message, rng))
            return None


def _resize(message: Any, field: Any, value: Any, rng: random.Random) -> None:
    """Drop, repeat, swap or empty the parts of a repeated field."""
    if not value:
        if field.type == Field.TYPE_MESSAGE:
            value.add()
        else:
            value.append(_other(field, None, message, rng))
        return
    i, j = rng.randrange(len(value)), rng.randrange(len(value))
    match rng.randrange(5):
        case 0:
            del value[i]
        case 1:
            value.extend([value[i]])
        case 2:
            value.extend([value[j]] * rng.choice((2, 30)))
        case 3:
            parts = list(value)
            rng.shuffle(parts)
            del value[:]
            value.extend(parts)
        case 4:
            message.ClearField(field.name)


def _other(field: Any, value: Any, message: Any, rng: random.Random) -> Any:
    if field.type == Field.TYPE_STRING:
        texts = [(f, v) for f, v in message.ListFields() if f.type == Field.TYPE_STRING]
        names = [text for f, v in texts for text in (v if f.is_repeated else [v])]
        return rng.choice((*TEXTS, *names, str(value) + "_", "mean", "square", "w"))
    if field.type == Field.TYPE_BYTES:
        return of_bytes(value or b"\0\0\x80\x3f", rng)
    if field.type in (Field.TYPE_FLOAT, Field.TYPE_DOUBLE):
        return rng.choice(FLOATS)
    if field.type == Field.TYPE_ENUM:
        return rng.choice([v.number for v in field.enum_type.values])
    return rng.choice((*NUMBERS, (value or 0) + 1, (value or 0) - 1))


# --- one file -----------------------------------------------------------------------------------------------

_CORPUS: list[bytes] = []


def damaged(seed: int, kind: str = "onnx") -> tuple[bytes, list[str]]:
    """The file and the command of a seed."""
    if kind == "pt2":
        from tests.pt2_mutations import mutate, seeds

        rng = random.Random(seed)
        return mutate(rng.choice(seeds()), rng), ["inspect"] if rng.random() < 0.9 else ["rewrite"]
    if not _CORPUS:
        _CORPUS.extend(corpus())
    rng = random.Random(seed)
    data = rng.choice(_CORPUS)
    data = (of_bytes if rng.random() < 0.25 else of_message)(data, rng)
    return data, rng.choice(COMMANDS)


def judge(seed: int, folder: Path, kind: str = "onnx", run: Callable[[list[str]], int] = main) -> tuple[str, str]:
    """What came of a file, as (done or refused, what is wrong with that or "")."""
    data, command = damaged(seed, kind)
    source, target = folder / f"in.{kind}", folder / f"out.{kind}"
    source.write_bytes(data)
    (folder / "weights.bin").write_bytes(np.linspace(0.5, 1.5, 64, dtype="f4").tobytes())
    arguments = [command[0], str(source), *([str(target)] if command[0] == "rewrite" else []), *command[1:], "--json"]
    out, err = io.StringIO(), io.StringIO()
    wrong, code, before = "", -1, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    started = time.monotonic()
    try:
        signal.alarm(3 * SECONDS)
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = run(arguments)
    except BaseException as why:
        wrong = f"{type(why).__name__} came through: {traceback.format_exc()[-300:]}"
    finally:
        signal.alarm(0)
    more = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    left = sorted(p.name for p in folder.iterdir() if p not in (source, folder / "weights.bin"))
    if time.monotonic() - started > SECONDS:
        wrong = wrong or f"took {time.monotonic() - started:.1f} s"
    elif more > MEBIBYTES + 1.5 * len(data) / 2**20:
        wrong = wrong or f"took {more:.0f} MiB"
    if not wrong:
        wrong = _wrong(code, out.getvalue(), err.getvalue(), left, target)
    for path in folder.iterdir():
        path.unlink()
    return {0: "done", 2: "refused"}.get(code, "failed"), wrong


def _wrong(code: int, out: str, err: str, left: list[str], target: Path) -> str:
    if code not in (0, 2):
        return f"exit code {code}: {out[-400:]}"
    try:
        said = json.loads(out)
    except ValueError:
        return f"stdout is no JSON: {out[:100]!r}"
    if "Traceback" in err or (code and len(said["error"]["message"].splitlines()) != 1):
        return f"more than a line: {err[-200:]}"
    if code and left:
        return f"refused, and yet wrote {left}"
    if any(name != target.name and not (name.startswith("out-") and name.endswith(".data")) for name in left):
        return f"left {left}"
    if code == 0 and target.suffix == ".onnx" and target.exists():
        try:
            onnx.ModelProto.FromString(target.read_bytes())
        except Exception:
            return "the output is no message"
    return ""


def _block(kind: str, seeds: range) -> list[tuple[int, str, str]]:
    def stop(*_: object) -> None:
        raise TimeoutError(f"no answer in {3 * SECONDS} s")

    signal.signal(signal.SIGALRM, stop)
    resource.setrlimit(resource.RLIMIT_AS, (2**33, resource.getrlimit(resource.RLIMIT_AS)[1]))
    sys.setrecursionlimit(1000)
    with tempfile.TemporaryDirectory() as folder:
        return [(seed, *judge(seed, Path(folder), kind)) for seed in seeds]


def fuzz(count: int, first: int = 0, jobs: int = 1, block: int = 500,
         kind: str = "onnx", budget: float = float("inf")) -> tuple[Counter[str], list[tuple[int, str]]]:  # fmt: skip
    """Judge files by seed in other processes: how many were done and refused, and what is wrong with which."""
    found, wrong, until = Counter[str](), [], time.monotonic() + budget
    blocks = [range(s, min(s + block, first + count)) for s in range(first, first + count, block)]
    with get_context("spawn").Pool(jobs, maxtasksperchild=8) as pool:
        for answers in pool.imap_unordered(partial(_block, kind), blocks):
            for seed, answer, what in answers:
                found[answer] += 1
                if what:
                    wrong.append((seed, what))
                    print(f"seed {seed}: {what}", flush=True)
            if time.monotonic() > until:
                return found, sorted(wrong)
        pool.close()
        pool.join()
    return found, sorted(wrong)


def replay(seed: int, kind: str) -> int:
    """Write the file of one seed here, and show what it does."""
    content, line = damaged(seed, kind)
    Path(f"damaged.{kind}").write_bytes(content)
    rest = [f"damaged-out.{kind}", "--overwrite"] if line[0] == "rewrite" else []
    print("normfuse", *(line := [line[0], f"damaged.{kind}", *rest, *line[1:], "-v"]))
    return main(line)
