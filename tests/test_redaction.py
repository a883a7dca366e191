"""Secrets are removed from every text; other text stays as it is."""

import subprocess
import sys
from pathlib import Path

import pytest

from echolab import redaction
from echolab.data.download import parse_url, public_url
from echolab.errors import ConfigError
from echolab.redaction import mask_secrets, mask_values, register_secrets

CANARY = "c4nary-0123456789"


@pytest.fixture(autouse=True)
def _forget(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(redaction, "_concealed", set())


@pytest.mark.parametrize(
    ("text", "clean"),
    [
        ("http://user:PW@host:80/d/a.tar: HTTP 403", "http://***@host:80/d/a.tar: HTTP 403"),
        ("https://TOKEN@host/d", "https://***@host/d"),
        ("HTTPS://u:P@host/d", "HTTPS://***@host/d"),
        ("https:/u:p@host/d", "https:/***@host/d"),  # as pathlib spells it
        ("s3://KEY:SEC/RET@bucket/d", "s3://***@bucket/d"),
        ("http://u:p%40s%3Fs@host/d", "http://***@host/d"),
        ("http://u:p@ss@host/d", "http://***@host/d"),
        ("http://u:p?w@host/d", "http://***@host/d"),
        ("http://u:p#w@host/d", "http://***@host/d"),
        ("http://u:pw@[::1]:80/d?s=1", "http://***@[::1]:80/d?***"),
        ("https://h/d?X-Amz-Signature=S&X-Amz-Date=D, then", "https://h/d?***, then"),
        ("https://h/d?sv=2024&sig=a%2Bb%3D", "https://h/d?***"),
        ("https://h/d#access_token=x", "https://h/d#***"),
        ("('https://h/d?sig=a', None)", "('https://h/d?***', None)"),
        ('{"a": "https://h/d?sig=a"}', '{"a": "https://h/d?***"}'),
        ("simplecache::s3://a:b@c/d::https://k:l@m", "simplecache::s3://***@c/d::https://***@m"),
        ("two: http://a:b@c http://d:e@f", "two: http://***@c http://***@f"),
        # An interpolation is no secret, and has to stay one.
        ("https://${oc.env:TOKEN}@h/d", "https://${oc.env:TOKEN}@h/d"),
        ("https://me:${oc.env:PW}@h/d", "https://me:${oc.env:PW}@h/d"),
        ("https://h/d?v=3&sig=${oc.env:SIG}", "https://h/d?v=***&sig=${oc.env:SIG}"),
        ("https://me:pw@h/${oc.env:SET}", "https://***@h/${oc.env:SET}"),
    ],
)
def test_secrets_of_a_url_are_masked(text: str, clean: str) -> None:
    assert mask_secrets(text) == clean
    assert mask_secrets(clean) == clean


@pytest.mark.parametrize(
    "text",
    [
        "/data/a?b@c.mp4", "clips?sig=1/a@b.tar", "runs/lr=1e-5@2", "c:/users/me@home/a?b",
        "runs/x:/y@z", "file:///data/a?b@c", "local:///data/a@b?c", "me@host.org", "user:pw@host",
        "https://host/@scope/set@v2/a.tar", "http://localhost:8080/d", "http://h:80/d: no byte",
        "see https://host/page; then", "s3://bucket/a@b", "1 of 2 samples: what?", "",
    ],
)  # fmt: skip
def test_text_without_secrets_stays(text: str) -> None:
    assert mask_secrets(text) == text


@pytest.mark.parametrize(
    ("name", "secret"),
    [
        ("HF_TOKEN", True), ("WANDB_API_KEY", True), ("AWS_SECRET_ACCESS_KEY", True),
        ("AWS_ACCESS_KEY_ID", True), ("APIKEY", True), ("DB_PASSWORD", True), ("MY_PW", True),
        ("AZURE_STORAGE_SAS_TOKEN", True), ("HF_TOKEN_2", True), ("sig", True), ("DATA_SIG", True),
        ("PATH", False), ("PWD", False), ("TOKENIZERS_PARALLELISM", False), ("HOME", False),
        ("KEYBOARD", False), ("SECRET_CANARY", True), ("TOKEN_BUDGET", False),
        ("SSH_AUTH_SOCK", False), ("KEY_FILE", False), ("data.token_budget", False),
        ("SIGNAL", False), ("PASSAGE", False),
    ],
)  # fmt: skip
def test_secret_variables_are_recognized_by_name(
    monkeypatch: pytest.MonkeyPatch, name: str, secret: bool
) -> None:
    monkeypatch.setenv(name, CANARY)
    assert (CANARY not in mask_secrets(f"HTTP 401: {CANARY} is not valid")) is secret


def test_a_path_in_a_secret_variable_is_not_masked(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(tmp_path))
    assert mask_secrets(f"{tmp_path}: cannot be read") == f"{tmp_path}: cannot be read"


def test_the_secrets_of_a_url_are_masked_alone_too() -> None:
    """Libraries have them in their messages decoded, in pieces, or as a header."""
    url = f"https://user:p%40{CANARY}@h/d?X-Amz-Credential=AKIA%2F20260101&sig=abcdefgh12&v=3"
    assert parse_url(url) == url
    for text in (f"p@{CANARY}", f"p%40{CANARY}", "AKIA/20260101", "/d?sig=abcdefgh12",
                 "Basic dXNlcjpwQGM0bmFyeS0wMTIzNDU2Nzg5"):  # fmt: skip
        assert "***" in mask_secrets(f"InvalidURL({text!r})"), text
    assert mask_secrets("version 3 of user") == "version 3 of user"


def test_short_words_are_not_masked() -> None:
    register_secrets("https://train:clips@h/d?token=raw")
    assert mask_secrets("train: raw clips") == "train: raw clips"


def test_nested_values_are_masked() -> None:
    value = {"a": [f"http://u:{CANARY}@h", 1, None, 2.5, True], "b": {"c": Path("https://u:p@h")}}
    assert mask_values(value) == {
        "a": ["http://***@h", 1, None, 2.5, True],
        "b": {"c": "https:/***@h"},
    }


def test_a_url_with_a_raw_slash_in_its_password_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"^https://\*\*\*@host/d: .*%2F"):
        parse_url(f"https://user:{CANARY}/x@host/d")
    assert parse_url("HTTPS://user:a@host/d") == "https://user:a@host/d"
    assert public_url("https://user:a@host/d?sig=x#y") == "https://host/d"
    with pytest.raises(ConfigError, match="chained") as error:
        parse_url(f"simplecache::https://u:{CANARY}@h/d")
    assert CANARY not in str(error.value)


@pytest.mark.parametrize(
    "program",
    [
        "print('http://u:{0}@h')",
        "import sys; print('http://u:{0}@h', file=sys.stderr)",
        "raise ValueError('no http://u:{0}@h?sig={0}')",
        "import threading; t = threading.Thread(target=int, args=['http://u:{0}@h']); t.start()",
        "import warnings; warnings.warn('http://u:{0}@h')",
        "import logging; logging.error('http://u:{0}@h')",
        "import os; raise KeyError(os.environ['A_TOKEN'])",
        "import sys; sys.stdout.writelines(['http://u:{0}@h'])",
    ],
)
def test_a_command_writes_no_secret(program: str) -> None:
    """The law holds for the program, a library, a thread, and the interpreter at the end."""
    words = (
        "import sys\nfrom echolab.redaction import mask_output\nwith mask_output():\n"
        f"    {program.format(CANARY)}\n"
    )
    # From standard input: the interpreter shows no source lines, which would be the test's own.
    done = subprocess.run(
        [sys.executable, "-"], input=words, capture_output=True, text=True, timeout=120,
        env={"A_TOKEN": CANARY},
    )  # fmt: skip
    assert CANARY not in done.stdout + done.stderr
    assert done.stdout + done.stderr
