"""A file is complete or as it was; a lock has one holder; a walk meets each folder once."""

import errno
import logging
import os
import subprocess
import sys

import pytest

from common import files
from common.files import try_lock, walk, write_atomic


def test_a_file_gets_its_name_when_it_is_complete(tmp_path):
    path = tmp_path / "file.txt"

    def fill(file):
        file.write(b"new")
        assert not path.exists() or path.read_bytes() == b"old"
        assert file.name == str(tmp_path / ".file.txt.partial")

    for _ in range(2):
        write_atomic(path, fill)
        assert path.read_bytes() == b"new" and list(tmp_path.iterdir()) == [path]
        path.write_bytes(b"old")


def test_a_failure_leaves_the_file_as_it_was(tmp_path):
    path = tmp_path / "file.txt"

    def fail(file):
        file.write(b"half")
        raise ZeroDivisionError

    for before in ([], [path]):
        with pytest.raises(ZeroDivisionError):
            write_atomic(path, fail)
        assert list(tmp_path.iterdir()) == before
        path.write_bytes(b"old")
    assert path.read_bytes() == b"old"


def test_a_full_disk_leaves_the_file_as_it_was(tmp_path, monkeypatch):
    def full(_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    path = tmp_path / "file.txt"
    path.write_bytes(b"old")
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_atomic(path, lambda file: file.write(b"new"))
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]


def test_what_a_killed_process_left_is_overwritten(tmp_path):
    (tmp_path / ".file.txt.partial").write_bytes(b"a long half-written file")
    write_atomic(tmp_path / "file.txt", lambda file: file.write(b"new"))
    assert (tmp_path / "file.txt").read_bytes() == b"new" and len(list(tmp_path.iterdir())) == 1


HOLD = """
import sys
from common.files import try_lock
with open(sys.argv[1], "w") as file:
    print(try_lock(file), flush=True)
    input()
"""


def test_a_lock_has_one_holder_until_its_process_ends(tmp_path):
    command = [sys.executable, "-c", HOLD, tmp_path / "lock"]
    root = os.path.join(os.path.dirname(__file__), "..", "..")
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=root) as other:
        assert other.stdout.readline() == b"True\n"
        with open(tmp_path / "lock", "w") as file:
            assert not try_lock(file)
        other.kill()
    with open(tmp_path / "lock", "w") as file:
        assert try_lock(file)


def test_a_file_system_without_locks_is_warned_of(tmp_path, monkeypatch, caplog):
    def refuse(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(files.fcntl, "lockf", refuse)
    with open(tmp_path / "lock", "w") as file, caplog.at_level(logging.WARNING, "td4v"):
        assert try_lock(file)
    assert "this file system has no locks" in caplog.text


def test_a_walk_is_sorted_and_meets_each_folder_once(tmp_path):
    for name in ("b/2.txt", "b/1.txt", "a/x/3.txt", ".hidden/4.txt", "a/.5.txt", "skipped/6.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "b/loop").symlink_to(tmp_path)
    (tmp_path / "c").symlink_to(tmp_path / "a/x")
    found = [(str(folder.relative_to(tmp_path)), names) for folder, names in walk(tmp_path, skip=tmp_path / "skipped")]
    assert found == [(".", []), ("a", []), ("a/x", ["3.txt"]), ("b", ["1.txt", "2.txt"])]


def test_a_folder_that_cannot_be_listed_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError):
        list(walk(tmp_path / "none"))
