"""`accent-plugin serve` in a subprocess, with an HTTP client for it."""

import contextlib
import http.client
import json
import os
import signal
import subprocess
import sys
import threading
import urllib.parse

BOUNDARY = "clip"


class Server:
    """A server process that has printed its address."""

    def __init__(self, *options, env=()):
        words = [
            sys.executable,
            "-m",
            "accent_plugin.cli",
            "serve",
            "--port",
            "0",
            "--device",
            "cpu",
            *map(str, options),
        ]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        self.process = subprocess.Popen(words, env=os.environ | dict(env), **pipes)
        self.errors = []
        self._reader = threading.Thread(target=lambda: self.errors.extend(self.process.stderr), daemon=True)
        self._reader.start()
        self.url = self.process.stdout.readline().strip()
        assert self.url, f"it did not start: {self.stderr()}"
        parts = urllib.parse.urlsplit(self.url)
        self.host, self.port = parts.hostname, parts.port

    def stderr(self):
        """Complete stderr, once the process has ended."""
        self._reader.join(60)
        return "".join(self.errors)

    def connect(self, timeout=120):
        return contextlib.closing(http.client.HTTPConnection(self.host, self.port, timeout=timeout))

    def get(self, path):
        with self.connect() as connection:
            connection.request("GET", path)
            response = connection.getresponse()
            return response.status, response.read()

    def classify(self, *files, headers=()):
        """Send files, (name, content) each, in one form; return status and JSON."""
        body = b"".join(
            f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="files"; filename="{name}"\r\n\r\n'.encode()
            + content
            + b"\r\n"
            for name, content in files
        )
        kind = {"Content-Type": f"multipart/form-data; boundary={BOUNDARY}"}
        with self.connect() as connection:
            connection.request("POST", "/api/classify", body + f"--{BOUNDARY}--\r\n".encode(), kind | dict(headers))
            response = connection.getresponse()
            return response.status, json.loads(response.read())

    def memory(self):
        """Resident memory of the process in bytes."""
        with open(f"/proc/{self.process.pid}/statm", encoding="ascii") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    def end(self, how=signal.SIGTERM):
        """Send a signal; return the exit code."""
        self.process.send_signal(how)
        return self.process.wait(120)


@contextlib.contextmanager
def serving(*options, env=()):
    """Run a server during a block."""
    server = Server(*options, env=env)
    try:
        yield server
    finally:
        server.process.kill()
        server.process.wait()
