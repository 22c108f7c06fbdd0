"""The service: which requests are refused and why, and that concurrent requests do not change an answer."""

import asyncio
import dataclasses
import json

import pytest
import soundfile
from helpers.dataset_dicts import encode, noise

from accent_plugin.audio import codecs
from accent_plugin.errors import LimitError
from accent_plugin.inference.bulk import run
from accent_plugin.inference.classifier import AccentClassifier
from accent_plugin.inference.records import Failure
from accent_plugin.serving.service import Limits, Service, ServiceAnswer


@pytest.fixture(scope="module")
def classifier(tiny_bundle):
    return AccentClassifier.from_bundle(tiny_bundle, "cpu")


@pytest.fixture
def make(tiny_bundle):
    """Function: limits -> a service, which is closed after the test."""
    made = []

    def make(**limits):
        made.append(Service(AccentClassifier.from_bundle(tiny_bundle, "cpu"), Limits(**limits)))
        return made[-1]

    yield make
    for service in made:
        service.close()


def clips(count):
    return [encode(noise(0.3 + 0.1 * (number % 7), seed=number)) for number in range(count)]


@pytest.mark.parametrize(
    ("limits", "problem"),
    [
        ({"max_bytes": 0}, "max_bytes is 0: give 1 or more"),
        ({"max_files": -1}, "max_files is -1: give 1 or more"),
        ({"max_requests": 0}, "max_requests is 0: give 1 or more"),
        ({"max_queue": -1}, "max_queue is -1: give 0 or more"),
        ({"max_seconds": 0.0}, "max_seconds is 0.0: give a positive number"),
        ({"timeout": float("nan")}, "timeout is nan: give a positive number"),
        ({"timeout": float("inf")}, "timeout is inf: give a positive number"),
    ],
)
def test_invalid_limits_are_problems(limits, problem):
    assert list(Limits(**limits).problems()) == [problem]


def test_the_default_limits_are_valid():
    assert not list(Limits().problems())


def test_concurrent_files_do_not_change_an_answer(make, classifier):
    service, sounds = make(), clips(24)
    alone = [classifier.predict_file(sound) for sound in sounds]

    async def ask():
        return await service.classify([(f"{number}.flac", sound) for number, sound in enumerate(sounds)])

    answers = [answer.outcome for answer in asyncio.run(ask())]
    assert [answer.source for answer in answers] == [f"{number}.flac" for number in range(24)]
    for one, other in zip(answers, alone, strict=True):
        assert one.accent == other.accent
        assert list(one.probabilities.values()) == pytest.approx(list(other.probabilities.values()), abs=1e-5)


def test_concurrent_requests_are_batched_together(make):
    service = make()

    async def ask():
        files = [(f"{number}.flac", sound) for number, sound in enumerate(clips(24))]
        await asyncio.gather(*(service.classify([file]) for file in files))

    asyncio.run(ask())
    assert service.batcher.windows == 24
    assert service.batcher.calls < 24


def test_a_full_queue_refuses_at_once(make):
    service = make(max_requests=1, max_queue=1)

    async def send():
        finish = asyncio.Event()

        async def request():
            async with service.slot():
                await finish.wait()

        requests = [asyncio.create_task(request()) for _ in range(2)]
        await asyncio.sleep(0)
        assert service.busy == 2
        with pytest.raises(LimitError, match="2 requests are being answered or waiting: try again later") as caught:
            async with service.slot():
                pass
        finish.set()
        await asyncio.gather(*requests)
        async with service.slot():
            assert service.busy == 1
        return caught.value.reason

    assert asyncio.run(send()) == "busy"
    assert service.busy == 0


def test_the_timeout_includes_the_wait(make):
    service = make(max_requests=1, timeout=0.05)

    async def send():
        async def request():
            async with service.slot():
                await asyncio.sleep(60)

        first, second = (asyncio.create_task(request()) for _ in range(2))
        for task in (first, second):
            with pytest.raises(LimitError, match="the request took more than 0.05 s") as caught:
                await task
            assert caught.value.reason == "time"

    asyncio.run(send())
    assert service.busy == 0


def test_a_file_past_its_deadline_is_abandoned(make):
    service = make(timeout=1e-6)

    with pytest.raises(LimitError, match=r"clip\.flac could not be decoded in time"):
        asyncio.run(service.classify([("clip.flac", encode(noise()))]))


def test_a_file_with_too_long_a_header_is_refused_without_decoding(make, monkeypatch):
    service = make(max_seconds=2.0)
    monkeypatch.setattr(service.classifier, "predict_blocks", lambda *_: pytest.fail("it was decoded"))
    (answer,) = asyncio.run(service.classify([("long.flac", encode(noise(3.0)))]))
    assert str(answer.outcome) == "too long: long.flac is longer than 2 s"


def test_a_long_file_without_a_length_in_its_header_is_not_decoded_to_the_end(make, monkeypatch):
    service, decoded = make(max_seconds=40.0), []
    content = codecs.encode_mp3(noise(300.0, seed=1), 16_000)
    read = soundfile.SoundFile.read

    def counted(self, *arguments, **keywords):
        block = read(self, *arguments, **keywords)
        decoded.append(len(block))
        return block

    monkeypatch.setattr(soundfile.SoundFile, "read", counted)
    (answer,) = asyncio.run(service.classify([("long.mp3", content)]))
    assert str(answer.outcome) == "too long: long.mp3 is longer than 40 s"
    assert sum(decoded) < 16_000 * 200


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ("clip.flac", "clip.flac"),
        ("../../etc/passwd", "passwd"),
        ("C:\\Users\\me\\clip.wav", "clip.wav"),
        ("a\nb\x1b[31m.wav", "a?b?[31m.wav"),
        ("", "recording"),
        ("folder/", "recording"),
        ("x" * 500 + ".wav", "x" * 196 + ".wav"),
    ],
)
def test_names_lose_folders_and_control_characters(make, given, named):
    (answer,) = asyncio.run(make().classify([(given, b"hello")]))
    assert answer.outcome.source == named
    assert answer.outcome.message == f"{named} is a text file, not audio"


def test_an_answer_has_the_fields_of_the_command_line(make, classifier, tmp_path, capsys):
    content = encode(noise(2.0))
    (tmp_path / "clip.flac").write_bytes(content)
    run(classifier, [str(tmp_path / "clip.flac")], "jsonl", progress=False)
    theirs = json.loads(capsys.readouterr().out) | {"source": "clip.flac"}
    service = make()
    (answer,) = asyncio.run(service.classify([("clip.flac", content)]))
    record = service.record(answer)
    assert {name: record[name] for name in theirs} == theirs
    assert set(record) - set(theirs) == {"speech_seconds", "sample_rate", "channels", "codec", "warnings"}


def test_a_failure_has_the_fields_of_the_command_line(make, classifier, tmp_path, capsys):
    run(classifier, [str(tmp_path / "clip.flac")], "jsonl", progress=False)
    (answer,) = asyncio.run(make().classify([("clip.flac", b"")]))
    record = make().record(answer)
    assert record["error"] == "empty: clip.flac holds no bytes"
    assert set(record) == set(json.loads(capsys.readouterr().out))


def test_an_answer_has_the_header_and_the_signal_quality(make):
    stereo = encode(noise(2.0, channels=2, rate=44_100), rate=44_100, format="WAV")
    (answer,) = asyncio.run(make().classify([("clip.wav", stereo)]))
    assert dataclasses.astuple(answer.header) == (44_100, 2, "WAV PCM_16", 2.0)
    assert answer.outcome.seconds == 2.0
    assert len(answer.quality.peaks) == 200


def test_a_damaged_file_is_answered_with_a_warning(make):
    service = make()
    content = encode(noise(4.0), format="WAV")
    (answer,) = asyncio.run(service.classify([("clip.wav", content[: 44 + 3 * 32_000])]))
    assert "damaged file: 1.0 s could not be decoded" in list(answer.warnings())
    record = service.record(answer)
    assert record["lost_seconds"] == 1.0
    assert record["lost"] == [
        {"start": 3.0, "seconds": 1.0, "reason": "the audio ends before its announced end"},
    ]


def test_short_speech_is_a_warning(make):
    (answer,) = asyncio.run(make().classify([("clip.flac", encode(noise(0.5)))]))
    assert next(answer.warnings()) == "short: 0.5 s of speech; with less than 1 s the answer is not reliable"


def test_a_failure_has_no_warnings():
    assert list(ServiceAnswer(Failure("a", "empty", "a holds no bytes")).warnings()) == []
