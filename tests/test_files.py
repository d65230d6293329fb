"""Files are whole or absent, and a disk that refuses is told in one sentence."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from autocompress.errors import StoreError
from autocompress.files import cache_dir, write_atomically, write_bytes, write_json, write_text


def test_writes_what_was_given_and_makes_the_folder(tmp_path: Path) -> None:
    write_text(tmp_path / "a" / "b" / "text.txt", "ä\n")
    write_json(tmp_path / "value.json", {"b": [1, 2.5], "a": "ö"})
    assert (tmp_path / "a" / "b" / "text.txt").read_text(encoding="utf-8") == "ä\n"
    assert json.loads((tmp_path / "value.json").read_text(encoding="utf-8")) == {"b": [1, 2.5], "a": "ö"}


def test_an_interrupted_write_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "value.bin"
    write_bytes(path, b"old")

    def interrupted(temporary: Path) -> None:
        assert temporary.parent == tmp_path
        assert temporary.suffix == ".bin"
        temporary.write_bytes(b"ne")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_atomically(path, interrupted)
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_that_is_a_file_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match=r"^Cannot write .*file/x.json .*choose another folder\.$"):
        write_json(tmp_path / "file" / "x.json", 1)


def test_a_full_disk_is_told_and_the_old_file_stays(tmp_path: Path) -> None:
    pytest.importorskip("resource")  # its limit on the size of files stands in for a disk without room
    code = (
        "import resource, sys; from pathlib import Path; from autocompress.files import write_bytes\n"
        "from autocompress.errors import StoreError\n"
        "path = Path(sys.argv[1]); write_bytes(path, b'old')\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\n"
        "try:\n    write_bytes(path, bytes(100_000))\n"
        "except StoreError as error:\n    print(error)\n"
    )
    path = tmp_path / "value.bin"
    done = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=True)
    assert done.stdout.startswith(f"Cannot write {path} (File too large)")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_the_cache_folder_follows_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AUTOCOMPRESS_HOME", str(tmp_path / "home"))
    assert cache_dir() == tmp_path / "home"
    assert cache_dir().is_dir()
    monkeypatch.delenv("AUTOCOMPRESS_HOME")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert cache_dir() == tmp_path / "cache" / "autocompress"
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("AUTOCOMPRESS_HOME", str(tmp_path / "file"))
    with pytest.raises(StoreError, match="set AUTOCOMPRESS_HOME"):
        cache_dir()
