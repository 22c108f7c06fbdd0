"""Tell from the first bytes of a file what it contains."""

import re
from dataclasses import dataclass

from accent_plugin import files

# Enough for every signature below; what follows an ID3 tag is identified by a second call.
HEAD_BYTES = 4096
# Who reads it: libsndfile, FFmpeg (through PyAV), or nobody.
SOUND, MEDIA, OTHER = "sound", "media", "other"


@dataclass(frozen=True)
class Content:
    """The content of a file.

    Arguments
    ---------
    kind : str
        `SOUND`, `MEDIA` or `OTHER`.
    name : str
        For `SOUND`, the container: "WAV", "FLAC", "MP3", "OGG", ... For others, a noun phrase: "an MP4 file".
    demuxer : str
        FFmpeg's name of the container; "" if FFmpeg is not needed.
    advice : str
        What to do; "" if the name says enough.
    """

    kind: str
    name: str
    demuxer: str = ""
    advice: str = ""


_SIGNATURES = (
    # (offset, pattern, content); the first match counts.
    (0, rb"(RIFF|RIFX|RF64)....WAVE", Content(SOUND, "WAV", "wav")),
    (0, rb"fLaC", Content(SOUND, "FLAC")),
    (0, rb"ID3[\x02-\x04]", Content(SOUND, "MP3")),
    # Layer bits 00 are AAC, not MP3.
    (0, rb"\xff[\xe2-\xe7\xea-\xef\xf2-\xf7\xfa-\xff][^\xf0-\xff]", Content(SOUND, "MP3")),
    (0, rb"OggS", Content(SOUND, "OGG", "ogg")),
    (0, rb"FORM....AIF[FC]", Content(SOUND, "AIFF", "aiff")),
    (0, rb"\.snd|dns\.", Content(SOUND, "AU", "au")),
    (0, rb"caff\x00\x01", Content(SOUND, "CAF", "caf")),
    (0, rb"riff\x2e\x91\xcf\x11", Content(SOUND, "W64", "w64")),
    (4, rb"ftyp(M4A|M4B)", Content(MEDIA, "an M4A file", "mov")),
    (4, rb"ftypqt", Content(MEDIA, "a QuickTime file", "mov")),
    (4, rb"ftyp3g", Content(MEDIA, "a 3GP file", "mov")),
    (4, rb"ftyp|moov|mdat|styp", Content(MEDIA, "an MP4 file", "mov")),
    (0, rb"\x1a\x45\xdf\xa3.*?\x42\x82.webm", Content(MEDIA, "a WebM file", "matroska")),
    (0, rb"\x1a\x45\xdf\xa3", Content(MEDIA, "a Matroska file", "matroska")),
    (0, rb"#!AMR", Content(MEDIA, "an AMR file", "amr")),
    (0, rb"\x30\x26\xb2\x75\x8e\x66\xcf\x11", Content(MEDIA, "a WMA or WMV file (ASF)", "asf")),
    (0, rb"RIFF....AVI ", Content(MEDIA, "an AVI file", "avi")),
    (0, rb"\xff[\xf0\xf1\xf8\xf9]", Content(MEDIA, "an AAC file (ADTS)", "aac")),
    (0, rb"ADIF", Content(MEDIA, "an AAC file (ADIF)", "aac")),
    (0, rb"\x0b\x77", Content(MEDIA, "an AC-3 file", "ac3")),
    (0, rb"FLV\x01", Content(MEDIA, "an FLV file", "flv")),
    (0, rb"\x00\x00\x01\xba", Content(MEDIA, "an MPEG program stream", "mpeg")),
    (0, rb"\x47.{187}\x47.{187}\x47", Content(MEDIA, "an MPEG transport stream", "mpegts")),
    (0, rb"wvpk", Content(MEDIA, "a WavPack file", "wv")),
    (0, rb"MAC ", Content(MEDIA, "a Monkey's Audio file", "ape")),
    (0, rb"TTA1", Content(MEDIA, "a True Audio file", "tta")),
    (0, rb"DSD ", Content(MEDIA, "a DSF file", "dsf")),
    (0, rb"PK(\x03\x04|\x05\x06)", Content(OTHER, "a zip archive", advice="extract it first")),
    (0, rb"\x1f\x8b", Content(OTHER, "a gzip file", advice="extract it first")),
    (0, rb"BZh|\xfd7zXZ|7z\xbc\xaf|Rar!|\x28\xb5\x2f\xfd", Content(OTHER, "an archive", advice="extract it first")),
    (257, rb"ustar", Content(OTHER, "a tar archive", advice="extract it first")),
    (0, rb"%PDF-", Content(OTHER, "a PDF file")),
    (0, rb"\x89PNG|\xff\xd8\xff|GIF8|RIFF....WEBP", Content(OTHER, "an image")),
    (0, rb"PAR1", Content(OTHER, "a Parquet file")),
    (0, rb"\x7fELF|MZ\x90", Content(OTHER, "a program")),
    (0, rb"#EXTM3U", Content(OTHER, "a playlist", advice="give the files that it lists")),
)
_COMPILED = tuple((offset, re.compile(pattern, re.DOTALL), content) for offset, pattern, content in _SIGNATURES)


def identify(head):
    """Identify a file by its first bytes.

    Arguments
    ---------
    head : bytes
        The first `HEAD_BYTES` bytes, or the whole file if it is shorter.

    Returns
    -------
    Content
        Of kind `OTHER` if nobody reads it. None if the bytes have no known signature.

    Example
    -------
    >>> identify(b"fLaC" + bytes(38)).name
    'FLAC'
    >>> identify(b"<!DOCTYPE html><title>404</title>").name
    'an HTML page'
    """
    for offset, pattern, content in _COMPILED:
        if pattern.match(head, offset):
            return content
    return _identify_text(head)


def _identify_text(head):
    try:
        # The last character may be cut.
        text = head[:-3].decode("utf-8") if len(head) > 3 else head.decode("utf-8")
    except UnicodeDecodeError:
        return None
    if not text.strip() or any(ord(c) < 32 and c not in "\t\n\r\f\x1b" for c in text):
        return None
    if found := files.describe_content(head):
        name, _, advice = found.partition(": ")
        return Content(OTHER, name, advice=advice)
    start = head.lstrip(b"\xef\xbb\xbf \t\r\n")[:1]
    name = {b"{": "JSON text", b"[": "JSON text", b"<": "an XML document"}.get(start, "a text file")
    return Content(OTHER, name)
