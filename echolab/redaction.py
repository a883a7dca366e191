"""Mask secrets in all text that is printed, stored or sent.

Three kinds of text are replaced by `***`:

1. the user, password and query of a URL (`https://user:word@host/d?sig=x`) anywhere in a text.
   The `@` and `?` of a local path are not changed;
2. the values of environment variables whose names indicate a secret (`HF_TOKEN`);
3. the passwords and signatures of registered URLs (`register_secrets`), also outside of a URL:
   libraries put parts of URLs, decoded, into their messages.
"""

import base64
import io
import os
import re
import sys
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from typing import Any, TextIO
from urllib.parse import parse_qsl, quote, unquote

MASK = "***"
SHORTEST = 8  # minimum characters of a secret: masking shorter values would hide ordinary words
LONG = 16  # minimum characters of a query value that counts as secret under any name
SECRET_NAME = re.compile(
    r"^(?!.*_(?:BUDGET|LIMIT|LENGTH|COUNT|SIZE|FILE|PATH|DIR|SOCK)$).*?(?:"
    r"(?:^|[_-])(?:PASS(?:PHRASE)?|PW|SIG|SAS|PAT|AUTH|COOKIE|KEY|TOKEN|SECRET)(?=[_\d-]|$)"
    r"|(?:KEY|KEY_?ID|TOKEN|SECRET|PASSWORD|PASSWD|CREDENTIALS?|SIGNATURE|AUTHORIZATION)\d*$)",
    re.IGNORECASE,
)
LOCAL = ("file", "local")
# pathlib turns `https://host` into `https:/host`.  With a scheme that is not listed here, `x:/y` is
# a path, not a URL.
REMOTE = (
    "http", "https", "s3", "s3a", "s3n", "gs", "gcs", "az", "abfs", "abfss", "adl", "ftp", "ftps",
    "sftp", "ssh", "smb", "hdfs", "webhdfs", "webdav", "hf", "github", "git", "oss", "oci", "wandb",
)  # fmt: skip
INTERPOLATION = r"\$\{[^{}]*\}"
ADDRESS = re.compile(
    r"(?<![A-Za-z0-9+.-])([A-Za-z][A-Za-z0-9+.-]+)(:/{1,3})"
    rf"((?:{INTERPOLATION}|(?!::[A-Za-z][A-Za-z0-9+.-]*:/)[^\s\"<>])+)"
)
HOST = re.compile(r"(?:\[[^\]]*\]|[^:]*)(?::\d*)?")
FIRST_PLACEHOLDER = 0xE000
PLACEHOLDER = re.compile("[\ue000-\uf8ff]+")
PUNCTUATION = "])}'`,;:.!"  # may follow a URL in a text

_concealed: set[str] = set()


def mask_secrets(text: str) -> str:
    """Return the text with every secret replaced by `***`; idempotent."""
    text = ADDRESS.sub(_mask_address, text)
    for secret in sorted(_known_secrets(), key=len, reverse=True):
        text = text.replace(secret, MASK)
    return text


def mask_values(value: Any) -> Any:
    """Return nested mappings and lists as dicts and lists with every text masked."""
    if isinstance(value, Mapping):
        return {mask_secrets(str(key)): mask_values(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [mask_values(inner) for inner in value]
    if isinstance(value, str | os.PathLike):
        return mask_secrets(os.fspath(value))
    return value


def strip_secrets(address: str) -> str:
    """Return a URL without user, password and query."""
    return mask_secrets(address).replace(f"://{MASK}@", "://").partition("?")[0].partition("#")[0]


def register_secrets(address: str) -> None:
    """Register the secrets in the URL `address`, so that they are masked outside of a URL too."""
    match = ADDRESS.fullmatch(address)
    if not match or match[1].lower() in LOCAL:
        return
    user_info, _, query = _split_address(match[3])
    user, _, password = user_info.partition(":")
    # Without a password, the user is a token and therefore the secret.
    secrets = {password or user}
    if len(user) >= LONG:  # an access key
        secrets.add(user)
    if password:
        secrets.add(base64.b64encode(unquote(user_info).encode()).decode())  # as http sends it
    # Signed URLs have their signature in the query.
    for name, value in parse_qsl(query.replace("#", "&").lstrip("?&")):
        if SECRET_NAME.search(name) or (len(value) >= LONG and "/" not in value):
            secrets.add(value)
    # Libraries print secrets percent-encoded or decoded; mask both forms if long enough.
    for secret in secrets:
        spelled = {secret, unquote(secret), quote(unquote(secret), safe="")}
        _concealed.update(spelling for spelling in spelled if len(spelling) >= SHORTEST)


def is_secret_name(name: str) -> bool:
    """Return whether a variable or parameter of this name holds a secret."""
    return bool(SECRET_NAME.search(name))


def _known_secrets() -> set[str]:
    named = {value for name, value in os.environ.items() if is_secret_name(name)}
    # Skip paths of files that hold a secret, as in GOOGLE_APPLICATION_CREDENTIALS.
    return _concealed | {v for v in named if len(v) >= SHORTEST and not os.path.exists(v)}


def _mask_address(match: re.Match[str]) -> str:
    scheme, slashes, rest = match.groups()
    if scheme.lower() in LOCAL or (slashes == ":/" and scheme.lower() not in REMOTE):
        return match[0]
    # Replace each interpolation by one private-use character, since it may contain `:/?#@`.
    held = re.findall(INTERPOLATION, rest)
    indices = iter(range(len(held)))
    rest = re.sub(INTERPOLATION, lambda _: chr(FIRST_PLACEHOLDER + next(indices)), rest)
    # Punctuation at the end belongs to the sentence, not to the URL.
    end = len(rest.rstrip(PUNCTUATION))
    user_info, path, query = _split_address(rest[:end])
    user = f"{_mask_user(user_info)}@" if user_info else ""
    clean = f"{scheme}{slashes}{user}{path}{_mask_query(query)}{rest[end:]}"
    for index, text in enumerate(held):
        clean = clean.replace(chr(FIRST_PLACEHOLDER + index), text)
    return clean


def _split_address(rest: str) -> tuple[str, str, str]:
    """Split the URL after its scheme: user and password, host and path, query and fragment."""
    host = re.split("[/?#]", rest, maxsplit=1)[0]
    at = host.rfind("@")
    if at < 0 and not HOST.fullmatch(host):
        at = rest.rfind("@")  # the password contains a slash or question mark, not encoded
    path = re.split("[?#]", rest[at + 1 :], maxsplit=1)[0]
    return rest[: max(at, 0)], path, rest[at + 1 + len(path) :]


def _mask_user(user_info: str) -> str:
    """Mask user and password, unless the password is an interpolation, which holds no secret."""
    user, _, password = user_info.partition(":")
    return user_info if PLACEHOLDER.fullmatch(password or user) else MASK


def _mask_query(query: str) -> str:
    if len(query) < 2:
        return query
    if not PLACEHOLDER.search(query):
        return query[0] + MASK
    return re.sub(rf"=(?!{PLACEHOLDER.pattern}(?:[&#]|$))[^&#]*", f"={MASK}", query)


class _MaskedStream:
    """A text stream that masks all written text; delegates everything else to the stream."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        self._stream.write(mask_secrets(text))
        return len(text)

    def writelines(self, lines: Iterator[str]) -> None:
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextmanager
def mask_output() -> Iterator[None]:
    """Mask all text that this process writes to standard output and error, including tracebacks.

    Characters that the output encoding lacks are written as escapes, so that printing a path with
    accents cannot raise an error.
    """
    # The interpreter writes uncaught exceptions to the original stream: replace its hook.
    sys.excepthook = _show_traceback
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    out, error = _MaskedStream(sys.stdout), _MaskedStream(sys.stderr)
    with redirect_stdout(out), redirect_stderr(error):
        yield


def _show_traceback(kind: type[BaseException], error: BaseException, trace: Any) -> None:
    """Print an uncaught exception as the interpreter does, but masked."""
    sys.stderr.write(mask_secrets("".join(traceback.format_exception(kind, error, trace))))
