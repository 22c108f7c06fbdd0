"""Uploads to a fake Hub on the loopback interface that stores all it receives."""

import base64
import json
import socket
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import huggingface_hub
import pytest
from huggingface_hub import constants

from accent_plugin.errors import BundleError
from accent_plugin.exchange import hub

FILES = {
    "config.json": b'{"format_version": 1}',
    "model.ckpt": bytes(range(256)) * 40,
    "README.md": "---\nlanguage: en\n---\n\n# Accents, naïve\n".encode(),
    "sub/more.txt": b"",
}


class Hub(ThreadingHTTPServer):
    """Answers the requests of huggingface_hub's upload_folder; all files are small enough for the commit itself."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.requests, self.files, self.commits, self.refuse, self.public = [], {}, [], {}, False
        self.url = f"http://127.0.0.1:{self.server_port}"

    def asked(self, end):
        return [body for path, body, _ in self.requests if path.split("?")[0].endswith(end)]


class Handler(BaseHTTPRequestHandler):
    def log_message(self, *arguments):
        pass

    def answer(self, status, value, **headers):
        content = json.dumps(value).encode()
        self.send_response(status)
        for name, text in {"Content-Type": "application/json", "Content-Length": len(content), **headers}.items():
            self.send_header(name.replace("_", "-"), str(text))
        self.end_headers()
        self.wfile.write(content)

    def handle_any(self):
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path, here = self.path.split("?")[0], self.server
        if path == "/api/agent-harnesses":  # huggingface_hub sends this request once a day
            return self.answer(404, {})
        here.requests.append((self.path, body, dict(self.headers)))
        for part, (status, message) in here.refuse.items():
            if part in path:
                return self.answer(status, {"error": message}, X_Error_Message=message)
        if path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked.get('organization') or 'me'}/{asked['name']}"
            status = 409 if here.public else 200
            return self.answer(status, {"url": f"{here.url}/{name}", "name": name, "id": "1"})
        if path == "/api/validate-yaml":
            return self.answer(200, {"errors": [], "warnings": []})
        if "/preupload/" in path:
            files = [
                {"path": file["path"], "uploadMode": "regular", "shouldIgnore": False}
                for file in json.loads(body)["files"]
            ]
            return self.answer(200, {"files": files})
        if "/commit/" in path:
            lines = [json.loads(line) for line in body.splitlines()]
            here.commits.append(next(line["value"] for line in lines if line["key"] == "header"))
            for line in lines:
                if line["key"] == "file":
                    assert line["value"]["encoding"] == "base64"
                    here.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            oid = "a" * 40
            return self.answer(200, {"success": True, "commitOid": oid, "commitUrl": f"{here.url}/me/x/commit/{oid}"})
        if path.startswith("/api/models/"):
            name = path.removeprefix("/api/models/").partition("/revision/")[0]
            value = {"id": name, "modelId": name, "private": not here.public, "sha": "b" * 40, "siblings": []}
            return self.answer(200, value)
        return self.answer(404, {"error": f"the stand-in knows no {path}"})

    do_GET = do_POST = handle_any


@pytest.fixture
def server(monkeypatch):
    """A fake Hub, with all other addresses blocked."""
    lookup, elsewhere = socket.getaddrinfo, []

    def only_here(host, *arguments, **more):
        if host not in ("127.0.0.1", b"127.0.0.1"):
            elsewhere.append(host)
            raise OSError(f"a test wants to reach {host}")
        return lookup(host, *arguments, **more)

    monkeypatch.setattr(socket, "getaddrinfo", only_here)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    huggingface_hub.close_session()  # an earlier session may use a proxy
    with Hub() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        yield server
        server.shutdown()
        thread.join()
    huggingface_hub.close_session()
    assert elsewhere == []


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "bundle"
    for name, content in FILES.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    for name in (".lock", ".cache/x", "sub/.part"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("stays here")
    return folder


def push(server, folder, repo="someone/accents", **options):
    options = {"token": "hf_secret", "endpoint": server.url, "check": lambda folder: None, **options}
    return hub.push(folder, repo, **options)


def test_all_files_but_hidden_ones_are_uploaded_unchanged(server, folder):
    assert push(server, folder, message="first one") == f"{server.url}/someone/accents"
    assert server.files == FILES
    assert [commit["summary"] for commit in server.commits] == ["first one"]
    (path,) = [path for path, *_ in server.requests if "/commit/" in path]
    assert path.split("?")[0] == "/api/models/someone/accents/commit/main"


def test_every_request_has_the_token(server, folder):
    push(server, folder)
    assert {headers.get("authorization") or headers.get("Authorization") for *_, headers in server.requests} == {
        "Bearer hf_secret"
    }


@pytest.mark.parametrize(("private", "wanted"), [(True, "private"), (False, "public")])
def test_a_repository_is_private_by_default(server, folder, private, wanted):
    push(server, folder, **({} if private else {"private": False}))
    (body,) = server.asked("/repos/create")
    asked = json.loads(body)
    assert (asked["name"], asked["organization"]) == ("accents", "someone")
    # Clients before 2.0 send "private".
    assert asked.get("visibility", {True: "private", False: "public"}.get(asked.get("private"))) == wanted


def test_a_name_without_namespace_belongs_to_the_tokens_owner(server, folder):
    assert push(server, folder, "accents") == f"{server.url}/me/accents"
    assert server.files == FILES


def test_the_commit_names_the_version_by_default(server, folder):
    push(server, folder)
    assert server.commits[0]["summary"].startswith("Bundle of accent_plugin ")


def test_a_private_upload_to_a_public_repository_is_refused(server, folder):
    server.public = True
    with pytest.raises(BundleError, match="exists and is public, .* nothing was uploaded"):
        push(server, folder)
    assert server.files == {} and server.commits == []
    push(server, folder, private=False)
    assert server.files == FILES


def test_the_token_of_the_login_is_used(server, folder, monkeypatch):
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: "hf_login")
    push(server, folder, token=None)
    assert "Bearer hf_login" in server.requests[0][2].values()


# ---- errors


def test_a_folder_that_is_not_a_bundle_is_not_uploaded(server, folder):
    def check(folder):
        raise BundleError(f"{folder} lacks config.json")

    with pytest.raises(BundleError, match=r"bundle lacks config\.json"):
        push(server, folder, check=check)
    assert server.requests == []


def test_the_bundles_own_check_is_the_default(server, folder):
    with pytest.raises(BundleError):
        push(server, folder, check=None)
    assert server.requests == []


@pytest.mark.parametrize("repo", ["a/b/c", "some one/x", "x--y", "", "../x", "x.git"])
def test_invalid_names_are_refused_before_any_request(server, folder, repo):
    with pytest.raises(BundleError, match="(?s)is not a valid repository name.*give NAME or NAMESPACE/NAME"):
        push(server, folder, repo)
    assert server.requests == []


def test_without_a_token_no_request_is_made(server, folder):
    with pytest.raises(BundleError, match="(?s)no token for the Hub.*hf auth login"):
        push(server, folder, token=None)
    assert server.requests == []


@pytest.mark.parametrize(
    ("part", "status", "message", "match"),
    [
        (
            "/api/",
            401,
            "Invalid credentials in Authorization header",
            "with 401: .*wrong or has expired.*hf auth login",
        ),
        ("/api/", 403, "You do not have the rights", "with 403: .*You do not have the rights.*check the namespace"),
        ("/api/repos/create", 400, "Name is taken by an organisation", "with 400: .*taken by an organisation.*later"),
        ("/commit/", 403, "You may read only", "with 403: .*You may read only.*role of the token"),
        ("/preupload/", 404, "no such repository", "with 404: .*check the name"),
    ],
)
def test_refusals_name_a_remedy_and_hide_the_token(server, folder, part, status, message, match):
    server.refuse = {part: (status, message)}
    with pytest.raises(BundleError, match=f"(?s)refused someone/accents {match}") as caught:
        push(server, folder)
    assert "hf_secret" not in str(caught.value)
    assert server.files == {}


def test_an_unreachable_hub_is_an_error(server, folder):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        nobody = f"http://127.0.0.1:{free.getsockname()[1]}"
        with pytest.raises(BundleError, match=f"(?s){nobody} cannot be reached.*check the network"):
            push(server, folder, endpoint=nobody)


def test_offline_mode_is_named(server, folder, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(BundleError, match="HF_HUB_OFFLINE is set"):
        push(server, folder)
    assert server.requests == []
