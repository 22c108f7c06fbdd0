"""Middleware that checks every request: host, token, path and size.

Every refusal is an immediate 4xx response with an "error" message. If the headers suffice, it is sent before the body
is read. The rest of the body is then read and discarded for a few seconds; otherwise a client that is still sending
would never see the response.
"""

import asyncio
import contextlib
import hashlib
import hmac
import ipaddress
import urllib.parse

from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from uvicorn.protocols.http.h11_impl import H11Protocol

from accent_plugin.errors import LimitError
from accent_plugin.serving.service import UPLOAD, dumps

API = "/api"
COOKIE = "accent_plugin_token"
STATUS = {"bytes": 413, "files": 413, "seconds": 413, "busy": 429, "time": 408}
_HEADER_SECONDS = 15.0
_LINGER_SECONDS = 5.0
_LINGER_BYTES = 256_000_000
# Bytes for the boundaries and headers of a form.
_FORM_BYTES = 65_536
# Bytes of the page's other POST requests, which contain a few names.
_EVENT_BYTES = 65_536
NO_SPACE = "busy: there is no space for more uploads; try again in a few minutes"
_RETRY_SECONDS = "1"

# Scripts, styles, fonts and connections only from this server: the page works offline and sends no data elsewhere.
_POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; media-src 'self' data: blob:; font-src 'self' data:; connect-src 'self' blob: data:; "
    "worker-src 'self' blob:; frame-src 'none'; object-src 'none'; base-uri 'self'; form-action 'self'; "
    "frame-ancestors 'self'"
)

_HEADERS = {
    "content-security-policy": _POLICY,
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-store",
}


class Guard:
    """ASGI middleware that checks host, token, path and size of requests, and adds headers to responses.

    Arguments
    ---------
    app : ASGI application
    service : accent_plugin.serving.service.Service
        Its limits apply.
    token : str, or None
        Required in every request as a bearer token. `?token=` in a URL is stored as a cookie.
    is_served : function
        Method and path -> whether the request is allowed; all others give a 404.
    local : bool
        Whether to serve only this machine. The Host header must then name it, which prevents DNS rebinding: another
        website whose name resolves to this machine could otherwise send requests from a browser.
    has_space : function
        Whether there is space for another upload of the page.
    """

    def __init__(self, app, service, token=None, is_served=None, local=True, has_space=lambda: True):
        self.app, self.service, self.limits, self.local = app, service, service.limits, local
        self.has_space = has_space
        self.token = None if token is None else _digest(token)
        self.is_served = is_served or (lambda method, path: path.startswith(f"{API}/"))
        self._stopping = asyncio.Event()

    async def __call__(self, scope, receive, send):
        """Serve one connection."""
        if scope["type"] != "http":
            if scope["type"] == "lifespan":
                await self.app(scope, receive, send)
            return
        body = _Body(receive, self.limits.max_bytes + _FORM_BYTES, self._stopping)
        response = _DrainingResponse(send, body)
        refused = self._refusal(Request(scope))
        if refused is not None:
            await refused(scope, body.receive, response.send)
            return
        try:
            # The API reserves its own slot after routing.
            uploads = scope["path"] == UPLOAD
            async with self.service.slot() if uploads else contextlib.nullcontext():
                await self.app(scope, body.receive, response.send)
        except LimitError as error:
            if not response.started:
                await refuse(STATUS[error.reason], f"{error.reason}: {error}")(scope, body.receive, response.send)
        except ClientDisconnect:
            pass
        if self._stopping.is_set() and response.started and not response.ended:
            await response.send({"type": "http.response.body", "body": b""})

    def stop(self):
        """End streams that would never end by themselves, such as those of an open browser page."""
        self._stopping.set()

    def _refusal(self, request):
        """Return the response to a refused request; None if it is allowed."""
        # The path as the application sees it: `request.url` drops some characters.
        method, path = request.method, request.scope["path"]
        if self.local and not _is_local(request.headers.get("host", "")):
            return refuse(
                421, "this server only answers requests to localhost; to allow other names, start it with --host"
            )
        if not self.is_served(method, path):
            return refuse(404, f"unknown path {path}")
        if path == f"{API}/health":
            return None
        if self.token is not None and not self._has_token(request):
            given = request.query_params.get("token")
            if method == "GET" and given and hmac.compare_digest(_digest(given), self.token):
                query = urllib.parse.urlencode([kv for kv in request.query_params.multi_items() if kv[0] != "token"])
                target = urllib.parse.quote(path) + ("?" + query if query else "")
                redirect = Response(status_code=303, headers={"location": target})
                redirect.set_cookie(COOKIE, given, httponly=True, samesite="strict", path="/")
                return redirect
            return refuse(
                401, "a token is required: send 'Authorization: Bearer TOKEN', or open ?token=TOKEN in a browser",
                {"www-authenticate": "Bearer"},
            )  # fmt: skip
        if method == "POST":
            return self._refusal_of_body(request, path)
        return None

    def _refusal_of_body(self, request, path):
        length = request.headers.get("content-length")
        if length is None:
            # The API limits the bytes while it reads. Gradio would write an unlimited body to disk.
            return None if path.startswith(f"{API}/") else refuse(411, "the header Content-Length is required")
        most = self.limits.max_bytes if path.startswith(f"{API}/") or path == UPLOAD else _EVENT_BYTES
        if not length.isascii() or not length.isdigit() or int(length) > most + _FORM_BYTES:
            return refuse(413, f"bytes: the request has {length} bytes; the limit is {most}")
        if path == UPLOAD and not self.has_space():
            return refuse(STATUS["busy"], NO_SPACE)
        return None

    def _has_token(self, request):
        kind, _, given = request.headers.get("authorization", "").partition(" ")
        if kind.lower() != "bearer":
            given = request.cookies.get(COOKIE, "")
        return hmac.compare_digest(_digest(given.strip()), self.token)


class Connection(H11Protocol):
    """uvicorn's connection with a timeout for headers; uvicorn would wait for them forever."""

    _too_late = None

    def connection_made(self, transport):
        """Called by asyncio."""
        super().connection_made(transport)
        self._wait_for_headers()

    def data_received(self, data):
        """Called by asyncio."""
        super().data_received(data)
        self._wait_for_headers()

    def _wait_for_headers(self):
        if self.cycle is None or self.cycle.response_complete:
            # One timer for all headers: otherwise a client that sends them slowly would never time out.
            if self._too_late is None:
                self._too_late = self.loop.call_later(_HEADER_SECONDS, self._give_up)
        elif self._too_late is not None:
            self._too_late.cancel()
            self._too_late = None

    def _give_up(self):
        # Browsers also open connections in advance; those are closed without a response.
        begun, _ = self.conn.trailing_data
        if begun and not self.transport.is_closing():
            text = dumps({"error": f"time: the headers took longer than {_HEADER_SECONDS:g} seconds"})
            head = "HTTP/1.1 408 Request Timeout\r\nconnection: close\r\ncontent-type: application/json\r\n"
            self.transport.write(f"{head}content-length: {len(text)}\r\n\r\n".encode() + text)
        self.transport.close()


class _Body:
    """A request's body with a byte limit; when the server stops, it reports a disconnect after the body."""

    def __init__(self, receive, most, stopping):
        self._receive, self._most, self._stopping = receive, most, stopping
        self._read, self.ended = 0, False

    async def receive(self):
        """Implements ASGI's interface.

        Raises
        ------
        LimitError
            "bytes" if the body exceeds the limit.
        """
        message = await (self._receive_or_stop() if self.ended else self._receive())
        if message["type"] != "http.request":
            self.ended = True
            return message
        self._read += len(message.get("body", b""))
        self.ended = not message.get("more_body", False)
        if self._read > self._most:
            raise LimitError("bytes", f"the request has more than {self._most - _FORM_BYTES} bytes")
        return message

    async def _receive_or_stop(self):
        tasks = [asyncio.ensure_future(self._receive()), asyncio.ensure_future(self._stopping.wait())]
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in tasks:
                task.cancel()
        return tasks[0].result() if tasks[0].done() and not tasks[0].cancelled() else {"type": "http.disconnect"}

    async def drain(self):
        """Read and discard the rest, for a limited time."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_LINGER_SECONDS):
                while not self.ended and self._read < self._most + _LINGER_BYTES:
                    message = await self._receive()
                    self._read += len(message.get("body", b""))
                    self.ended = message["type"] != "http.request" or not message.get("more_body", False)


class _DrainingResponse:
    """A response that ends only after the request's body was read; its bytes are sent before."""

    def __init__(self, send, body):
        self._send, self._body = send, body
        self.started = self.ended = False

    async def send(self, message):
        """Implements ASGI's interface."""
        if message["type"] == "http.response.start":
            self.started = True
            # Gradio would allow pages of other servers on this machine to read responses.
            headers = [(name, value) for name, value in message["headers"] if not name.startswith(b"access-control-")]
            names = {name for name, _ in headers}
            more = ((name.encode(), value.encode()) for name, value in _HEADERS.items() if name.encode() not in names)
            message = message | {"headers": [*headers, *more]}
        elif message["type"] == "http.response.body" and not message.get("more_body") and not self._body.ended:
            await self._send(message | {"more_body": True})
            await self._body.drain()
            message = {"type": "http.response.body", "body": b""}
        self.ended = message["type"] == "http.response.body" and not message.get("more_body")
        await self._send(message)


def _is_local(host):
    try:
        name = urllib.parse.urlsplit(f"//{host}").hostname or ""
        if name == "localhost" or name.endswith(".localhost"):
            return True
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False


def _digest(text):
    # The comparison needs ASCII texts of equal length.
    return hashlib.sha256(text.encode("utf-8", "replace")).hexdigest()


def respond(status, content, headers=None):
    """Make a JSON response."""
    return Response(dumps(content), status, headers, "application/json")


def refuse(status, message, headers=None):
    """Make the response of a refused request."""
    more = {"retry-after": _RETRY_SECONDS} if status == STATUS["busy"] else {}
    return respond(status, {"error": message}, more | (headers or {}))
