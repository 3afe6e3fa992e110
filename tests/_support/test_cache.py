"""What is kept on disk comes back as it was, or not at all; and it is never worth an error."""

from __future__ import annotations

import os

import pytest

from offramp._support import cache


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "offramp"


def test_what_was_kept_comes_back():
    assert cache.read("a") is None
    cache.write("a", b"one\ntwo\n")
    cache.write("b", b"")
    assert cache.read("a") == b"one\ntwo\n"
    assert cache.read("b") == b""
    cache.write("a", b"three")
    assert cache.read("a") == b"three"


@pytest.mark.parametrize("damage", ["cut", "flipped", "empty", "of another key", "longer"])
def test_what_is_damaged_is_as_good_as_nothing(folder, damage):
    cache.write("a", b"0123456789")
    (file,) = folder.glob("*.bin")
    content = file.read_bytes()
    if damage == "cut":
        file.write_bytes(content[:-3])
    elif damage == "flipped":
        file.write_bytes(content[:-1] + b"8")
    elif damage == "empty":
        file.write_bytes(b"")
    elif damage == "longer":
        file.write_bytes(content + b"0")
    else:
        cache.write("b", b"0123456789")
        (other,) = set(folder.glob("*.bin")) - {file}
        other.replace(file)
    assert cache.read("a") is None
    cache.write("a", b"again")
    assert cache.read("a") == b"again"


@pytest.mark.skipif(not hasattr(os, "geteuid"), reason="asks who owns a file")
def test_what_is_run_is_read_only_where_nobody_else_could_have_written_it(folder, monkeypatch):
    cache.write("a", b"a program")
    (file,) = folder.glob("*.bin")
    assert cache.read("a", private=True) == b"a program"
    for place, mode in [(file, 0o660), (file, 0o602), (folder, 0o770), (folder, 0o707)]:
        before = place.stat().st_mode
        place.chmod(mode)
        assert cache.read("a", private=True) is None
        assert cache.read("a") == b"a program"
        place.chmod(before)
    assert cache.read("a", private=True) == b"a program"
    owner = os.geteuid()
    monkeypatch.setattr(os, "geteuid", lambda: owner + 1)
    assert cache.read("a", private=True) is None


def test_where_nothing_can_be_written_nothing_is_kept(tmp_path, monkeypatch):
    """A read-only folder is no good test for a superuser; a file in its place is."""
    blocked = tmp_path / "file"
    blocked.write_text("no folder")
    monkeypatch.setenv("XDG_CACHE_HOME", str(blocked))
    cache.write("a", b"1")
    assert cache.read("a") is None
    assert blocked.read_text() == "no folder"


@pytest.mark.skipif(os.geteuid() == 0, reason="a superuser may write everywhere")
def test_a_read_only_folder_is_no_error(folder):
    cache.write("a", b"1")
    folder.chmod(0o500)
    cache.write("b", b"2")
    assert cache.read("a") == b"1"
    assert cache.read("b") is None
    folder.chmod(0o700)


def test_the_files_that_nobody_reads_go_first(folder, monkeypatch):
    monkeypatch.setattr(cache, "MOST_BYTES", 1000)
    for number in range(4):
        cache.write(str(number), b"x" * 200)
        for file in folder.glob("*.bin"):
            os.utime(file, (file.stat().st_atime, file.stat().st_mtime - 10))
    assert cache.read("0") is None
    assert cache.read("3") is not None
    assert not list(folder.glob("*.part"))


def test_a_user_without_a_home_has_no_cache(monkeypatch):
    """As a process in a container under a number that is no account."""
    monkeypatch.delenv("XDG_CACHE_HOME")

    def no_home():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(cache.Path, "home", no_home)
    cache.write("a", b"1")
    assert cache.read("a") is None


def test_what_killed_processes_left_is_removed(folder):
    folder.mkdir()
    old = folder / "old.part"
    new = folder / "new.part"
    for file in (old, new):
        file.write_bytes(b"half")
    os.utime(old, (0, 0))
    cache.write("a", b"1")
    assert not old.exists()
    assert new.exists()
