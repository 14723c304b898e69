"""From what a caller names (path, URL, bytes, open file) to an open file, within a policy.

A program on one's own machine may read any path and any address; a server reads for strangers and must
not: `FetchPolicy.for_server()` forbids files and every address that is not public, also after redirects.
"""

from __future__ import annotations

import base64
import binascii
import contextlib
import http.client
import io
import ipaddress
import os
import socket
import ssl
import stat
import threading
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO, cast

from huoyan.errors import MediaError
from huoyan.version import __version__

MAX_REDIRECTS = 5
_CHUNK = 1 << 18
_NAT64 = ipaddress.ip_network("64:ff9b::/96")


@dataclass(frozen=True)
class FetchPolicy:
    """What may be read, from where, and how much of it."""

    allow_http: bool = True
    """Whether http(s) URLs are fetched at all."""
    allow_files: bool = True
    """Whether paths and `file:` URLs are read."""
    allowed_folder: str | None = None
    """Where set, only files inside this folder (links followed) are read."""
    allowed_hosts: frozenset[str] | None = None
    """Where set, only these hosts; `.example.org` also means every host under it."""
    allow_private_addresses: bool = True
    """Whether a host may resolve to this machine or to a private network."""
    max_bytes: int = 256 << 20
    """The most bytes of one download, `data:` URL or pipe. Files are not counted: they stay on disk."""
    max_video_bytes: int = 4 << 30
    """The same for a video, which is downloaded to a temporary file."""
    timeout: float = 20.0
    """Seconds of silence after which a server is given up."""
    max_seconds: float = 600.0
    """Seconds one download may take in all."""

    @classmethod
    def for_server(cls, **changes: Any) -> FetchPolicy:
        """What a server may read on a stranger's word: public addresses, moderate sizes, no files."""
        strict: dict[str, Any] = {
            "allow_files": False,
            "allow_private_addresses": False,
            "max_bytes": 64 << 20,
            "max_video_bytes": 512 << 20,
            "timeout": 10.0,
            "max_seconds": 60.0,
        }
        return cls(**{**strict, **changes})


DEFAULT_POLICY = FetchPolicy()


@dataclass(frozen=True)
class OpenSource:
    """An open, seekable file with a name fit for a message; `path` where it is a plain file on disk."""

    file: BinaryIO
    name: str
    path: str | None = None


@contextlib.contextmanager
def open_source(
    source: object, policy: FetchPolicy = DEFAULT_POLICY, *, video: bool = False
) -> Iterator[OpenSource]:
    """Open a path, a `file:`, `http(s):` or `data:` URL, bytes, or a binary file object, for reading.

    A caller's own file object is read from its beginning and left open; a video from a URL goes through a
    temporary file. Raises MediaError: not found, not allowed, too large, unreachable.
    """
    limit = policy.max_video_bytes if video else policy.max_bytes
    if isinstance(source, (bytes, bytearray, memoryview)):
        yield OpenSource(io.BytesIO(source), f"{len(source)} bytes given")
        return
    if isinstance(source, (str, os.PathLike)):
        text = os.fspath(source)
        if not isinstance(text, str):
            text = os.fsdecode(text)
        name = source_name(text)
        scheme = url_scheme(text) if isinstance(source, str) else ""
        if scheme == "data":
            yield OpenSource(io.BytesIO(_read_data_url(text, limit)), name)
        elif scheme in ("http", "https"):
            with _landing_place(video) as file:
                _download(text, policy, limit, file)
                yield OpenSource(file, name, getattr(file, "name", None))
        elif scheme in ("", "file"):
            path = _file_url_path(text) if scheme else text
            with _open_file(path, policy, limit, name) as (file, plain):
                yield OpenSource(file, name, path if plain else None)
        else:
            raise MediaError(f"{name}: {scheme}: URLs are not read; give a path, or an http(s) or data URL")
        return
    if callable(getattr(source, "read", None)):
        yield _caller_file(cast(BinaryIO, source), limit)
        return
    raise MediaError(f"cannot open a {type(source).__name__}; give a path, a URL, bytes or a binary file")


def source_name(source: object) -> str:
    """A short name for messages, on one line, without a URL's query or credentials."""
    if isinstance(source, os.PathLike):
        source = os.fspath(source)
    if isinstance(source, bytes):
        source = os.fsdecode(source)
    text = str(source)
    scheme = url_scheme(text)
    if scheme == "data":
        return f"data URL ({text[5:40].split(',')[0].split(';')[0] or 'no type'})"
    if scheme in ("http", "https"):
        try:
            parts = urllib.parse.urlsplit(text)
            text = f"{scheme}://{parts.hostname or ''}{f':{parts.port}' if parts.port else ''}{parts.path}"
        except ValueError:
            text = f"{scheme} URL"
    text = "".join(character if character.isprintable() else "?" for character in text)
    return text if len(text) <= 200 else f"{text[:120]}…{text[-60:]}"


def url_scheme(text: str) -> str:
    """`file`, `http`, `https`, `data`, another where `://` follows, or nothing: then it is a path."""
    head, colon, _ = text[:16].partition(":")
    # One letter before the colon is a drive of Windows, not a scheme.
    if not colon or len(head) < 2 or not head.isascii() or not head.isalnum():
        return ""
    known = head.lower() in ("file", "http", "https", "data")
    return head.lower() if known or text[len(head) + 1 :].startswith("//") else ""


# ---- files


def _file_url_path(url: str) -> str:
    parts = urllib.parse.urlsplit(url)
    if parts.netloc not in ("", "localhost"):
        raise MediaError(f"{source_name(url)}: a file URL must not name a host; write file:///path")
    return urllib.request.url2pathname(parts.path)


@contextlib.contextmanager
def _open_file(path: str, policy: FetchPolicy, limit: int, name: str) -> Iterator[tuple[BinaryIO, bool]]:
    if not policy.allow_files:
        raise MediaError(f"{name}: reading local files is not allowed here; send a URL or the data itself")
    try:
        path = os.path.expanduser(path)
        if policy.allowed_folder is not None:
            folder, real = os.path.realpath(policy.allowed_folder), os.path.realpath(path)
            if os.path.commonpath([folder, real]) != folder:
                raise MediaError(f"{name}: outside the folder that may be read")
            path = real
        if os.path.isdir(path):
            raise MediaError(f"{name} is a folder; name the files in it")
        file = open(path, "rb")  # noqa: SIM115 - closed below, after the caller is done
    except FileNotFoundError:
        raise MediaError(f"{name}: no such file") from None
    except PermissionError:
        raise MediaError(f"{name}: no permission to read it") from None
    except (OSError, ValueError) as error:
        raise MediaError(f"{name}: cannot be opened ({_reason(error)})") from None
    with file:
        if stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            yield file, True
        else:
            yield io.BytesIO(_read_bounded(file, limit, name)), False


def _caller_file(file: BinaryIO, limit: int) -> OpenSource:
    label = getattr(file, "name", None)
    name = source_name(label) if isinstance(label, (str, bytes)) else f"a {type(file).__name__}"
    try:
        if file.seekable():
            file.seek(0)
            probe = file.read(0)
        else:
            file, probe = io.BytesIO(_read_bounded(file, limit, name)), b""
    except MediaError:
        raise
    except Exception as error:
        raise MediaError(f"{name}: cannot be read ({_reason(error)})") from None
    if not isinstance(probe, bytes):
        raise MediaError(f"{name} is open as text; open it in binary mode ('rb')")
    return OpenSource(file, name)


def _read_bounded(file: Any, limit: int, name: str) -> bytes:
    chunks: list[bytes] = []
    total = 0
    while chunk := file.read(_CHUNK):
        if not isinstance(chunk, bytes):
            raise MediaError(f"{name} is open as text; open it in binary mode ('rb')")
        total += len(chunk)
        _check_bytes(total, limit, name)
        chunks.append(chunk)
    return b"".join(chunks)


def _check_bytes(count: int, limit: int, name: str) -> None:
    if count > limit:
        raise MediaError(f"{name}: larger than the {limit / (1 << 20):.4g} MiB that may be read")


# ---- data: URLs


def _read_data_url(url: str, limit: int) -> bytes:
    head, comma, body = url[len("data:") :].partition(",")
    name = source_name(url)
    if not comma:
        raise MediaError(f"{name}: no comma before the data; write data:image/png;base64,…")
    if not head.lower().endswith(";base64"):
        data = urllib.parse.unquote_to_bytes(body)
    else:
        _check_bytes(len(body) * 3 // 4, limit, name)
        body = "".join(body.split())
        if "%" in body:
            body = urllib.parse.unquote(body)
        try:
            data = base64.b64decode(body, validate=True)
        except (binascii.Error, ValueError):
            raise MediaError(f"{name}: the data is not valid base64 (cut short?)") from None
    _check_bytes(len(data), limit, name)
    return data


# ---- http(s)


@contextlib.contextmanager
def _landing_place(video: bool) -> Iterator[BinaryIO]:
    if not video:
        yield io.BytesIO()
        return
    import tempfile

    with tempfile.NamedTemporaryFile(prefix="huoyan-") as file:
        yield cast(BinaryIO, file)


def _download(url: str, policy: FetchPolicy, limit: int, file: BinaryIO) -> None:
    name = source_name(url)
    if not policy.allow_http:
        raise MediaError(f"{name}: fetching URLs is not allowed here; send the data itself")
    deadline = time.monotonic() + policy.max_seconds
    for _ in range(MAX_REDIRECTS + 1):
        with _request(url, policy, deadline, name) as response:
            location = response.getheader("Location")
            if response.status in (301, 302, 303, 307, 308) and location:
                url = urllib.parse.urljoin(url, location)
                if urllib.parse.urlsplit(url).scheme not in ("http", "https"):
                    raise MediaError(f"{name}: redirected to something that is not http; not followed")
                continue
            if response.status != 200:
                reason = "".join(c for c in response.reason if c.isprintable())[:60]
                raise MediaError(f"{name}: the server answered {response.status} {reason}".rstrip())
            expected = response.length
            _check_bytes(expected or 0, limit, name)
            total = 0
            while chunk := response.read(_CHUNK):
                total += len(chunk)
                _check_bytes(total, limit, name)
                file.write(chunk)
            if time.monotonic() >= deadline:
                raise TimeoutError
            if expected is not None and total != expected:
                raise MediaError(f"{name}: the download broke off after {total} of {expected} bytes")
            file.flush()
            file.seek(0)
            return
    raise MediaError(f"{name}: redirected more than {MAX_REDIRECTS} times")


@contextlib.contextmanager
def _request(url: str, policy: FetchPolicy, deadline: float, name: str) -> Iterator[http.client.HTTPResponse]:
    """One GET, without following redirects; every failure inside becomes a MediaError."""
    connection: http.client.HTTPConnection | None = None
    watchdog: threading.Timer | None = None
    try:
        parts = urllib.parse.urlsplit(url)
        host, port = parts.hostname or "", parts.port
        if not host or any(c < " " or c == "\x7f" for c in url):
            raise MediaError(f"{name}: not a complete URL")
        if parts.username is not None:
            raise MediaError(f"{name}: names and passwords in a URL are not sent; download the file first")
        _check_host(host, policy, name)
        target = urllib.parse.quote(
            urllib.parse.urlunsplit(("", "", parts.path or "/", parts.query, "")), safe="/?&=%:;,+@!$'()*~[]|"
        )
        connection, target = _connect(parts.scheme, host, port, target, policy)
        connection.connect()
        # A socket's timeout restarts with every byte: only a clock outside it stops a server that drips.
        watchdog = threading.Timer(max(deadline - time.monotonic(), 0.0), _hang_up, (connection.sock,))
        watchdog.daemon = True
        watchdog.start()
        connection.request(
            "GET", target, headers={"User-Agent": f"huoyan/{__version__}", "Accept-Encoding": "identity"}
        )
        yield connection.getresponse()
    except MediaError:
        raise
    except (OSError, http.client.HTTPException, ValueError) as error:
        late = time.monotonic() >= deadline
        reason = f"took longer than {policy.max_seconds:g} s" if late else _reason(error)
        raise MediaError(f"{name}: cannot be fetched ({reason})") from None
    finally:
        if watchdog is not None:
            watchdog.cancel()
        if connection is not None:
            connection.close()


def _connect(
    scheme: str, host: str, port: int | None, target: str, policy: FetchPolicy
) -> tuple[http.client.HTTPConnection, str]:
    proxy = _proxy(scheme, host) if policy.allow_private_addresses else None
    secure = scheme == "https"
    if proxy is None:
        if secure:
            context = ssl.create_default_context()
            return _SecureConnection(host, port, policy=policy, context=context), target
        return _PlainConnection(host, port, policy=policy), target
    # The proxy resolves the name, so addresses cannot be checked: only for those who may reach all of them.
    if secure:
        tunnel = http.client.HTTPSConnection(proxy[0], proxy[1], timeout=policy.timeout)
        tunnel.set_tunnel(host, port or 443)
        return tunnel, target
    authority = f"[{host}]" if ":" in host else host
    whole = f"http://{authority}{f':{port}' if port else ''}{target}"
    return http.client.HTTPConnection(proxy[0], proxy[1], timeout=policy.timeout), whole


def _proxy(scheme: str, host: str) -> tuple[str, int] | None:
    if urllib.request.proxy_bypass(host):
        return None
    address = urllib.request.getproxies().get(scheme)
    if not address:
        return None
    parts = urllib.parse.urlsplit(address if "://" in address else f"http://{address}")
    return (parts.hostname, parts.port or 80) if parts.hostname else None


class _PlainConnection(http.client.HTTPConnection):
    def __init__(self, host: str, port: int | None, *, policy: FetchPolicy) -> None:
        super().__init__(host, port, timeout=policy.timeout)
        self._policy = policy

    def connect(self) -> None:
        self.sock = _open_socket(self.host, self.port, self._policy)


class _SecureConnection(http.client.HTTPSConnection):
    def __init__(self, host: str, port: int | None, *, policy: FetchPolicy, context: ssl.SSLContext) -> None:
        super().__init__(host, port, timeout=policy.timeout, context=context)
        self._policy = policy
        self._tls = context

    def connect(self) -> None:
        self.sock = self._tls.wrap_socket(
            _open_socket(self.host, self.port, self._policy), server_hostname=self.host
        )


def _open_socket(host: str, port: int, policy: FetchPolicy) -> socket.socket:
    """A connection to an address that was checked: the name is not resolved a second time."""
    failure: OSError | None = None
    for family, kind, protocol, _, address in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM):
        if not policy.allow_private_addresses and not is_public_address(str(address[0])):
            raise MediaError(f"{host} is not a public address; fetching from it is not allowed here")
        connection = socket.socket(family, kind, protocol)
        try:
            connection.settimeout(policy.timeout)
            connection.connect(address)
        except OSError as error:
            connection.close()
            failure = error
        else:
            return connection
    raise failure or OSError("the name has no address")


def is_public_address(text: str) -> bool:
    """Whether `text` (an IPv4 or IPv6 address) is on the public internet, also where one wraps the other."""
    try:
        address = ipaddress.ip_address(text.split("%")[0])
    except ValueError:
        return False
    if isinstance(address, ipaddress.IPv6Address):
        inner = address.ipv4_mapped or address.sixtofour or (address.teredo[1] if address.teredo else None)
        if inner is None and address in _NAT64:
            inner = ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
        if inner is not None:
            return is_public_address(str(inner))
    return address.is_global and not address.is_multicast and not address.is_reserved


def _check_host(host: str, policy: FetchPolicy, name: str) -> None:
    if policy.allowed_hosts is None:
        return
    host = host.lower().rstrip(".")
    for allowed in policy.allowed_hosts:
        wanted = allowed.lower().rstrip(".")
        if host == wanted.lstrip(".") or (wanted.startswith(".") and host.endswith(wanted)):
            return
    raise MediaError(f"{name}: this host is not among those that may be fetched from")


def _hang_up(sock: socket.socket) -> None:
    with contextlib.suppress(OSError):
        sock.shutdown(socket.SHUT_RDWR)


def _reason(error: BaseException) -> str:
    if isinstance(error, (TimeoutError, socket.timeout)):
        return "no answer in time"
    if isinstance(error, socket.gaierror):
        return "the host's name cannot be resolved"
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return " ".join(text.split())[:120] or type(error).__name__
