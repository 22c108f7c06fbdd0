"""Divide a file into parts that libsndfile decodes."""

import struct

from accent_plugin.audio.damaged.flac import survey_flac
from accent_plugin.audio.damaged.mpeg import survey_mp3
from accent_plugin.audio.damaged.ogg import survey_ogg
from accent_plugin.audio.damaged.parts import Bytes, Part
from accent_plugin.audio.damaged.riff import survey_aiff, survey_au, survey_wav

_SURVEYS = {
    "WAV": survey_wav,
    "AIFF": survey_aiff,
    "AU": survey_au,
    "FLAC": survey_flac,
    "MP3": survey_mp3,
    "OGG": survey_ogg,
}


def survey(file, container):
    """Divide a file into parts.

    Arguments
    ---------
    file : binary file object
        Seekable.
    container : str, or None
        As named by `accent_plugin.audio.sniff.identify`. None searches the file for audio that does not begin at its
        start.

    Returns
    -------
    list of Part
        In order of time; empty if nothing was found. The whole file is one part if it is sound, or if its container is
        not checked.
    """
    if container is None:
        return next((parts for name in ("FLAC", "OGG", "WAV", "MP3") if (parts := _survey(file, name))), [])
    return _survey(file, container) or [Part()]


def _survey(file, container):
    try:
        return _SURVEYS[container](Bytes(file))
    except (KeyError, ValueError, IndexError, struct.error):
        return []
