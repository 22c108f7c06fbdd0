import errno
import hashlib
import io
import os
import pickle
import subprocess
import sys

import numpy as np
import pytest
import soundfile
from helpers.dataset_dicts import encode, noise

from accent_plugin.audio import codecs
from accent_plugin.audio.samples import quantise, samples_from_array
from accent_plugin.audio.workers import ConversionJob, convert_files
from accent_plugin.errors import AudioError


def tone(rate, seconds=1.0, hertz=440):
    return (0.5 * np.sin(2 * np.pi * hertz * np.arange(int(rate * seconds)) / rate)).astype(np.float32)


KINDS = [
    ("WAV", "PCM_16", 16_000),
    ("WAV", "FLOAT", 44_100),
    ("FLAC", "PCM_16", 22_050),
    ("MP3", None, 48_000),
    ("MP3", None, 16_000),
    ("OGG", "VORBIS", 44_100),
    ("OGG", "OPUS", 48_000),
]


@pytest.mark.parametrize("channels", [1, 2])
@pytest.mark.parametrize(("format", "subtype", "rate"), KINDS)
def test_every_format_is_decoded_to_16_khz_mono(format, subtype, rate, channels, tmp_path):
    samples = np.stack([tone(rate)] * channels, axis=1)
    encoded = encode(samples, rate, format, subtype)
    path = tmp_path / "clip.txt"
    path.write_bytes(encoded)
    expected = tone(16_000)
    for source in (encoded, path, str(path), io.BytesIO(encoded)):
        loaded = codecs.load(source)
        assert loaded.dtype == np.float32
        assert abs(len(loaded) - 16_000) < 100
        middle = slice(2000, 14_000)
        assert np.corrcoef(loaded[middle], expected[middle])[0, 1] > 0.99


def test_channels_are_averaged():
    both = np.stack([tone(16_000), -tone(16_000)], axis=1)
    assert np.abs(codecs.decode(encode(both, format="WAV", subtype="FLOAT")).samples).max() == 0


def test_16_bit_samples_are_restored_exactly(tmp_path):
    steps = np.random.default_rng(0).integers(-32768, 32768, 5000, dtype=np.int16)
    codecs.write(tmp_path / "a.flac", codecs.load(encode(steps, format="WAV")))
    assert np.array_equal(soundfile.read(tmp_path / "a.flac", dtype="int16")[0], steps)


def test_writing_clips_and_never_wraps(tmp_path):
    codecs.write(tmp_path / "a.flac", np.array([2.0, 1.0, -1.0, -2.0, 0.25], np.float32))
    assert soundfile.read(tmp_path / "a.flac", dtype="int16")[0].tolist() == [32767, 32767, -32768, -32768, 8192]
    assert os.listdir(tmp_path) == ["a.flac"]


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    codecs.write(tmp_path / "a.flac", noise(0.1))
    before = (tmp_path / "a.flac").read_bytes()

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(codecs.os, "replace", full)
    with pytest.raises(OSError, match="No space"):
        codecs.write(tmp_path / "a.flac", noise(0.2))
    assert os.listdir(tmp_path) == ["a.flac"]
    assert (tmp_path / "a.flac").read_bytes() == before


def test_read_returns_a_segment(tmp_path):
    whole = noise(0.5)
    codecs.write(tmp_path / "a.flac", whole)
    whole = quantise(whole) / 32768
    assert np.array_equal(codecs.read(tmp_path / "a.flac"), whole)
    assert np.array_equal(codecs.read(tmp_path / "a.flac", start=100, frames=50), whole[100:150])
    assert len(codecs.read(tmp_path / "a.flac", start=7990, frames=50)) == 10
    with pytest.raises(AudioError, match="8000 samples: cannot read from sample 8000"):
        codecs.read(tmp_path / "a.flac", start=8000)


def test_read_refuses_unprepared_files(tmp_path):
    soundfile.write(tmp_path / "a.wav", noise(0.1, 8000), 8000)
    with pytest.raises(AudioError, match="at 8000 Hz.*prepare the data again"):
        codecs.read(tmp_path / "a.wav")
    soundfile.write(tmp_path / "b.wav", noise(0.1, channels=2), 16_000)
    with pytest.raises(AudioError, match="has 2 channel"):
        codecs.read(tmp_path / "b.wav")
    with pytest.raises(AudioError, match="cannot be read"):
        codecs.read(tmp_path / "absent.wav")


def silence(offset=0.0):
    return np.full(16_000, offset, np.float32)


BROKEN = noise(1.0)
BROKEN[5] = np.nan
LOUD = noise(1.0)
LOUD[5] = 1e25


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        (b"", "empty"),
        (encode(np.zeros(0, np.float32), format="WAV"), "empty"),
        (b"not audio at all" * 100, "undecodable"),
        (encode(noise())[:3000], "undecodable"),
        (encode(noise())[:100], "undecodable"),
        (encode(noise(0.01)), "too short"),
        (encode(noise(0.01), format="MP3"), "too short"),
        (encode(noise(21.0)), "too long"),
        (encode(noise(21.0), format="MP3"), "too long"),
        (encode(BROKEN, format="WAV", subtype="FLOAT"), "non-finite"),
        (encode(BROKEN + np.inf, format="WAV", subtype="FLOAT"), "non-finite"),
        (encode(LOUD, format="WAV", subtype="FLOAT"), "out of range"),
        (encode(silence(), format="WAV"), "silent"),
        (encode(silence(0.5), format="WAV"), "silent"),
        (encode(silence(), format="MP3"), "silent"),
    ],
)
def test_unusable_clips_are_refused_with_a_reason(source, reason):
    with pytest.raises(AudioError) as caught:
        codecs.load(source, min_seconds=1.0, max_seconds=20.0)
    assert caught.value.reason == reason
    assert pickle.loads(pickle.dumps(caught.value)).reason == reason


def test_paths_that_are_not_audio_files_are_undecodable(tmp_path):
    os.mkfifo(tmp_path / "pipe.wav")
    (tmp_path / "text.wav").write_text("hello")
    (tmp_path / "text.raw").write_text("hello")
    (tmp_path / "empty.wav").write_bytes(b"")
    expected = {"pipe.wav": "undecodable", "text.wav": "undecodable", "text.raw": "undecodable", "empty.wav": "empty"}
    for name, reason in {**expected, "absent.wav": "undecodable", "": "undecodable", "a\0b": "undecodable"}.items():
        with pytest.raises(AudioError) as caught:
            codecs.load(str(tmp_path / name))
        assert caught.value.reason == reason, name
        assert str(tmp_path) in str(caught.value)


@pytest.mark.parametrize(("format", "minutes"), [("WAV", 120), ("FLAC", 120), ("OGG", 2), ("MP3", 2)])
def test_a_long_clip_is_refused_without_decoding_it(format, minutes, tmp_path):
    path = tmp_path / "long"
    with soundfile.SoundFile(path, "w", 8000, 1, format=format) as file:
        minute = np.zeros(8000 * 60, np.int16)
        for _ in range(minutes):
            file.write(minute)
    decoded = []
    original = soundfile.SoundFile.read

    def counted(self, *args, **kwargs):
        got = original(self, *args, **kwargs)
        decoded.append(len(got))
        return got

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(soundfile.SoundFile, "read", counted)
        for source in (path, path.read_bytes()):
            with pytest.raises(AudioError, match="long") as caught:
                codecs.load(source, max_seconds=30)
            assert caught.value.reason == "too long"
    # MP3 headers are unreliable: both files are decoded up to the limit.
    assert sum(decoded) <= (2 * (8000 * 30 + 1) if format == "MP3" else 0)


def test_a_header_with_a_false_length_allocates_no_memory():
    encoded = bytearray(encode(noise(1.0)))
    # STREAMINFO of FLAC: the last 36 bits before the MD5 are the number of samples.
    assert int.from_bytes(encoded[18:26], "big") & (1 << 36) - 1 == 16_000
    encoded[21:26] = bytes([encoded[21] | 0x0F, 0xFF, 0xFF, 0xFF, 0xFF])
    assert len(codecs.load(bytes(encoded), max_seconds=30)) == 16_000
    assert sum(map(len, codecs.stream(bytes(encoded)))) == 16_000


@pytest.mark.parametrize("workers", [1, 2])
def test_convert_files_yields_a_result_for_each_clip(tmp_path, workers):
    jobs = [
        ConversionJob(f"clip{i}", encode(noise(1.0, seed=i)), str(tmp_path / f"{i}.flac"), 0.5, 30) for i in range(5)
    ]
    jobs.append(ConversionJob("bad", b"bad", str(tmp_path / "bad.flac"), 0.5, 30))
    outcomes = {outcome.id: outcome for outcome in convert_files(iter(jobs), workers)}
    assert outcomes.pop("bad").reason == "undecodable"
    assert sorted(outcomes) == [f"clip{i}" for i in range(5)]
    assert {outcome.frames for outcome in outcomes.values()} == {16_000}
    assert all(os.path.getsize(tmp_path / f"{i}.flac") == outcomes[f"clip{i}"].size for i in range(5))
    assert len({outcome.md5 for outcome in outcomes.values()}) == 5


def test_a_written_clip_has_its_size_and_the_md5_of_its_samples(tmp_path):
    steps = quantise(noise(2.0))
    written = codecs.write(tmp_path / "a.flac", steps)
    assert written.size == os.path.getsize(tmp_path / "a.flac")
    assert written.md5 == hashlib.md5(soundfile.read(tmp_path / "a.flac", dtype="int16")[0].tobytes()).hexdigest()


def test_clips_are_written_at_the_fastest_level(tmp_path):
    codecs.write(tmp_path / "a.flac", noise(2.0))
    # STREAMINFO begins with the smallest block size; levels from 3 on use 4096 samples.
    assert int.from_bytes((tmp_path / "a.flac").read_bytes()[8:10], "big") == 1152


def test_a_clip_is_opened_once_to_read_and_once_to_write(tmp_path, monkeypatch):
    original, opened = soundfile.SoundFile.__init__, []

    def counted(self, file, mode="r", *args, **options):
        opened.append(mode)
        original(self, file, mode, *args, **options)

    monkeypatch.setattr(soundfile.SoundFile, "__init__", counted)
    encoded = encode(noise(2.0, 48_000), 48_000, "MP3", None)
    opened.clear()
    list(convert_files([ConversionJob("a", encoded, str(tmp_path / "a.flac"), 0.5, 30)]))
    assert opened == ["r", "w"]


def test_an_error_on_writing_in_a_worker_is_raised(tmp_path):
    jobs = (ConversionJob(str(i), encode(noise(1.0)), str(tmp_path / "absent" / "a.flac"), 0.5, 30) for i in range(4))
    with pytest.raises(FileNotFoundError):
        list(convert_files(jobs, 2))


class Bomb:
    """Ends the process that unpickles this."""

    def __reduce__(self):
        return os._exit, (3,)


def test_a_worker_that_dies_costs_one_clip(tmp_path):
    sounds = [encode(noise(1.0)), Bomb(), encode(noise(1.0)), encode(noise(1.0))]
    jobs = (ConversionJob(str(i), sound, str(tmp_path / f"{i}.flac"), 0.5, 30) for i, sound in enumerate(sounds))
    outcomes = {outcome.id: outcome for outcome in convert_files(jobs, 2)}
    assert outcomes["1"].message == "the worker that decoded it died (exit code 3)"
    assert [id_ for id_, outcome in sorted(outcomes.items()) if not outcome.reason] == ["0", "2", "3"]


def test_workers_do_not_run_the_main_script(tmp_path):
    soundfile.write(tmp_path / "a.wav", noise(1.0), 16_000)
    script = tmp_path / "script.py"
    script.write_text(
        "print('once')\n"
        "from accent_plugin.audio.workers import ConversionJob, convert_files\n"
        "jobs = [ConversionJob(str(i), 'a.wav', f'{i}.flac', 0.5, 30) for i in range(4)]\n"
        "print(sorted(o.frames for o in convert_files(iter(jobs), 2)))\n"
    )
    run = subprocess.run([sys.executable, script], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert run.stdout == "once\n[16000, 16000, 16000, 16000]\n"


@pytest.mark.parametrize("block_seconds", [0.1, 0.5, 0.77, 60.0])
@pytest.mark.parametrize(("format", "subtype", "rate"), [*KINDS, ("WAV", "FLOAT", 192_000), ("FLAC", "PCM_24", 8000)])
def test_a_stream_yields_the_samples_of_load(format, subtype, rate, block_seconds):
    encoded = encode(noise(2.0, rate, channels=2), rate, format, subtype)
    whole, blocks = codecs.load(encoded), list(codecs.stream(encoded, block_seconds))
    assert np.abs(np.concatenate(blocks) - whole).max() < 1e-4
    size = int(block_seconds * 16_000)
    assert [len(block) for block in blocks[:-1]] == [size] * (len(blocks) - 1)
    assert 0 < len(blocks[-1]) <= size
    assert {block.dtype for block in blocks} == {np.dtype(np.float32)}


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        (b"", "empty"),
        (encode(np.zeros(0, np.float32), format="WAV"), "empty"),
        (b"not audio at all" * 100, "undecodable"),
        (encode(noise())[:3000], "undecodable"),
        (encode(BROKEN, format="WAV", subtype="FLOAT"), "non-finite"),
        (encode(LOUD, format="WAV", subtype="FLOAT"), "out of range"),
        (encode(silence(), format="WAV"), "silent"),
        (encode(silence(0.5), format="WAV"), "silent"),
        (None, "undecodable"),
    ],
)
def test_a_stream_refuses_the_clips_that_load_refuses(source, reason):
    for read in (codecs.load, lambda source: list(codecs.stream(source))):
        with pytest.raises(AudioError) as caught:
            read(source)
        assert caught.value.reason == reason


def test_a_clip_shorter_than_one_sample_at_16_khz_is_empty():
    with pytest.raises(AudioError, match="shorter than one sample at 16000 Hz") as caught:
        next(codecs.stream(encode(tone(192_000)[:3], 192_000, format="WAV")))
    assert caught.value.reason == "empty"


def test_a_stream_refuses_paths_that_are_not_audio_files(tmp_path):
    os.mkfifo(tmp_path / "pipe.wav")
    (tmp_path / "text.wav").write_text("hello")
    (tmp_path / "empty.wav").write_bytes(b"")
    expected = {"pipe.wav": "undecodable", "text.wav": "undecodable", "": "undecodable", "empty.wav": "empty"}
    for name, reason in {**expected, "absent.wav": "undecodable"}.items():
        with pytest.raises(AudioError) as caught:
            next(codecs.stream(tmp_path / name))
        assert caught.value.reason == reason, name
        assert str(tmp_path) in str(caught.value)


def test_a_stream_decodes_lazily(tmp_path, monkeypatch):
    soundfile.write(tmp_path / "long.wav", noise(60.0, 48_000), 48_000)
    decoded = []
    original = soundfile.SoundFile.read

    def counted(self, *args, **kwargs):
        got = original(self, *args, **kwargs)
        decoded.append(len(got))
        return got

    monkeypatch.setattr(soundfile.SoundFile, "read", counted)
    blocks = codecs.stream(tmp_path / "long.wav", block_seconds=2.0)
    for number in range(1, 10):
        assert len(next(blocks)) == 32_000
        assert max(decoded) == 96_000
        assert sum(decoded) <= (2 * number + 4) * 48_000


def test_a_long_silence_is_refused_at_its_end():
    encoded = encode(np.zeros(16_000 * 5, np.float32))
    blocks = codecs.stream(encoded, block_seconds=2.0)
    assert [len(next(blocks)), len(next(blocks))] == [32_000, 32_000]
    with pytest.raises(AudioError, match="is silent"):
        next(blocks)


@pytest.mark.parametrize(
    ("samples", "expected"),
    [
        (np.array([-128, 0, 64], np.int8), [-1, 0, 0.5]),
        (np.array([0, 128, 192], np.uint8), [-1, 0, 0.5]),
        (np.array([-32768, 0, 16384], np.int16), [-1, 0, 0.5]),
        (np.array([0, 32768, 49152], np.uint16), [-1, 0, 0.5]),
        (np.array([-(2**31), 0, 2**30], np.int32), [-1, 0, 0.5]),
        (np.array([-1, 0, 0.5], np.float64), [-1, 0, 0.5]),
        (np.array([[1.0, 0.0, 0.5], [0.0, 1.0, 0.0]]), [0.5, 0.5, 0.25]),
        (np.array([[1.0, 0.0, 0.5], [0.0, 1.0, 0.0]]).T, [0.5, 0.5, 0.25]),
        # In a square array the first axis holds the samples, as in soundfile.
        (np.array([[1.0, 0.0], [0.0, 0.5]]), [0.5, 0.25]),
        (np.array([[100, 50, 0], [28, 78, 0]], np.int8), [0.5, 0.5, 0]),
    ],
)
def test_arrays_are_scaled_by_their_range_and_averaged_over_channels(samples, expected):
    found = samples_from_array(samples, 16_000)
    assert found.dtype == np.float32
    assert found.tolist() == expected


@pytest.mark.parametrize("sample", [1e25, -1e25, 100.1, 30_000.0])
def test_samples_far_beyond_full_scale_are_refused(sample):
    samples = noise(1.0)
    samples[7] = sample
    with pytest.raises(AudioError, match="full scale, which is 1: divide 16-bit integers.*by 32768") as caught:
        samples_from_array(samples, 16_000)
    assert caught.value.reason == "out of range"
    samples[7] = np.sign(sample) * 99
    assert len(samples_from_array(samples, 16_000)) == 16_000
