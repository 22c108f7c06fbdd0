"""The guard in front of everything that is served: who may come in, how much they may send, how they are refused.

Every refusal is a 4xx with an "error" in words, at once: before the body is read where the headers suffice. The rest of
a body is then read and thrown away for a few seconds, or the client, still sending, would never see the answer.
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


# Boundaries and headers of a form.
_FORM_BYTES = 65_536


# What else the page posts: a few names.
_EVENT_BYTES = 65_536


NO_ROOM = "busy: there is no room for more uploads: try again in some minutes"


_RETRY_SECONDS = "1"


# Scripts, styles, fonts and connections of this server alone: the page works without a network, and tells nobody.
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
    """What comes before everything that is served: host, token, paths, bytes; and headers on the way out.

    Arguments
    ---------
    app : ASGI application
    service : accent_plugin.serving.service.Service
        Whose limits hold.
    token : str, or None
        Asked of everybody, as a bearer token, or as `?token=` once, which becomes a cookie.
    is_served : function
        Method and path -> whether there is such a thing; the rest is a 404, whatever the application could do.
    local : bool
        Whether only this machine is served: then the Host header must name it, or a page of somebody else's, whose
        name was made to mean this machine, could ask in a browser's name.
    has_room : function
        Whether there is room on the disk for one more upload of the page's.
    """

    def __init__(self, app, service, token=None, is_served=None, local=True, has_room=lambda: True):
        self.app, self.service, self.limits, self.local = app, service, service.limits, local
        self.has_room = has_room
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
        answer = _Lingering(send, body)
        refused = self._refusal(Request(scope))
        if refused is not None:
            await refused(scope, body.receive, answer.send)
            return
        try:
            # The API takes its place itself, after its route was found.
            uploads = scope["path"] == UPLOAD
            async with self.service.place() if uploads else contextlib.nullcontext():
                await self.app(scope, body.receive, answer.send)
        except LimitError as error:
            if not answer.started:
                await refuse(STATUS[error.reason], f"{error.reason}: {error}")(scope, body.receive, answer.send)
        except ClientDisconnect:
            pass
        if self._stopping.is_set() and answer.started and not answer.ended:
            await answer.send({"type": "http.response.body", "body": b""})

    def stop(self):
        """Let go of streams that never end by themselves, such as a browser's page keeps open while it is shown."""
        self._stopping.set()

    def _refusal(self, request):
        """The response to a request that does not come in, or None."""
        # As the application sees it: `request.url` leaves characters out.
        method, path = request.method, request.scope["path"]
        if self.local and not _is_local(request.headers.get("host", "")):
            return refuse(421, "this server answers to localhost; start it with --host to be reached by other names")
        if not self.is_served(method, path):
            return refuse(404, f"there is nothing at {path}")
        if path == f"{API}/health":
            return None
        if self.token is not None and not self._knows(request):
            given = request.query_params.get("token")
            if method == "GET" and given and hmac.compare_digest(_digest(given), self.token):
                query = urllib.parse.urlencode([kv for kv in request.query_params.multi_items() if kv[0] != "token"])
                place = urllib.parse.quote(path) + ("?" + query if query else "")
                response = Response(status_code=303, headers={"location": place})
                response.set_cookie(COOKIE, given, httponly=True, samesite="strict", path="/")
                return response
            return refuse(
                401, "a token is needed: 'Authorization: Bearer TOKEN', or ?token=TOKEN in a browser's address",
                {"www-authenticate": "Bearer"},
            )  # fmt: skip
        if method == "POST":
            return self._refusal_of_body(request, path)
        return None

    def _refusal_of_body(self, request, path):
        length = request.headers.get("content-length")
        if length is None:
            # The API counts while it reads; the page's own library would write to disk what comes without end.
            return None if path.startswith(f"{API}/") else refuse(411, "Content-Length is needed")
        most = self.limits.max_bytes if path.startswith(f"{API}/") or path == UPLOAD else _EVENT_BYTES
        if not length.isascii() or not length.isdigit() or int(length) > most + _FORM_BYTES:
            return refuse(413, f"bytes: the request has {length} bytes, the most is {most}")
        if path == UPLOAD and not self.has_room():
            return refuse(STATUS["busy"], NO_ROOM)
        return None

    def _knows(self, request):
        kind, _, given = request.headers.get("authorization", "").partition(" ")
        if kind.lower() != "bearer":
            given = request.cookies.get(COOKIE, "")
        return hmac.compare_digest(_digest(given.strip()), self.token)


class Connection(H11Protocol):
    """uvicorn's, closed where a request's headers do not come: it would wait for them for ever."""

    _too_late = None

    def connection_made(self, transport):
        """As asyncio's."""
        super().connection_made(transport)
        self._wait_for_headers()

    def data_received(self, data):
        """As asyncio's."""
        super().data_received(data)
        self._wait_for_headers()

    def _wait_for_headers(self):
        if self.cycle is None or self.cycle.response_complete:
            # Once for all that comes of them, or a client that drips would never be late.
            if self._too_late is None:
                self._too_late = self.loop.call_later(_HEADER_SECONDS, self._give_up)
        elif self._too_late is not None:
            self._too_late.cancel()
            self._too_late = None

    def _give_up(self):
        # A browser also opens connections before it knows what to ask; those are closed without a word.
        begun, _ = self.conn.trailing_data
        if begun and not self.transport.is_closing():
            text = dumps({"error": f"time: the headers took longer than {_HEADER_SECONDS:g} seconds"})
            head = "HTTP/1.1 408 Request Timeout\r\nconnection: close\r\ncontent-type: application/json\r\n"
            self.transport.write(f"{head}content-length: {len(text)}\r\n\r\n".encode() + text)
        self.transport.close()


class _Body:
    """A request's body, counted; once the server ends, and the body was read, its client seems to have left."""

    def __init__(self, receive, most, stopping):
        self._receive, self._most, self._stopping = receive, most, stopping
        self._read, self.ended = 0, False

    async def receive(self):
        """As ASGI's.

        Raises
        ------
        LimitError
            "bytes" when there are more than were allowed.
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
        """Read and forget the rest, for a while."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_LINGER_SECONDS):
                while not self.ended and self._read < self._most + _LINGER_BYTES:
                    message = await self._receive()
                    self._read += len(message.get("body", b""))
                    self.ended = message["type"] != "http.request" or not message.get("more_body", False)


class _Lingering:
    """A response whose end waits until the request's body was read; its bytes are sent before."""

    def __init__(self, send, body):
        self._send, self._body = send, body
        self.started = self.ended = False

    async def send(self, message):
        """As ASGI's."""
        if message["type"] == "http.response.start":
            self.started = True
            # Gradio would let pages of other servers on this machine read.
            given = [(name, value) for name, value in message["headers"] if not name.startswith(b"access-control-")]
            names = {name for name, _ in given}
            more = ((name.encode(), value.encode()) for name, value in _HEADERS.items() if name.encode() not in names)
            message = message | {"headers": [*given, *more]}
        elif message["type"] == "http.response.body" and not message.get("more_body") and not self._body.ended:
            await self._send(message | {"more_body": True})
            await self._body.drain()
            message = {"type": "http.response.body", "body": b""}
        self.ended = message["type"] == "http.response.body" and not message.get("more_body")
        await self._send(message)


def _is_local(host):
    """Whether a Host header names this machine."""
    try:
        name = urllib.parse.urlsplit(f"//{host}").hostname or ""
        if name == "localhost" or name.endswith(".localhost"):
            return True
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False


def _digest(text):
    # Of the same length, whatever is given, and of ASCII, as the comparison wants it.
    return hashlib.sha256(text.encode("utf-8", "replace")).hexdigest()


def respond(status, content, headers=None):
    """Make a response of JSON."""
    return Response(dumps(content), status, headers, "application/json")


def refuse(status, message, headers=None):
    """Make the response of a refused request."""
    more = {"retry-after": _RETRY_SECONDS} if status == STATUS["busy"] else {}
    return respond(status, {"error": message}, more | (headers or {}))
