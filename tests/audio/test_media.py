"""Containers that FFmpeg reads: M4A, MP4, WebM, AMR, WMA and others."""

import builtins
import io

import numpy as np
import pytest

from accent_plugin.audio import codecs
from accent_plugin.errors import AudioError

av = pytest.importorskip("av")

# Container, codec and rate of what phones, browsers and meeting software record.
KINDS = {
    "m4a": ("ipod", "aac", 44_100),
    "mp4": ("mp4", "aac", 16_000),
    "3gp": ("3gp", "libopencore_amrnb", 8_000),
    "mov": ("mov", "alac", 16_000),
    "webm": ("webm", "libopus", 48_000),
    "mkv": ("matroska", "aac", 16_000),
    "amr": ("amr", "libopencore_amrnb", 8_000),
    "wma": ("asf", "wmav2", 44_100),
    "aac": ("adts", "aac", 16_000),
    "avi": ("avi", "mp3", 16_000),
}


def tone(rate, seconds):
    time = np.arange(int(rate * seconds)) / rate
    return (0.4 * np.sin(2 * np.pi * (300 + 40 * time) * time)).astype(np.float32)


def encode(format, codec, rate, seconds=6.0, channels=1, video=False):
    """Encode a rising tone; with `video` also a few black frames."""
    file = io.BytesIO()
    with av.open(file, "w", format=format) as container:
        picture = container.add_stream("mpeg4", rate=5) if video else None
        if video:
            picture.width = picture.height = 64
            picture.pix_fmt = "yuv420p"
        try:
            stream = container.add_stream(codec, rate=rate)
            stream.layout = "stereo" if channels == 2 else "mono"
            stream.bit_rate = 12_200 if "amr" in codec else 64_000
            stream.codec_context.open()
        except (av.error.FFmpegError, ValueError) as error:
            pytest.skip(f"PyAV cannot encode {codec}: {error}")
        for number in range(int(seconds * 5) if video else 0):
            frame = av.VideoFrame.from_ndarray(np.zeros((96, 64), np.uint8), "yuv420p")
            frame.pts = number
            container.mux(picture.encode(frame))
        samples = np.repeat((tone(rate, seconds) * 32767).astype(np.int16)[:, None], channels, axis=1)
        frame = av.AudioFrame.from_ndarray(samples.reshape(1, -1), "s16", stream.layout.name)
        frame.sample_rate = rate
        waiting = av.AudioFifo()
        waiting.write(frame)
        while (piece := waiting.read(stream.codec_context.frame_size or 1024, partial=True)) is not None:
            container.mux(stream.encode(piece))
        container.mux(stream.encode(None))
        if video:
            container.mux(picture.encode(None))
    return file.getvalue()


@pytest.fixture(scope="module")
def encoded():
    return {kind: encode(*arguments) for kind, arguments in KINDS.items()}


@pytest.mark.parametrize("kind", KINDS)
def test_media_files_are_decoded_to_16_khz_mono(kind, encoded, tmp_path):
    path = tmp_path / "clip.bin"
    path.write_bytes(encoded[kind])
    expected = tone(16_000, 6.0)
    for source in (encoded[kind], path, io.BytesIO(encoded[kind])):
        lost = []
        loaded = codecs.load(source, lost=lost)
        assert loaded.dtype == np.float32
        assert len(loaded) == pytest.approx(len(expected), abs=3200)
        assert lost == []
        # Codecs delay by different times.
        correlation = np.fft.irfft(np.fft.rfft(loaded, 1 << 18) * np.conj(np.fft.rfft(expected, 1 << 18)))
        assert correlation.max() > 0.8 * np.linalg.norm(loaded) * np.linalg.norm(expected)
        assert sum(map(len, codecs.stream(source, 1.0))) == pytest.approx(len(loaded), abs=2)


@pytest.mark.parametrize("kind", ["mp4", "mkv", "avi"])
def test_the_audio_of_a_video_is_decoded(kind):
    sound = codecs.decode(encode(*KINDS[kind], video=True))
    assert sound.seconds == pytest.approx(6.0, abs=0.25)
    assert sound.lost == ()


def test_a_video_without_audio_is_called_that():
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as container:
        stream = container.add_stream("mpeg4", rate=5)
        stream.width = stream.height = 64
        stream.pix_fmt = "yuv420p"
        container.mux(stream.encode(av.VideoFrame.from_ndarray(np.zeros((96, 64), np.uint8), "yuv420p")))
        container.mux(stream.encode(None))
    with pytest.raises(AudioError, match="clip is an MP4 file without an audio stream"):
        codecs.decode(file.getvalue())


def test_channels_are_averaged_and_the_header_is_read():
    content = encode("mp4", "aac", 48_000, channels=2)
    header = codecs.read_header(content)
    assert (header.sample_rate, header.channels, header.codec) == (48_000, 2, "MOV AAC")
    assert header.seconds == pytest.approx(6.0, abs=0.1)
    assert codecs.decode(content).samples.ndim == 1


@pytest.mark.parametrize("kind", ["m4a", "webm", "amr", "wma"])
def test_without_pyav_the_error_names_the_container_and_the_remedy(kind, encoded, monkeypatch):
    original = builtins.__import__

    def without_av(name, *args, **kwargs):
        if name == "av":
            raise ImportError("No module named 'av'")
        return original(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without_av)
    name = {"m4a": "an M4A file", "webm": "a WebM file", "amr": "an AMR file", "wma": "a WMA or WMV file"}[kind]
    with pytest.raises(
        AudioError, match=rf'clip is {name}.*needs PyAV: pip install "accent_plugin\[media\]"'
    ) as caught:
        codecs.decode(encoded[kind])
    assert caught.value.reason == "undecodable"


@pytest.mark.parametrize("kind", ["m4a", "3gp"])
def test_joined_mp4_files_are_read_to_the_last(kind, encoded):
    once, twice = codecs.decode(encoded[kind]), codecs.decode(encoded[kind] * 2)
    assert np.array_equal(twice.samples, np.tile(once.samples, 2))
    assert twice.lost == ()


def test_an_mp4_without_its_index_is_called_incomplete(encoded):
    with pytest.raises(AudioError, match="its index is missing, because the recording or the download was cut off"):
        codecs.decode(encoded["m4a"][:-3000])


@pytest.mark.parametrize("kind", ["webm", "mkv"])
def test_a_truncated_file_says_how_much_its_header_announced(kind, encoded):
    content = encoded[kind]
    sound = codecs.decode(content[: len(content) * 3 // 4])
    assert 4 < sound.seconds < 5
    assert sound.seconds + sum(loss.seconds for loss in sound.lost) == pytest.approx(6.0, abs=0.3)


@pytest.mark.parametrize("kind", ["m4a", "mov", "webm", "mkv", "wma"])
def test_a_hole_is_reported(kind, encoded):
    content = bytearray(encoded[kind])
    content[len(content) // 2 : len(content) // 2 + 4000] = bytes(4000)
    sound = codecs.decode(bytes(content))
    lost = sum(loss.seconds for loss in sound.lost)
    assert lost > 0.1 or kind == "mov"
    assert sound.seconds + lost == pytest.approx(6.0, abs=0.3)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", range(8))
def test_damaged_media_files_raise_nothing_but_audio_errors(kind, seed, encoded):
    rng = np.random.default_rng(seed)
    content = bytearray(encoded[kind])
    for _ in range(rng.integers(1, 6)):
        at, size = int(rng.integers(len(content))), int(rng.integers(1, 500))
        content[at : at + size] = rng.bytes(size) if seed % 2 else b""
    try:
        codecs.decode(bytes(content))
    except AudioError:
        pass


def test_a_playlist_cannot_make_ffmpeg_open_other_files(tmp_path, encoded):
    (tmp_path / "secret.aac").write_bytes(encoded["aac"])
    playlist = f"#EXTM3U\n#EXT-X-TARGETDURATION:6\n#EXTINF:6,\n{tmp_path}/secret.aac\n#EXT-X-ENDLIST\n"
    for content in (playlist, f"ffconcat version 1.0\nfile {tmp_path}/secret.aac\n"):
        with pytest.raises(AudioError, match="not audio"):
            codecs.decode(content.encode())
