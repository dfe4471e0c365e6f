"""A Hub on loopback that huggingface_hub cannot tell from the real one, with a log and faults on demand.

with Hub() as hub:
    hub.seed(folder, "user/basis")
    ...  # clients with HF_ENDPOINT = hub.address and the token hub.token
    assert hub.bytes_sent("basis.safetensors") < 1000
"""

from __future__ import annotations

import re
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

from .routes import Answer, Request, safely
from .store import Repository, Store

USER, WRITER, READER, STRANGER = "user", "hf_writer", "hf_reader", "hf_stranger"
TOKENS = {WRITER: (USER, "write"), READER: (USER, "read"), STRANGER: ("stranger", "write")}


@dataclass
class Asked:
    """One request and how it was answered; `sent` counts bytes of the body that went out."""

    method: str
    path: str
    range: str | None
    token: str | None
    received: int
    status: int = 0
    sent: int = 0

    @property
    def line(self) -> str:
        return f"{self.method} {self.path}"


@dataclass
class Fault:
    """What happens to the next `times` requests whose line ("GET /path") the pattern is found in.

    cut: the connection ends after so many bytes of the body. status, code: this error instead of the answer.
    hold: the request waits, `reached` is set, until `go` is set.
    """

    pattern: str
    times: int
    cut: int | None = None
    status: int | None = None
    code: str = ""
    hold: bool = False
    reached: threading.Event = field(default_factory=threading.Event)
    go: threading.Event = field(default_factory=threading.Event)


class Hub:
    """The server; `store` is what it holds, `log` what it was asked."""

    token = WRITER

    def __init__(self) -> None:
        self.log: list[Asked] = []
        self._faults: list[Fault] = []
        self._lock = threading.Lock()
        self._server: ThreadingHTTPServer | None = None
        self._port = 0
        self.reset()

    def reset(self) -> None:
        """Forget everything."""
        for fault in self._faults:
            fault.go.set()
        self.store = Store(tokens=dict(TOKENS))
        self.log.clear()
        self._faults.clear()

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self._port}"

    def __enter__(self) -> Hub:
        self.up()
        return self

    def __exit__(self, *error: object) -> None:
        self.reset()
        self._close()

    def up(self) -> None:
        handler = type("Handler", (_Handler,), {"hub": self})
        self._server = _Server(("127.0.0.1", self._port), handler)
        self._port = self._server.server_port
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()

    def _close(self) -> None:
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()
            self._server = None

    @contextmanager
    def down(self) -> Iterator[None]:
        """Nobody listens at the address."""
        self._close()
        try:
            yield
        finally:
            self.up()

    # Faults

    def cut(self, pattern: str, after: int, times: int = 1) -> Fault:
        return self._fault(Fault(pattern, times, cut=after))

    def fail(self, pattern: str, status: int, times: int = 1, code: str = "") -> Fault:
        return self._fault(Fault(pattern, times, status=status, code=code))

    def hold(self, pattern: str) -> Fault:
        return self._fault(Fault(pattern, 1, hold=True))

    def heal(self) -> None:
        for fault in self._faults:
            fault.go.set()
        self._faults.clear()

    def _fault(self, fault: Fault) -> Fault:
        self._faults.append(fault)
        return fault

    def next_fault(self, line: str) -> Fault | None:
        with self._lock:
            for fault in self._faults:
                if fault.times > 0 and re.search(fault.pattern, line):
                    fault.times -= 1
                    return fault
        return None

    # What it holds and what it was asked

    def repo(self, name: str) -> Repository:
        return self.store.repos[name]

    def seed(self, folder: str | Path, name: str, private: bool = False, branch: str = "main") -> str:
        """Commit a folder as the whole content of a repository; returns the commit."""
        return self.store.seed(Path(folder), name, private, branch)

    def asked(self, pattern: str) -> list[Asked]:
        """Requests whose line ("PUT /path") the pattern is found in."""
        return [a for a in list(self.log) if re.search(pattern, a.line)]

    def bytes_sent(self, ending: str) -> int:
        """Bytes of a file that went out, over all requests for it."""
        return sum(a.sent for a in self.asked(f"^GET .*/(resolve|cdn)/.*{re.escape(ending)}$") if a.status < 300)

    def fetched(self) -> set[str]:
        """Paths of the files of which any byte went out."""
        sent = [a.path for a in self.asked("^GET .*/(resolve|cdn)/") if a.status in (200, 206)]
        return {re.sub("^/cdn/[^/]+/[^/]+/[^/]+/|^.*?/resolve/[^/]+/", "", path) for path in sent}


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    request_queue_size = 64

    def handle_error(self, request: object, address: object) -> None:
        pass  # a client that was killed, or that we cut off


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    timeout = 60

    def log_message(self, *args: object) -> None:
        pass

    def _handle(self) -> None:
        parts = urlsplit(self.path)
        body = self._read_body()
        entry = Asked(self.command, unquote(parts.path), self.headers.get("Range"), self._token(), len(body))
        self.hub.log.append(entry)
        fault = self.hub.next_fault(entry.line)
        if fault is not None and fault.hold:
            fault.reached.set()
            fault.go.wait(60)
        request = Request(self.command, parts.path, parse_qs(parts.query), self.headers, body, self.hub.address)
        if fault is not None and fault.status:
            self._send(entry, Answer(b"{}", fault.status, {"X-Error-Code": fault.code}), None)
        else:
            self._send(entry, safely(self.hub.store, request), fault.cut if fault else None)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = _handle

    def _token(self) -> str | None:
        return self.headers.get("Authorization", "").removeprefix("Bearer ") or None

    def _read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() == "chunked":
            parts = []
            while size := int(self.rfile.readline().split(b";")[0], 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)
        length = int(self.headers.get("Content-Length", 0))
        body = self.rfile.read(length)
        if len(body) < length:
            raise ConnectionError("the client went away in the middle of its request")
        return body

    def _send(self, entry: Asked, answer: Answer, cut: int | None) -> None:
        data, status, headers = answer.data, answer.status, dict(answer.headers)
        if answer.is_file:
            headers["Accept-Ranges"] = "bytes"
            data, status = _part(entry.range, data, headers)
        entry.status = status
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        entry.sent = len(data) if cut is None else min(cut, len(data))
        self.wfile.write(data[: entry.sent])
        if cut is not None:
            self.wfile.flush()
            self.close_connection = True
            # The client has what was sent, and then sees the end of the stream before the end of the body.
            self.connection.shutdown(socket.SHUT_RDWR)


def _part(wanted: str | None, data: bytes, headers: dict[str, str]) -> tuple[bytes, int]:
    """The bytes that a Range header asks for, and the status."""
    match = re.fullmatch(r"bytes=(\d*)-(\d*)", wanted or "")
    if not match or not any(match.groups()):
        return data, 200
    first, last = match.groups()
    start = int(first) if first else max(0, len(data) - int(last))
    stop = min(int(last) + 1, len(data)) if first and last else len(data)
    if start >= len(data):
        headers["Content-Range"] = f"bytes */{len(data)}"
        return b"", 416
    headers["Content-Range"] = f"bytes {start}-{stop - 1}/{len(data)}"
    return data[start:stop], 206
