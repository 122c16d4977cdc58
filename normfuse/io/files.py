"""ONNX models on the disk: read with suspicion, written whole or not at all.

Reading: regular files only; external data by way of `normfuse.io.data`. Writing by way of `normfuse.io.write`: data
first, under a name made from its content, the model last.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import stat
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from inspect import signature
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir

from normfuse.errors import InputError, UnsupportedError, first_line
from normfuse.io.data import DataFile, DataFiles, External, graphs, secure
from normfuse.io.message import check_message
from normfuse.io.pt2 import foreign, is_zip
from normfuse.io.write import (
    Put, among, check_target, copy, discard, extents, over, rehearse, through, write, write_bytes,
)  # fmt: skip

__all__ = [
    "Source", "check_target", "copy_onnx", "from_proto", "over", "read_onnx", "read_proto", "rehearse", "through",
    "to_proto", "write_bytes", "write_new", "write_onnx",
]  # fmt: skip

PROTO_LIMIT = 2**31 - 1
INLINE, SMALL = 2**28, 1024
"""The most bytes of weights that a new model holds itself, and the tensors too small to lie beside it."""
CHUNK = 2**20
_WRITE: Any = ir.external_data.convert_tensors_to_external
ALIGNED: Any = {"alignment": 4096} if "alignment" in signature(_WRITE).parameters else {}
"""onnx-ir aligns large tensors by itself before 1.1, and since then only when it is asked to."""
ANNOTATIONS = "normfuse.annotations"
Copied = Callable[[int, int], None]


@dataclass(slots=True)
class Source:
    """A model as it was read: the message, and the nodes of the main graph in its order."""

    proto: onnx.ModelProto
    nodes: list[ir.Node]
    external: list[External]
    spliced: bool = False


def read_onnx(path: str | os.PathLike[str]) -> tuple[ir.Model, Source]:
    """Load an ONNX model; external data is checked but not read.

    Raises `InputError` for what is not a readable ONNX file, `UnsafeModelError` for external data outside its folder.
    """
    source = Path(path)
    proto = read_proto(source)
    model, external = from_proto(proto, source)
    for tensor in external:
        tensor.file()
    return model, Source(proto, list(model.graph), external)


def read_proto(source: Path) -> onnx.ModelProto:
    """The message in a file, as it stands there; `InputError` for what is no ONNX model."""
    data, other = _bytes(source), foreign(source)
    if other is None and is_zip(source):
        other = "a zip archive, such as a .pt2, and no ONNX model; export a program with normfuse.export"
    if other is not None:
        raise InputError(f"{source}: {other}")
    try:
        proto = onnx.load_model_from_string(data)
    except Exception:
        raise InputError(f"{source}: not an ONNX model (the file does not parse; is it complete?)") from None
    return proto


def from_proto(proto: onnx.ModelProto, source: Path) -> tuple[ir.Model, list[External]]:
    """The model of a message that is what it says it is, and its external tensors, none of which is looked at yet.

    Raises `InputError` with what is wrong with it.
    """
    if not proto.HasField("graph") or not (proto.graph.node or proto.graph.output or proto.graph.input):
        raise InputError(f"{source}: not an ONNX model (no graph in it)")
    check_message(proto, str(source))
    try:
        model = ir.serde.deserialize_model(proto)
    except RecursionError:
        raise InputError(f"{source}: sub-graphs nested too deeply") from None
    except Exception as why:
        deepest: BaseException = why
        while deepest.__cause__ is not None:
            deepest = deepest.__cause__
        text = first_line(deepest).split(" | ")[0].split(" Please ")[0]
        raise InputError(f"{source}: the graph is not valid ONNX, or has what is not supported: {text}") from why
    model.meta[ANNOTATIONS] = list(proto.graph.quantization_annotation)
    return model, secure(model, DataFiles(source))


def to_proto(model: ir.Model) -> onnx.ModelProto:
    """The message of a model, with the quantization annotations that older versions of `onnx_ir` do not keep."""
    proto = ir.to_proto(model)
    known = {v.name for node in model.graph for v in node.outputs} | {v.name for v in model.graph.inputs}
    known |= set(model.graph.initializers)
    known -= {a.tensor_name for a in proto.graph.quantization_annotation}
    proto.graph.quantization_annotation.extend(a for a in model.meta.get(ANNOTATIONS, ()) if a.tensor_name in known)
    return proto


def _spliced(model: ir.Model, source: Source) -> onnx.ModelProto:
    """The message of an edited model, in which all that was not edited is the very bytes that were read.

    Values keep their names when they are replaced, so a node that stays says what it said before.
    """
    proto, graph = source.proto, source.proto.graph
    if source.spliced:
        return proto
    gone: set[str | None] = set()
    for i in reversed(range(len(source.nodes))):
        if source.nodes[i].graph is None:
            gone.update(v.name for v in source.nodes[i].outputs)
            del graph.node[i]
    old = dict(zip((n for n in source.nodes if n.graph is not None), graph.node, strict=True))
    order = [node for node in model.graph if node in old]
    if order != list(old):
        del graph.node[:]
        graph.node.extend(old[node] for node in order)
    for i, node in enumerate(model.graph):
        if node not in old:
            gone.difference_update(v.name for v in node.outputs)
            graph.node.insert(i, ir.to_proto(node))
    inputs = {v.name for v in model.graph.inputs}
    for i in reversed(range(len(graph.input))):
        if graph.input[i].name not in inputs:
            del graph.input[i]
    wanted = model.graph.initializers
    known = {tensor.name for tensor in graph.initializer}
    for i in reversed(range(len(graph.initializer))):
        if graph.initializer[i].name not in wanted:
            del graph.initializer[i]
    graph.initializer.extend(ir.to_proto(v.const_value) for name, v in wanted.items()
                             if name not in known and v.const_value is not None)  # fmt: skip
    types = {tensor.name: tensor.data_type for tensor in graph.initializer}
    for i in reversed(range(len(graph.value_info))):
        name, said = graph.value_info[i].name, graph.value_info[i].type.tensor_type.elem_type
        if name in gone or types.get(name, said) != said:  # the second is left over from a converter of types
            del graph.value_info[i]
    proto.ir_version = model.ir_version
    stated = {entry.domain or "ai.onnx" for entry in proto.opset_import}
    for domain, version in model.opset_imports.items():
        if (domain or "ai.onnx") not in stated:
            proto.opset_import.append(onnx.helper.make_opsetid(domain, version))
    have = [(f.domain, f.name, f.overload) for f in proto.functions]
    for i in reversed(range(len(have))):
        if have[i] not in model.functions:
            del proto.functions[i]
    proto.functions.extend(ir.to_proto(f) for identifier, f in model.functions.items() if identifier not in have)
    source.spliced = True
    return proto


def _bytes(source: Path) -> bytes:
    try:
        info = source.stat()
    except FileNotFoundError:
        raise InputError(f"{source}: no such file") from None
    except (OSError, ValueError) as why:
        raise InputError(f"{source}: {first_line(why)}") from None
    if stat.S_ISDIR(info.st_mode):
        raise InputError(f"{source}: is a directory; give the .onnx file in it")
    if not stat.S_ISREG(info.st_mode):
        raise InputError(f"{source}: not a regular file")
    if info.st_size == 0:
        raise InputError(f"{source}: the file is empty")
    if info.st_size > PROTO_LIMIT:
        raise InputError(f"{source}: larger than 2 GiB; ONNX keeps such weights in external data")
    try:
        return source.read_bytes()
    except OSError as why:
        raise InputError(f"{source}: {first_line(why)}") from None


def write_onnx(model: ir.Model, target: Path, source: Source | None = None, reference: bool = False,
               progress: Copied | None = None, check: Callable[[Path], object] | None = None,
               like: Path | None = None, edited: bool = False, put: Put = over) -> list[Path]:  # fmt: skip
    """Save a model whole or not at all; give back the files of weights of which it has copies now.

    External data is copied next to it under a name made from its content.

    With the `source` it was read from, what was not edited is written as it was read; unless more than nodes of the
    main graph were `edited`. Then what the model does not read any more of external data is not copied, and if there
    are more than `INLINE` bytes of weights in memory now, they get a file of their own. With `reference`, external data
    stays where it is, which has to be in the folder of `target` or below; otherwise `progress` is called with the bytes
    copied so far and all that there are. `check` is given the model under a temporary name in the same folder, where it
    finds its weights; what it raises undoes all. A new file has the permissions of the one it is `like`, or is a copy
    of; `put` gives the model its name.
    """
    tensors = list(external_tensors(model)) if source is None or source.external or edited else []
    files = {tensor: tensor.file() for tensor in tensors}
    moved = dict.fromkeys(files.values(), "")
    if target.exists() and any(target.samefile(file.path) for file in moved):
        raise InputError(f"{target}: holds the weights of the input; choose another name")
    old = [(t, t.location) for t in tensors]
    loose = _weights(model) if edited and source is not None and source.external else []
    beside = {v: t for v, t in loose if t.nbytes > SMALL and not isinstance(t, External)}
    beside = beside if sum(t.nbytes for t in beside.values()) > INLINE else {}
    total, before = sum(file.size for file in moved), 0
    with _made() as weights:
        try:
            for file in moved:
                if reference:
                    moved[file] = _referenced(file.path, target)
                    continue
                advance = None if progress is None else partial(_more, progress, before, total)
                parts = _parts(t for t, held in files.items() if held is file) if edited else []
                moved[file] = _copy_data(file, target, advance, weights, parts)
                before += file.size
            for tensor, file in files.items():
                tensor._location = moved[file]
            if beside:
                _unload(beside, target, weights)
            proto = to_proto(model) if tensors or source is None or edited else _spliced(model, source)
        finally:
            for tensor, location in old:
                tensor._location = location
            for value, held in beside.items():
                value.const_value = held
        write_bytes(_serialised(proto, target), target, check, like, put)
    return [file.path for file, name in moved.items() if not reference and not file.path.samefile(target.parent / name)]


def external_tensors(model: ir.Model) -> Iterator[External]:
    """All tensors of a model whose elements are in another file."""
    for graph in graphs(model):
        for value in graph.initializers.values():
            if isinstance(value.const_value, External):
                yield value.const_value
        for node in graph:
            for attr in node.attributes.values():
                if attr.type == ir.AttributeType.TENSOR and isinstance(attr.value, External):
                    yield attr.value


def copy_onnx(model: ir.Model, source: Path, target: Path, reference: bool = False,
              progress: Copied | None = None, put: Put = over) -> None:  # fmt: skip
    """Save a model that was not changed: the same bytes, unless external data has to get a new name."""
    if next(external_tensors(model), None) is None:
        write_bytes(_bytes(source), target, like=source, put=put)
    else:
        write_onnx(model, target, None, reference, progress, like=source, put=put)


def write_new(model: ir.Model, target: Path, put: Put = over) -> int:
    """Save a model that is in memory; its weights beside it where there are more than `INLINE` bytes of them.

    Gives back the bytes of all weights. The model's initializers become external tensors.
    """
    size = sum(tensor.nbytes for _, tensor in _weights(model))
    if size <= INLINE:
        write_onnx(model, target, put=put)
        return size
    with _made() as beside:
        weights = {v: t for v, t in _weights(model) if t.nbytes > SMALL or isinstance(t, ir.ExternalTensor)}
        _unload(weights, target, beside)
        write_bytes(_serialised(to_proto(model), target), target, put=put)
    return size


def _weights(model: ir.Model) -> list[tuple[ir.Value, ir.TensorProtocol]]:
    """The initializers of a model with what they hold; text cannot lie in another file."""
    values = [v for graph in (model.graph, *model.graph.subgraphs()) for v in graph.initializers.values()]
    return [(v, t) for v in values if (t := v.const_value) is not None and t.dtype != ir.DataType.STRING]


def _unload(weights: dict[ir.Value, ir.TensorProtocol], target: Path, beside: Put) -> None:
    """Write weights into a file beside a model, which they are in now; its name is made from its content."""
    try:
        with tempfile.TemporaryDirectory(prefix=".normfuse-", dir=target.parent) as folder:
            found = _WRITE(list(weights.values()), folder, "data", **ALIGNED)
            name = _name_data(Path(folder) / "data", target, beside)
    except OSError as why:
        raise InputError(f"{target}: its weights cannot be written: {first_line(why)}") from None
    files = DataFiles(target)
    for value, tensor in zip(weights, found, strict=True):
        value.const_value = External(tensor, files)
        value.const_value._location = name


def _parts(tensors: Iterable[External]) -> list[tuple[int, int]]:
    """Where in their file tensors lie, as (start, end)."""
    out: list[tuple[int, int]] = []
    for start, end in sorted(((t.offset or 0), (t.offset or 0) + t.nbytes) for t in tensors):
        if out and start <= out[-1][1]:
            start, end = out[-1][0], max(out.pop()[1], end)
        out.append((start, end))
    return out


@contextlib.contextmanager
def _made() -> Iterator[Put]:
    """Gives files of weights their names; those that are new are gone again if it does not come to a model that reads
    them."""
    made: dict[Path, os.stat_result] = {}
    try:
        yield among(made)
    except BaseException:
        discard(made)
        raise


def _serialised(proto: onnx.ModelProto, target: Path) -> bytes:
    try:
        data: bytes = proto.SerializeToString()
        return data
    except Exception:
        raise UnsupportedError(f"{target}: larger than 2 GiB; save the input with external data first") from None


def _referenced(path: Path, target: Path) -> str:
    """Where external data lies as seen from a model, if that is a place that runtimes accept."""
    folder = target.parent.resolve()
    if not path.is_relative_to(folder):
        raise InputError(f"{target}: its weights are in {str(path.parent)!r}, and a model may only refer to files in "
                         "its own folder or below; write it there, or have them copied (external_data='copy')")
    return path.relative_to(folder).as_posix()


def _more(progress: Copied, before: int, all_bytes: int, done: int) -> None:
    progress(before + done, all_bytes)


def _named(target: Path, data: Path) -> str:
    """The name of a data file: that of its model, and its content: the size, and each chunk that is not all zeros.

    So that holes, which may be terabytes, need not be read, and are the same as zeros that were written.
    """
    digest, zeros, after = hashlib.blake2b(digest_size=16), bytes(CHUNK), 0
    with data.open("rb", buffering=0) as f:
        digest.update(b"%d" % os.fstat(f.fileno()).st_size)
        for start, end in extents(f.fileno()):
            for i in range(max(start // CHUNK, after), -(-end // CHUNK)):
                f.seek(i * CHUNK)
                chunk, after = f.read(CHUNK), i + 1
                if chunk != zeros[: len(chunk)]:
                    digest.update(b"@%d:" % i + chunk)
    stem = target.stem.replace("\\", "_")  # in a location it would part folders
    return f"{stem}-{digest.hexdigest()}.data"


def _name_data(data: Path, target: Path, put: Put) -> str:
    """Give a data file that was written its name."""
    name = _named(target, data)
    with data.open("rb") as f:
        os.fsync(f.fileno())
    put(data, target.parent / name)
    return name


def _copy_data(file: DataFile, target: Path, advance: Callable[[int], None] | None, put: Put,
               parts: Sequence[tuple[int, int]]) -> str:  # fmt: skip
    """Copy a data file next to a model, by the file system; the name is that of the content that was written."""
    source = file.open()
    try:
        return write(target, lambda handle: copy(source, handle, advance, parts), partial(_named, target),
                     like=file.path, put=put).name  # fmt: skip
    finally:
        os.close(source)
