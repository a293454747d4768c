from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from cxrgaze import files
from cxrgaze.errors import IntegrityError, UsageError


def test_new_folder_appears_whole(tmp_path):
    with files.new_folder(tmp_path / "a" / "b", "marker") as folder:
        (folder / "marker").write_text("new")
        assert not (tmp_path / "a" / "b").exists()
    assert (tmp_path / "a" / "b" / "marker").read_text() == "new"
    assert os.listdir(tmp_path / "a") == ["b"]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit])
def test_an_error_leaves_nothing_and_the_old_folder_untouched(tmp_path, error):
    old = tmp_path / "old"
    old.mkdir()
    (old / "marker").write_text("old")
    for target in (old, tmp_path / "x" / "y" / "new"):
        with pytest.raises(error), files.new_folder(target, "marker") as folder:
            (folder / "marker").write_text("half")
            raise error
    assert os.listdir(tmp_path) == ["old"]
    assert (old / "marker").read_text() == "old"


def test_a_folder_of_our_kind_is_replaced_and_a_foreign_one_or_a_link_is_not(tmp_path):
    old = tmp_path / "old"
    old.mkdir()
    (old / "marker").write_text("old")
    with files.new_folder(old, "marker") as folder:
        (folder / "marker").write_text("new")
    assert (old / "marker").read_text() == "new" and os.listdir(tmp_path) == ["old"]
    (tmp_path / "mine").mkdir()
    (tmp_path / "link").symlink_to(old)
    for foreign in ("mine", "link"):
        with pytest.raises(UsageError), files.new_folder(tmp_path / foreign, "marker"):
            pass


def test_write_atomic(tmp_path):
    path = tmp_path / "a.json"
    files.write_atomic(path, b"1")
    files.write_atomic(path, b"2")
    assert path.read_bytes() == b"2" and os.listdir(tmp_path) == ["a.json"]
    with pytest.raises(IsADirectoryError):
        files.write_atomic(tmp_path, b"3")
    assert os.listdir(tmp_path) == ["a.json"]


def test_only_regular_files_within_the_limit_are_read(tmp_path):
    (tmp_path / "f").write_bytes(b"12345")
    (tmp_path / "l").symlink_to(tmp_path / "f")
    os.mkfifo(tmp_path / "p")
    assert files.read_regular(tmp_path / "f", 5) == b"12345"
    for name, limit, message in (("f", 4, "5 bytes"), ("l", 9, "link"), ("p", 9, "regular")):
        with pytest.raises(IntegrityError, match=message):
            files.read_regular(tmp_path / name, limit)


@pytest.mark.parametrize(
    "name", ["", "/etc/passwd", "../x", "a/../b", "a\\b", "a//b", "./a", "a\0"]
)
def test_paths_that_could_leave_are_refused(name):
    with pytest.raises(ValueError):
        files.checked_relative(name)


@pytest.mark.parametrize(
    "data", [b'{"a": 1, "a": 2}', b'{"a": NaN}', b"[1]", b"{", b"\xff", b"[" * 100_000]
)
def test_json_that_is_refused(data):
    with pytest.raises(IntegrityError):
        files.parse_json(data, "x")


def test_an_unwritable_folder_is_a_usage_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="cannot write"):
        files.make_output_folder(tmp_path / "file" / "below")


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="a file of /proc has no size")
def test_a_file_that_grows_while_it_is_read_is_refused():
    with pytest.raises(IntegrityError, match="changed its size"):
        files.read_regular(Path("/proc/version"), 100)


def test_only_the_bytes_that_were_promised_are_read(tmp_path):
    path, digest = tmp_path / "f", files.sha256(b"12345")
    said = {"source": "the list", "remedy": "copy it again"}
    path.write_bytes(b"12345")
    assert files.read_verified(path, 5, digest, **said) == b"12345"
    for data in (b"12346", b"1234"):
        path.write_bytes(data)
        with pytest.raises(IntegrityError, match="altered: .*, the list says 5 bytes.*copy it"):
            files.read_verified(path, 5, digest, **said)
    path.unlink()
    with pytest.raises(IntegrityError, match=r"cannot be read \(No such file.*copy it again"):
        files.read_verified(path, 5, digest, **said)


def test_a_toml_file_that_cannot_be_read_is_a_usage_error(tmp_path):
    path = tmp_path / "a.toml"
    for data, message in ((b"a = [1", "valid TOML"), (b"a = '\xff'", "valid TOML")):
        path.write_bytes(data)
        with pytest.raises(UsageError, match=message):
            files.read_toml(path)
    with pytest.raises(UsageError, match="No such file"):
        files.read_toml(tmp_path / "no.toml")
    path.write_bytes(b"a = [1]")
    assert files.read_toml(path) == {"a": [1]}


# --- what killed runs leave ---------------------------------------------------------------------

KILLED = """
import os, sys, time
from pathlib import Path
from cxrgaze import files
kind, target = sys.argv[1], Path(sys.argv[2])
if kind == "folder":
    with files.new_folder(target, "marker") as folder:
        (folder / "marker").write_text("half")
        print("ready", flush=True)
        time.sleep(60)
elif kind == "file":
    files.os.fsync = lambda descriptor: (print("ready", flush=True), time.sleep(60))
    files.write_atomic(target, b"half")
elif kind == "between":  # the two renames of new_folder
    real = Path.rename
    def rename(self, other):
        if self.name == "new":
            print("ready", flush=True)
            time.sleep(60)
        return real(self, other)
    Path.rename = rename
    with files.new_folder(target, "marker") as folder:
        (folder / "marker").write_text("new")
else:
    files.tempfile.tempdir = str(target)
    with files.temporary_folder("test") as folder:
        (folder / "film").write_text("a film")
        print("ready", flush=True)
        time.sleep(60)
"""


def _started(kind, target):
    child = subprocess.Popen(
        [sys.executable, "-c", KILLED, kind, str(target)], stdout=subprocess.PIPE, text=True
    )
    assert child.stdout.readline() == "ready\n"
    return child


def _killed(kind, target):
    child = _started(kind, target)
    child.send_signal(signal.SIGKILL)
    child.communicate()


def test_a_killed_run_leaves_nothing_after_the_next(tmp_path):
    """D10: kill -9 left folders and files for ever."""
    target = tmp_path / "out" / "bundle"
    _killed("folder", target)
    assert len(os.listdir(target.parent)) == 1
    with files.new_folder(target, "marker") as folder:
        (folder / "marker").write_text("whole")
    assert os.listdir(target.parent) == ["bundle"]
    _killed("file", target.parent / "x.json")
    assert len(os.listdir(target.parent)) == 2
    files.make_output_folder(target.parent)
    assert os.listdir(target.parent) == ["bundle"]


def test_what_a_living_run_writes_is_left_alone(tmp_path):
    child = _started("folder", tmp_path / "bundle")
    other = _started("file", tmp_path / "x.json")
    try:
        before = sorted(os.listdir(tmp_path))
        files.make_output_folder(tmp_path)
        with files.new_folder(tmp_path / "bundle", "marker") as folder:
            (folder / "marker").write_text("whole")
        assert sorted(os.listdir(tmp_path)) == sorted([*before, "bundle"])
    finally:
        for process in (child, other):
            process.kill()
            process.communicate()


def test_what_was_set_aside_comes_back(tmp_path):
    """D10: a kill between the two renames hid the old bundle."""
    old = tmp_path / "bundle"
    old.mkdir()
    (old / "marker").write_text("old")
    _killed("between", old)
    assert not old.exists()
    with pytest.raises(RuntimeError), files.new_folder(old, "marker"):
        assert (old / "marker").read_text() == "old"
        raise RuntimeError
    assert (old / "marker").read_text() == "old" and os.listdir(tmp_path) == ["bundle"]


def test_temporary_folders_of_killed_runs_go(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    _killed("temporary", tmp_path)
    (killed,) = os.listdir(tmp_path)
    living = _started("temporary", tmp_path)
    try:
        (lives,) = os.listdir(tmp_path)
        assert lives != killed
        with files.temporary_folder("test") as folder:
            assert sorted(os.listdir(tmp_path)) == sorted([lives, folder.name])
        assert os.listdir(tmp_path) == [lives]
    finally:
        living.kill()
        living.communicate()


def test_two_runs_into_one_folder_are_refused(tmp_path):
    """D9."""
    with files.only_run(tmp_path):
        with pytest.raises(UsageError, match="another run writes into"):
            with files.only_run(tmp_path):
                pass
    assert not os.listdir(tmp_path)
    with files.only_run(tmp_path):
        pass


def test_a_full_disk_names_the_file(tmp_path, monkeypatch):
    """D13: the system's own error names none."""

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(OSError, match="x.json") as caught:
        files.write_atomic(tmp_path / "x.json", b"data")
    assert caught.value.filename == str(tmp_path / "x.json") and not os.listdir(tmp_path)
