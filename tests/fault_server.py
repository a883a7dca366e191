"""A web server for a folder that misbehaves on demand, in a thread of the test."""

import os
import socket
import struct
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

Fault = Callable[["Answer"], None]


class Answer(BaseHTTPRequestHandler):
    """One request, which a fault may handle instead."""

    protocol_version = "HTTP/1.1"
    server: "FaultServer"

    def do_GET(self) -> None:
        name = self.path.lstrip("/").partition("?")[0]
        server = self.server
        with server.guard:
            server.asked[name] += 1
            waiting = server.faults.get(name)
            fault = waiting.popleft() if waiting else server.always.get(name, complete)
        self.data = (server.folder / name).read_bytes() if (server.folder / name).exists() else None
        self.tag = server.tags.get(name, '"1"')
        self.close_connection = True
        try:
            fault(self)
        except (BrokenPipeError, ConnectionResetError):
            pass  # the other side had enough

    def head(self, status: int, size: int, **headers: str) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(size))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()

    def start(self) -> int:
        """Return the first byte requested, if the request names this version of the object."""
        first = self.headers.get("Range", "bytes=0-").removeprefix("bytes=").rstrip("-")
        return int(first) if self.headers.get("If-Range", self.tag) == self.tag else 0

    def body(self) -> bytes:
        """Send the headers, and return the bytes to send."""
        if self.data is None:
            self.head(404, 0)
            return b""
        start = self.start()
        headers = {"ETag": self.tag}
        if start:
            size = len(self.data)
            headers["Content_Range"] = f"bytes {start}-{size - 1}/{size}"
            self.server.resumed.append(start)
        self.head(206 if start else 200, len(self.data) - start, **headers)
        return self.data[start:]

    def log_message(self, *words: Any) -> None:
        pass


def complete(answer: Answer) -> None:
    answer.wfile.write(answer.body())


def truncated(answer: Answer) -> None:
    data = answer.body()
    answer.wfile.write(data[: len(data) // 2])


def reset(answer: Answer) -> None:
    """Send half of the body, then reset the connection."""
    truncated(answer)
    answer.wfile.flush()
    answer.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    answer.connection.close()


def stall(answer: Answer) -> None:
    truncated(answer)
    answer.wfile.flush()
    answer.server.released.wait(20)


def silent(answer: Answer) -> None:
    answer.server.released.wait(20)


def wrong(answer: Answer) -> None:
    data = bytearray(answer.body())
    data[len(data) // 3] ^= 1
    answer.wfile.write(data)


def longer(answer: Answer) -> None:
    assert answer.data is not None
    answer.data += bytes(512)
    answer.wfile.write(answer.body())


def trickle(answer: Answer) -> None:
    """Send a byte at a time, without silence and without end."""
    for byte in answer.body():
        answer.wfile.write(bytes([byte]))
        if answer.server.released.wait(0.01):
            return


def endless(answer: Answer) -> None:
    """Send the body, then bytes without end; announce no length."""
    answer.send_response(200)
    answer.end_headers()
    answer.wfile.write(answer.data or b"")
    while not answer.server.released.is_set():
        answer.wfile.write(bytes(2**16))


def announces(size: int) -> Fault:
    """Return a fault that announces this length instead of the file's."""
    return lambda answer: answer.head(200, size)


def sent_to(url: str) -> Fault:
    return lambda answer: answer.head(302, 0, Location=url)


def slow(answer: Answer) -> None:
    data = answer.body()
    for start in range(0, len(data), 4096):
        answer.wfile.write(data[start : start + 4096])
        time.sleep(0.002)


def new_tag(answer: Answer) -> None:
    """Send half of the body while the object is replaced by one of the same bytes."""
    truncated(answer)
    answer.server.tags[answer.path.lstrip("/")] = '"2"'


def stubborn(answer: Answer) -> None:
    """Send the requested part of whichever object is there now."""
    answer.headers.replace_header("If-Range", answer.tag)
    complete(answer)


def from_the_start(answer: Answer) -> None:
    """Answer as a server without range requests."""
    del answer.headers["Range"]
    complete(answer)


def other_part(answer: Answer) -> None:
    """Answer as a server that ignores If-Range and its earlier answers."""
    answer.tag = answer.headers.get("If-Range", '"1"')
    data = answer.body()
    answer.wfile.write(bytes(len(data)))


def status(code: int) -> Fault:
    return lambda answer: answer.head(code, 0)


class FaultServer(ThreadingHTTPServer):
    """Serves `folder`; each of `faults` is used once, in order, `always` every time."""

    daemon_threads = True
    block_on_close = False
    request_queue_size = 64

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), Answer)
        self.folder = folder
        self.guard, self.released = threading.Lock(), threading.Event()
        self.asked: Counter[str] = Counter()
        self.faults: dict[str, deque[Fault]] = {}
        self.always: dict[str, Fault] = {}
        self.tags: dict[str, str] = {}
        self.resumed: list[int] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def handle_error(self, request: Any, client_address: Any) -> None:
        pass  # a connection that the other side dropped


@contextmanager
def serving(folder: Path) -> Iterator[FaultServer]:
    os.environ["no_proxy"] = "127.0.0.1"
    server = FaultServer(folder)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.released.set()
        server.shutdown()
        server.server_close()
