"""Files that lie about their length, are truncated, damaged, or joined."""

import io
import struct

import numpy as np
import pytest
import soundfile
from helpers.dataset_dicts import noise
from hypothesis import given, settings
from hypothesis import strategies as st

from accent_plugin.audio import codecs
from accent_plugin.audio.damaged import mpeg
from accent_plugin.audio.damaged.survey import survey
from accent_plugin.errors import AudioError

RATE = 16_000
# A rising tone that gets louder, and a little noise: encoders give it a variable bitrate, and no two seconds are equal.
_TIME = np.arange(4 * RATE) / RATE
SPEECH = (0.3 * np.sin(2 * np.pi * (200 + 150 * _TIME) * _TIME) * np.exp(_TIME - 4) + 0.1 * noise(4.0)).astype(
    np.float32
)
FORMATS = [("WAV", "PCM_16"), ("FLAC", "PCM_16"), ("MP3", None), ("OGG", "VORBIS"), ("OGG", "OPUS")]
# At most so many seconds may go unmentioned: delays of codecs, and parts of a frame.
SLACK = {"WAV": 0.01, "FLAC": 0.01, "MP3": 0.2, "OGG": 0.1}


def encoded(format, subtype=None, samples=SPEECH, **options):
    file = io.BytesIO()
    soundfile.write(file, samples, RATE, format=format, subtype=subtype, **options)
    return file.getvalue()


def variable_mp3(samples=SPEECH):
    return encoded("MP3", samples=samples, bitrate_mode="VARIABLE", compression_level=0.5)


def read(content):
    """Decode whole and as a stream, which must agree; returns the samples and the losses."""
    whole, lost = codecs.decode(content), []
    blocks = list(codecs.stream(content, 1.0, lost))
    assert tuple(lost) == whole.lost
    assert sum(map(len, blocks)) == len(whole.samples)
    # The frames of an MP3 differ a little where a block begins.
    assert whole.codec == "MP3" or np.abs(np.concatenate(blocks) - whole.samples).max() < 1e-4
    return whole.samples, whole.lost


def lost_seconds(lost):
    return sum(loss.seconds for loss in lost)


def wav_sizes(content, riff, data):
    content = bytearray(content)
    assert content[36:40] == b"data"
    content[4:8], content[40:44] = struct.pack("<I", riff), struct.pack("<I", data)
    return bytes(content)


def flac_total(content, samples):
    content = bytearray(content)
    packed = int.from_bytes(content[18:26], "big") >> 36 << 36 | samples
    content[18:26] = packed.to_bytes(8, "big")
    return bytes(content)


@pytest.mark.parametrize(("format", "subtype"), FORMATS)
def test_sound_files_lose_nothing(format, subtype):
    content = encoded(format, subtype)
    samples, lost = read(content)
    with soundfile.SoundFile(io.BytesIO(content)) as file:
        assert np.array_equal(samples, file.read(dtype="float32"))
    assert lost == ()


@pytest.mark.parametrize("riff", [0, 0xFFFFFFFF])
@pytest.mark.parametrize("data", [0, 0xFFFFFFFF, 0x7FFFF000])
def test_a_wav_file_written_to_a_pipe_is_read_to_its_end(riff, data):
    content = encoded("WAV")
    samples, lost = read(wav_sizes(content, riff, data))
    assert np.array_equal(samples, read(content)[0])
    assert lost == ()


def test_a_wav_file_whose_data_size_contradicts_its_riff_size_is_read_to_its_end():
    content = encoded("WAV")
    samples, lost = read(wav_sizes(content, len(content) - 8, 1000))
    assert len(samples) == len(SPEECH)
    assert lost == ()


def test_an_empty_wav_file_with_other_chunks_is_empty():
    content = wav_sizes(encoded("WAV", samples=SPEECH[:0]), 50, 0) + b"LIST\x06\x00\x00\x00INFO\x00\x00"
    with pytest.raises(AudioError, match="holds no samples") as caught:
        codecs.decode(content)
    assert caught.value.reason == "empty"


@pytest.mark.parametrize("total", [0, (1 << 36) - 1, 1000])
def test_a_flac_file_with_a_wrong_length_is_read_to_its_end(total):
    content = encoded("FLAC")
    samples, lost = read(flac_total(content, total))
    assert np.array_equal(samples, read(content)[0])
    assert lost == ()
    assert codecs.read_header(flac_total(content, total)).seconds == 4.0


@pytest.mark.parametrize(
    ("format", "subtype"), [("WAV", "PCM_16"), ("WAV", "FLOAT"), ("FLAC", "PCM_16"), ("AIFF", None), ("AU", None)]
)
def test_a_truncated_file_is_read_to_its_end_and_the_rest_counted_as_lost(format, subtype):
    content = encoded(format, subtype)
    samples, lost = read(content[: len(content) * 3 // 4])
    assert len(samples) / RATE + lost_seconds(lost) == pytest.approx(4.0, abs=0.01)
    assert 2.5 < len(samples) / RATE < 3.05
    assert np.abs(samples - SPEECH[: len(samples)]).max() < 1e-4
    assert [loss.start for loss in lost] == [len(samples) / RATE]
    assert "ends before its announced end" in lost[0].reason


@pytest.mark.parametrize("total", [4 * RATE, 0])
def test_a_false_frame_header_in_a_flac_file_is_not_believed(total):
    content = flac_total(encoded("FLAC"), total)
    # A valid header of a frame that would end after 36 hours, in bytes that a decoder never reaches.
    header = content[content.index(b"\xff\xf8") :][:4] + "\U0007a120".encode()
    crc = 0
    for byte in header:
        crc ^= byte
        for _ in range(8):
            crc = (crc << 1 ^ 0x107 if crc & 0x80 else crc << 1) & 0xFF
    samples, lost = read(content + header + bytes([crc]) + bytes(100))
    assert len(samples) == len(SPEECH)
    assert lost == ()


def test_a_truncated_mp3_says_how_much_its_header_announced():
    content = variable_mp3()
    samples, lost = read(content[: len(content) * 3 // 4])
    assert 2 < len(samples) / RATE < 3.9
    assert len(samples) / RATE + lost_seconds(lost) == pytest.approx(4.0, abs=0.2)


@pytest.mark.parametrize(("format", "subtype"), FORMATS)
def test_a_file_of_which_less_than_half_is_left_is_refused(format, subtype):
    content = bytearray(encoded(format, subtype, np.tile(SPEECH, 2)))
    content[len(content) // 4 : len(content) * 9 // 10] = bytes(len(content) * 9 // 10 - len(content) // 4)
    if format == "WAV":
        content = content[: len(content) // 4]
    for decode in (codecs.decode, lambda source: list(codecs.stream(source))):
        with pytest.raises(
            AudioError, match=r"clip is damaged: only \d\.\d s of about \d\.\d s can be decoded: "
        ) as caught:
            decode(bytes(content))
        assert caught.value.reason == "undecodable"


@pytest.mark.parametrize(("format", "subtype"), FORMATS)
def test_joined_files_are_read_to_the_last(format, subtype):
    first, second = encoded(format, subtype), encoded(format, subtype, SPEECH[: 2 * RATE][::-1])
    samples, lost = read(first + second)
    expected = np.concatenate([read(first)[0], read(second)[0]])
    assert len(samples) == len(expected)
    assert np.abs(samples - expected).max() < 1e-6
    assert lost == ()


@pytest.mark.parametrize(("format", "subtype"), FORMATS[:3])
def test_the_header_of_joined_files_has_the_length_of_all(format, subtype):
    joined = encoded(format, subtype) + encoded(format, subtype, SPEECH[: 2 * RATE])
    assert codecs.read_header(joined).seconds == pytest.approx(6.0, abs=0.3)


def test_joined_mp3_files_of_different_rates_are_resampled_to_the_first():
    low = io.BytesIO()
    soundfile.write(low, noise(3.0, 22_050), 22_050, format="MP3")
    samples, lost = read(encoded("MP3") + low.getvalue())
    assert len(samples) / RATE == pytest.approx(7.0, abs=0.2)
    assert lost == ()


@pytest.mark.parametrize(("format", "subtype"), FORMATS[1:])
def test_a_hole_of_zeros_costs_what_it_covers(format, subtype):
    content = bytearray(encoded(format, subtype, np.tile(SPEECH, 15)))
    content[len(content) // 2 : len(content) // 2 + 10_000] = bytes(10_000)
    samples, lost = read(bytes(content))
    assert len(samples) / RATE + lost_seconds(lost) == pytest.approx(60.0, abs=SLACK[format] + 0.2)
    assert 0.2 < lost_seconds(lost) < 8
    assert len(lost) == 1
    assert 20 < lost[0].start < 40


def test_the_samples_around_a_hole_are_those_of_the_sound_file():
    sound = encoded("FLAC")
    damaged = bytearray(sound)
    damaged[len(sound) // 2 : len(sound) // 2 + 1000] = bytes(1000)
    samples, (loss,) = read(bytes(damaged))
    whole, gap = read(sound)[0], round(loss.start * RATE)
    assert np.array_equal(samples[:gap], whole[:gap])
    assert np.array_equal(samples[gap:], whole[gap + round(loss.seconds * RATE) :])


@pytest.mark.parametrize("count", [1, 3, 200])
def test_flac_frames_with_wrong_checksums_are_left_out(count):
    # 240 frames, so that their numbers take one byte and two.
    samples = np.tile(SPEECH, 16)
    content = encoded("FLAC", samples=samples)
    damaged = bytearray(content)
    for index in range(count):
        damaged[len(content) // 8 + index * len(content) * 3 // 4 // count] ^= 0x10
    if count > 100:
        with pytest.raises(AudioError, match="FLAC frames are missing or damaged"):
            read(bytes(damaged))
        return
    found, lost = read(bytes(damaged))
    assert [loss.seconds for loss in lost] == [4096 / RATE] * count
    assert len(found) == len(samples) - count * 4096


@pytest.mark.parametrize("rate", [48_000, 44_100])
def test_frames_of_a_constant_bitrate_are_counted_without_looking_at_each(rate, monkeypatch):
    file, seen = io.BytesIO(), []
    soundfile.write(file, noise(20.0, rate), rate, format="MP3", bitrate_mode="CONSTANT", compression_level=0.8)

    class Counted(dict):
        def get(self, word):
            seen.append(word)
            return super().get(word)

    monkeypatch.setattr(mpeg, "_HEADERS", Counted(mpeg._HEADERS))
    (part,) = survey(file, "MP3")
    assert part.seconds == pytest.approx(20.0, abs=0.1)
    # 44.1 kHz: the padding bit changes the size of every other frame or so.
    assert len(seen) < (10 if rate == 48_000 else 20 * 44_100 / 1152)


def test_an_mp3_without_a_header_for_its_variable_bitrate_is_read_to_its_end():
    content = variable_mp3()
    bare = content[codecs_first_frame(content) :]
    with soundfile.SoundFile(io.BytesIO(bare)) as file:
        assert len(file.read()) / RATE < 3.5
    samples, lost = read(bare)
    assert len(samples) / RATE == pytest.approx(4.0, abs=0.15)
    assert lost == ()


def codecs_first_frame(content):
    """Size of the frame with the Xing header, by searching for the next frame's first two bytes."""
    return content.index(content[:2], 4)


@pytest.mark.parametrize("frames", [10, 1])
def test_an_mp3_whose_header_announces_too_few_frames_is_read_to_its_end(frames):
    content = bytearray(variable_mp3())
    at = content.index(b"Xing") + 8
    content[at : at + 4] = struct.pack(">I", frames)
    samples, lost = read(bytes(content))
    assert len(samples) / RATE == pytest.approx(4.0, abs=0.2)
    assert lost == ()


def id3(size):
    return (
        b"ID3\x04\x00\x00"
        + bytes((size >> 21 & 127, size >> 14 & 127, size >> 7 & 127, size & 127))
        + b"\xff\xfb\x90\x00" * (size // 4)
    )


@pytest.mark.parametrize(
    "wrapped",
    [
        lambda mp3: id3(200_000) + mp3,
        lambda mp3: id3(400) + id3(800) + mp3 + b"TAG" + bytes(125),
        lambda mp3: id3(400) + mp3 + b"APETAGEX" + struct.pack("<IIII8x", 2000, 64, 1, 0) + b"TAG" + bytes(125),
        lambda mp3: mp3 + bytes(range(1, 251)) * 10,
        lambda mp3: bytes(range(1, 200)) + mp3,
    ],
    ids=["picture", "several tags", "APE tag", "garbage behind", "garbage before"],
)
@pytest.mark.parametrize("make", [variable_mp3, lambda: encoded("MP3", bitrate_mode="CONSTANT")])
def test_tags_and_garbage_around_an_mp3_lose_nothing(make, wrapped):
    mp3 = make()
    samples, lost = read(wrapped(mp3))
    assert np.array_equal(samples, read(mp3)[0])
    assert lost == ()


def test_tags_between_joined_mp3_files_are_no_loss():
    mp3 = variable_mp3()
    samples, lost = read(mp3 + b"TAG" + bytes(125) + id3(5000) + mp3)
    assert len(samples) == 2 * len(SPEECH)
    assert lost == ()


def test_zeros_inserted_into_an_mp3_are_no_loss_if_its_header_says_so():
    mp3 = variable_mp3()
    samples, lost = read(mp3[: len(mp3) // 2] + bytes(10_000) + mp3[len(mp3) // 2 :])
    assert len(samples) / RATE > 3.8
    assert lost_seconds(lost) < 0.15


@pytest.mark.parametrize("size", [200, 40])
def test_the_beginning_of_an_mp3_is_called_what_it_is(size):
    with pytest.raises(AudioError, match="clip (cannot be decoded: it holds no complete frame|is damaged)"):
        codecs.decode(variable_mp3()[:size])


def test_mp3_in_a_wav_file_is_read_past_a_hole():
    mp3 = np.tile(SPEECH, 4)
    mp3 = bytearray(encoded("MP3", samples=mp3, bitrate_mode="CONSTANT"))
    mp3[len(mp3) // 2 : len(mp3) // 2 + 4000] = bytes(4000)
    fmt = struct.pack("<HHIIHHHHIHHH", 0x55, 1, RATE, 4000, 1, 0, 12, 1, 2, 144, 1, 1393)
    wav = b"WAVEfmt " + struct.pack("<I", len(fmt)) + fmt + b"data" + struct.pack("<I", len(mp3)) + mp3
    samples, lost = read(b"RIFF" + struct.pack("<I", len(wav)) + wav)
    assert len(samples) / RATE > 12
    assert len(samples) / RATE + lost_seconds(lost) == pytest.approx(16.0, abs=0.3)


def test_garbage_after_a_wav_file_is_counted_as_lost():
    content = encoded("WAV")
    samples, lost = read(content + np.random.default_rng(0).bytes(32_000))
    assert len(samples) == len(SPEECH)
    assert lost_seconds(lost) == pytest.approx(1.0)
    # Zeros are padding.
    assert read(content + bytes(32_000))[1] == ()


def test_a_loss_reads_as_a_sentence():
    content = encoded("WAV")
    lost = codecs.decode(content[: len(content) * 3 // 4]).lost
    assert str(lost[0]) == "1.0 s at 3.0 s could not be decoded: the audio ends before its announced end"


def test_a_file_object_is_read_part_by_part_as_bytes_are(tmp_path):
    content = encoded("FLAC") + encoded("FLAC")
    (tmp_path / "joined.flac").write_bytes(content)
    with open(tmp_path / "joined.flac", "rb") as file:
        assert (
            len(codecs.decode(file).samples) == len(codecs.decode(tmp_path / "joined.flac").samples) == 2 * len(SPEECH)
        )


@pytest.mark.parametrize("cut", [1000, 30_000])
def test_silence_can_stand_in_for_what_is_lost(cut):
    sound = encoded("FLAC", samples=np.tile(SPEECH, 2))
    damaged = bytearray(sound)
    damaged[len(sound) // 3 : len(sound) // 3 + cut] = bytes(cut)
    losses = []
    kept = np.concatenate(list(codecs.stream(bytes(damaged), 1.0, losses, keep_time=True)))
    (loss,) = losses
    start, end = round(loss.start * RATE), round((loss.start + loss.seconds) * RATE)
    expected = read(sound)[0].copy()
    expected[start:end] = 0
    assert np.array_equal(kept, expected)


def test_one_channel_of_a_damaged_file_is_read():
    both = np.stack([SPEECH, -SPEECH[::-1]], axis=1)
    content = encoded("FLAC", samples=both)
    losses = []
    found = np.concatenate(list(codecs.stream(flac_total(content, 0), lost=losses, channel=2)))
    assert np.abs(found - both[:, 1]).max() < 1e-4
    assert losses == []


MUTATED = {f"{format} {subtype}": encoded(format, subtype, np.tile(SPEECH, 2)) for format, subtype in FORMATS}
MUTATED["MP3 constant"] = encoded("MP3", samples=np.tile(SPEECH, 2), bitrate_mode="CONSTANT")


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    name=st.sampled_from(sorted(MUTATED)),
    change=st.sampled_from(["cut", "hole", "zeros", "garbage", "joined", "flipped"]),
    place=st.floats(0, 1),
    size=st.integers(1, 4000),
    seed=st.integers(0, 1000),
)
def test_whatever_is_changed_is_decoded_refused_or_reported(name, change, place, size, seed):
    sound, seconds = MUTATED[name], 8.0
    at, random = int(place * len(sound)), np.random.default_rng(seed).bytes(size)
    if change == "cut":
        content = sound[:at]
        # Without an announced length, what is cut off is not missed.
        seconds *= 1 if name.startswith(("WAV", "FLAC")) else 0
    elif change == "joined":
        content, seconds = sound + sound, 16.0
    else:
        content = {
            "hole": sound[:at] + bytes(min(size, len(sound) - at)) + sound[at + size :],
            "zeros": sound[:at] + bytes(size) + sound[at:],
            "garbage": sound[:at] + random + sound[at:],
            "flipped": sound[:at] + bytes([sound[min(at, len(sound) - 1)] ^ (1 + seed % 255)]) + sound[at + 1 :],
        }[change]
    try:
        samples, lost = read(content)
    except AudioError:
        return
    assert len(samples) / RATE + lost_seconds(lost) >= 0.95 * seconds - 0.5
