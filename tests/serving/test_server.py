"""`accent-plugin serve` as a process: under load, on signals, and with invalid options."""

import json
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from helpers.dataset_dicts import encode, noise
from helpers.servers import serving

from accent_plugin.cli import main
from accent_plugin.inference.classifier import AccentClassifier

MEGABYTE = 1 << 20


@pytest.fixture
def refused(capsys, tiny_bundle):
    """Function: options -> stderr of an `accent-plugin serve` that does not start."""

    def refused(*options):
        assert main.main(["serve", "--model", str(tiny_bundle), "--device", "cpu", *options]) == 2
        return capsys.readouterr().err

    return refused


def test_the_api_alone_imports_no_heavy_packages(tiny_bundle, tmp_path):
    code = (
        "import sys\n"
        "from accent_plugin.cli import models, parser\n"
        "from accent_plugin.serving import server, service\n"
        "words = ['serve', '--model', sys.argv[1], '--no_page', '--backend', 'onnx']\n"
        "classifier = models._classifier(parser.make_parser().parse_args(words), sys.argv[1])\n"
        "server._make(classifier, '', service.Limits(), None, False, True, sys.argv[2])\n"
        "heavy = {'torch', 'speechbrain', 'transformers', 'datasets', 'gradio', 'matplotlib', 'pandas', 'sklearn'}\n"
        "print(sorted(heavy & sys.modules.keys()))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, tiny_bundle, tmp_path], capture_output=True, text=True, check=True
    )
    assert done.stdout == "[]\n"


def test_every_invalid_limit_is_named(refused):
    message = refused("--max_files", "0", "--timeout", "-1")
    assert "ConfigError: max_files is 0: give 1 or more\ntimeout is -1.0: give a positive number" in message


@pytest.mark.parametrize("token", ["", " ", "a\nb", "gehëim", " padded "])
def test_a_token_must_fit_into_a_header(refused, token):
    assert "it must be printable ASCII" in refused("--token", token)


def test_a_port_in_use_is_an_error(refused):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        message = refused("--port", str(taken.getsockname()[1]))
    assert "choose another --port (0 for any free port) or --host" in message


@pytest.mark.parametrize("port", ["-1", "70000"])
def test_an_invalid_port_is_an_error(refused, port):
    assert f"cannot listen on 127.0.0.1:{port}" in refused("--port", port)


def test_an_address_of_another_machine_is_an_error(refused):
    assert "cannot listen on 192.0.2.1:0" in refused("--host", "192.0.2.1", "--port", "0")


@pytest.fixture(scope="module")
def sounds():
    """Names and contents: 180 good clips, and 20 bad files of four kinds among them."""
    files = []
    for number in range(200):
        if number % 10 == 3:
            content = [b"hello", b"", encode(noise())[:3000], encode(0 * noise())][number // 10 % 4]
            files.append((f"bad{number}.flac", content))
        else:
            files.append((f"good{number}.flac", encode(noise(0.4 + 0.2 * (number % 9), seed=number))))
    return files


@pytest.mark.slow
def test_two_hundred_requests_sixteen_at_once(tiny_bundle, sounds):
    alone = AccentClassifier.from_bundle(tiny_bundle, "cpu")
    with serving("--model", tiny_bundle) as server, ThreadPoolExecutor(16) as clients:
        first = list(clients.map(server.classify, sounds))
        before = server.memory()
        second = list(clients.map(server.classify, sounds))
        grown = server.memory() - before
        about = json.loads(server.get("/api/health")[1])
        assert server.end() == 0
    assert about == {"status": "ok", "busy": 0}
    for (name, content), (status, answers), (again, same) in zip(sounds, first, second, strict=True):
        (answer,), (other,) = answers["answers"], same["answers"]
        assert answer["source"] == other["source"] == name
        if name.startswith("bad"):
            assert status == again == 422 and answer["error"]
            continue
        assert status == again == 200, answers
        expected = alone.predict_file(content)
        assert answer["accent"] == other["accent"] == expected.accent
        assert answer["probabilities"] == pytest.approx(expected.probabilities, abs=1e-5)
        assert other["probabilities"] == pytest.approx(expected.probabilities, abs=1e-5)
    assert grown < 30 * MEGABYTE


@pytest.mark.slow
def test_after_a_signal_it_answers_the_requests_in_progress(tiny_bundle, tmp_path):
    long = encode(noise(300.0))
    with serving("--model", tiny_bundle, env={"TMPDIR": str(tmp_path)}) as server, ThreadPoolExecutor(4) as clients:
        # An open page keeps a stream open; the server must not wait for it.
        stream = threading.Thread(target=server.get, args=("/gradio_api/heartbeat/x",), daemon=True)
        stream.start()
        (uploads,) = tmp_path.glob("accent_plugin_*")
        pending = [clients.submit(server.classify, (f"{number}.flac", long)) for number in range(4)]
        while json.loads(server.get("/api/health")[1])["busy"] < 4:
            assert not all(one.done() for one in pending), "they were answered before the signal"
            time.sleep(0.01)
        assert server.end(signal.SIGTERM) == 0
        assert [one.result()[0] for one in pending] == [200] * 4
        assert "Traceback" not in server.stderr()
        with pytest.raises(ConnectionRefusedError):
            server.get("/api/health")
    assert not uploads.exists()


@pytest.mark.slow
def test_the_api_alone_with_a_token_from_the_environment(tiny_bundle):
    with serving("--model", tiny_bundle, "--no_page", env={"ACCENT_PLUGIN_TOKEN": "sesame"}) as server:
        assert server.url == f"http://127.0.0.1:{server.port}/api/openapi.json"
        clip = ("clip.flac", encode(noise(1.0)))
        assert server.classify(clip)[0] == 401
        assert server.classify(clip, headers={"Authorization": "Bearer sesame"})[0] == 200
        assert server.get("/")[0] == 404
        assert server.end(signal.SIGINT) == 0


@pytest.mark.slow
def test_a_large_upload_receives_its_refusal(tiny_bundle):
    with serving("--model", tiny_bundle, "--no_page", "--max_bytes", "1000") as server:
        for _ in range(3):
            status, answer = server.classify(("big.wav", b"x" * (20 * MEGABYTE)))
            assert (status, answer["error"][:6]) == (413, "bytes:")
        assert server.get("/api/health")[0] == 200
