"""Damaged .pt2 files: bytes, zip members and JSON of good ones changed at random."""

from __future__ import annotations

import copy
import io
import json
import random
import struct
import tempfile
import warnings
import zipfile
import zlib
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import normfuse
from tests.pt2_cases import exported, saved

SEEDS = ("small", "small with free sizes", "lifted eps", "no grad", "condition", "scalars")
TEXTS = ("", "x", "os.system", "torch.ops.aten.__class__", "torch.ops.aten.mul.Tensor", "torch.ops.aten.view.default",
         "torch.ops.aten.layer_norm.default", "_operator.getitem", "torch.ops.higher_order.cond", "\x1b[31m\u202e",
         "Symbol('s0')", "__import__('os')", "a" * 100000, "NaN", "-Infinity", "model.json", "../../x")  # fmt: skip
NUMBERS = (0, -1, 1, 2, 3, 7, 12, 64, 2**31, 2**63 - 1, 2**63, -(2**63), 10**400, 0.5, -0.0, 1e308, True, False)
JSON = ("models/model.json", "model_constants_config.json", "model_weights_config.json")


@cache
def seeds() -> list[bytes]:
    """Small good files; the last two hold operators of `normfuse.ops` and of torch's core set."""
    programs = [exported(name) for name in SEEDS]
    programs += [normfuse.optimize(programs[0])[0], programs[0].run_decompositions()]
    with tempfile.TemporaryDirectory() as folder:
        return [saved(program, Path(folder) / "model.pt2").read_bytes() for program in programs]


def mutate(data: bytes, rng: random.Random) -> bytes:
    """One to four changes of the bytes, the zip members or, most often, the JSON."""
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        change = rng.choices((_bytes, _members, _json), (1, 1, 4))[0]
        try:
            data = change(data, rng)
        except (zipfile.BadZipFile, zlib.error, struct.error, ValueError, KeyError, EOFError, RuntimeError, OSError):
            data = _bytes(data, rng)
    return data


# -- bytes --------------------------------------------------------------------------------------------------------


def _bytes(data: bytes, rng: random.Random) -> bytes:
    out = bytearray(data or b"PK")
    at, n = rng.randrange(len(out)), rng.choice((1, 2, 4, 16, 256))
    if rng.random() < 0.5:  # the directory and its end matter most
        at = max(0, len(out) - rng.randrange(1, 1200))
    kind = rng.randrange(5)
    if kind == 0:
        out[at] ^= 1 << rng.randrange(8)
    elif kind == 1:
        out[at : at + n] = rng.randbytes(n)
    elif kind == 2:
        del out[at : at + n]
    elif kind == 3:
        out[at:at] = out[at : at + n]
    else:
        del out[at:]
    return bytes(out)


# -- members ------------------------------------------------------------------------------------------------------


def _members(data: bytes, rng: random.Random) -> bytes:
    with zipfile.ZipFile(io.BytesIO(data)) as old:
        items = [(i.filename, old.read(i)) for i in old.infolist()]
    at = rng.randrange(len(items))
    name, content = items[at]
    kind = rng.randrange(7)
    if kind == 0:
        del items[at]
    elif kind == 1:
        items.insert(at, items[at])
    elif kind == 2:
        others = (f"other/{name}", "/etc/x", f"../{name}", name.upper(), f"{name}/", "x", rng.choice(items)[0])
        items[at] = (rng.choice(others), content)
    elif kind == 3:
        items[at] = (name, rng.choice(items)[1])
    elif kind == 4:
        items[at] = (name, _bytes(content, rng))
    elif kind == 5:
        items[at] = (name, rng.choice((b"", b"{}", b"[]", b"[" * 5000, b"null", b"\xff\xfe", b'{"config": {}}', b"2")))
    else:
        rng.shuffle(items)
    return packed(items, rng.choice((zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)))


def packed(items: list[tuple[str, bytes]], how: int = zipfile.ZIP_STORED) -> bytes:
    """A zip archive of these members."""
    out = io.BytesIO()
    with warnings.catch_warnings(), zipfile.ZipFile(out, "w", how) as new:
        warnings.simplefilter("ignore")  # two members of one name
        for name, content in items:
            new.writestr(zipfile.ZipInfo(name), content, how)
    return out.getvalue()


# -- JSON ---------------------------------------------------------------------------------------------------------


def _json(data: bytes, rng: random.Random) -> bytes:
    with zipfile.ZipFile(io.BytesIO(data)) as old:
        items = [(i.filename, old.read(i)) for i in old.infolist()]
    suffix = rng.choices(JSON, (8, 1, 1))[0]
    for i, (name, content) in enumerate(items):
        if name.endswith(suffix):
            tree = json.loads(content)
            for _ in range(rng.choice((1, 1, 2, 5))):
                _edit(tree, rng)
            items[i] = (name, json.dumps(tree).encode())
    return packed(items)


def _edit(tree: Any, rng: random.Random) -> None:
    """Change one place: walk down at random, mostly into the nodes, then replace, delete, duplicate, rename or swap."""
    places: list[tuple[Any, Any]] = []
    here: Any = tree
    key: Any
    for key in ("graph_module", "graph", rng.choice(("nodes", "nodes", "tensor_values", "outputs"))):
        if rng.random() < 0.9 and isinstance(here, dict) and isinstance(here.get(key), (dict, list)):
            places.append((here, key))
            here = here[key]
    while isinstance(here, (dict, list)) and here:
        key = rng.choice(list(here)) if isinstance(here, dict) else rng.randrange(len(here))
        places.append((here, key))
        here = here[key]
    if not places:
        return
    parent, key = rng.choice(places[-4:])
    edits: tuple[Callable[[], None], ...] = (
        lambda: parent.__setitem__(key, _value(rng, parent[key])),
        lambda: parent.__setitem__(key, _value(rng, parent[key])),
        lambda: parent.__delitem__(key),
        lambda: _again(parent, key, rng),
        lambda: _swap(parent, key, rng),
        lambda: _graft(tree, parent, key, rng),
    )
    rng.choice(edits)()


def _value(rng: random.Random, old: Any) -> Any:
    if isinstance(old, int) and rng.random() < 0.5:
        return old + rng.choice((-1, 1, 63, -64))
    if isinstance(old, str) and rng.random() < 0.3:
        return old[: rng.randrange(len(old) + 1)]
    return rng.choice((None, [], {}, [[]], {"as_int": 1}, {"as_none": True}, rng.choice(TEXTS), rng.choice(NUMBERS)))


def _again(parent: Any, key: Any, rng: random.Random) -> None:
    if isinstance(parent, list):
        parent.insert(rng.randrange(len(parent) + 1), copy.deepcopy(parent[key]))
    else:
        parent[rng.choice(TEXTS) if rng.random() < 0.5 else f"{key}_1"] = copy.deepcopy(parent[key])


def _swap(parent: Any, key: Any, rng: random.Random) -> None:
    other = rng.choice(list(parent)) if isinstance(parent, dict) else rng.randrange(len(parent))
    parent[key], parent[other] = parent[other], parent[key]


def _graft(tree: Any, parent: Any, key: Any, rng: random.Random) -> None:
    """A part of the file in the place of another of its kind: another input, another operator, other sizes."""
    found: list[Any] = []
    stack = [tree]
    while stack:
        here = stack.pop()
        for name, value in here.items() if isinstance(here, dict) else enumerate(here):
            if name == key and isinstance(name, str):
                found.append(value)
            if isinstance(value, (dict, list)):
                stack.append(value)
    if found:
        parent[key] = copy.deepcopy(rng.choice(found))
