"""An HTTP proxy in front of an S3 server that does what networks and servers do on bad days."""

import http.client
import socket
import struct
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Literal, NamedTuple
from urllib.parse import urlsplit

Kind = Literal[
    "answer",  # an S3 error instead of the server's answer; the request is not passed on
    "lose_answer",  # the request is passed on, the connection closed without an answer
    "reset",  # RST in the middle of the body
    "truncate",  # the connection ends in the middle of the body
    "flip",  # one bit of the body is another
    "flip_up",  # the same on the way to the server
    "trickle",  # a byte now and then, for ever
]


class Request(NamedTuple):
    """What the proxy saw of a request."""

    method: str
    path: str
    query: str
    headers: Mapping[str, str]
    """Names in lower case."""


class Fault(NamedTuple):
    """What goes wrong, with which requests, and how often."""

    kind: Kind
    method: str = ""
    """Empty: any."""
    path_part: str = ""
    """Occurs in the path or in the query string."""
    times: int = 1
    status: int = 503
    code: str = "SlowDown"
    when: Callable[[Request], bool] = lambda request: True


class FaultProxy:
    """Passes requests on to `endpoint`, except for those that a fault in `faults` meets."""

    def __init__(self, endpoint: str, *, drop_headers: tuple[str, ...] = ()) -> None:
        parts = urlsplit(endpoint)
        self.upstream = (parts.hostname or "", parts.port or 80)
        self.drop_headers = drop_headers
        self.requests: list[Request] = []
        self._faults: list[list[Fault | int]] = []
        self._lock = threading.Lock()
        proxy = self

        class Handler(_Handler):
            owner = proxy

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,))
        self.endpoint = f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> "FaultProxy":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def add(self, fault: Fault) -> None:
        with self._lock:
            self._faults.append([fault, fault.times])

    def count(self, method: str, path_part: str = "") -> int:
        """Requests seen so far."""
        with self._lock:
            return sum(
                seen.method == method and path_part in f"{seen.path}?{seen.query}"
                for seen in self.requests
            )

    def meet(self, request: Request) -> Fault | None:
        """Notes a request; the fault that it meets, if any."""
        with self._lock:
            self.requests.append(request)
            for entry in self._faults:
                fault, left = entry
                assert isinstance(fault, Fault)
                assert isinstance(left, int)
                if left and _fits(fault, request):
                    entry[1] = left - 1
                    return fault
        return None


def _fits(fault: Fault, request: Request) -> bool:
    return (
        fault.method in ("", request.method)
        and fault.path_part in f"{request.path}?{request.query}"
        and fault.when(request)
    )


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    owner: FaultProxy
    timeout = 30

    def _serve(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        parts = urlsplit(self.path)
        headers = {name.lower(): value for name, value in self.headers.items()}
        fault = self.owner.meet(Request(self.command, parts.path, parts.query, headers))
        if fault is not None and fault.kind == "answer":
            return self._error(fault)
        if fault is not None and fault.kind == "flip_up":
            body, fault = bytes([body[0] ^ 1]) + body[1:], None
        try:
            status, answered, data = self._pass_on(body)
        except OSError:
            self.close_connection = True  # the server is down: so is the proxy
            return None
        if fault is not None and fault.kind == "lose_answer":
            self.close_connection = True
            return None
        self.send_response_only(status)
        for name, value in answered:
            if name.lower() not in ("connection", "transfer-encoding", "content-length"):
                self.send_header(name, value)
        length = {name.lower(): value for name, value in answered}.get("content-length")
        declared = length if self.command == "HEAD" and length else str(len(data))
        self.send_header("Content-Length", declared)
        self.end_headers()
        with suppress(OSError):
            self._send_body(data, fault)
        return None

    do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = _serve

    def _pass_on(self, body: bytes) -> tuple[int, list[tuple[str, str]], bytes]:
        connection = http.client.HTTPConnection(*self.owner.upstream, timeout=60)
        try:
            connection.putrequest(
                self.command, self.path, skip_host=True, skip_accept_encoding=True
            )
            for name, value in self.headers.items():
                if name.lower() not in ("expect", "connection", *self.owner.drop_headers):
                    connection.putheader(name, value)
            connection.endheaders(body)
            answer = connection.getresponse()
            return answer.status, answer.getheaders(), answer.read()
        finally:
            connection.close()

    def _error(self, fault: Fault) -> None:
        text = f"<Error><Code>{fault.code}</Code><Message>by the fault proxy</Message></Error>"
        data = b"" if self.command == "HEAD" else text.encode()
        self.send_response_only(fault.status)
        self.send_header("Content-Type", "application/xml")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        with suppress(OSError):
            self.wfile.write(data)

    def _send_body(self, data: bytes, fault: Fault | None) -> None:
        half = len(data) // 2
        if fault is None:
            self.wfile.write(data)
        elif fault.kind == "flip":
            self.wfile.write(data[:half] + bytes([data[half] ^ 1]) + data[half + 1 :])
        elif fault.kind == "trickle":
            for byte in data:
                self.wfile.write(bytes([byte]))
                time.sleep(0.02)
        else:
            self.close_connection = True
            self.wfile.write(data[:half])
            self.wfile.flush()
            if fault.kind == "reset":
                linger = struct.pack("ii", 1, 0)
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
                self.connection.close()

    def log_message(self, format: str, *args: object) -> None:
        """Silent."""
