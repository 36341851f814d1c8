"""A file is whole or not there, and what is no file stays what it is."""

from __future__ import annotations

import os
import stat
import threading
from pathlib import Path

import pytest

from traces.errors import InputError
from traces.whole import whole


def test_a_file_takes_its_name_when_it_is_whole(tmp_path: Path) -> None:
    """Until then what stood there stands there; a writer that fails leaves it, and nothing beside it."""
    path = tmp_path / "new" / "a.csv"
    with pytest.raises(InputError, match="cannot be written"), whole(path):
        pytest.fail("its folder is not there")
    with whole(path, folders=True) as file:
        file.write("1\r\n")
        assert not path.exists()
    assert path.read_bytes() == b"1\r\n"
    with pytest.raises(ZeroDivisionError), whole(path) as file:
        file.write(str(1 / 0))
    assert path.read_bytes() == b"1\r\n"
    with whole(path, "wb") as file:
        file.write(b"2")
    assert path.read_bytes() == b"2"
    assert list(path.parent.iterdir()) == [path]


def test_a_file_is_as_open_as_others_and_stays_as_it_was(tmp_path: Path) -> None:
    """Whoever may not read other new files, or what stood there before, may not read it either."""
    path = tmp_path / "a.csv"
    before = os.umask(0o027)
    try:
        for wanted in (0o640, 0o600):
            with whole(path) as file:
                file.write("1")
            assert stat.S_IMODE(path.stat().st_mode) == wanted
            path.chmod(0o600)
    finally:
        os.umask(before)


def test_a_pipe_is_written_and_stays_a_pipe(tmp_path: Path) -> None:
    """Renaming a file onto it would put the file in its place: of /dev/null, for all programs of the machine."""
    path = tmp_path / "pipe"
    os.mkfifo(path)
    read: list[bytes] = []
    reader = threading.Thread(target=lambda: read.append(path.read_bytes()))
    reader.start()
    with whole(path) as file:
        file.write("through")
    reader.join(10)
    assert read == [b"through"]
    assert stat.S_ISFIFO(path.stat().st_mode)
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("place", ["file/a.csv", "."])
def test_a_place_that_cannot_be_written_is_one_line(tmp_path: Path, place: str) -> None:
    """A folder, and a file where a folder must be."""
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(InputError, match=r"cannot be written \(.*\)\. Give another --out"),
        whole(tmp_path / place, folders=True),
    ):
        pytest.fail("there is nothing to write to")
