"""Ask for a remote object, from one of its bytes on: http(s) by urllib, all else by fsspec.

Both give a Reply or raise one of two errors: Refused, where asking again would not help, and
Interrupted, where it may.
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
from echolab.redaction import conceal, masked, without_secrets

WEB = ("http", "https")
HTTP_BYTES = 1 << 20  # at most, in one read; a read ends with what has come
FSSPEC_BYTES = 8 << 20  # each read is one request for so many
NETWORK = "check the server and the network"
PLACE = "check the address, and that the upload was finished"
CREDENTIALS = "check the credentials"
PACKAGES = {"s3": "s3fs", "s3a": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "az": "adlfs"}


class Refused(Exception):
    """The server said no for good; what to do about it."""

    def __init__(self, what: str, remedy: str) -> None:
        super().__init__(what)
        self.remedy = remedy


class Interrupted(Exception):
    """Something went wrong that may pass; `lost`: what came before is of no use either."""

    def __init__(self, what: str, *, remedy: str = NETWORK, lost: bool = False) -> None:
        super().__init__(what)
        self.remedy, self.lost = remedy, lost


class Reply(NamedTuple):
    """What is being sent."""

    start: int  # the first byte of what `read` gives
    size: int | None  # of the whole object, if the server tells
    tag: str | None  # differs where the object does
    read: Callable[[], bytes]  # the next bytes; none at the end
    close: Callable[[], None]


def url_of(place: Path | str) -> str | None:
    """The address that a setting names; None for a folder.  Raises ConfigError.

    Its secrets are masked from now on, wherever this process writes them.
    """
    # A Path has lost a slash: https:/host.
    found = re.fullmatch(r"([A-Za-z][A-Za-z0-9+.-]+):/(?:/(.*)|(.+))", str(place), re.DOTALL)
    if re.search(r"::[A-Za-z][A-Za-z0-9+.-]+:/", str(place)):
        raise ConfigError(f"{masked(str(place))}: chained addresses are not read; give one address")
    if not found:
        return None
    rest = found[2] if found[2] is not None else found[3]
    url = f"{found[1].lower()}://{rest}".rstrip("/")
    conceal(url)
    if "@" in rest and "@" not in urlsplit(url).netloc and "***@" in masked(url):
        raise ConfigError(
            f"{masked(url)}: the password holds a slash, ? or #; write it as %2F, %3F or %23"
        )
    return url


def joined(url: str, name: str) -> str:
    """The address of an object below `url`, with its query if it has one."""
    if urlsplit(url).scheme not in WEB:
        return f"{url}/{name}"
    parts = urlsplit(url)
    return urlunsplit(parts._replace(path=f"{parts.path.rstrip('/')}/{name}"))


def shown(url: str) -> str:
    """The address without user, password and query, which may be secrets."""
    return without_secrets(url)


# Without those for ftp:, file: and data:, to which a server could send us on.
_WEB = urllib.request.OpenerDirector()
for _handler in (
    urllib.request.ProxyHandler, urllib.request.HTTPHandler, urllib.request.HTTPSHandler,
    urllib.request.HTTPRedirectHandler, urllib.request.HTTPDefaultErrorHandler,
    urllib.request.HTTPErrorProcessor, urllib.request.UnknownHandler,
):  # fmt: skip
    _WEB.add_handler(_handler())


def ask(url: str, start: int, tag: str | None, seconds: float) -> Reply:
    """Begin to read `url` at byte `start` of the object that bears `tag`.

    A server that cannot, or has another object by now, begins at 0.  Nothing blocks on a silent
    http server for more than `seconds`; raises Refused, Interrupted or ConfigError.
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


def _ask_http(url: str, start: int, tag: str | None, seconds: float) -> Reply:
    try:
        response = _WEB.open(_request(url, start, tag), timeout=seconds)
    except urllib.error.HTTPError as error:
        error.close()
        raise _status(error.code, error.reason) from error
    except urllib.error.URLError as error:
        if isinstance(error.reason, ssl.SSLCertVerificationError):
            raise Refused(f"no connection ({error.reason})", "check its certificate") from error
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
    return Reply(begins, size, strong, read, response.close)


def _broken(what: str, error: object, seconds: float) -> Interrupted:
    silent = isinstance(error, TimeoutError)
    return Interrupted(silence(seconds) if silent else f"{what} ({_words(error)})")


def silence(seconds: float) -> str:
    """What a stall is called, whoever sees it first."""
    return f"no byte for {seconds:.3g} s"


def _status(code: int, reason: str) -> Exception:
    if code in (408, 416, 429) or code >= 500:
        # 416: the object is shorter by now than what had come of it.
        return Interrupted(f"HTTP {code} {reason}", lost=code == 416)
    return Refused(f"HTTP {code} {reason}", CREDENTIALS if code in (401, 403, 407) else PLACE)


def _extent(response: Any) -> tuple[int, int | None]:
    """(first byte sent, size of the whole object) by the headers."""
    length = response.headers.get("Content-Length")
    if response.status != 206:
        return 0, int(length) if length and length.isdigit() else None
    sent = re.fullmatch(r"bytes (\d+)-\d+/(\d+|\*)", response.headers.get("Content-Range", ""))
    if not sent:
        response.close()
        raise Interrupted("a part was sent that does not say which", lost=True)
    return int(sent[1]), int(sent[2]) if sent[2].isdigit() else None


def _ask_fsspec(url: str, start: int, tag: str | None) -> Reply:
    try:
        # An instance from before a fork would wait for a thread that is not there.
        system, path = fsspec.core.url_to_fs(url, skip_instance_cache=True)
    except ImportError as error:
        scheme = urlsplit(url).scheme
        package = PACKAGES.get(scheme, str(error))
        raise ConfigError(
            f"{shown(url)}: {scheme}:// needs a package that is not installed; "
            f"pip install {package}"
        ) from error
    except ValueError as error:
        raise ConfigError(f"{shown(url)}: {error}; give a folder or an address") from error
    try:
        now = str(system.ukey(path))
        size = int(system.info(path)["size"])
        file = system.open(path, "rb", block_size=FSSPEC_BYTES, cache_type="none")
        begins = start if tag == now else 0
        file.seek(begins)
    except PermissionError as error:
        raise Refused(_words(error), CREDENTIALS) from error
    except (FileNotFoundError, IsADirectoryError) as error:
        raise Refused(_words(error), PLACE) from error
    except Exception as error:  # each file system has errors of its own
        raise Interrupted(_words(error)) from error

    def read() -> bytes:
        try:
            return file.read(FSSPEC_BYTES)
        except Exception as error:
            raise Interrupted(_words(error)) from error

    return Reply(begins, size, now, read, file.close)


def _words(error: object) -> str:
    """An error of somebody else's in one line."""
    text = getattr(error, "strerror", None) or " ".join(str(error).split())
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
