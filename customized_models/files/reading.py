"""Files of others, read strictly: bounded, never blocking, every failure an error of ours."""

from __future__ import annotations

import errno
import json
import math
import os
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..errors import (
    CustomizedModelsError,
    MalformedError,
    StorageError,
    UnsafeFileError,
    shown,
)

MAX_JSON = 64 << 20  # bytes: the largest tokenizer.json in use is about half of this

MAX_NESTING = 100
"""Levels of JSON: configurations have about ten, and transformers copies them by recursion."""


def strict_json(data: bytes | bytearray, what: str) -> Any:
    """Parse JSON as the standard has it: no NaN, no duplicate keys, no endless nesting.

    Args:
        data: UTF-8.
        what: The name that a message has for it.

    Raises:
        MalformedError: It does not parse under these rules.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) != len(pairs):
            raise ValueError("a key stands twice in one object")
        return result

    def no_constant(text: str) -> Any:
        raise ValueError(f"{text} is not JSON")

    def finite(text: str) -> float:
        number = float(text)
        if not math.isfinite(number):
            raise ValueError(f"the number {shown(text, 40)} is out of range")
        return number

    return _parsed(
        data, what, "strict JSON", unique, parse_constant=no_constant, parse_float=finite
    )


def python_json(data: bytes | bytearray, what: str) -> Any:
    """Parse JSON as Python writes and reads it, and with it transformers, PEFT and their tools.

    NaN, Infinity and -Infinity are numbers, and so are those out of range. A key may stand twice
    in an object with the same value.

    Args:
        data: UTF-8.
        what: The name that a message has for it.

    Raises:
        MalformedError: It does not parse under these rules.
    """

    def agreeing(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        for key, value in pairs if len(result) != len(pairs) else ():
            if result[key] != value:
                raise ValueError(f"{shown(key)} stands twice in one object, with different values")
        return result

    return _parsed(data, what, "JSON", agreeing)


def _parsed(
    data: bytes | bytearray,
    what: str,
    kind: str,
    pairs_hook: Callable[[list[tuple[str, Any]]], dict[str, Any]],
    parse_constant: Callable[[str], Any] | None = None,
    parse_float: Callable[[str], Any] | None = None,
) -> Any:
    try:
        document = json.loads(
            data.decode("utf-8"),
            object_pairs_hook=pairs_hook,
            parse_constant=parse_constant,
            parse_float=parse_float,
        )
    except (ValueError, RecursionError) as error:
        raise MalformedError(f"{what} is not {kind}: {shown(error)}") from error
    if _nests_without_end(document):
        raise MalformedError(f"{what} nests objects and lists deeper than {MAX_NESTING} levels")
    return document


def _nests_without_end(document: Any) -> bool:
    level = [document] if isinstance(document, dict | list) else []
    for _ in range(MAX_NESTING):
        level = [
            inner
            for outer in level
            for inner in (outer.values() if isinstance(outer, dict) else outer)
            if isinstance(inner, dict | list)
        ]
    return bool(level)


def json_object(path: Path, *, limit: int = MAX_JSON) -> dict[str, Any]:
    """The JSON object in a file of a model's directory, parsed by `python_json`.

    Args:
        path: Links are followed.
        limit: The most bytes that the file may have.

    Raises:
        MalformedError: Missing, not JSON or not an object.
        UnsafeFileError: More than `limit` bytes, or no regular file.
        StorageError: It cannot be read.
    """
    value = python_json(content(path, limit), shown(path.name))
    if not isinstance(value, dict):
        raise MalformedError(f"{shown(path.name)} holds no JSON object")
    return value


def content(path: Path, limit: int, flags: int = 0) -> bytearray:
    """A file's bytes; raises as `json_object` does. `flags`: as for `opened`."""
    with opened(path, flags) as fd:
        size = os.fstat(fd).st_size
        if size > limit:
            raise UnsafeFileError(f"{shown(path.name)} has {size} bytes, more than {limit}")
        return read_at(fd, 0, size, shown(path.name))


def plain_text(path: Path, limit: int) -> str:
    """The text of a UTF-8 file, without a byte order mark.

    Raises:
        MalformedError: Missing, or not UTF-8.
        UnsafeFileError: A link, no regular file, or more than `limit` bytes.
        StorageError: It cannot be read.
    """
    try:
        return content(path, limit, os.O_NOFOLLOW).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise MalformedError(f"{shown(path.name)} is not UTF-8") from error


@contextmanager
def opened(path: Path, flags: int = 0) -> Iterator[int]:
    """A read-only descriptor of a regular file, never blocking on a pipe; closed at the end.

    Args:
        path: The file.
        flags: For `os.open`, besides those it needs; `os.O_NOFOLLOW` refuses links.

    Raises:
        MalformedError: There is no such file, or the path can name none.
        UnsafeFileError: It is not a regular file.
        StorageError: It cannot be read.
    """
    name = shown(path.name)
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | flags)
    except FileNotFoundError as error:
        raise MalformedError(f"{name} is missing") from error
    except ValueError as error:  # a NUL in the path, or half of a surrogate pair
        raise MalformedError(f"{name} cannot be the name of a file") from error
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.ENXIO):  # a link, a socket
            raise UnsafeFileError(f"{name} is not a regular file") from error
        if error.errno in (errno.ENOTDIR, errno.ENAMETOOLONG):
            raise MalformedError(f"{name} cannot be reached: {error.strerror}") from error
        raise StorageError(f"{name} cannot be read: {error.strerror}") from error
    try:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise UnsafeFileError(f"{name} is not a regular file")
        yield fd
    finally:
        os.close(fd)


def read_at(fd: int, start: int, count: int, what: str) -> bytearray:
    """Exactly `count` bytes from byte `start`.

    Raises:
        MalformedError: The file ends before.
        StorageError: It cannot be read.
    """
    data = bytearray(count)
    read_into(memoryview(data), fd, start, what)
    return data


def read_into(view: memoryview, fd: int, start: int, what: str) -> None:
    """Fill `view` from byte `start`; raises as `read_at` does."""
    done, count = 0, len(view)
    while done < count:
        got = read_some(view[done:], fd, start + done, what)
        if not got:
            raise MalformedError(f"{what} ends at byte {start + done}, before {start + count}")
        done += got


def read_some(view: memoryview, fd: int, start: int, what: str) -> int:
    """Read from byte `start` into `view`; returns how many bytes, 0 at the end of the file.

    Raises:
        StorageError: It cannot be read.
    """
    try:
        return os.preadv(fd, [view], start)
    except OSError as error:
        raise StorageError(f"{what} cannot be read: {error.strerror}") from error


def existing_directory(
    directory: Path, missing: type[CustomizedModelsError] = MalformedError
) -> Path:
    """`directory`, if it is one.

    Args:
        directory: Of a caller's.
        missing: The class of the error if there is none.

    Raises:
        CustomizedModelsError: Of class `missing`: there is no directory at that path.
        MalformedError: The path can name none.
    """
    try:
        found = directory.is_dir()
    except (ValueError, OSError) as error:
        raise MalformedError(f"{shown(directory)} cannot be a directory: {shown(error)}") from error
    if not found:
        kind = "is not a directory" if os.path.lexists(directory) else "does not exist"
        raise missing(f"the directory {shown(directory)} {kind}")
    return directory
