"""The one writer: a file appears whole under its name, or not at all.

The content goes to a temporary name in the same folder, is synced, and is renamed; then the folder is synced. A failure
at any step leaves what was there before, and no temporary file; a kill may leave a file `.normfuse-*`.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from normfuse.errors import InputError, first_line
from normfuse.process import demand_going

CHUNK = 2**26
Advance = Callable[[int], None]
Put = Callable[[Path, Path], None]
"""Gives a file that lies under a temporary name (first) its own."""


def over(temporary: Path, target: Path) -> None:
    """In place of what has the name."""
    os.replace(temporary, target)


def fresh(temporary: Path, target: Path) -> None:
    """Raises `InputError` if anything has the name, also since a moment."""
    if not _taken(temporary, target):
        raise InputError(f"{target}: exists already, since a moment ago; choose another name, or replace it with "
                         "overwrite=True")  # fmt: skip


def among(made: dict[Path, os.stat_result]) -> Put:
    """A `Put` for files that may be there already, with the same content; it notes in `made` those that are new."""

    def put(temporary: Path, target: Path) -> None:
        again = target in made  # of two files of the same content
        made[target] = temporary.stat()
        if again or not _taken(temporary, target):
            os.replace(temporary, target)
            if not again:
                del made[target]

    return put


def discard(made: dict[Path, os.stat_result]) -> None:
    """Take files away again, but for those in whose place another process has put its own."""
    for path, own in made.items():
        with contextlib.suppress(OSError):  # the number of a file that is gone may be given to another one
            now = path.stat()
            if os.path.samestat(now, own) and now.st_mtime_ns == own.st_mtime_ns:
                path.unlink()


def _taken(temporary: Path, target: Path) -> bool:
    """Whether a file got a name that nothing had."""
    try:
        os.link(temporary, target)
    except FileExistsError:
        return False
    except OSError:  # not all file systems give a file two names
        if os.path.lexists(target):
            return False
        os.replace(temporary, target)
    else:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
    return True


def check_target(source: Path | None, target: Path, overwrite: bool, in_place: bool | None) -> Put:
    """How `target` gets its name; `in_place` is None where the input may never be replaced.

    Raises `InputError` where it may not be written.
    """
    itself = False
    try:
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            target.lstat()  # says at once if a name cannot be one
        if not target.parent.is_dir():
            raise InputError(f"{target}: the folder {str(target.parent)!r} does not exist")
        if target.is_dir():
            raise InputError(f"{target}: is a directory; give the name of the output file")
        exists = os.path.lexists(target)  # a link to nothing is there, too
        if exists and source is not None and target.exists() and os.path.samefile(source, target):
            itself = True
            if not in_place:
                advice = "" if in_place is None else ", or allow it with in_place=True"
                raise InputError(f"{target}: is the input itself; choose another name{advice}")
        elif exists and not overwrite:
            raise InputError(f"{target}: exists already; choose another name, or replace it with overwrite=True")
        if exists and not target.is_file():
            raise InputError(f"{target}: is not a regular file; choose another name")
        if not os.access(target.parent, os.W_OK):
            raise InputError(f"{target}: the folder is not writable")
    except (OSError, ValueError) as why:  # a name that is too long, has a NUL, or is a ring of links
        raise InputError(f"{target}: cannot be written: {first_line(why)}") from None
    return over if overwrite or itself else fresh


def rehearse(source: Path, target: Path, overwrite: bool, in_place: bool) -> list[str]:
    """What a dry run tells of an output that may not be written."""
    try:
        check_target(source, target, overwrite, in_place)
    except InputError as why:
        return [f"this was a dry run; to write the output would end with: {why}"]
    return []


def through(source: Path, target: Path) -> Path:
    """Where a model is written that replaces the input itself: what a link leads to, which the link then still does."""
    try:
        return target.resolve() if target.is_symlink() and target.samefile(source) else target
    except (OSError, ValueError):  # which `check_target` tells
        return target


def write_bytes(data: bytes, target: Path, check: Callable[[Path], object] | None = None,
                like: Path | None = None, put: Put = over) -> None:  # fmt: skip
    """Write a file whole or not at all; raises `InputError` where the system does not let it, and what `check` does."""

    def fill(handle: int) -> None:
        view = memoryview(data)
        while view:
            view = view[os.write(handle, view[:CHUNK]) :]

    write(target, fill, check=check, like=like, put=put)


def write(target: Path, fill: Callable[[int], None], named: Callable[[Path], str] | None = None,
          check: Callable[[Path], object] | None = None, like: Path | None = None,
          put: Put = over) -> Path:  # fmt: skip
    """Have `fill` write to an open file, and `put` give it its name: that of `target`, or what `named` makes of the
    content.

    `check` is called before, with the temporary name. The permissions are those of the file that is replaced, or of the
    file that it is `like`, of which the umask takes its share. Raises `InputError` where the system does not let it;
    what else `fill` or `check` raises passes through. Either way nothing has changed then.
    """
    temporary = ""
    try:
        handle, temporary = tempfile.mkstemp(prefix=".normfuse-", dir=target.parent)
        try:
            fill(handle)
            os.fchmod(handle, _permissions(target if named is None else None, like))
            os.fsync(handle)
        finally:
            os.close(handle)
        if check is not None:
            check(Path(temporary))
        demand_going()
        if named is not None:
            target = target.parent / named(Path(temporary))
        put(Path(temporary), target)
    except BaseException as why:
        with contextlib.suppress(OSError):
            if temporary:
                os.unlink(temporary)
        if isinstance(why, OSError):
            raise InputError(f"{target}: cannot be written: {first_line(why)}") from None
        raise
    sync_folder(target.parent)
    return target


def _permissions(replaced: Path | None, like: Path | None) -> int:
    if replaced is not None and replaced.is_file():
        return stat.S_IMODE(replaced.stat().st_mode) & 0o777
    return 0o666 & ~_umask() & (0o666 if like is None else stat.S_IMODE(like.stat().st_mode))


def sync_folder(folder: Path) -> None:
    """Have the names in a folder on the disk; not all systems can, and the files are whole without it."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def extents(handle: int) -> Iterator[tuple[int, int]]:
    """Where an open file has data, as (start, end): without its holes, where the system tells of them."""
    size, at = os.fstat(handle).st_size, 0
    while at < size:
        try:
            at = os.lseek(handle, at, os.SEEK_DATA)
            end = os.lseek(handle, at, os.SEEK_HOLE)
        except (OSError, AttributeError) as why:
            if getattr(why, "errno", None) == errno.ENXIO:  # a hole reaches to the end
                return
            end = size
        yield at, end
        at = end


def _common(one: Iterator[tuple[int, int]], other: Iterator[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """What two lists of ranges, each in order, have in common."""
    a, b = next(one, None), next(other, None)
    while a is not None and b is not None:
        yield max(a[0], b[0]), min(a[1], b[1])
        if a[1] <= b[1]:
            a = next(one, None)
        else:
            b = next(other, None)


def copy(source: int, target: int, advance: Advance | None = None, parts: Sequence[tuple[int, int]] = ()) -> None:
    """The content of an open file, in the kernel and without its holes where the system can.

    With `parts`, (start, end) in order, what lies between them becomes a hole.
    """
    size = os.fstat(source).st_size
    os.truncate(target, size)
    for at, end in _common(extents(source), iter(parts or [(0, size)])):
        while at < end:
            try:
                done = os.copy_file_range(source, target, min(end - at, CHUNK), at, at)
            except (OSError, AttributeError) as why:
                if getattr(why, "errno", None) not in (None, errno.EXDEV, errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS):
                    raise
                done = os.pwrite(target, os.pread(source, min(end - at, CHUNK), at), at)  # file systems that cannot
            if not done:
                raise OSError(errno.EIO, "the file became shorter while it was copied")
            at += done
            if advance is not None:
                advance(at)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
