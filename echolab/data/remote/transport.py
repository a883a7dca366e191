"""Request a remote object from a given byte: http(s) by urllib, all else by fsspec.

Both return a Response or raise one of two errors: PermanentError, if a retry would not help, and
TransientError, if it may.
"""

import base64
import http.client
import re
import ssl
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import unquote, urlsplit, urlunsplit

import fsspec

from echolab.errors import ConfigError
from echolab.redaction import mask_secrets, register_secrets, strip_secrets

WEB = ("http", "https")
HTTP_BYTES = 1 << 20  # at most, in one read; a read ends with what has come
FSSPEC_BYTES = 8 << 20  # each read is one request for so many
NETWORK = "check the server and the network"
PLACE = "check the address, and that the upload was finished"
CREDENTIALS = "check the credentials"
PACKAGES = {"s3": "s3fs", "s3a": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "az": "adlfs"}


class PermanentError(Exception):
    """The server refused, and would again; with the remedy."""

    def __init__(self, what: str, remedy: str) -> None:
        super().__init__(what)
        self.remedy = remedy


class TransientError(Exception):
    """A fault that may pass; `lost`: the bytes received before are of no use either."""

    def __init__(self, what: str, *, remedy: str = NETWORK, lost: bool = False) -> None:
        super().__init__(what)
        self.remedy, self.lost = remedy, lost


class Response(NamedTuple):
    """A body that is being received."""

    start: int  # the first byte of what `read` gives
    size: int | None  # of the object, if the server states it
    tag: str | None  # differs where the object does
    read: Callable[[], bytes]  # the next bytes; none at the end
    close: Callable[[], None]


def parse_url(place: Path | str) -> str | None:
    """Return the address that a setting names, None for a folder; raise ConfigError.

    From now on its secrets are masked wherever this process writes them.
    """
    # A Path has lost a slash: https:/host.
    parts = re.fullmatch(r"([A-Za-z][A-Za-z0-9+.-]+):/(?:/(.*)|(.+))", str(place), re.DOTALL)
    if re.search(r"::[A-Za-z][A-Za-z0-9+.-]+:/", str(place)):
        raise ConfigError(
            f"{mask_secrets(str(place))}: chained addresses are not read; give one address"
        )
    if not parts:
        return None
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


# Without the handlers of ftp:, file: and data:, to which a server could redirect.
_WEB = urllib.request.OpenerDirector()
for _handler in (
    urllib.request.ProxyHandler, urllib.request.HTTPHandler, urllib.request.HTTPSHandler,
    urllib.request.HTTPRedirectHandler, urllib.request.HTTPDefaultErrorHandler,
    urllib.request.HTTPErrorProcessor, urllib.request.UnknownHandler,
):  # fmt: skip
    _WEB.add_handler(_handler())


def ask(url: str, start: int, tag: str | None, seconds: float) -> Response:
    """Request `url` from byte `start` of the object that has `tag`.

    A server that cannot, or has another object now, begins at 0.  Nothing blocks on a silent http
    server for more than `seconds`.  Raises PermanentError, TransientError or ConfigError.
    """
    if urlsplit(url).scheme in WEB:
        return _ask_http(url, start, tag, seconds)
    return _ask_fsspec(url, start, tag)


def _request(url: str, start: int, tag: str | None) -> urllib.request.Request:
    parts = urlsplit(url)
    credentials, _, host = parts.netloc.rpartition("@")
    # A server that compresses would send other bytes than it stores.
    headers = {"Accept-Encoding": "identity", "User-Agent": "echolab"}
    if start and tag:
        headers |= {"Range": f"bytes={start}-", "If-Range": tag}
    request = urllib.request.Request(urlunsplit(parts._replace(netloc=host)), headers=headers)
    if credentials:
        word = base64.b64encode(unquote(credentials).encode()).decode()
        request.add_unredirected_header("Authorization", f"Basic {word}")
    return request


def _ask_http(url: str, start: int, tag: str | None, seconds: float) -> Response:
    try:
        response = _WEB.open(_request(url, start, tag), timeout=seconds)
    except urllib.error.HTTPError as error:
        error.close()
        raise _status(error.code, error.reason) from error
    except urllib.error.URLError as error:
        if isinstance(error.reason, ssl.SSLCertVerificationError):
            raise PermanentError(
                f"no connection ({error.reason})", "check its certificate"
            ) from error
        raise _broken("no connection", error.reason, seconds) from error
    except (OSError, http.client.HTTPException) as error:
        raise _broken("the connection broke", error, seconds) from error

    def read() -> bytes:
        try:
            return response.read1(HTTP_BYTES)
        except (OSError, ValueError, http.client.HTTPException) as error:
            raise _broken("the connection broke", error, seconds) from error

    begins, size = _extent(response)
    etag = response.headers.get("ETag")
    # A weak tag names what means the same, not the same bytes.
    strong = etag if etag and not etag.startswith("W/") else None
    return Response(begins, size, strong, read, response.close)


def _broken(what: str, error: object, seconds: float) -> TransientError:
    silent = isinstance(error, TimeoutError)
    return TransientError(silence(seconds) if silent else f"{what} ({_words(error)})")


def silence(seconds: float) -> str:
    """Return the words for a stall."""
    return f"no byte for {seconds:.3g} s"


def _status(code: int, reason: str) -> Exception:
    if code in (408, 416, 429) or code >= 500:
        # 416: the object is now shorter than the bytes received of it.
        return TransientError(f"HTTP {code} {reason}", lost=code == 416)
    return PermanentError(
        f"HTTP {code} {reason}", CREDENTIALS if code in (401, 403, 407) else PLACE
    )


def _extent(response: Any) -> tuple[int, int | None]:
    """Return (first byte sent, size of the object) by the headers."""
    length = response.headers.get("Content-Length")
    if response.status != 206:
        return 0, int(length) if length and length.isdigit() else None
    sent = re.fullmatch(r"bytes (\d+)-\d+/(\d+|\*)", response.headers.get("Content-Range", ""))
    if not sent:
        response.close()
        raise TransientError("a part was sent that does not say which", lost=True)
    return int(sent[1]), int(sent[2]) if sent[2].isdigit() else None


def _ask_fsspec(url: str, start: int, tag: str | None) -> Response:
    try:
        # An instance from before a fork would wait for a thread that is not there.
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
    try:
        now = str(system.ukey(path))
        size = int(system.info(path)["size"])
        file = system.open(path, "rb", block_size=FSSPEC_BYTES, cache_type="none")
        begins = start if tag == now else 0
        file.seek(begins)
    except PermissionError as error:
        raise PermanentError(_words(error), CREDENTIALS) from error
    except (FileNotFoundError, IsADirectoryError) as error:
        raise PermanentError(_words(error), PLACE) from error
    except Exception as error:  # each file system has errors of its own
        raise TransientError(_words(error)) from error

    def read() -> bytes:
        try:
            return file.read(FSSPEC_BYTES)
        except Exception as error:
            raise TransientError(_words(error)) from error

    return Response(begins, size, now, read, file.close)


def _words(error: object) -> str:
    """Return the error of a library in one line."""
    text = getattr(error, "strerror", None) or " ".join(str(error).split())
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
