"""Errors for people: what is wrong, where, and what to do about it."""

import os
from pathlib import Path
from typing import Any


class NormFuseError(Exception):
    """Base of every error NormFuse raises on purpose; the message is one line meant for a person."""


class InputError(NormFuseError):
    """The given file, path or argument cannot be used."""


class UnsafeModelError(NormFuseError):
    """The model asks for something a trustworthy model does not need, such as data outside its folder."""


class UnsupportedError(NormFuseError):
    """A correct input that NormFuse does not handle."""


class VerificationError(NormFuseError):
    """Two models, or a region and its replacement, do not compute the same."""


def path_of(given: Any, what: str, instead: str = "") -> Path:
    """A path that was given as `what`; `InputError` for what is none, with what to do `instead`."""
    if isinstance(given, (str, os.PathLike)) and isinstance(os.fspath(given), str):
        if not os.fspath(given):
            raise InputError(f"{what} is an empty path; give the name of a file")
        if os.fspath(given).endswith(("/", os.sep)):
            raise InputError(f"{what} is {given}, a folder; give the name of a file in it")
        return Path(given)
    raise InputError(f"{what} is a {type(given).__name__} and not the path of a file{instead}")


def first_line(why: BaseException) -> str:
    """An error of the system or of a library in one line."""
    text = getattr(why, "strerror", None) or str(why).strip() or type(why).__name__
    return str(text).splitlines()[0][:300]
