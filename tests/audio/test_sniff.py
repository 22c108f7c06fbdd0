import io
import zipfile

import numpy as np
import pytest
from helpers.dataset_dicts import encode, noise

from accent_plugin.audio import codecs, sniff
from accent_plugin.errors import AudioError

LFS_POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"


def zipped():
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("a.wav", b"abc")
    return file.getvalue()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (LFS_POINTER, "a Git LFS pointer, not audio: the content was not downloaded; run git lfs pull"),
        (b"<!DOCTYPE html>\n<html><title>404</title>", r"an HTML page \('404'\), not audio: download the file itself"),
        (b"\xef\xbb\xbf\n <HTML lang=en>", "an HTML page, not audio"),
        (b'{"error": "not found"}', r"a server's error \('not found'\), not audio: download the file again"),
        (b'{"clips": []}', "JSON text, not audio"),
        (b"<?xml version='1.0'?><Error/>", "an object store's error, not audio: download the file again"),
        (b"<?xml version='1.0'?><clips/>", "an XML document, not audio"),
        (b"client_id\tpath\tsentence\n", "a text file, not audio"),
        ("Grüße, nicht Audio".encode(), "a text file, not audio"),
        (zipped(), "a zip archive, not audio: extract it first"),
        (b"\x1f\x8b\x08" + bytes(30), "a gzip file, not audio"),
        (bytes(257) + b"ustar" + bytes(300), "a tar archive, not audio"),
        (b"%PDF-1.7\n" + bytes(range(256)), "a PDF file, not audio"),
        (b"\x89PNG\r\n\x1a\n" + bytes(30), "an image, not audio"),
        (b"#EXTM3U\nhttp://localhost/a.mp3\n", "a playlist, not audio"),
        (bytes(5000), "its first 4096 bytes are zeros: the download may be incomplete"),
    ],
)
def test_an_error_says_what_the_file_is_if_it_is_not_audio(content, message, tmp_path):
    (tmp_path / "clip.mp3").write_bytes(content)
    for read in (codecs.decode, codecs.read_header, lambda source: list(codecs.stream(source))):
        for source in (content, tmp_path / "clip.mp3"):
            with pytest.raises(AudioError, match=message) as caught:
                read(source)
            assert caught.value.reason == "undecodable"


def test_an_empty_file_is_empty(tmp_path):
    (tmp_path / "clip.mp3").write_bytes(b"")
    for source in (b"", tmp_path / "clip.mp3", io.BytesIO()):
        with pytest.raises(AudioError, match="holds no bytes") as caught:
            codecs.decode(source)
        assert caught.value.reason == "empty"


@pytest.mark.parametrize(
    ("format", "subtype", "name"),
    [
        ("WAV", None, "WAV"),
        ("RF64", None, "WAV"),
        ("FLAC", None, "FLAC"),
        ("MP3", None, "MP3"),
        ("OGG", "OPUS", "OGG"),
        ("AIFF", None, "AIFF"),
        ("AU", None, "AU"),
        ("CAF", None, "CAF"),
        ("W64", None, "W64"),
    ],
)
def test_audio_is_identified_by_its_first_bytes(format, subtype, name):
    content = sniff.identify(encode(noise(), format=format, subtype=subtype)[: sniff.HEAD_BYTES])
    assert (content.kind, content.name) == (sniff.SOUND, name)


@pytest.mark.parametrize(
    ("head", "name"),
    [
        (b"\x00\x00\x00\x1cftypM4A ", "an M4A file"),
        (b"\x00\x00\x00\x1cftypisom", "an MP4 file"),
        (b"\x00\x00\x00\x14ftypqt  ", "a QuickTime file"),
        (b"\x1a\x45\xdf\xa3\x9f\x42\x86\x81\x01\x42\x82\x84webm", "a WebM file"),
        (b"\x1a\x45\xdf\xa3\xa3\x42\x82\x88matroska", "a Matroska file"),
        (b"#!AMR\n", "an AMR file"),
        (b"\x30\x26\xb2\x75\x8e\x66\xcf\x11", "a WMA or WMV file (ASF)"),
        (b"RIFF\x00\x00\x00\x00AVI ", "an AVI file"),
        (b"\xff\xf1\x50\x80", "an AAC file (ADTS)"),
    ],
)
def test_containers_of_ffmpeg_are_identified(head, name):
    content = sniff.identify(head + bytes(range(128, 256)))
    assert (content.kind, content.name) == (sniff.MEDIA, name)


def test_unknown_bytes_are_not_identified():
    assert sniff.identify(np.random.default_rng(0).bytes(4096)) is None
    assert sniff.identify(bytes(4096)) is None
