"""The one place that opens model files.

Reading: regular files only, and external data only inside the model's folder (the folder of the file that a link
resolves to, as in the Hugging Face cache). Writing: to a temporary name in the target's folder, synced, renamed; data
first, the model last.
"""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import onnx
import onnx_ir as ir

from normfuse.errors import InputError, UnsafeModelError, UnsupportedError

PROTO_LIMIT = 2**31 - 1
INLINE, SMALL = 2**28, 1024
"""The most bytes of weights that a new model holds itself, and the tensors too small to lie beside it."""
CHUNK = 2**26
ALIGNMENT = 4096
Copied = Callable[[int, int], None]


@dataclass(slots=True)
class Source:
    """A model as it was read: the message, and the nodes of the main graph in its order."""

    proto: onnx.ModelProto
    nodes: list[ir.Node]
    external: bool
    spliced: bool = False


def read_onnx(path: str | os.PathLike[str]) -> tuple[ir.Model, Source]:
    """Load an ONNX model; external data is checked but not read.

    Raises `InputError` for what is not a readable ONNX file, `UnsafeModelError` for external data outside its folder.
    """
    source = Path(path)
    data = _bytes(source)
    try:
        proto = onnx.ModelProto.FromString(data)
    except Exception:
        raise InputError(f"{source}: not an ONNX model (the file does not parse; is it complete?)") from None
    if not proto.HasField("graph") or not (proto.graph.node or proto.graph.output or proto.graph.input):
        raise InputError(f"{source}: not an ONNX model (no graph in it)")
    try:
        model = ir.serde.deserialize_model(proto)
    except Exception as why:
        raise InputError(f"{source}: the graph is not valid ONNX: {_line(why)}") from why
    external = b"\n\x08location" in data  # the key without which nothing is, as the format writes it
    if external:
        for tensor in external_tensors(model):
            _check_external(tensor, source)
    return model, Source(proto, list(model.graph), external)


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
    wanted = model.graph.initializers
    known = {tensor.name for tensor in graph.initializer}
    for i in reversed(range(len(graph.initializer))):
        if graph.initializer[i].name not in wanted:
            del graph.initializer[i]
    graph.initializer.extend(ir.to_proto(v.const_value) for name, v in wanted.items()
                             if name not in known and v.const_value is not None)  # fmt: skip
    for i in reversed(range(len(graph.value_info))):
        if graph.value_info[i].name in gone:
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
        raise InputError(f"{source}: {_line(why)}") from None
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
        raise InputError(f"{source}: {_line(why)}") from None


def external_tensors(model: ir.Model) -> Iterator[ir.ExternalTensor]:
    """All tensors of a model whose elements are in another file."""
    graphs = [model.graph, *model.graph.subgraphs(), *(f.graph for f in model.functions.values())]
    for graph in graphs:
        for value in graph.initializers.values():
            if isinstance(value.const_value, ir.ExternalTensor):
                yield value.const_value
        for node in graph:
            for attr in node.attributes.values():
                if attr.type == ir.AttributeType.TENSOR and isinstance(attr.value, ir.ExternalTensor):
                    yield attr.value


def _check_external(tensor: ir.ExternalTensor, source: Path) -> None:
    name, location = tensor.name, str(tensor.location)
    where = f"{source}: external data of {name!r}"
    if not location or os.path.isabs(location) or "\\" in location or "\0" in location or ".." in Path(location).parts:
        raise UnsafeModelError(f"{where} points outside the model's folder: {location!r}")
    # a link to a model may lie alone, its data where it points to, or among links to all files, as in a model cache
    folders = [source.parent.resolve(), source.resolve().parent]
    folder = next((f for f in folders if (f / location).exists()), folders[-1])
    try:
        resolved = (folder / location).resolve(strict=True)
        info = resolved.stat()
    except FileNotFoundError:
        raise InputError(f"{where} is missing: {location!r}; put the file next to the model") from None
    except (OSError, RuntimeError) as why:
        raise InputError(f"{where}: {_line(why)}") from None
    if not any(resolved.is_relative_to(f) for f in folders):
        raise UnsafeModelError(f"{where} points outside the model's folder: {location!r}")
    if not stat.S_ISREG(info.st_mode):
        raise UnsafeModelError(f"{where} is not a regular file: {location!r}")
    offset = tensor.offset or 0
    length = tensor.length if tensor.length is not None else tensor.nbytes
    if offset < 0 or length < 0 or offset + length > info.st_size:
        raise InputError(f"{where} reaches past the end of {location!r}")
    if any(d < 0 for d in tensor.shape.numpy()) or length != tensor.nbytes:
        raise InputError(f"{where} has {length} bytes, its type and shape need {tensor.nbytes}")
    tensor._location, tensor.base_dir = resolved.name, str(resolved.parent)  # onnx_ir reads no links


def check_target(source: Path | None, target: Path, overwrite: bool, in_place: bool) -> None:
    """Raise `InputError` unless `target` may be written."""
    if not target.parent.is_dir():
        raise InputError(f"{target}: the folder {str(target.parent)!r} does not exist")
    if target.is_dir():
        raise InputError(f"{target}: is a directory; give the name of the output file")
    if target.exists():
        if not target.is_file():  # a device or a pipe would be replaced by a file
            raise InputError(f"{target}: is not a regular file; choose another name")
        if source is not None and os.path.samefile(source, target):
            if not in_place:
                raise InputError(f"{target}: is the input itself; choose another name, or allow it with --in-place")
        elif not overwrite:
            raise InputError(f"{target}: exists already; choose another name, or replace it with --overwrite")
    if not os.access(target.parent, os.W_OK):
        raise InputError(f"{target}: the folder is not writable")


def write_onnx(model: ir.Model, target: Path, source: Source | None = None, reference: bool = False,
               progress: Copied | None = None) -> None:  # fmt: skip
    """Save a model whole or not at all. External data is copied next to it under a name made from its content.

    With the `source` it was read from, what was not edited is written as it was read; this needs edits in the main
    graph only. With `reference`, external data stays where it is, which has to be in the folder of `target` or below;
    otherwise `progress` is called with the bytes copied so far and all that there are.
    """
    tensors = list(external_tensors(model)) if source is None or source.external else []
    old = [(t, t.location, t.base_dir) for t in tensors]
    paths = [(Path(t.base_dir) / t.location).resolve() for t in tensors]
    moved: dict[Path, str] = dict.fromkeys(paths, "")
    if target.exists() and any(target.samefile(path) for path in moved):
        raise InputError(f"{target}: holds the weights of the input; choose another name")
    all_bytes, before = sum(path.stat().st_size for path in moved), 0
    try:
        for path in moved:
            if reference:
                moved[path] = _referenced(path, target)
                continue
            advance = None if progress is None else partial(_more, progress, before, all_bytes)
            moved[path] = _copy_data(path, target, advance)
            before += path.stat().st_size
        for tensor, path in zip(tensors, paths, strict=True):
            tensor._location = moved[path]
        proto = ir.to_proto(model) if tensors or source is None else _spliced(model, source)
    finally:
        for tensor, location, base in old:
            tensor._location, tensor.base_dir = location, base
    try:
        data = proto.SerializeToString()
    except Exception:
        raise UnsupportedError(f"{target}: larger than 2 GiB; save the input with external data first") from None
    write_bytes(data, target)


def copy_onnx(model: ir.Model, source: Path, target: Path, reference: bool = False,
              progress: Copied | None = None) -> None:  # fmt: skip
    """Save a model that was not changed: the same bytes, unless external data has to get a new name."""
    if next(external_tensors(model), None) is None:
        write_bytes(source.read_bytes(), target)
    else:
        write_onnx(model, target, None, reference, progress)


def write_new(model: ir.Model, target: Path) -> int:
    """Save a model that is in memory; its weights beside it where there are more than `INLINE` bytes of them.

    Gives back the bytes of all weights. The model's initializers become external tensors.
    """
    values = [v for graph in (model.graph, *model.graph.subgraphs()) for v in graph.initializers.values()]
    size = sum(v.const_value.nbytes for v in values if v.const_value is not None)
    if size <= INLINE:
        write_onnx(model, target)
        return size
    with tempfile.TemporaryDirectory(prefix=".normfuse-", dir=target.parent) as folder:
        ir.external_data.unload_from_model(model, folder, "data", size_threshold_bytes=SMALL, alignment=ALIGNMENT)
        written = Path(folder) / "data"
        name = _named(target, written)
        _commit(str(written), target.parent / name, lambda: _sync(written))
        for tensor in external_tensors(model):
            tensor._location, tensor.base_dir = name, str(target.parent)
        write_bytes(ir.to_proto(model).SerializeToString(), target)
    return size


def _referenced(path: Path, target: Path) -> str:
    """Where external data lies as seen from a model, if that is a place that runtimes accept."""
    folder = target.parent.resolve()
    if not path.is_relative_to(folder):
        raise InputError(f"{target}: its weights are in {str(path.parent)!r}, and a model may only refer to files in "
                         "its own folder or below; write it there, or have them copied (--external-data copy)")
    return path.relative_to(folder).as_posix()


def _more(progress: Copied, before: int, all_bytes: int, done: int) -> None:
    progress(before + done, all_bytes)


def _named(target: Path, data: Path) -> str:
    """The name of a data file: that of its model, and its content."""
    with data.open("rb") as f:
        digest = hashlib.file_digest(f, lambda: hashlib.blake2b(digest_size=16))
    return f"{target.stem}-{digest.hexdigest()}.data"


def _copy_data(path: Path, target: Path, advance: Callable[[int], None] | None) -> str:
    """Copy a data file next to a model, by the file system; the name is that of the content that was written."""
    handle, temporary = _temporary(target)
    os.close(handle)
    try:
        _copy(path, Path(temporary), advance)
        name = _named(target, Path(temporary))
    except OSError as why:
        Path(temporary).unlink(missing_ok=True)
        raise InputError(f"{target}: its weights cannot be copied: {_line(why)}") from None
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    _commit(temporary, target.parent / name, lambda: _sync(Path(temporary)))
    return name


def _copy(path: Path, to: Path, advance: Callable[[int], None] | None) -> None:
    """The content of a file, in the kernel and without its holes where the system can, else by shutil."""
    if not hasattr(os, "copy_file_range"):
        shutil.copyfile(path, to)
        return
    with path.open("rb") as source, to.open("r+b") as target:
        size, at = os.fstat(source.fileno()).st_size, 0
        os.truncate(to, size)
        try:
            while at < size:
                at = os.lseek(source.fileno(), at, os.SEEK_DATA)
                end = os.lseek(source.fileno(), at, os.SEEK_HOLE)
                while at < end:
                    done = os.copy_file_range(source.fileno(), target.fileno(), min(end - at, CHUNK), at, at)
                    if not done:
                        raise OSError(errno.EIO, "the file became shorter while it was copied")
                    at += done
                    if advance is not None:
                        advance(at)
        except OSError as why:
            if why.errno == errno.ENXIO:  # a hole reaches to the end
                return
            if why.errno not in (errno.EXDEV, errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS):
                raise
            shutil.copyfile(path, to)  # file systems that cannot


def _sync(path: Path) -> None:
    """Have a file on the disk before its name is."""
    with path.open("rb") as f:
        os.fsync(f.fileno())


def write_bytes(data: bytes, target: Path) -> None:
    """Write a file whole or not at all."""
    handle, temporary = _temporary(target)

    def fill() -> None:
        with os.fdopen(handle, "wb") as f:
            f.write(data)
            f.flush()
            os.fsync(f.fileno())

    _commit(temporary, target, fill)


def _temporary(target: Path) -> tuple[int, str]:
    try:
        return tempfile.mkstemp(prefix=".normfuse-", dir=target.parent)
    except OSError as why:
        raise InputError(f"{target}: cannot be written: {_line(why)}") from None


def _commit(temporary: str, target: Path, fill: object) -> None:
    try:
        fill()  # type: ignore[operator]
        mask = os.umask(0)
        os.umask(mask)
        os.chmod(temporary, 0o666 & ~mask)
        os.replace(temporary, target)
    except OSError as why:
        Path(temporary).unlink(missing_ok=True)
        raise InputError(f"{target}: cannot be written: {_line(why)}") from None
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def _line(why: BaseException) -> str:
    text = getattr(why, "strerror", None) or str(why) or type(why).__name__
    return str(text).splitlines()[0][:300]
