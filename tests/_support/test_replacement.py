"""A file or a folder is the old one or the new one at every moment, and what a killed writer left
goes away.
"""

from __future__ import annotations

import os
import stat
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from offramp._support import replacement
from offramp._support.files import read_json, write_json
from offramp._support.ownership import FolderKind
from offramp._support.replacement import read_whole, replacing, replacing_folder, restored
from offramp.errors import BadFile

HERE = Path(__file__).parent  # from where the writers import what they write with

KIND = FolderKind("a pair", "a.json", "pair", frozenset({"a.json", "b.json"}))
own = KIND.require_own


def left(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def write_pair(folder: Path, value: int) -> None:
    """Two files with one value: a mixture of two folders shows."""
    with replacing_folder(folder, own) as path:
        for name in ("a", "b"):
            write_json(path / f"{name}.json", "pair", 1, {"value": value})


def pair(folder: Path) -> list[int]:
    return [read_json(folder / f"{name}.json", "pair", 1)[1]["value"] for name in ("a", "b")]


def test_a_write_replaces_the_file_whole(tmp_path):
    file = tmp_path / "new" / "a.txt"
    for text in ("one", "two"):
        with replacing(file) as temporary:
            assert temporary.is_relative_to(file.parent)
            # what writes there may lock its folder
            write_json(temporary.with_name("other.json"), "plan", 1, {})
            temporary.write_text(text)
        assert file.read_text() == text
    assert left(tmp_path) == ["new", "new/a.txt"]
    assert stat.S_IMODE(file.stat().st_mode) == 0o644


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_interrupted_write_leaves_the_old_file(tmp_path, error):
    (tmp_path / "a.txt").write_text("old")

    def interrupted():
        with replacing(tmp_path / "a.txt") as temporary:
            temporary.write_text("half")
            raise error

    with pytest.raises(error):
        interrupted()
    assert (tmp_path / "a.txt").read_text() == "old"
    assert left(tmp_path) == ["a.txt"]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_interrupted_write_leaves_the_old_folder(tmp_path, error):
    write_pair(tmp_path / "net", 1)

    def interrupted():
        with replacing_folder(tmp_path / "net", own) as path:
            (path / "a.json").write_text("half")
            raise error

    with pytest.raises(error):
        interrupted()
    assert pair(tmp_path / "net") == [1, 1]
    assert left(tmp_path) == ["net", "net/a.json", "net/b.json"]


@pytest.fixture(params=["exchange", "two renames"])
def way(request, monkeypatch):
    """Both ways in which a folder takes the place of another."""
    if request.param == "two renames":
        monkeypatch.setattr(replacement, "_exchange_call", lambda: None)
    elif not (sys.platform.startswith("linux") or sys.platform == "darwin"):
        pytest.skip("no exchange on this system")
    return request.param


def test_a_folder_replaces_another(tmp_path, way):
    for value in range(3):
        write_pair(tmp_path / "net", value)
        assert pair(tmp_path / "net") == [value, value]
    assert left(tmp_path) == ["net", "net/a.json", "net/b.json"]


def test_the_exchange_is_one_step_here(tmp_path):
    """Else all tests of it would test the two renames."""
    if not sys.platform.startswith("linux"):
        pytest.skip("seen on Linux alone")
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / name).touch()
    assert replacement.exchange(tmp_path / "one", tmp_path / "two")
    assert left(tmp_path) == ["one", "one/two", "two", "two/one"]


def test_a_rename_that_fails_gives_the_old_folder_back(tmp_path, monkeypatch):
    write_pair(tmp_path / "net", 1)
    rename = os.rename

    def fails(source, target):
        if Path(source).name == "new":
            raise OSError(28, "No space left on device")
        rename(source, target)

    monkeypatch.setattr(replacement, "_exchange_call", lambda: None)
    monkeypatch.setattr(replacement.os, "rename", fails)
    with pytest.raises(BadFile, match="No space left"):
        write_pair(tmp_path / "net", 2)
    assert pair(tmp_path / "net") == [1, 1]
    assert left(tmp_path) == ["net", "net/a.json", "net/b.json"]


def test_an_unwritable_place(tmp_path):
    (tmp_path / "file").write_text("x")
    for index in (tmp_path / "file" / "a.json", tmp_path / ("n" * 300)):
        with pytest.raises(BadFile, match=r"cannot write .* may write to"):
            write_json(index, "plan", 1, {})
        with pytest.raises(BadFile, match="cannot write"):
            write_pair(index, 1)
    assert left(tmp_path) == ["file"]


def test_long_names(tmp_path):
    for name in ("n" * 250, "ü" * 120):
        write_pair(tmp_path / name, 1)
        write_pair(tmp_path / name, 2)
        assert pair(tmp_path / name) == [2, 2]
    assert len([*tmp_path.iterdir()]) == 2


def test_what_was_put_into_the_folder_meanwhile_is_kept(tmp_path, way):
    """The folder was ours when the work began, and holds somebody's notes when it is done."""
    write_pair(tmp_path / "net", 1)

    def meanwhile():
        with replacing_folder(tmp_path / "net", own) as path:
            write_json(path / "a.json", "pair", 1, {"value": 2})
            (tmp_path / "net" / "notes.md").write_text("mine")

    with pytest.raises(BadFile, match=r"notes\.md"):
        meanwhile()
    assert left(tmp_path) == ["net", "net/a.json", "net/b.json", "net/notes.md"]
    assert pair(tmp_path / "net") == [1, 1]


def test_a_file_that_somebody_puts_there_in_the_last_moment_is_kept(tmp_path, monkeypatch):
    write_pair(tmp_path / "net", 1)
    call = replacement._exchange_call()
    if call is None:
        pytest.skip("no exchange on this system")

    def late(one, other):
        (tmp_path / "net" / "notes.md").touch()
        return call(one, other)

    with monkeypatch.context() as patch:
        calls = [late, call]
        patch.setattr(replacement, "_exchange_call", lambda: calls.pop(0))
        with pytest.raises(BadFile, match=r"notes\.md"):
            write_pair(tmp_path / "net", 2)
    assert left(tmp_path) == ["net", "net/a.json", "net/b.json", "net/notes.md"]
    assert pair(tmp_path / "net") == [1, 1]


def test_a_link_to_a_file_stays_a_link(tmp_path):
    (tmp_path / "real.json").touch()
    (tmp_path / "link.json").symlink_to("real.json")
    write_json(tmp_path / "link.json", "plan", 1, {"a": 1})
    assert (tmp_path / "link.json").is_symlink()
    assert read_json(tmp_path / "real.json", "plan", 1) == (1, {"a": 1})


def test_no_device_is_replaced(tmp_path):
    if not hasattr(os, "mkfifo"):
        pytest.skip("no pipes on this system")
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(BadFile, match="must be a regular file, got a device"):
        write_json(tmp_path / "pipe", "plan", 1, {})
    assert left(tmp_path) == ["pipe"]


# Killed writers

WRITER = """
import os, signal, sys, time
from pathlib import Path

sys.path.insert(0, sys.argv[1])
from test_replacement import pair, own, replacement, restored, write_pair
from offramp._support.replacement import read_whole

home, how, ways = Path(sys.argv[2]), sys.argv[3], sys.argv[4]
if ways == "two renames":
    replacement._exchange_call = lambda: None


def child(work):
    number = os.fork()
    if number == 0:
        try:
            work()
        finally:
            os._exit(0)
    return number


def dying(count):
    # Ends the process before its count-th call that touches the file system, as a kill would.
    seen = 0

    def step(*_):
        nonlocal seen
        seen += 1
        if seen == count:
            os._exit(9)

    def heard(event, arguments):
        if event.split(".")[0] in ("open", "os", "shutil", "tempfile"):
            step()

    call = replacement._exchange_call()

    def exchanged(one, other):
        step()  # before
        result = call(one, other)
        step()  # and after
        return result

    if call is not None:
        replacement._exchange_call = lambda: exchanged
    sys.addaudithook(heard)
    write_pair(home / "net", 2)
    os._exit(7)  # it came to its end


def check(expected):
    found = read_whole(home / "net", pair, own)
    assert found in expected, found
    return found


write_pair(home / "net", 1)
killed = 0
if how == "each":
    while True:
        write_pair(home / "net", 1)
        _, status = os.waitpid(child(lambda: dying(killed + 1)), 0)
        ended = os.waitstatus_to_exitcode(status)
        check(([1, 1], [2, 2]))
        if ended == 7:
            break
        assert ended == 9, ended
        killed += 1
else:
    def forever():
        value = 0
        while True:
            write_pair(home / "net", value)
            value += 1

    import random
    random.seed(0)
    for killed in range(1, int(how) + 1):
        number = child(forever)
        time.sleep(random.uniform(0, 0.02))
        os.kill(number, signal.SIGKILL)
        os.waitpid(number, 0)
        one, other = read_whole(home / "net", pair, own)
        assert one == other, (one, other)
write_pair(home / "net", 3)
assert pair(home / "net") == [3, 3]
assert [path.name for path in home.iterdir()] == ["net"], [path.name for path in home.iterdir()]
print(killed)
"""


def killed(tmp_path: Path, how: str, ways: str) -> int:
    """How many writers were killed; each left the old folder or the new one, and the next left
    nothing behind.
    """
    done = subprocess.run(
        [
            sys.executable,
            "-W",
            "ignore",
            "-c",
            WRITER,
            str(HERE),
            str(tmp_path),
            how,
            ways,
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


WAYS = ["exchange", "two renames"]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("ways", WAYS)
def test_a_writer_killed_before_any_of_its_system_calls(tmp_path, ways):
    assert killed(tmp_path, "each", ways) > 20


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("ways", WAYS)
@pytest.mark.parametrize("count", [20, pytest.param(200, marks=pytest.mark.slow)])
def test_writers_killed_at_random_moments(tmp_path, ways, count):
    assert killed(tmp_path, str(count), ways) == count


def test_a_living_writer_is_left_alone(tmp_path):
    with replacing_folder(tmp_path / "net", own) as path:
        write_json(path / "a.json", "pair", 1, {"value": 1})
        # removes what killed writers left, and this one is not among them
        write_pair(tmp_path / "net", 2)
        write_json(path / "b.json", "pair", 1, {"value": 1})
    assert pair(tmp_path / "net") == [1, 1]
    assert left(tmp_path) == ["net", "net/a.json", "net/b.json"]


def test_a_killed_write_of_a_file_is_cleaned_up_by_the_next(tmp_path):
    dead = tmp_path / ".plan.json.offramp-abc.part"
    dead.mkdir()
    (dead / "new.json").write_text("half")
    write_json(tmp_path / "other.json", "plan", 1, {})
    assert dead.exists()  # of another place
    write_json(tmp_path / "plan.json", "plan", 1, {})
    assert left(tmp_path) == ["other.json", "plan.json"]


def test_other_folders_with_such_endings_are_not_ours(tmp_path):
    for name in (".net.part", ".net.abc.part", ".net.old", "net.part", ".net2.offramp-abc.part"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "mine").touch()
    before = left(tmp_path)
    write_pair(tmp_path / "net", 1)
    write_pair(tmp_path / "net", 2)
    assert left(tmp_path) == sorted([*before, "net", "net/a.json", "net/b.json"])


def test_a_reader_restores_only_what_is_ours(tmp_path):
    strange = tmp_path / ".net.offramp-abc.part" / "old"
    strange.mkdir(parents=True)
    (strange / "manifest.json").write_text("{}")
    assert not restored(tmp_path / "net", own).exists()
    write_pair(tmp_path / "else", 5)
    (tmp_path / ".net.offramp-xyz.part").mkdir()
    (tmp_path / "else").rename(tmp_path / ".net.offramp-xyz.part" / "old")
    assert pair(restored(tmp_path / "net", own)) == [5, 5]


WRITERS = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from test_replacement import write_pair
for turn in range(40):
    write_pair(Path(sys.argv[2]), 1000 * int(sys.argv[3]) + turn)
"""


def test_several_writers_at_once_all_succeed_and_a_reader_never_sees_a_mixture(tmp_path):
    folder = tmp_path / "net"
    write_pair(folder, 0)
    words = [sys.executable, "-c", WRITERS, str(HERE), str(folder)]
    writers = [
        subprocess.Popen([*words, str(number)], stderr=subprocess.PIPE, text=True)
        for number in range(3)
    ]
    seen = set()
    while any(writer.poll() is None for writer in writers):
        one, other = read_whole(folder, lambda index: matched(pair(index)), own)
        assert one == other
        seen.add(one)
    for writer in writers:
        _, said = writer.communicate()
        assert (writer.returncode, said) == (0, "")
    assert len(seen) > 5
    assert left(tmp_path) == ["net", "net/a.json", "net/b.json"]


def matched(values: list[int]) -> list[int]:
    """As a network's reader does: files that do not fit together are refused, and then read
    again.
    """
    if values[0] != values[1]:
        raise BadFile(f"{values} do not fit together")
    return values


def test_two_threads_write_at_once(tmp_path):
    problems = []

    def write(number):
        try:
            for _ in range(10):
                write_pair(tmp_path / "net", number)
        except BaseException as problem:
            problems.append(problem)

    threads = [threading.Thread(target=write, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert problems == []
    assert left(tmp_path) == ["net", "net/a.json", "net/b.json"]
