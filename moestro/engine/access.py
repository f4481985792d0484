"""Who may ask: the key, the name the server was called by, and the page a browser was on."""

import base64
import binascii
import hashlib
import hmac
from collections.abc import Iterable

from moestro.core.errors import ConfigError
from moestro.engine.fields import BadRequest


Headers = list[tuple[bytes, bytes]]
_LOOPBACK = ("127.0.0.1", "localhost", "[::1]", "::1")


def values(headers: Iterable[tuple[bytes, bytes]], name: bytes) -> list[bytes]:
    """All values of a header (names are lower case)."""
    return [value for key, value in headers if key == name]


def check_bind(host: str, key: bytes | None) -> None:
    """Refuse to listen beyond this machine without a key.

    Raises:
        ConfigError: see above.
    """
    if key is None and host not in _LOOPBACK:
        raise ConfigError(f"--host {host} lets other machines in; give --api-key-file, or keep to 127.0.0.1")


def read_key(text: str, where: str) -> bytes:
    """A key from the text of a file.

    Raises:
        ConfigError: it is empty, short, or holds what a header cannot carry.
    """
    key = text.strip()
    if len(key) < 16 or not key.isascii() or not key.isprintable() or " " in key:
        raise ConfigError(f"{where}: a key has at least 16 printable ASCII characters and no space")
    return key.encode()


def check_key(headers: Headers, key: bytes | None) -> None:
    """Every credential that is sent must be the key, and one must be sent. Bearer, x-api-key, or Basic (any user name).

    Raises:
        BadRequest: status 401.
    """
    if key is None:
        return
    given = [value.strip() for value in values(headers, b"x-api-key")]
    for value in values(headers, b"authorization"):
        scheme, _, rest = value.strip().partition(b" ")
        given.append(
            _password(rest) if scheme.lower() == b"basic" else rest.strip() if scheme.lower() == b"bearer" else b""
        )
    # Digests first: the time tells neither the key's length nor how much of it was right.
    wanted = hashlib.sha256(key).digest()
    right = [hmac.compare_digest(hashlib.sha256(value).digest(), wanted) for value in given]
    if not right or not all(right):
        raise BadRequest(
            "a key is needed: Authorization: Bearer KEY" if not right else "the key is wrong",
            status=401,
            code="invalid_api_key",
        )


def check_origin(headers: Headers, key: bytes | None, method: str) -> None:
    """Keep other web pages out: a server without a key answers to loopback names only (a foreign name that resolves
    here would make a browser hand our answers to a foreign page), and no request from a page of another origin.

    Raises:
        BadRequest: status 403.
    """
    hosts = values(headers, b"host")
    host = hosts[0].decode("latin-1") if hosts else ""
    if len(hosts) > 1:
        raise BadRequest("more than one Host header", status=400)
    if key is None and hosts and _name(host) not in _LOOPBACK:
        raise BadRequest(f"without a key this server answers to localhost only, not to {host[:60]!r}", status=403)
    for origin in values(headers, b"origin"):
        where = origin.decode("latin-1").partition("://")[2]
        if where != host and method not in ("GET", "HEAD"):
            raise BadRequest("requests from pages of other origins are not answered", status=403)


def _name(host: str) -> str:
    name, colon, port = host.rpartition(":")
    return name if colon and port.isdigit() and (":" not in name or name.endswith("]")) else host


def _password(encoded: bytes) -> bytes:
    try:
        return base64.b64decode(encoded.strip(), validate=True).partition(b":")[2]
    except (binascii.Error, ValueError):
        return b""
