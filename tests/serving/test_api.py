"""The API and its guard, over HTTP: one answer for each file, a clear 4xx for everything else, and nothing more."""

import asyncio
import errno
import json
import socket

import numpy as np
import pytest
import uvicorn
from helpers.dataset_dicts import encode, noise
from starlette.testclient import TestClient

from accent_plugin.inference.classifier import AccentClassifier
from accent_plugin.serving import api
from accent_plugin.serving import guard as guarding
from accent_plugin.serving.service import Limits, Service

CLIP = encode(noise(1.5))


@pytest.fixture(scope="module")
def classifier(tiny_bundle):
    return AccentClassifier.from_bundle(tiny_bundle, "cpu")


@pytest.fixture
def serve(classifier):
    """Function: limits and the guard's arguments -> a client of the API."""

    def serve(token=None, local=True, base_url="http://127.0.0.1", **limits):
        service = Service(classifier, Limits(**limits))
        guard = guarding.Guard(api.make_app(service), service, token, local=local)
        client = TestClient(guard, base_url=base_url, follow_redirects=False)
        client.service, client.guard = service, guard
        return client

    return serve


def post(client, *files, **more):
    form = [("files", (name, content)) for name, content in files]
    return client.post("/api/classify", files=form, **more)


def test_one_file(serve, classifier):
    response = post(serve(), ("clip.flac", CLIP))
    assert response.status_code == 200
    (answer,) = response.json()["answers"]
    alone = classifier.predict_file(CLIP)
    assert answer["source"] == "clip.flac" and answer["error"] is None
    assert answer["accent"] == answer["decision"] == alone.accent
    assert answer["probabilities"] == pytest.approx(alone.probabilities, abs=2e-6)
    assert (answer["codec"], answer["sample_rate"], answer["channels"]) == ("FLAC PCM_16", 16_000, 1)


def test_a_body_that_is_the_file(serve):
    response = serve().post("/api/classify", content=CLIP)
    assert [answer["source"] for answer in response.json()["answers"]] == ["recording"]
    assert response.status_code == 200


def test_many_files_in_their_order(serve):
    names = [f"{number}.flac" for number in range(5)]
    response = post(serve(), *((name, CLIP) for name in names))
    assert [answer["source"] for answer in response.json()["answers"]] == names


def test_a_long_recording_has_windows(serve):
    (answer,) = post(serve(), ("long.flac", encode(noise(23.0)))).json()["answers"]
    assert [(window["start"], window["end"]) for window in answer["windows"]] == [(0, 10), (5, 15), (10, 20), (13, 23)]


def broken(what):
    if what == "nan":
        samples = noise()
        samples[7] = np.nan
        return encode(samples, format="WAV", subtype="FLOAT")
    return {
        "text": b"hello",
        "nothing": b"",
        "no samples": encode(np.zeros(0, np.float32), format="WAV"),
        "silence": encode(np.zeros(16_000, np.float32)),
        "cut": CLIP[:3000],
    }[what]


@pytest.mark.parametrize(
    ("what", "error"),
    [
        ("text", "undecodable: it.wav is a text file, not audio"),
        ("nothing", "empty: it.wav holds no bytes"),
        ("no samples", "empty: it.wav holds no samples"),
        ("silence", "silent: it.wav is silent: all samples are equal"),
        ("nan", "non-finite: it.wav has samples that are NaN or infinite"),
        ("cut", "undecodable: it.wav is damaged: only 0.0 s of about 1.5 s can be decoded: "),
    ],
)
def test_a_bad_file_is_a_4xx_with_the_command_lines_words(serve, what, error):
    response = post(serve(), ("it.wav", broken(what)))
    assert response.status_code == 422
    assert response.json()["error"].startswith(error)
    assert response.json()["answers"][0]["error"] == response.json()["error"]


def test_good_files_beside_a_bad_one_are_answered(serve):
    response = post(serve(), ("good.flac", CLIP), ("bad.wav", b"hello"), ("better.flac", CLIP))
    assert response.status_code == 422
    assert [bool(answer["accent"]) for answer in response.json()["answers"]] == [True, False, True]


def test_too_many_seconds(serve):
    response = post(serve(max_seconds=1.0), ("long.flac", CLIP))
    assert (response.status_code, response.json()["error"]) == (413, "too long: long.flac is longer than 1 s")


def test_too_many_bytes_by_the_header(serve):
    client = serve(max_bytes=1000)
    response = client.post("/api/classify", content=b"x" * 100_000)
    assert (response.status_code, response.json()["error"]) == (
        413,
        "bytes: the request has 100000 bytes; the limit is 1000",
    )


def test_too_many_bytes_without_a_header(serve):
    response = serve(max_bytes=1000).post("/api/classify", content=iter([b"x" * 40_000] * 3))
    assert (response.status_code, response.json()["error"]) == (413, "bytes: the request has more than 1000 bytes")


@pytest.mark.parametrize("length", ["-1", "1e3", "9" * 30, "٣"])
def test_a_length_that_is_none(serve, length):
    response = serve().post("/api/classify", content=b"x", headers={"content-length": length.encode()})
    assert response.status_code == 413


def test_too_many_files(serve):
    response = post(serve(max_files=2), *[("clip.flac", CLIP)] * 3)
    assert (response.status_code, response.json()["error"]) == (413, "files: there are more than 2 files in the form")


def test_a_request_too_many(serve):
    client = serve(max_requests=1, max_queue=0)
    client.service._active = 1
    response = post(client, ("clip.flac", CLIP))
    assert response.status_code == 429 and response.headers["retry-after"] == "1"
    assert response.json()["error"] == "busy: 1 requests are being answered or waiting: try again later"


def test_too_slow(serve):
    response = post(serve(timeout=1e-4), ("clip.flac", CLIP))
    assert response.status_code == 408
    assert response.json()["error"].startswith("time: ")


@pytest.mark.parametrize(
    ("content", "kind", "error"),
    [
        (b"", "multipart/form-data", "Missing boundary in multipart."),
        (b"--x\r\nContent-Disposition: form-data; name=a\r\n\r\nb\r\n--x--\r\n", "multipart/form-data; boundary=x",
         "the form contains no file: send files in the field 'files'"),
        (b"--x\r\nnonsense", "multipart/form-data; boundary=x", None),
    ],
)  # fmt: skip
def test_a_damaged_form(serve, content, kind, error):
    response = serve().post("/api/classify", content=content, headers={"content-type": kind})
    assert response.status_code == 400
    assert error is None or response.json()["error"] == error


@pytest.mark.parametrize("method", ["GET", "PUT", "DELETE", "OPTIONS"])
def test_the_wrong_method(serve, method):
    response = serve().request(method, "/api/classify")
    assert (response.status_code, response.json()) == (405, {"error": "Method Not Allowed"})


def test_no_such_thing_of_the_api(serve):
    response = serve().get("/api/nope")
    assert (response.status_code, response.json()) == (404, {"error": "unknown path /api/nope"})


def test_what_else_is_mounted_does_not_answer_for_the_api(classifier):
    service = Service(classifier)
    app = api.make_app(service)
    app.mount("/", lambda scope, receive, send: pytest.fail(scope["path"]))
    client = TestClient(guarding.Guard(app, service), base_url="http://127.0.0.1")
    assert client.get("/api/classify").status_code == 405
    assert client.get("/api/nope").status_code == 404


def test_a_full_disk_is_no_room(serve, monkeypatch):
    async def full(request, limits):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(api, "_read_files", full)
    response = post(serve(), ("clip.flac", CLIP))
    assert (response.status_code, response.json()["error"][:22]) == (429, "busy: there is no spac")


@pytest.mark.parametrize("path", ["/", "/api", "/docs", "/redoc", "/openapi.json", "/apix", "/gradio_api/upload"])
def test_nothing_else_is_served(serve, path):
    response = serve().get(path)
    assert (response.status_code, response.json()) == (404, {"error": f"unknown path {path}"})


def test_what_is_served(serve, classifier):
    about = serve(max_files=3).get("/api/model").json()
    assert about["labels"] == ["us", "england", "australia"]
    assert about["model"] == classifier.identity
    assert about["limits"]["max_files"] == 3


def test_the_description_is_openapi_and_names_every_refusal(serve):
    described = serve().get("/api/openapi.json").json()
    assert described["openapi"].startswith("3.")
    classify = described["paths"]["/api/classify"]["post"]
    assert set(classify["responses"]) >= {"200", "400", "401", "408", "413", "422", "429"}
    assert "multipart/form-data" in classify["requestBody"]["content"]


def test_an_answer_is_as_described(serve):
    client = serve()
    described = client.get("/api/openapi.json").json()["components"]["schemas"]["Answer"]["properties"]
    for content in (CLIP, encode(noise(23.0)), b"hello"):
        (answer,) = post(client, ("clip.flac", content)).json()["answers"]
        assert set(answer) <= set(described)
        api.Answer(**answer)


def test_without_the_token_nobody_comes_in(serve):
    client = serve(token="open sesame")
    for headers in ({}, {"authorization": "Bearer shut"}, {"authorization": "Basic open sesame"}, {"cookie": "a=b"}):
        response = post(client, ("clip.flac", CLIP), headers=headers)
        assert response.status_code == 401 and response.headers["www-authenticate"] == "Bearer"
        assert response.json()["error"].startswith("a token is required: ")


def test_health_needs_no_token(serve):
    assert serve(token="x").get("/api/health").json() == {"status": "ok", "busy": 0}


def test_with_the_token_as_a_header(serve):
    assert post(serve(token="x"), ("clip.flac", CLIP), headers={"authorization": "bearer x"}).status_code == 200


def test_the_guard_sees_the_path_that_the_application_sees(serve):
    """Some ways to read an address leave a tab out, and would take this for what needs no token."""
    assert serve(token="x").get("/api/he%09alth").status_code == 401


def test_after_the_token_the_address_may_hold_anything(serve):
    response = serve(token="x").get("/api/%E2%82%AC?token=x")
    assert (response.status_code, response.headers["location"]) == (303, "/api/%E2%82%AC")


def test_with_the_token_in_the_address_once(serve):
    client = serve(token="open sesame")
    response = client.get("/api/model?token=open%20sesame&a=b")
    assert (response.status_code, response.headers["location"]) == (303, "/api/model?a=b")
    cookie = response.headers["set-cookie"].lower()
    assert "httponly" in cookie and "samesite=strict" in cookie
    assert client.get("/api/model").status_code == 200


def test_a_wrong_token_in_the_address(serve):
    assert serve(token="open sesame").get("/api/model?token=x").status_code == 401


@pytest.mark.parametrize("host", ["127.0.0.1:7860", "localhost", "LOCALHOST:1", "[::1]:7860", "a.localhost"])
def test_names_of_this_machine(serve, host):
    assert serve().get("/api/health", headers={"host": host}).status_code == 200


@pytest.mark.parametrize(
    "host", ["evil.example", "127.0.0.1.evil.example", "10.0.0.1", "", "localhost.evil.example", "[", "]", "[x]"]
)
def test_another_name_for_this_machine_is_refused(serve, host):
    """A page of somebody else's, whose name was made to mean this machine, asks in a browser's name."""
    assert serve().get("/api/health", headers={"host": host}).status_code == 421
    assert serve(local=False).get("/api/health", headers={"host": host}).status_code == 200


def test_headers_keep_everything_at_home(serve):
    headers = serve().get("/api/health").headers
    assert "default-src 'self'" in headers["content-security-policy"]
    assert not [word for word in headers["content-security-policy"].split() if "//" in word or word == "*"]
    assert headers["x-content-type-options"] == "nosniff"
    assert "access-control-allow-origin" not in headers


def connection(chunks, path="/api/classify", headers=()):
    """What ASGI gives for a POST whose body comes in chunks; and a list for what is sent."""
    scope = {"type": "http", "method": "POST", "path": path, "query_string": b"", "root_path": "", "scheme": "http"}
    scope |= {"headers": [(b"host", b"localhost"), *headers], "server": ("localhost", 80), "client": ("a", 1)}
    left, events = list(chunks), []

    async def receive():
        events.append("read")
        return {"type": "http.request", "body": left.pop(0), "more_body": bool(left)}

    async def send(message):
        events.append(message)

    return scope, receive, send, events


def test_a_refusal_is_sent_before_the_body_is_read_and_the_rest_is_thrown_away(serve):
    client = serve(max_bytes=1000)
    scope, receive, send, events = connection([b"x" * 50_000] * 4, headers=[(b"content-length", b"200000")])
    asyncio.run(client.guard(scope, receive, send))
    assert [event if event == "read" else event["type"] for event in events] == [
        "http.response.start", "http.response.body", "read", "read", "read", "read", "http.response.body",
    ]  # fmt: skip
    assert events[0]["status"] == 413
    assert json.loads(events[1]["body"])["error"].startswith("bytes: ")


def test_a_client_that_leaves_is_no_error(serve):
    client = serve()
    scope, _, send, events = connection([])

    async def receive():
        return {"type": "http.disconnect"}

    asyncio.run(client.guard(scope, receive, send))
    assert client.service.busy == 0


def test_streams_end_when_the_server_does(classifier):
    began = asyncio.Event()

    async def stream(scope, receive, send):
        await receive()
        await send({"type": "http.response.start", "status": 200, "headers": []})
        began.set()
        assert await receive() == {"type": "http.disconnect"}

    guard = guarding.Guard(stream, Service(classifier), is_served=lambda method, path: True)
    scope, _, send, events = connection([], "/gradio_api/heartbeat/x")
    messages = [{"type": "http.request", "body": b""}]

    async def receive():
        if messages:
            return messages.pop()
        await asyncio.sleep(3600)

    async def visit():
        task = asyncio.create_task(guard(scope | {"method": "GET"}, receive, send))
        await began.wait()
        guard.stop()
        await task

    asyncio.run(visit())
    assert events[-1] == {"type": "http.response.body", "body": b""}


@pytest.mark.parametrize(("path", "status"), [("/gradio_api/queue/join", 413), (guarding.UPLOAD, 200)])
def test_only_uploads_may_be_large(classifier, path, status):
    async def app(scope, receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    guard = guarding.Guard(app, Service(classifier), is_served=lambda method, path: True)
    response = TestClient(guard, base_url="http://127.0.0.1").post(path, content=b"x" * 300_000)
    assert response.status_code == status


def test_no_other_server_is_let_read(classifier):
    async def app(scope, receive, send):
        allowed = [(b"access-control-allow-origin", b"http://localhost:1"), (b"x-other", b"1")]
        await send({"type": "http.response.start", "status": 200, "headers": allowed})
        await send({"type": "http.response.body", "body": b""})

    guard = guarding.Guard(app, Service(classifier), is_served=lambda method, path: True)
    headers = TestClient(guard, base_url="http://127.0.0.1").get("/").headers
    assert "access-control-allow-origin" not in headers and headers["x-other"] == "1"


def test_sockets_are_not_served(serve):
    events = []

    async def send(message):
        events.append(message)

    asyncio.run(serve().guard({"type": "websocket", "path": "/"}, None, send))
    assert events == []


REQUEST = b"GET / HTTP/1.1\r\nHost: localhost\r\n"


def talk(say, app=None):
    """Serve an application as `accent-plugin serve` does its own; what `say`, given a connection, returns."""

    async def both():
        server = uvicorn.Server(uvicorn.Config(app, http=guarding.Connection, ws="none", lifespan="off"))
        with socket.create_server(("127.0.0.1", 0)) as bound:
            serving = asyncio.create_task(server.serve(sockets=[bound]))
            try:
                async with asyncio.timeout(60):
                    return await say(*await asyncio.open_connection(*bound.getsockname()))
            finally:
                server.should_exit = True
                await serving

    return asyncio.run(both())


@pytest.fixture
def impatient(monkeypatch):
    """Function: from now on hardly any time is left for headers."""

    def impatient():
        monkeypatch.setattr(guarding, "_HEADER_SECONDS", 0.5)

    return impatient


def test_headers_that_do_not_come_are_not_waited_for(impatient):
    async def say(reader, writer):
        writer.write(REQUEST)
        return await reader.read()

    impatient()
    head, _, body = talk(say).partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 408 ")
    assert json.loads(body) == {"error": "time: the headers took longer than 0.5 seconds"}


def test_headers_that_drip_are_not_waited_for(impatient):
    async def say(reader, writer):
        answer = asyncio.create_task(reader.read())
        writer.write(REQUEST)
        while not answer.done():
            writer.write(b"x")
            await asyncio.sleep(0.01)
        return await answer

    impatient()
    assert talk(say).startswith(b"HTTP/1.1 408 ")


def test_a_connection_without_a_word_is_closed_without_a_word(impatient):
    async def say(reader, writer):
        return await reader.read()

    impatient()
    assert talk(say) == b""


async def answer(send, text):
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"%d" % len(text))]})
    await send({"type": "http.response.body", "body": text})


def test_an_answer_may_take_longer_than_headers(monkeypatch):
    wait, timers = guarding.Connection._wait_for_headers, []

    def watched(connection):
        wait(connection)
        timers.append(connection._too_late)

    async def app(scope, receive, send):
        await answer(send, b"done")

    async def say(reader, writer):
        writer.write(REQUEST)
        while len(timers) < 2:
            await asyncio.sleep(0.001)
        writer.write(b"Connection: close\r\n\r\n")
        return await reader.read()

    monkeypatch.setattr(guarding.Connection, "_wait_for_headers", watched)
    assert talk(say, app).endswith(b"done")
    connected, begun, whole = timers
    assert begun is connected and connected.cancelled() and whole is None


def test_headers_of_a_second_request_are_not_waited_for_either(impatient):
    async def app(scope, receive, send):
        impatient()
        await answer(send, b"done")

    async def say(reader, writer):
        writer.write(REQUEST + b"\r\n")
        await reader.readuntil(b"done")
        writer.write(REQUEST)
        return await reader.read()

    assert talk(say, app).startswith(b"HTTP/1.1 408 ")
