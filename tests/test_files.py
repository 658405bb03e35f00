"""Files are written whole or not at all."""

from __future__ import annotations

import json
import os
import stat

import pytest

from expertsteer.errors import ExpertSteerError
from expertsteer.files import (
    is_finished,
    replacing,
    replacing_folder,
    require_writable,
    write_text,
)


def names(folder) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_file_takes_the_place_of_the_old_one_only_when_done(tmp_path):
    path = tmp_path / "deep" / "notes.txt"
    write_text(path, "old ñ")
    with replacing(path) as scratch:
        scratch.write_text("new")
        assert path.read_text(encoding="utf-8") == "old ñ"
    assert path.read_text() == "new"
    assert names(path.parent) == ["notes.txt"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_a_failing_write_leaves_the_old_file_and_nothing_else(tmp_path, error):
    path = tmp_path / "notes.txt"
    path.write_text("old")

    def write():
        with replacing(path) as scratch:
            scratch.write_text("half of the n")
            raise error

    with pytest.raises(error):
        write()
    assert path.read_text() == "old"
    assert names(tmp_path) == ["notes.txt"]


def test_a_full_disk_is_one_message(tmp_path):
    path = tmp_path / "notes.txt"

    def write():
        with replacing(path):
            raise OSError(28, "No space left on device")

    with pytest.raises(ExpertSteerError) as caught:
        write()
    assert str(caught.value) == f"Cannot write {path}: No space left on device."
    assert names(tmp_path) == []


def make_folder(path, settings=None, error=None):
    with replacing_folder(path) as scratch:
        (scratch / "deep").mkdir()
        (scratch / "deep" / "weights").write_text("all of them")
        if error:
            raise error
        write_text(scratch / "record.json", json.dumps({"settings": settings}))


def test_a_folder_is_there_when_it_is_finished(tmp_path):
    path, settings = tmp_path / "above" / "made", {"rank": 8, "layers": (1, 2)}
    assert not is_finished(path, "record.json", settings)
    assert names(tmp_path) == []
    make_folder(path, settings)
    assert names(path) == ["deep", "record.json"]
    assert names(path.parent) == ["made"]
    assert is_finished(path, "record.json", settings)
    with pytest.raises(ExpertSteerError, match="rank: 8 instead of 4"):
        is_finished(path, "record.json", settings | {"rank": 4})
    with pytest.raises(ExpertSteerError, match="holds something else"):
        is_finished(path.parent, "record.json", settings)
    with pytest.raises(ExpertSteerError, match="it is a file"):
        is_finished(path / "record.json", "record.json", settings)
    with pytest.raises(ExpertSteerError, match="Not a directory"):
        is_finished(path / "record.json" / "made", "record.json", settings)


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_a_folder_that_fails_leaves_nothing(tmp_path, error):
    with pytest.raises(error):
        make_folder(tmp_path / "made", error=error)
    assert names(tmp_path) == []


def test_a_folder_takes_an_empty_place_and_no_other(tmp_path):
    (tmp_path / "made").mkdir()
    assert not is_finished(tmp_path / "made", "record.json", {})
    make_folder(tmp_path / "made", {})
    with pytest.raises(ExpertSteerError, match=r"Cannot write .*made"):
        make_folder(tmp_path / "made", {"other": 1})
    assert is_finished(tmp_path / "made", "record.json", {})
    assert names(tmp_path) == ["made"]


@pytest.mark.skipif(os.name == "nt", reason="permission bits of POSIX systems")
def test_a_folder_has_the_permissions_of_any_new_one(tmp_path):
    (tmp_path / "plain").mkdir()
    (tmp_path / "plain" / "record.json").touch()
    make_folder(tmp_path / "made")
    for name in ("", "record.json"):
        modes = [
            stat.S_IMODE((tmp_path / folder / name).stat().st_mode) for folder in ("plain", "made")
        ]
        assert modes[0] == modes[1]


@pytest.mark.skipif(os.name == "nt", reason="permission bits of POSIX systems")
def test_a_file_has_the_permissions_of_any_new_file(tmp_path):
    (tmp_path / "plain.txt").touch()
    write_text(tmp_path / "ours.txt", "text")
    modes = [stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("plain.txt", "ours.txt")]
    assert modes[0] == modes[1]


def test_what_can_be_written_is_probed_without_a_trace(tmp_path):
    old = tmp_path / "old.txt"
    old.write_text("old")
    for path in (old, tmp_path / "new.txt", tmp_path / "a" / "b" / "new.txt"):
        require_writable(path)
    assert names(tmp_path) == ["old.txt"]
    assert old.read_text() == "old"


def test_a_relative_path_is_probed_where_it_will_be(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    require_writable("new.txt")
    assert names(tmp_path) == []


@pytest.mark.parametrize("check", [require_writable, lambda path: write_text(path, "text")])
@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("folder", "it is a folder"),
        ("file/new.txt", "(Not a directory|File exists)"),
        ("file/a/b/new.txt", "Not a directory"),
        ("n" * 300, "File name too long"),
    ],
)
def test_what_cannot_be_written_is_named_with_its_reason(tmp_path, check, name, reason):
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("old")
    with pytest.raises(ExpertSteerError, match=f"Cannot write .*{name}: {reason}"):
        check(tmp_path / name)
    assert names(tmp_path) == ["file", "folder"]
    assert (tmp_path / "file").read_text() == "old"


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write")
def test_a_folder_without_permission(tmp_path):
    locked = tmp_path / "locked"
    locked.mkdir(mode=0o500)
    for path in (locked / "new.txt", locked / "deep" / "new.txt"):
        with pytest.raises(ExpertSteerError, match="Permission denied"):
            require_writable(path)
