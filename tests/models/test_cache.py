"""Where files are kept, and the check that they will fit."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace

import pytest
from platformdirs import user_cache_path

from expertsteer.errors import ExpertSteerError
from expertsteer.models.cache import cache_root, require_disk


def test_cache_is_the_environments_or_the_platforms(monkeypatch):
    monkeypatch.setenv("EXPERTSTEER_CACHE", "/somewhere/else")
    assert cache_root() == Path("/somewhere/else")
    monkeypatch.delenv("EXPERTSTEER_CACHE")
    assert cache_root() == user_cache_path("expertsteer")


def test_a_folder_with_room_is_made(tmp_path):
    require_disk(tmp_path / "a" / "b", 1000, "states")
    assert (tmp_path / "a" / "b").is_dir()


def test_too_little_room_is_told_with_both_sizes(tmp_path, monkeypatch):
    monkeypatch.setattr(
        "expertsteer.models.cache.shutil.disk_usage", lambda _folder: SimpleNamespace(free=1.5e9)
    )
    message = "^Got 1.50 GB of free disk in .*, but expected 2.00 GB for states. Free some room"
    with pytest.raises(ExpertSteerError, match=message):
        require_disk(tmp_path, 2_000_000_000, "states")


def test_a_file_in_the_way_is_told(tmp_path):
    (tmp_path / "file").touch()
    message = "^Got the folder .*/file/sub for states, but expected one that can be written"
    with pytest.raises(ExpertSteerError, match=message):
        require_disk(tmp_path / "file" / "sub", 0, "states")


@pytest.mark.skipif(
    not hasattr(os, "geteuid") or os.geteuid() == 0, reason="permissions do not bind this user"
)
def test_a_folder_without_permission_is_told(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(ExpertSteerError, match=r"but expected one that can be written .no permis"):
        require_disk(tmp_path, 0, "states")
