"""External data: the tensors of a model that lie in other files.

A location leads to a file in the model's folder, or, where the model is a link, as in the Hugging Face cache, in the
folder of the file that it leads to. The file is found by its real path, opened one folder at a time without following
links, without waiting, and has to be a regular file with one name. Every later opening has to find the same file.
"""

from __future__ import annotations

import mmap
import os
import stat
import threading
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from normfuse.errors import InputError, UnsafeModelError, first_line
from normfuse.io.pt2 import LFS, POINTER

MAPPED = 16
"""Files that are mapped at a time: a model may have thousands, a process has some thousand descriptors."""
Identity = tuple[int, int, int, int]


@dataclass(slots=True, eq=False)
class DataFile:
    """A file that was checked: where it really is, below which folder, and what the system calls it."""

    folder: Path
    path: Path
    identity: Identity

    @property
    def size(self) -> int:
        return self.identity[2]

    def open(self) -> int:
        """A descriptor of the very file that was checked, or `UnsafeModelError`."""
        try:
            handle = _open_beneath(self.folder, self.path)
        except OSError as why:
            raise UnsafeModelError(f"{self.path}: changed while it was read: {first_line(why)}") from None
        if _identity(os.fstat(handle)) != self.identity:
            os.close(handle)
            raise UnsafeModelError(f"{self.path}: changed while it was read")
        return handle


class DataFiles:
    """The files beside a model, found once each; safe to use from several threads."""

    def __init__(self, model: Path) -> None:
        self.model = model
        self.folders = list(dict.fromkeys((model.parent.resolve(), model.resolve().parent)))
        self.found: dict[str, DataFile] = {}
        self.maps: OrderedDict[DataFile, mmap.mmap] = OrderedDict()
        self.lock = threading.Lock()

    def find(self, location: str, where: str) -> DataFile:
        """The file that a location means; `where` begins the message of an error."""
        if location not in self.found:
            self.found[location] = self._find(location, where)
        return self.found[location]

    def _find(self, location: str, where: str) -> DataFile:
        outside = f"{where} points outside the model's folder: {location[:200]!r}"
        if not location or os.path.isabs(location) or set(location) & {"\\", "\0"} or ".." in location.split("/"):
            raise UnsafeModelError(outside)
        try:
            # a link to a model may lie alone, its data where it points to, or among links to all files
            folder = next((f for f in self.folders if (f / location).exists()), self.folders[-1])
            path = (folder / location).resolve(strict=True)
            inside = next((f for f in self.folders if path.is_relative_to(f)), None)
            if inside is None:
                raise UnsafeModelError(outside)
            if not stat.S_ISREG(path.stat().st_mode):
                raise UnsafeModelError(f"{where} is not a regular file: {location!r}")
            handle = _open_beneath(inside, path)
        except FileNotFoundError:
            raise InputError(f"{where} is missing: {location[:200]!r}; put the file next to the model") from None
        except (OSError, RuntimeError, ValueError) as why:
            raise InputError(f"{where}: {first_line(why)}: {location[:200]!r}") from None
        try:
            info = os.fstat(handle)
            pointer = stat.S_ISREG(info.st_mode) and os.read(handle, len(LFS)) == LFS
        finally:
            os.close(handle)
        if pointer:
            raise InputError(f"{where}: {location!r} is {POINTER}")
        if not stat.S_ISREG(info.st_mode):
            raise UnsafeModelError(f"{where} is not a regular file: {location!r}")
        if info.st_nlink > 1:
            raise UnsafeModelError(f"{where} has a second name (a hard link), which may be outside the model's folder: "
                                   f"{location!r}; make it a file of its own with cp")  # fmt: skip
        if self.model.exists() and os.path.samestat(info, self.model.stat()):
            raise UnsafeModelError(f"{where} is the model itself: {location!r}")
        return DataFile(inside, path, _identity(info))

    def view(self, file: DataFile, offset: int, length: int) -> memoryview:
        """Bytes of a file, in place."""
        with self.lock:
            if file not in self.maps:
                handle = file.open()
                try:
                    self.maps[file] = mmap.mmap(handle, 0, access=mmap.ACCESS_READ)
                finally:
                    os.close(handle)
            self.maps.move_to_end(file)
            while len(self.maps) > MAPPED:
                self.maps.popitem(last=False)  # unmapped as soon as no array is made of it any more
            return memoryview(self.maps[file])[offset : offset + length]


class External(ir.ExternalTensor):
    """A tensor in a file of `DataFiles`, which looks where it is when its elements are first asked for."""

    __slots__ = ("files",)

    def __init__(self, tensor: ir.ExternalTensor, files: DataFiles) -> None:
        super().__init__(tensor.location, tensor.offset, tensor.length, tensor.dtype, shape=tensor.shape,
                         name=tensor.name, doc_string=tensor.doc_string, metadata_props=dict(tensor.metadata_props),
                         base_dir=tensor.base_dir or str(files.model.parent))  # fmt: skip
        self.files = files

    def file(self) -> DataFile:
        """The file, once it is certain that it may be read and holds the elements."""
        where = f"{self.files.model}: external data of {self.name!r}"
        found = self.files.find(str(self.location), where)
        sizes = self.shape.numpy()
        if self.dtype == ir.DataType.STRING or any(d < 0 for d in sizes):
            raise InputError(f"{where}: no tensor of type {self.dtype.name} and shape {list(sizes)} can lie in a file")
        offset = self.offset or 0
        length = self.nbytes if self.length is None else self.length
        if offset < 0 or length < 0 or offset + length > found.size:
            raise InputError(f"{where} reaches past the end of {str(self.location)!r}")
        if length != self.nbytes:
            raise InputError(f"{where} has {length} bytes, its type and shape need {self.nbytes}")
        return found

    def _bytes(self) -> memoryview:
        found = self.file()
        return self.files.view(found, self.offset or 0, self.nbytes) if self.nbytes else memoryview(b"")

    def numpy(self) -> np.ndarray[Any, Any]:
        """The elements, in place and not kept."""
        sizes = tuple(int(d) for d in self.shape.numpy())
        if self.dtype.bitwidth < 8:
            packed = np.frombuffer(self._bytes(), np.uint8)
            return np.asarray(ir.PackedTensor(packed, self.dtype, shape=sizes).numpy())
        array = np.frombuffer(self._bytes(), np.dtype(self.dtype.numpy()).newbyteorder("<"))
        return array.reshape(sizes)

    def __array__(self, dtype: Any = None) -> np.ndarray[Any, Any]:
        return self.numpy().__array__(dtype)

    def tobytes(self) -> bytes:
        """The elements as the format stores them."""
        return bytes(self._bytes())

    def tofile(self, file: Any) -> None:
        """Write the elements to an open file."""
        file.write(self._bytes())


def graphs(model: ir.Model) -> Iterator[ir.Graph]:
    """All graphs of a model: sub-graphs too, and those of functions."""
    for body in (model.graph, *(f.graph for f in model.functions.values())):
        yield body
        yield from body.subgraphs()


def secure(model: ir.Model, files: DataFiles | None = None) -> list[External]:
    """Have all external tensors of a model read by way of `files`, or else from the folders that they say themselves.

    The tensors given are not changed.
    """
    made: list[External] = []
    folders: dict[str, DataFiles] = {}

    def safe(tensor: ir.ExternalTensor) -> External:
        base = str(tensor.base_dir)
        made.append(External(tensor, files or folders.setdefault(base, DataFiles(Path(base) / "the model"))))
        return made[-1]

    for graph in graphs(model):
        for value in graph.initializers.values():
            if isinstance(value.const_value, ir.ExternalTensor):
                value.const_value = safe(value.const_value)
        for node in graph:
            for name, attr in list(node.attributes.items()):
                if attr.type == ir.AttributeType.TENSOR and isinstance(attr.value, ir.ExternalTensor):
                    node.attributes[name] = ir.AttrTensor(name, safe(attr.value))
                elif attr.type == ir.AttributeType.TENSORS and any(isinstance(t, ir.ExternalTensor)
                                                                   for t in attr.value):  # fmt: skip
                    raise UnsafeModelError(f"attribute {name!r} of {node.name!r} is a list of tensors "
                                           "in other files, which no runtime reads")  # fmt: skip
    return made


def _open_beneath(folder: Path, path: Path) -> int:
    """Open a file below a folder, one name at a time and following no link."""
    flags = os.O_RDONLY | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_NOCTTY", 0)
    if os.open not in os.supports_dir_fd:
        return os.open(path, flags | getattr(os, "O_BINARY", 0))
    parts = path.relative_to(folder).parts
    at = os.open(folder, flags | os.O_DIRECTORY)
    try:
        for i, part in enumerate(parts):
            kind = os.O_NONBLOCK if i == len(parts) - 1 else os.O_DIRECTORY
            after = os.open(part, flags | os.O_NOFOLLOW | kind, dir_fd=at)
            os.close(at)
            at = after
    except BaseException:
        os.close(at)
        raise
    return at


def _identity(info: os.stat_result) -> Identity:
    return info.st_dev, info.st_ino, info.st_size, info.st_mtime_ns
