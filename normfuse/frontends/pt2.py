"""The .pt2 front end: the norms of an exported program on disk, without running anything in the file.

`torch.export.load` evaluates expressions, imports and unpickles what a file names; here its JSON alone is read.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from normfuse.config import Config
from normfuse.errors import UnsupportedError
from normfuse.frontends import fx_model
from normfuse.frontends.pt2_graph import Malformed, Reader, field, one, tensor_info
from normfuse.io.pt2 import NUMBER, NUMBERS, Archive
from normfuse.report import Report

SCHEMA = 8
"""The major version of torch.export's schema (torch 2.13 writes 8.20)."""


def inspect(path: str | Path) -> Report:
    """Find the norms of a .pt2 archive; nothing of it is run, imported or unpickled.

    Raises `InputError`, `UnsafeModelError` or `UnsupportedError` for what cannot be read.
    """
    with Archive(path) as archive:
        name = archive.model()
        program = Program(archive, archive.json(f"models/{name}.json"), name)
    report = fx_model.report_on_graph(program.graph_module, program.state, Config(verify="off"))[0]
    report.format = "exported"
    report.notes += program.notes
    return report


class Program:
    """The graph of an archive, and which of its placeholders are the same in every run."""

    def __init__(self, archive: Archive, data: dict[str, Any], name: str) -> None:
        self.notes: list[str] = []
        try:
            version = field(field(data, "schema_version", dict), "major", int)
            if version != SCHEMA:
                raise UnsupportedError(f"{archive.path}: schema version {version} of torch.export is not known, only "
                                       f"{SCHEMA}; save the program by torch 2.13, which writes it")  # fmt: skip
            whole = field(data, "graph_module", dict)
            signature = field(whole, "signature", dict)
            specs = [one(spec) for spec in field(signature, "input_specs", list)]
            self.graph_module = Reader(specs).module(field(whole, "graph", dict))
            self.state = self._state(archive, name, specs, field(signature, "output_specs", list))
        except Malformed as why:
            archive.wrong(f"not a program of torch.export: {why}")

    def _state(self, archive: Archive, name: str, specs: list[tuple[str, Any]],
               outputs: list[Any]) -> dict[str, torch.Tensor | None]:  # fmt: skip
        """Parameters, buffers that are never written, and constants, these with their number if they are one."""
        written = {field(spec, "buffer_name", str) for kind, spec in map(one, outputs) if kind == "buffer_mutation"}
        out: dict[str, torch.Tensor | None] = {}
        constants: dict[str, Any] | None = None
        pickled = 0
        if sum(kind == "tensor_constant" for kind, _ in specs) > NUMBERS:
            archive.unsafe(f"more than {NUMBERS} constants")
        for kind, spec in specs:
            if kind not in ("parameter", "buffer", "tensor_constant"):
                continue
            placeholder = field(field(spec, "arg", dict), "name", str)
            target = field(spec, f"{kind}_name", str)
            if kind != "tensor_constant":
                if target not in written:
                    out[placeholder] = None
                continue
            if constants is None:
                config = f"data/constants/{name}_constants_config.json"
                constants = field(archive.json(config), "config", dict) if config in archive.members else {}
            out[placeholder] = number(archive, constants.get(target))
            pickled += target not in constants or field(constants[target], "use_pickle", bool)
        if pickled:
            self.notes.append(f"{pickled} constants are pickled or missing, and were not read")
        return out


def number(archive: Archive, payload: Any) -> torch.Tensor | None:
    """The tensor of a constant that has one element and lies as it is in the archive; None for any other."""
    if payload is None or field(payload, "use_pickle", bool) or payload.get("tensor_meta") is None:
        return None
    meta, path = field(payload, "tensor_meta", dict), field(payload, "path_name", str)
    info = tensor_info(meta)
    offset = one(field(meta, "storage_offset", dict))[1]
    member, size = f"data/constants/{path}", info.dtype.itemsize
    if any(d != 1 for d in info.shape) or type(offset) is not int or not 0 <= offset * size <= NUMBER - size:
        return None
    order = archive.read("byteorder", 16) if "byteorder" in archive.members else b"little"
    if member not in archive.members or order != b"little":
        return None
    data = archive.read(member, NUMBER, offset * size + size)[offset * size :]
    if len(data) < size:
        return None
    return torch.frombuffer(bytearray(data), dtype=info.dtype).reshape((1,) * len(info.shape))
