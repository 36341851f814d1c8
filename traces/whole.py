"""Files that are whole or not there."""

from __future__ import annotations

import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from traces.errors import InputError


@contextmanager
def whole(path: Path, mode: str = "w", *, folders: bool = False) -> Iterator[Any]:
    """A file to write ("w": UTF-8 text, lines end as written; "wb": bytes) that takes the name when all is in it. folders: make
    those that are missing. Who may read it is as for any new file (umask), or as it was for the one whose place it takes.

    Devices and pipes are written as they are: moved onto /dev/null, a report written by root would be the machine's null device
    from then on. InputError when it cannot be written.
    """
    text: dict[str, Any] = {} if "b" in mode else {"encoding": "utf-8", "newline": ""}
    try:
        if path.exists() and not path.is_file():
            with path.open(mode, **text) as file:
                yield file
            return
        if folders:
            path.parent.mkdir(parents=True, exist_ok=True)
        beside = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
        try:
            with beside.open(mode.replace("w", "x"), **text) as file:
                if path.exists():
                    shutil.copymode(path, beside)
                yield file
            beside.replace(path)
        except BaseException:
            beside.unlink(missing_ok=True)
            raise
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error.strerror}). Give another --out.") from error
