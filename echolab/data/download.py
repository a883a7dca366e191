"""Fetch a remote object completely and verified, or raise a typed error within a deadline.

A request fetches the object from a given byte on: by urllib for http(s), by fsspec for all other
schemes.  Both return a Response or raise PermanentError, if a retry would not help, or
TransientError, if a retry may help.

An interrupted transfer is retried after a random pause that doubles.  It resumes at the first
missing byte if the server still has the same object, else it restarts.
"""

import base64
import hashlib
import http.client
import random
import re
import ssl
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from queue import Empty, SimpleQueue
from threading import Thread
from typing import Any, BinaryIO, NamedTuple, TypeVar
from urllib.parse import unquote, urlsplit, urlunsplit

import fsspec

from echolab.errors import ConfigError, DataError, StorageError
from echolab.redaction import mask_secrets, register_secrets, strip_secrets

WEB = ("http", "https")
HTTP_BYTES = 1 << 20  # maximum per read; a read returns the bytes that have arrived
FSSPEC_BYTES = 8 << 20  # bytes per read, each a separate request
MAX_BYTES = 2**31  # limit for an object of unknown size, which is held in memory
# Remedies
CHECK_NETWORK = "check the server and the network"
CHECK_ADDRESS = "check the address, and that the upload was finished"
CHECK_CREDENTIALS = "check the credentials"
UPLOAD_AGAIN = "the object is not the one that was indexed; upload the whole dataset again"
PACKAGES = {"s3": "s3fs", "s3a": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "az": "adlfs"}


class PermanentError(Exception):
    """A failure that a retry would not change; `remedy` is for the user."""

    def __init__(self, what: str, remedy: str) -> None:
        super().__init__(what)
        self.remedy = remedy


class TransientError(Exception):
    """A failure that a retry may fix; `lost` means that the bytes received so far are invalid."""

    def __init__(self, what: str, *, remedy: str = CHECK_NETWORK, lost: bool = False) -> None:
        super().__init__(what)
        self.remedy, self.lost = remedy, lost


class Response(NamedTuple):
    """The response to a request, whose body is read in parts."""

    start: int  # byte of the object at which `read` begins
    size: int | None  # size of the object, None if the server does not state it
    tag: str | None  # version of the object, such as its ETag; a changed object has another tag
    read: Callable[[], bytes]  # returns the next bytes; none at the end
    close: Callable[[], None]


def parse_url(location: Path | str) -> str | None:
    """Return the address in a setting, None for a folder; raise ConfigError.

    Secrets in the address are masked from now on in all output of this process.
    """
    # A Path drops the second slash: https:/host.
    parts = re.fullmatch(r"([A-Za-z][A-Za-z0-9+.-]+):/(?:/(.*)|(.+))", str(location), re.DOTALL)
    if re.search(r"::[A-Za-z][A-Za-z0-9+.-]+:/", str(location)):
        raise ConfigError(
            f"{mask_secrets(str(location))}: chained addresses are not supported; give one address"
        )
    if not parts:
        return None
    # Register the secrets first, so that error messages mask them.
    rest = parts[2] if parts[2] is not None else parts[3]
    url = f"{parts[1].lower()}://{rest}".rstrip("/")
    register_secrets(url)
    if "@" in rest and "@" not in urlsplit(url).netloc and "***@" in mask_secrets(url):
        raise ConfigError(
            f"{mask_secrets(url)}: the password holds a slash, ? or #; write it as %2F, %3F or %23"
        )
    return url


def join_url(url: str, name: str) -> str:
    """Return the address of an object below `url`, with the query of `url` if it has one."""
    if urlsplit(url).scheme not in WEB:
        return f"{url}/{name}"
    parts = urlsplit(url)
    return urlunsplit(parts._replace(path=f"{parts.path.rstrip('/')}/{name}"))


def public_url(url: str) -> str:
    """Return the address without user, password and query, which may be secrets."""
    return strip_secrets(url)


# Exclude the handlers of ftp:, file: and data:, to which a server could redirect.
_WEB = urllib.request.OpenerDirector()
for _handler in (
    urllib.request.ProxyHandler, urllib.request.HTTPHandler, urllib.request.HTTPSHandler,
    urllib.request.HTTPRedirectHandler, urllib.request.HTTPDefaultErrorHandler,
    urllib.request.HTTPErrorProcessor, urllib.request.UnknownHandler,
):  # fmt: skip
    _WEB.add_handler(_handler())


def send_request(url: str, start: int, tag: str | None, seconds: float) -> Response:
    """Request `url` from byte `start` of the object that has `tag`.

    A server that cannot resume, or that has another object now, starts at 0.  A silent http server
    blocks for at most `seconds`.  Raise PermanentError, TransientError or ConfigError.
    """
    if urlsplit(url).scheme in WEB:
        return _request_http(url, start, tag, seconds)
    return _request_fsspec(url, start, tag)


def _build_request(url: str, start: int, tag: str | None) -> urllib.request.Request:
    # Send credentials in a header that redirects to another host do not copy.
    parts = urlsplit(url)
    credentials, _, host = parts.netloc.rpartition("@")
    # Disable compression, so that the bytes are those of the stored object.
    headers = {"Accept-Encoding": "identity", "User-Agent": "echolab"}
    if start and tag:
        headers |= {"Range": f"bytes={start}-", "If-Range": tag}
    request = urllib.request.Request(urlunsplit(parts._replace(netloc=host)), headers=headers)
    if credentials:
        token = base64.b64encode(unquote(credentials).encode()).decode()
        request.add_unredirected_header("Authorization", f"Basic {token}")
    return request


def _request_http(url: str, start: int, tag: str | None, seconds: float) -> Response:
    # Classify errors: a wrong certificate or a refusal is permanent, others are transient.
    try:
        response = _WEB.open(_build_request(url, start, tag), timeout=seconds)
    except urllib.error.HTTPError as error:
        error.close()
        raise _status_error(error.code, error.reason) from error
    except urllib.error.URLError as error:
        if isinstance(error.reason, ssl.SSLCertVerificationError):
            raise PermanentError(
                f"no connection ({error.reason})", "check the server's certificate"
            ) from error
        raise _transfer_error("no connection", error.reason, seconds) from error
    except (OSError, http.client.HTTPException) as error:
        raise _transfer_error("the connection broke", error, seconds) from error

    # An IncompleteRead or a reset is a transient failure of the transfer.
    def read() -> bytes:
        try:
            return response.read1(HTTP_BYTES)
        except (OSError, ValueError, http.client.HTTPException) as error:
            raise _transfer_error("the connection broke", error, seconds) from error

    begins, size = _content_range(response)
    etag = response.headers.get("ETag")
    # A weak ETag does not guarantee identical bytes.
    strong = etag if etag and not etag.startswith("W/") else None
    return Response(begins, size, strong, read, response.close)


def _transfer_error(what: str, error: object, seconds: float) -> TransientError:
    silent = isinstance(error, TimeoutError)
    return TransientError(describe_stall(seconds) if silent else f"{what} ({_describe(error)})")


def describe_stall(seconds: float) -> str:
    """Return the description of a stall for an error message."""
    return f"no byte for {seconds:.3g} s"


def _status_error(code: int, reason: str) -> Exception:
    if code in (408, 416, 429) or code >= 500:
        # 416: the object is now shorter than the bytes received so far.
        return TransientError(f"HTTP {code} {reason}", lost=code == 416)
    return PermanentError(
        f"HTTP {code} {reason}", CHECK_CREDENTIALS if code in (401, 403, 407) else CHECK_ADDRESS
    )


def _content_range(response: Any) -> tuple[int, int | None]:
    """Return (first byte sent, size of the object) according to the headers."""
    length = response.headers.get("Content-Length")
    if response.status != 206:
        return 0, int(length) if length and length.isdigit() else None
    sent = re.fullmatch(r"bytes (\d+)-\d+/(\d+|\*)", response.headers.get("Content-Range", ""))
    if not sent:
        response.close()
        raise TransientError("the server sent a part without its Content-Range", lost=True)
    return int(sent[1]), int(sent[2]) if sent[2].isdigit() else None


def _request_fsspec(url: str, start: int, tag: str | None) -> Response:
    try:
        # A cached instance from before a fork would wait for a thread that no longer exists.
        system, path = fsspec.core.url_to_fs(url, skip_instance_cache=True)
    except ImportError as error:
        scheme = urlsplit(url).scheme
        package = PACKAGES.get(scheme, str(error))
        raise ConfigError(
            f"{public_url(url)}: {scheme}:// needs a package that is not installed; "
            f"pip install {package}"
        ) from error
    except ValueError as error:
        raise ConfigError(f"{public_url(url)}: {error}; give a folder or an address") from error
    # Resume only if the object has not changed.
    try:
        now = str(system.ukey(path))
        size = int(system.info(path)["size"])
        file = system.open(path, "rb", block_size=FSSPEC_BYTES, cache_type="none")
        begins = start if tag == now else 0
        file.seek(begins)
    except PermissionError as error:
        raise PermanentError(_describe(error), CHECK_CREDENTIALS) from error
    except (FileNotFoundError, IsADirectoryError) as error:
        raise PermanentError(_describe(error), CHECK_ADDRESS) from error
    except Exception as error:  # file systems raise different errors
        raise TransientError(_describe(error)) from error

    def read() -> bytes:
        try:
            return file.read(FSSPEC_BYTES)
        except Exception as error:
            raise TransientError(_describe(error)) from error

    return Response(begins, size, now, read, file.close)


def _describe(error: object) -> str:
    """Return a library's error as one line."""
    text = getattr(error, "strerror", None) or " ".join(str(error).split())
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


# Fetching: complete, verified, within a deadline


Result = TypeVar("Result")

# Pauses must differ between processes and must not consume seeded random numbers.
_RANDOM = random.SystemRandom()


class FetchError(DataError):
    """A remote object could not be fetched: a failure of network or server, not a bad sample."""


class UnreachableError(FetchError, StorageError):
    """A server or network did not respond in time; a later retry may succeed."""


class RetryPolicy(NamedTuple):
    """Number and delays of the attempts to reach a server."""

    attempts: int = 6
    stall_seconds: float = 30.0  # maximum time without receiving a byte
    deadline_seconds: float = 900.0  # for one object, including all attempts and pauses
    first_pause_seconds: float = 0.5
    max_pause_seconds: float = 30.0


class Expected(NamedTuple):
    """The size and checksum that an object must have."""

    bytes: int
    sha256: str


class _CallThread:
    """A thread that makes blocking calls, so that the calling thread can time out.

    Some file systems and name resolution have no timeout.  A call that timed out occupies its
    thread until it returns; the thread is a daemon, so that the process can exit.
    """

    def __init__(self) -> None:
        self._calls: SimpleQueue[Callable[[], Any] | None] = SimpleQueue()
        self._results: SimpleQueue[tuple[bool, Any]] = SimpleQueue()
        Thread(target=self._work, name="fetch", daemon=True).start()

    def _work(self) -> None:
        while (call := self._calls.get()) is not None:
            try:
                self._results.put((True, call()))
            except BaseException as error:
                self._results.put((False, error))

    def call(self, function: Callable[[], Result], seconds: float) -> Result:
        """Return or raise as `function` does; raise TransientError after `seconds`."""
        self._calls.put(function)
        try:
            good, result = self._results.get(timeout=seconds)
        except Empty:
            raise TransientError(describe_stall(seconds)) from None
        if not good:
            raise result
        return result

    def end(self, last: Callable[[], Any]) -> None:
        """Schedule one last call without waiting for it, then end the thread."""
        self._calls.put(last)
        self._calls.put(None)


class _Body:
    """The bytes received so far, in a file."""

    count: int
    tag: str | None

    def __init__(self, file: BinaryIO) -> None:
        self.file = file
        self.restart()

    def restart(self) -> None:
        self.file.seek(0)
        self.count, self.tag, self.hash = 0, None, hashlib.sha256()

    def add(self, data: bytes) -> None:
        self.file.write(data)
        self.hash.update(data)
        self.count += len(data)


def fetch(url: str, file: BinaryIO, expected: Expected | None, retry_policy: RetryPolicy) -> None:
    """Write the object at `url` to `file` from its start.

    If `expected` is None, the object is complete when it has the size that the server stated.
    Raise UnreachableError if the same request may succeed later, else FetchError.
    """
    # Retry until the object is complete, the policy is exhausted, or a failure is permanent.
    began = time.monotonic()
    deadline = began + retry_policy.deadline_seconds
    body, last, attempts = _Body(file), TransientError("no time left for a request"), 0
    while attempts < retry_policy.attempts and time.monotonic() < deadline:
        if attempts:
            remaining = max(0.0, deadline - time.monotonic())
            time.sleep(min(backoff_seconds(attempts, retry_policy), remaining))
        attempts += 1
        try:
            _try_fetch(url, body, expected, retry_policy.stall_seconds, deadline)
            return
        except PermanentError as error:
            raise FetchError(f"{public_url(url)}: {error}; {error.remedy}") from error
        except TransientError as error:
            last = error
            if error.lost:
                body.restart()
    kind = FetchError if last.remedy is UPLOAD_AGAIN else UnreachableError
    raise kind(
        f"{public_url(url)}: {last}; gave up after {attempts} attempts and "
        f"{time.monotonic() - began:.3g} s; {last.remedy}"
    ) from last


def _try_fetch(
    url: str, body: _Body, expected: Expected | None, stall: float, deadline: float
) -> None:
    caller, close = _CallThread(), lambda: None

    # Each call may wait until a stall or the deadline, whichever comes first.
    def seconds() -> float:
        remaining = deadline - time.monotonic()
        if remaining <= 0:
            raise TransientError(f"too slow: {body.count} bytes came before the deadline")
        return min(stall, remaining)

    try:
        wait = seconds()
        response = caller.call(lambda: send_request(url, body.count, body.tag, wait), wait)
        close = response.close
        _start_body(body, response, expected)
        limit = _size_limit(response, expected)
        while body.count < limit and (data := caller.call(response.read, seconds())):
            body.add(data[: limit - body.count])  # a server may send too many bytes
        _check_body(body, response, expected)
    finally:
        caller.end(close)


def _start_body(body: _Body, response: Response, expected: Expected | None) -> None:
    """Resume the body if the response continues the same object, else restart it."""
    # Bytes of two versions of the object must not be mixed.
    if response.start and (response.start, response.tag) != (body.count, body.tag):
        what = f"the object changed (ETag {body.tag} to {response.tag})"
        raise TransientError(what, lost=True)
    if not response.start:
        body.restart()
    body.tag = response.tag
    if expected and response.size not in (None, expected.bytes):
        what = f"{response.size} bytes are there, dataset.json says {expected.bytes}"
        raise TransientError(what, remedy=UPLOAD_AGAIN, lost=True)


def _size_limit(response: Response, expected: Expected | None) -> int:
    """Return the maximum number of bytes to read."""
    if expected:
        return expected.bytes
    if response.size is not None and response.size > MAX_BYTES:
        raise PermanentError(f"{response.size} bytes, the limit is {MAX_BYTES}", CHECK_ADDRESS)
    return MAX_BYTES + 1 if response.size is None else response.size


def _check_body(body: _Body, response: Response, expected: Expected | None) -> None:
    # Check the length first: the checksum of a truncated object is meaningless.
    if body.count > MAX_BYTES and not expected:
        raise PermanentError(f"longer than the limit of {MAX_BYTES} bytes", CHECK_ADDRESS)
    size = expected.bytes if expected else response.size
    if size is not None and body.count < size:
        raise TransientError(f"cut at byte {body.count} of {size}")
    if expected and (sha256 := body.hash.hexdigest()) != expected.sha256:
        what = f"wrong bytes: sha256 {sha256[:12]}..., dataset.json says {expected.sha256[:12]}..."
        raise TransientError(what, remedy=UPLOAD_AGAIN, lost=True)


def backoff_seconds(attempt: int, retry_policy: RetryPolicy) -> float:
    """Return the seconds before the next attempt: exponential backoff with jitter."""
    # The jitter spreads ranks that failed at the same time.
    limit = min(
        retry_policy.first_pause_seconds * 2.0 ** (attempt - 1), retry_policy.max_pause_seconds
    )
    return limit * _RANDOM.uniform(0.5, 1.0)
