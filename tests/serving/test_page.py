"""What the page shows, as HTML; which of Gradio's doors are open; and the whole way of a file through Gradio."""

import asyncio
import contextlib
import html.parser
import json
import os
import re
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from helpers.dataset_dicts import encode, noise
from starlette.testclient import TestClient

from accent_plugin.audio.codecs import Header
from accent_plugin.inference.classifier import AccentClassifier
from accent_plugin.inference.records import Failure, Prediction, Window
from accent_plugin.serving import api, page, server
from accent_plugin.serving import guard as guarding
from accent_plugin.serving.service import Limits, Service, ServiceAnswer
from accent_plugin.serving.signal_quality import SignalQuality

LABELS = ("us", "england", "australia")


class Classifier:
    labels, threshold, calibration = LABELS, None, None


CALIBRATED = Classifier()
CALIBRATED.calibration = {"clips": 46, "expected_calibration_error": {"before": 0.2, "after": 0.1142}}
ABSTAINS = Classifier()
ABSTAINS.threshold = 0.9


def prediction(p=0.8, decided=True, reliable=True, windows=(), seconds=4.0):
    probabilities = {"us": 0.5 * (1 - p), "england": p, "australia": 0.5 * (1 - p)}
    speech = 3.0 if reliable else 0.4
    return Prediction(
        "england", "england" if decided else None, p, probabilities, seconds, speech, reliable, "clip.wav", windows
    )


def answer(outcome=None, peaks=(0.1, 0.9, 0.2), noise_db=-60.0, channels=1):
    quality = SignalQuality(-20.0, noise_db, 0.0, np.array(peaks, np.float32))
    return ServiceAnswer(outcome or prediction(), quality, Header(44_100, channels, "WAV PCM_16"))


def text(markup):
    """What a reader sees, one line per element."""
    lines = []

    class Parser(html.parser.HTMLParser):
        def handle_data(self, data):
            lines.append(data)

    Parser().feed(markup)
    return "\n".join(lines)


def balanced(markup):
    """Whether every element that is opened is closed, in order."""
    stack = []

    class Parser(html.parser.HTMLParser):
        def handle_startendtag(self, tag, attrs):
            pass

        def handle_starttag(self, tag, attrs):
            stack.append(tag)

        def handle_endtag(self, tag):
            assert stack and stack.pop() == tag, tag

    Parser().feed(markup)
    return not stack


def test_a_sure_answer():
    shown = text(page.render(answer(), CALIBRATED))
    assert shown.startswith("Most likely: england, 80 %\n")
    assert (
        "Calibrated on 46 validation clips: probabilities and frequencies differed by 0.114 on average there." in shown
    )
    assert "4.0 s, of which 3.0 s are speech (estimated from the energy). WAV PCM_16, 44,100 Hz, mono." in shown
    assert "Warning" not in shown and "Over time" not in shown


def test_every_accent_has_its_number_in_the_models_order():
    shown = page.render(answer(), CALIBRATED)
    rows = re.findall(r'<th scope="row">(.*?)</th>.*?width:([\d.]+)%.*?<td class="number">(.*?)</td>', shown)
    assert rows == [("us", "10.0", "10.0 %"), ("england", "80.0", "80.0 %"), ("australia", "10.0", "10.0 %")]


@pytest.mark.parametrize(
    ("outcome", "classifier", "why"),
    [
        (prediction(0.8, decided=False), ABSTAINS, "The model is set to abstain below a probability of 0.900."),
        (prediction(0.8, reliable=False), CALIBRATED, "There is too little speech for a reliable answer."),
        (prediction(0.49), CALIBRATED, "The answer is more likely wrong than right."),
    ],
)
def test_an_unsure_answer_says_so_and_why(outcome, classifier, why):
    shown = text(page.render(answer(outcome), classifier))
    assert shown.startswith(f"Unsure; most likely: england, {100 * outcome.probability:.0f} %\n{why}\n")


def test_nobody_reads_100_percent():
    assert text(page.render(answer(prediction(0.9999)), CALIBRATED)).startswith("Most likely: england, over 99 %")


def test_a_model_that_is_not_calibrated_says_so():
    assert "Not calibrated: uncalibrated probabilities are usually too high." in page.render(answer(), Classifier())


def test_warnings_are_shown():
    shown = text(page.render(answer(prediction(reliable=False), noise_db=-25.0), CALIBRATED))
    assert "Warning: short: 0.4 s of speech; with less than 1 s the answer is not reliable." in shown
    assert "Warning: noisy or without pauses: loud parts are only 5 dB above quiet parts." in shown


def test_channels_are_told():
    assert "2 channels, averaged to mono" in page.render(answer(channels=2), CALIBRATED)


def window(start, accent, p=0.7):
    rest = {label: (1 - p) / 2 for label in LABELS if label != accent}
    return Window(start, start + 10.0, {label: rest.get(label, p) for label in LABELS})


def long_answer():
    windows = (window(0.0, "us"), window(5.0, "england"), Window(10.0, 20.0, None), window(13.0, "australia", 0.999))
    return answer(prediction(windows=windows, seconds=23.0), peaks=np.linspace(0, 1, 2300))


def test_windows_are_coloured_named_and_listed():
    shown = page.render(long_answer(), CALIBRATED)
    rects = re.findall(r'<title>(.*?)</title><rect x="([\d.]+)" y="(\d+)" width="([\d.]+)".*?fill="(.*?)"', shown)
    assert [(title, float(x), float(width)) for title, x, _, width, _ in rects] == [
        ("0:00.0 to 0:10.0: us, 70 %", 0.0, pytest.approx(432.8)),
        ("0:05.0 to 0:15.0: england, 70 %", pytest.approx(217.4), pytest.approx(432.8)),
        ("0:13.0 to 0:23.0: australia, over 99 %", pytest.approx(565.2), pytest.approx(432.8)),
    ]
    assert len({colour for *_, colour in rects}) == 3
    assert "0:10.0 to 0:20.0\ntoo little speech" in text(shown)


def test_windows_that_overlap_lie_below_one_another():
    shown = page.render(long_answer(), CALIBRATED)
    rows = [int(y) for y in re.findall(r'<rect x="[\d.]+" y="(\d+)"', shown)]
    assert rows[0] < rows[1] < rows[2]


def test_only_accents_that_were_heard_are_in_the_key():
    outcome = prediction(windows=(window(0.0, "us"), window(10.0, "us")), seconds=20.0)
    shown = page.render(answer(outcome), CALIBRATED)
    assert re.findall(r"</i>(.*?)</span>", shown) == ["us"]


@pytest.mark.parametrize("markup", [page.render(answer(), CALIBRATED), page.render(long_answer(), CALIBRATED)])
def test_the_markup_is_whole(markup):
    assert balanced(markup)


def test_names_are_text_and_not_markup():
    evil = "<img src=x onerror=alert(1)>"
    assert "<img" not in page.failure(f"undecodable: {evil} cannot be decoded")

    class Evil:
        labels, threshold, calibration = (evil, "us"), None, None

    outcome = Prediction(evil, evil, 0.9, {evil: 0.9, "us": 0.1}, 4.0, 3.0, True)
    assert "<img" not in page.render(answer(outcome), Evil())


def test_a_failure_is_an_alert():
    shown = page.render(ServiceAnswer(Failure("a.wav", "empty", "a.wav holds no bytes")), CALIBRATED)
    assert 'role="alert">empty: a.wav holds no bytes<' in shown


def test_a_card_without_its_metadata(tmp_path):
    (tmp_path / "README.md").write_text("---\nlicense: other\n---\n\n# Title\n\n---\n\nrest\n")
    assert page.read_card(tmp_path) == "\n# Title\n\n---\n\nrest\n"


def test_no_card(tmp_path):
    assert page.read_card(tmp_path) == "This model has no card: its accuracy is unknown."


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/gradio_api/proxy=http://a.example/b"),
        ("GET", "/gradio_api/file/etc/passwd"),
        ("GET", "/monitoring"),
        ("GET", "/login"),
        ("POST", "/gradio_api/vibe-edit/"),
        ("POST", "/gradio_api/process_recording"),
        ("POST", "/gradio_api/component_server"),
        ("POST", "/gradio_api/run/predict"),
        ("POST", "/"),
        ("PUT", "/"),
        ("GET", "/gradio_api/runs"),
        ("GET", "/gradio_api/custom_component/1/client/component/index.js"),
    ],
)
def test_doors_that_stay_shut(method, path, tmp_path):
    assert not page.is_served(method, path, tmp_path)


def test_only_uploads_are_given_back(tmp_path):
    (tmp_path / "uploads").mkdir()
    (tmp_path / "uploads" / "clip.wav").write_bytes(b"")
    (tmp_path / "secret").write_text("secret")
    (tmp_path / "uploads" / "link").symlink_to(tmp_path / "secret")
    served = [
        name
        for name in ("uploads/clip.wav", "uploads/../secret", "uploads/link", "secret", "/etc/passwd", "\0", "uploadsx")
        if page.is_served("GET", f"/gradio_api/file={tmp_path / name}", tmp_path / "uploads")
    ]
    assert served == ["uploads/clip.wav"]


@contextlib.contextmanager
def visiting(bundle, folder):
    """A client of the page, whose uploads lie in a folder."""
    pytest.importorskip("gradio")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GRADIO_TEMP_DIR", str(folder))
        service = Service(AccentClassifier.from_bundle(bundle, "cpu"), Limits(max_bytes=200_000))
        made = page.make_page(service, page.read_card(bundle), folder)
        app = page.mount(api.make_app(service), made, service.limits)
        doors = {"is_served": lambda method, path: page.is_served(method, path, folder)}
        guard = guarding.Guard(app, service, **doors, has_space=lambda: page.has_space(folder, service.limits))
        with TestClient(guard, base_url="http://127.0.0.1") as client:
            client.folder, client.service = folder, service
            yield client
    service.close()


@pytest.fixture(scope="module")
def client(tiny_bundle, tmp_path_factory):
    with visiting(tiny_bundle, tmp_path_factory.mktemp("uploads")) as client:
        yield client


def upload(client, name, content):
    response = client.post("/gradio_api/upload", files=[("files", (name, content))])
    assert response.status_code == 200, response.text
    return response.json()[0]


def listen(client, path):
    """What the page's own script does with a file: the last message of its stream."""
    session = f"s{np.random.default_rng().integers(1 << 40)}"
    file = None if path is None else {"path": path, "meta": {"_type": "gradio.FileData"}}
    data = {"data": [file], "fn_index": 0, "session_hash": session}
    assert client.post("/gradio_api/queue/join", json=data).status_code == 200
    stream = client.get(f"/gradio_api/queue/data?session_hash={session}").text
    messages = [json.loads(line[5:]) for line in stream.splitlines() if line.startswith("data:")]
    return next(message for message in messages if message["msg"] == "process_completed")


def test_a_file_on_its_whole_way(client):
    path = upload(client, "clip.flac", encode(noise(2.0)))
    message = listen(client, path)
    assert message["success"]
    shown = text(message["output"]["data"][0])
    assert "Probability by accent" in shown and "2.0 s, of which 2.0 s are speech" in shown
    assert client.get(f"/gradio_api/file={path}").status_code == 200


def test_old_files_are_deleted_whatever_they_are(tmp_path):
    for name in ("a/old.wav", "tmpx", "b/new.wav", "c/d/old.wav"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    (tmp_path / "new").mkdir()
    for path in (tmp_path, *tmp_path.rglob("*")):
        if not path.name.startswith("new"):
            os.utime(path, (time.time() - 700,) * 2)
    page.sweep(tmp_path, 600)
    assert {path.name for path in tmp_path.rglob("*")} >= {"b", "new.wav", "new"}
    assert not [path for path in tmp_path.rglob("*") if path.name in ("old.wav", "tmpx")]
    page.sweep(tmp_path, -1)
    assert list(tmp_path.iterdir()) == []


def test_the_server_deletes_what_is_old(tmp_path):
    """Also what Gradio itself forgets: a form of another kind, an upload that broke off."""
    (tmp_path / "tmpx").write_bytes(b"x")

    async def until_empty():
        sweeping = asyncio.create_task(server._sweep(tmp_path, 0.1))
        async with asyncio.timeout(60):
            while (tmp_path / "tmpx").exists():
                await asyncio.sleep(0.01)
        sweeping.cancel()

    asyncio.run(until_empty())


def test_a_bad_file_on_its_whole_way(client):
    message = listen(client, upload(client, "bad.wav", b"hello"))
    assert "undecodable: bad.wav is a text file, not audio" in message["output"]["data"][0]


def test_a_path_of_the_server_cannot_be_asked_for(client, tmp_path):
    secret = tmp_path / "secret.flac"
    secret.write_bytes(encode(noise(2.0)))
    for path in (str(secret), f"{client.folder}/../{secret.name}", str(client.folder), "/etc/passwd"):
        message = listen(client, path)
        assert not message["success"], path
        assert "Probability" not in json.dumps(message)
    assert client.get(f"/gradio_api/file={secret}").status_code == 404


def test_no_address_is_fetched_for_a_client(client, monkeypatch):
    asked = []

    async def fetch(*arguments, **keywords):
        asked.append(arguments)
        raise AssertionError("fetched")

    from gradio import processing_utils

    monkeypatch.setattr(processing_utils, "async_ssrf_protected_download", fetch)
    for address in ("http://127.0.0.1:1/clip.wav", "https://a.example/clip.wav"):
        assert not listen(client, address)["success"]
    assert asked == []


def test_a_large_upload_is_refused(client):
    response = client.post("/gradio_api/upload", files=[("files", ("big.wav", b"x" * 300_000))])
    assert (response.status_code, response.json()["error"][:6]) == (413, "bytes:")


def test_an_upload_without_an_end_is_refused(client):
    response = client.post("/gradio_api/upload", content=iter([b"x"]))
    assert (response.status_code, response.json()["error"]) == (411, "the header Content-Length is required")


def test_uploads_without_room_are_refused(client, monkeypatch):
    monkeypatch.setattr(page, "has_space", lambda folder, limits: False)
    response = client.post("/gradio_api/upload", files=[("files", ("clip.wav", b"x"))])
    assert (response.status_code, response.json()["error"][:22]) == (429, "busy: there is no spac")


def test_room_is_for_as_many_as_may_ask(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "clip.wav").write_bytes(b"x" * 29)
    limits = Limits(max_bytes=10, max_requests=2, max_queue=1)
    assert page.has_space(tmp_path, limits)
    (tmp_path / "other.wav").write_bytes(b"x")
    assert not page.has_space(tmp_path, limits)


def test_there_is_no_room_for_any_number_of_files(tmp_path):
    for number in range(10):
        assert page.has_space(tmp_path, Limits(max_requests=1, max_queue=0))
        (tmp_path / f"{number}.wav").write_bytes(b"")
    assert not page.has_space(tmp_path, Limits(max_requests=1, max_queue=0))


def test_there_is_no_room_on_a_full_disk(tmp_path, monkeypatch):
    monkeypatch.setattr(page.shutil, "disk_usage", lambda folder: SimpleNamespace(free=9))
    assert page.has_space(tmp_path, Limits(max_bytes=9))
    assert not page.has_space(tmp_path, Limits(max_bytes=10))


def test_uploads_wait_for_a_place_like_everybody(client, monkeypatch):
    monkeypatch.setattr(client.service, "_active", 80)
    response = client.post("/gradio_api/upload", files=[("files", ("clip.wav", b"x"))])
    assert (response.status_code, response.json()["error"][:16]) == (429, "busy: 80 request")


def test_the_page_loads_nothing_from_elsewhere(client):
    shown = client.get("/")
    assert shown.status_code == 200 and "default-src 'self'" in shown.headers["content-security-policy"]
    outside = re.findall(r'<(?:script|link|img|iframe)[^>]+(?:src|href)="((?:https?:)?//[^"]+)"', shown.text)
    assert [address for address in outside if not address.startswith("http://127.0.0.1")] == []


def test_gradio_tells_nobody(client):
    config = client.get("/config").json()
    assert config["analytics_enabled"] is False
    assert not config.get("run_history")
    assert config["footer_links"] == []


def test_a_recording_that_is_taken_back_clears_the_answer(client):
    message = listen(client, None)
    assert message["success"] and message["output"]["data"] == [""]


def test_no_stub_is_written_beside_the_code(client):
    assert not list(Path(page.__file__).parent.glob("*.pyi"))
