"""The zip archive that `torch.export.save` writes: its JSON and single numbers, under limits; nothing in it is run.

Pickled members (example inputs, tensor subclasses, custom objects) are never opened. What a model has no use for is
refused at once: members outside the archive's folder, links, two members of one name, members that overlap, prefixes.
"""

from __future__ import annotations

import json
import os
import stat
import struct
import zipfile
import zlib
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn

from normfuse.errors import InputError, UnsafeModelError, UnsupportedError, first_line

MEMBERS, DIRECTORY = 2**16, 2**24
"""The most members of an archive, and the bytes of their list."""
JSON_BYTES, JSON_PARTS = 2**27, 2**22
"""The most bytes and brackets of a JSON member; a program has some 2,500 and 35 a node."""
RATIO, SMALL = 200, 2**20
"""How far a member may expand; one below `SMALL` as far as it likes."""
NUMBER, NUMBERS = 2**12, 10_000
"""Where the bytes of a single number have to end in its member, and the most numbers that are read."""
FORMAT, VERSION = b"pt2", b"0"

LFS = b"version https://git-lfs"
"""How a file begins that stands for another, which git-lfs has not brought yet."""
POINTER = "a git-lfs pointer, not the file itself; run git lfs pull"

_SAVE = "give the .pt2 that torch.export.save writes"
_PICKLED = f"weights or objects in Python's pickle format, without a graph; {_SAVE}, or an ONNX file"


def foreign(path: str | os.PathLike[str]) -> str | None:
    """What a file is by its first bytes, if it is a known format that is neither ONNX nor a zip; None otherwise."""
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            return None
        with open(path, "rb") as f:
            head = f.read(len(LFS))
    except (OSError, ValueError):
        return None
    if head == LFS:
        return POINTER
    if head[:1] == b"\x80" and head[1:2] in (b"\2", b"\3", b"\4", b"\5"):
        return f"a pickle, as torch.save wrote before 1.6: {_PICKLED}"
    if head[4:8] == b"ORTM":
        return "a model in ONNX Runtime's own format (.ort), not in ONNX; give the .onnx that it was made from"
    if head[:4] == b"GGUF":
        return f"a GGUF file: weights without a graph; {_SAVE}, or an ONNX file"
    if head[8:9] == b"{" and 2 <= int.from_bytes(head[:8], "little") < 2**32:
        return f"a safetensors file: weights without a graph; {_SAVE}, or an ONNX file"
    return None


def is_zip(path: str | os.PathLike[str]) -> bool:
    """Whether a regular file begins as a zip archive does."""
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            return False
        with open(path, "rb") as f:
            return f.read(4) in (b"PK\3\4", b"PK\5\6")
    except (OSError, ValueError):
        return False


class Archive:
    """An open archive; a context manager.

    Raises `InputError` for what is not a whole .pt2 archive, `UnsafeModelError` for one made to do harm,
    `UnsupportedError` for one of another version.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        try:
            info = self.path.stat()
            if stat.S_ISDIR(info.st_mode):
                self.wrong("is a directory; give the .pt2 file in it")
            if not stat.S_ISREG(info.st_mode):
                self.wrong("not a regular file")
            if info.st_size == 0:
                self.wrong("the file is empty")
            self._file = self.path.open("rb")
        except FileNotFoundError:
            self.wrong("no such file")
        except (OSError, ValueError) as why:
            self.wrong(first_line(why))
        try:
            self._open(info.st_size)
        except (zipfile.BadZipFile, OSError, ValueError, EOFError, struct.error, NotImplementedError) as why:
            self._file.close()
            self.wrong(f"not a readable zip archive: {first_line(why)}")
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> Archive:
        return self

    def __exit__(self, kind: type[BaseException] | None, why: BaseException | None, at: TracebackType | None) -> None:
        self._zip.close()
        self._file.close()

    def wrong(self, message: str) -> NoReturn:
        """Raise an `InputError` about this file."""
        raise InputError(f"{self.path}: {message}") from None

    def unsafe(self, message: str) -> NoReturn:
        """Raise an `UnsafeModelError` about this file."""
        raise UnsafeModelError(f"{self.path}: {message}") from None

    # -- the list of members --------------------------------------------------------------------------------------

    def _open(self, size: int) -> None:
        if not is_zip(self.path):
            self.wrong(foreign(self.path) or f"not a .pt2 archive; {_SAVE}")
        count, end = self._directory(size)
        self._zip = zipfile.ZipFile(self._file)
        infos = self._zip.infolist()
        if len(infos) != count:
            self.wrong("the zip directory does not hold the members that it counts")
        self._check_names(infos)
        infos.sort(key=lambda i: i.header_offset)
        starts = [i.header_offset for i in infos] + [end]
        for info, start, following in zip(infos, starts, starts[1:], strict=False):
            if start < 0 or start + 30 + len(info.orig_filename) + info.compress_size > following:
                self.unsafe(f"members of the zip archive overlap at {info.filename!r}")
        self.members = {i.filename.partition("/")[2]: i for i in infos}
        self._recognise()

    def _directory(self, size: int) -> tuple[int, int]:
        """(number of members, where their list begins), by the record at the very end of the file."""
        self._file.seek(max(0, size - 98))
        tail = self._file.read(98)
        if tail[-22:-18] != b"PK\5\6" or tail[-2:] != b"\0\0":
            self.wrong("not a whole zip archive (its directory is not at the end of the file; is it complete?)")
        count, length, offset = struct.unpack("<HII", tail[-12:-2])
        end = size - 22
        if tail[-42:-38] == b"PK\6\7":
            if tail[:4] != b"PK\6\6":
                self.wrong("the zip64 record is not where it has to be")
            count, length, offset = struct.unpack("<QQQ", tail[32:56])
            end = size - 98
        if count > MEMBERS or length > DIRECTORY:
            self.unsafe(f"{count} members; a model has at most {MEMBERS}")
        if offset + length != end:
            self.unsafe("the zip directory is not where its end says")
        self._file.seek(offset)
        if self._file.read(length).count(b"PK\1\2") > MEMBERS:
            self.unsafe(f"more than {MEMBERS} members in the zip directory")
        self._file.seek(0)
        return count, offset

    def _check_names(self, infos: list[zipfile.ZipInfo]) -> None:
        seen: set[str] = set()
        for info in infos:
            name = info.filename
            parts = name.split("/")
            if name != info.orig_filename or "\\" in name or "\0" in name or ".." in parts or not parts[0]:
                self.unsafe(f"a member of the archive has a name that leads out of it: {info.orig_filename[:99]!r}")
            if stat.S_ISLNK(info.external_attr >> 16):
                self.unsafe(f"a member of the archive is a link: {name[:99]!r}")
            if name in seen:
                self.unsafe(f"two members of the archive have one name: {name[:99]!r}")
            seen.add(name)

    def _recognise(self) -> None:
        """Refuse zip archives that are something else, and say what."""
        names = self.members.keys()
        if len({i.filename.partition("/")[0] for i in self._zip.infolist()}) > 1 or "archive_format" not in names:
            flat = {i.filename for i in self._zip.infolist()}
            if "serialized_exported_program.json" in flat:
                raise UnsupportedError(f"{self.path}: a program saved by an old torch; load it with torch.export.load "
                                       "and save it again")  # fmt: skip
            if "constants.pkl" in names:
                self.wrong("a TorchScript archive, whose graph is code; export the model with torch.export and "
                           "torch.export.save")  # fmt: skip
            if "data.pkl" in names:
                self.wrong(f"a file of torch.save (.pt, .pth): {_PICKLED}")
            self.wrong(f"a zip archive, but no .pt2; {_SAVE}")
        if self.read("archive_format", 16) != FORMAT:
            self.wrong(f"a torch archive of another format than .pt2; {_SAVE}")
        version = self.read("archive_version", 16) if "archive_version" in names else VERSION
        if version != VERSION:
            raise UnsupportedError(f"{self.path}: archive version {version!r} is not known; this reads version 0")

    # -- their content --------------------------------------------------------------------------------------------

    def read(self, name: str, limit: int, most: int | None = None) -> bytes:
        """A member of no more than `limit` bytes, checked by its checksum; of a longer one the first `most`."""
        info = self.members.get(name)
        if info is None:
            self.wrong(f"{name} is missing from the archive")
        if info.flag_bits & 0x1:
            self.wrong(f"{name} is encrypted; {_SAVE}")
        if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            self.wrong(f"{name} is compressed in a way that torch does not read")
        if most is None and info.file_size > limit:
            self.unsafe(f"{name} has {info.file_size} bytes, more than the {limit} that are read")
        if info.file_size > RATIO * info.compress_size + SMALL:
            self.unsafe(f"{name} expands to {info.file_size} bytes from {info.compress_size}")
        try:
            with self._zip.open(info) as f:
                data = f.read(limit + 1 if most is None else most)
                if len(data) != (info.file_size if most is None else min(most, info.file_size)):
                    self.wrong(f"{name} is not as long as the zip directory says")
                return data
        except (zipfile.BadZipFile, zlib.error, OSError, ValueError, EOFError, RuntimeError, struct.error) as why:
            self.wrong(f"{name} cannot be read: {first_line(why)}")

    def json(self, name: str) -> dict[str, Any]:
        """A member that is a JSON object."""
        data = self.read(name, JSON_BYTES)
        if data.count(b"{") + data.count(b"[") > JSON_PARTS:
            self.unsafe(f"{name} has more than {JSON_PARTS} lists and objects")

        def refuse(word: str) -> NoReturn:
            raise ValueError(f"{word} is not JSON")

        try:
            found = json.loads(data.decode("utf-8"), parse_constant=refuse)
        except RecursionError:
            self.unsafe(f"{name} is nested too deeply")
        except ValueError as why:
            self.wrong(f"{name} is not JSON: {first_line(why)}")
        if not isinstance(found, dict):
            self.wrong(f"{name} is not a JSON object")
        return found

    def model(self) -> str:
        """The name of the program in the archive: the one that `torch.export.load` takes."""
        names = [n[7:-5] for n in self.members if n.startswith("models/") and n.endswith(".json")]
        if "model" in names:
            return "model"
        if any(n.startswith("data/aotinductor/") for n in self.members):
            self.wrong("an AOTInductor package, which is compiled code; give the program it was made from")
        held = f"its programs are {', '.join(sorted(names))[:99]}" if names else "it holds none"
        self.wrong(f"no program named 'model' is in the archive; {held}")
