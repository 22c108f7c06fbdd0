"""Files that are whole or absent."""

import os

import pytest

from accent_plugin import files


@pytest.mark.parametrize("mode, content", [("w", "één\r\n\n"), ("wb", b"\x00\xff\n")])
def test_a_file_takes_its_name_only_when_it_is_complete(tmp_path, mode, content):
    path = tmp_path / "file"
    path.write_text("old")
    with files.atomic_write(path, mode) as file:
        file.write(content)
        assert path.read_text() == "old"
    assert path.read_bytes() == (content if mode == "wb" else content.encode("utf-8"))
    assert os.listdir(tmp_path) == ["file"]


@pytest.mark.parametrize("error", [OSError("full"), KeyboardInterrupt()])
def test_a_file_that_is_broken_off_leaves_the_old_one_and_nothing_else(tmp_path, error):
    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(type(error)), files.atomic_write(path) as file:
        file.write("new")
        raise error
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["file"]
