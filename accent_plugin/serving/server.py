"""The server of the page and the API: one process with one model, which runs until it receives a signal."""

import asyncio
import contextlib
import os
import socket
import sys
import tempfile
import webbrowser
from urllib.parse import quote

from accent_plugin.errors import ConfigError
from accent_plugin.serving.service import Limits, Service

HOST, PORT = "127.0.0.1", 7860
LOCAL = ("127.0.0.1", "::1", "localhost")
TOKEN_VARIABLE = "ACCENT_PLUGIN_TOKEN"
_BACKLOG = 2048
# Packages of the extra `serve`.
_EXTRA = ("gradio", "fastapi", "uvicorn", "starlette", "pydantic", "multipart", "python_multipart")


def require(limits, token=None):
    """Raise a `ConfigError` that lists every problem with the limits and the token, before a model is loaded."""
    problems = list(limits.problems())
    if token is not None and not (token.isascii() and token.isprintable() and token.strip() == token != ""):
        problems.append("the token is sent in a header: it must be printable ASCII without spaces around it")
    if problems:
        raise ConfigError("\n".join(problems))


def run(classifier, card, limits=None, host=HOST, port=PORT, token=None, page=True, open=False):
    """Serve until a signal arrives; then finish the requests in progress and return.

    Arguments
    ---------
    classifier : accent_plugin.inference.base.RecordingClassifier
    card : str
        The model card, in Markdown.
    limits : accent_plugin.serving.service.Limits
    host : str
        Address to listen on; any other than the loopback address is reachable from other machines.
    port : int
        0 chooses a free one.
    token : str, or None
        Secret that every request must carry.
    page : bool
        Whether to serve the page beside the API.
    open : bool
        Whether to open the page in a browser.

    Raises
    ------
    ConfigError
        When a limit or the token is invalid, the address cannot be used, or a package is missing.
    """
    limits = limits or Limits()
    require(limits, token)
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="accent_plugin_"))
        listening = stack.enter_context(_bind(host, port))
        server, guard, service = _make(classifier, card, limits, token, page, host in LOCAL, folder)
        stack.callback(service.close)
        address = _address(listening)
        hint = f"?token={quote(token, safe='')}" if token else ""
        # The token is a secret: it must not end up in a log.
        shown = hint if sys.stdout.isatty() else ""
        print(f"{address}/{shown}" if page else f"{address}/api/openapi.json", flush=True)
        if host not in LOCAL and token is None:
            print(
                "anyone who can reach this address can use the server: set --token to require a secret", file=sys.stderr
            )
        if open and page:
            webbrowser.open(f"{address}/{hint}")
        asyncio.run(_serve(server, guard, listening, service, folder, page))


def _make(classifier, card, limits, token, page, local, folder):
    # Gradio reads these variables on import.
    os.environ |= {"GRADIO_TEMP_DIR": folder, "GRADIO_ANALYTICS_ENABLED": "False", "GRADIO_RUN_HISTORY": "false"}
    try:
        import uvicorn

        from accent_plugin.serving import api, guard

        if page:
            print("loading Gradio for the web page; with --no_page, the API starts sooner", file=sys.stderr, flush=True)
            import gradio  # noqa: F401
    except ModuleNotFoundError as error:
        if error.name not in _EXTRA:
            raise
        raise ConfigError(f"{error.name} is not installed: pip install 'accent_plugin[serve]'") from None

    service = Service(classifier, limits)
    app, rules = api.make_app(service), {}
    if page:
        from accent_plugin.serving import page as serving_page

        app = serving_page.mount(app, serving_page.make_page(service, card, folder), limits)

        def is_served(method, path):
            return path.startswith(f"{guard.API}/") or serving_page.is_served(method, path, folder)

        rules = {"is_served": is_served, "has_space": lambda: serving_page.has_space(folder, limits)}

    guarded = guard.Guard(app, service, token, local=local, **rules)

    class Server(uvicorn.Server):
        ending: asyncio.Event
        loop: asyncio.AbstractEventLoop

        def handle_exit(self, sig, frame):
            # uvicorn's own handler raises the signal again at the end, before the uploads are deleted. A second
            # signal stops the server without waiting.
            self.force_exit = self.should_exit
            self.should_exit = True
            self.loop.call_soon_threadsafe(self.ending.set)

    config = uvicorn.Config(
        guarded, http=guard.Connection, ws="none", log_level="warning", access_log=False, server_header=False,
        timeout_keep_alive=5, timeout_graceful_shutdown=round(limits.timeout) + 5,
    )  # fmt: skip
    return Server(config), guarded, service


async def _serve(server, guard, listening, service, folder, page):
    server.ending, server.loop = asyncio.Event(), asyncio.get_running_loop()
    tasks = [asyncio.create_task(_close_streams_when_idle(server.ending, guard, service))]
    if page:
        tasks.append(asyncio.create_task(_sweep(folder)))
    await server.serve(sockets=[listening])
    for task in tasks:
        task.cancel()


async def _sweep(folder, keep_seconds=None):
    """Delete old uploads repeatedly until cancelled."""
    from accent_plugin.serving import page as serving_page

    keep_seconds = serving_page.KEEP_SECONDS if keep_seconds is None else keep_seconds
    while True:
        await asyncio.sleep(keep_seconds / 10)
        await asyncio.to_thread(serving_page.sweep, folder, keep_seconds)


async def _close_streams_when_idle(ending, guard, service):
    """Close the event streams of open pages once the server is ending and no request is in progress."""
    await ending.wait()
    while service.busy:
        await asyncio.sleep(0.05)
    guard.stop()


def _bind(host, port):
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listening = socket.socket(family, socket.SOCK_STREAM)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind((host, port))
        # Connections made as soon as the address is printed wait here until the server is up.
        listening.listen(_BACKLOG)
    except (OSError, OverflowError) as error:
        listening.close()
        raise ConfigError(
            f"cannot listen on {host}:{port}: {error}; choose another --port (0 for any free port) or --host"
        ) from None
    return listening


def _address(listening):
    host, port = listening.getsockname()[:2]
    # A browser cannot open the wildcard address.
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
