"""Files that are whole or absent."""

import os
import re

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


def test_a_complete_file_is_not_looked_for_again(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "unlink", lambda *_: pytest.fail("unlink"))
    with files.atomic_write(tmp_path / "file") as file:
        file.write("new")
    assert (tmp_path / "file").read_text() == "new"


STAND_INS = {
    "Git LFS": (
        b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a21\nsize 377\n",
        "a Git LFS pointer: the content was not downloaded; run git lfs pull",
    ),
    "Git LFS with an extension": (
        b"version https://git-lfs.github.com/spec/v1\next-0-foo sha256:aa\noid sha256:4d7a21\nsize 377\n",
        "a Git LFS pointer",
    ),
    "git-annex": (b"/annex/objects/SHA256E-s377--4d7a21.ckpt\n", "a git-annex pointer"),
    "a page": (b"\xef\xbb\xbf\n<!DOCTYPE html>\n<html><head><title>\n Sign in </title>", r"an HTML page \('Sign in'\)"),
    "a page after a comment": (b"<!-- 403 --><HTML lang=en><p>no", "an HTML page: download the file itself"),
    "S3": (
        b'<?xml version="1.0" encoding="UTF-8"?>\n<Error><Code>NoSuchKey</Code><Message>x</Message></Error>',
        r"an object store's error \('NoSuchKey'\)",
    ),
    "JSON": (b'{"error":"Repository not found"}', r"a server's error \('Repository not found'\)"),
    "nested JSON": (b'{"error": {"message": "quota", "code": 403}}', r"a server's error \('quota'\)"),
    "JSON with a number": (b'{"error": 404}', "a server's error: download"),
    "the Hub": (b"Entry not found", r"a server's error \('Entry not found'\)"),
    "GitHub": (b"404: Not Found", r"a server's error \('404: Not Found'\)"),
    "nothing": (b"", "empty"),
    "zeros": (bytes(4096), "filled with zeros"),
}


@pytest.mark.parametrize("name", STAND_INS)
def test_what_a_failed_download_leaves_is_recognised(tmp_path, name):
    content, wanted = STAND_INS[name]
    assert re.match(wanted, files.describe_content(content))
    (tmp_path / "file").write_bytes(content)
    assert files.describe_file(tmp_path / "file") == files.describe_content(content)


@pytest.mark.parametrize(
    "content",
    [
        b'{"format_version": 1, "labels": ["us", "england"]}',
        b'{"architectures": ["HubertModel"], "error": 1}',
        b"# Generated\nlabel_encoder: !apply:accent_plugin.bundle.make_label_encoder\n",
        b"\x08\x00\x00\x00\x00\x00\x00\x00{}      ",
        b"PK\x03\x04\x00\x00not found",
        b"RIFF\x24\x00\x00\x00WAVEfmt ",
        b"fLaC\x00\x00\x00\x22",
        b"ID3\x03\x00<html>",
        b"accent\tsentence\nus\t404 is not found here\n",
    ],
)
def test_other_content_is_not_taken_for_a_failed_download(content):
    assert files.describe_content(content) is None


def test_the_words_of_a_page_cannot_control_a_terminal():
    assert "\x1b" not in files.describe_content(b"<html><title>\x1b[2Jx</title>")
