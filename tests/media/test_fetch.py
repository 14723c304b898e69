"""Fetching within a policy: what is read, what is refused, and how much of it."""

from __future__ import annotations

import io
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
from PIL import Image

from huoyan.errors import MediaError
from huoyan.media import fetch
from huoyan.media.fetch import FetchPolicy, is_public_address, open_source, source_name
from huoyan.media.picture import Picture
from huoyan.media.video import Video, sample_frames
from tests.media.clips import clip, number_of


def png(width: int = 12) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (width, 9), (10, 20, 30)).save(buffer, "PNG")
    return buffer.getvalue()


class Handler(BaseHTTPRequestHandler):
    seen: ClassVar[list[tuple[str, dict[str, str]]]] = []

    def log_message(self, *_: Any) -> None:
        pass

    def do_GET(self) -> None:
        Handler.seen.append((self.path, dict(self.headers)))
        route, _, rest = self.path.lstrip("/").partition("/")
        getattr(self, f"on_{route.split('?')[0]}")(rest)

    def reply(self, body: bytes, status: int = 200, length: int | None = -1, **headers: str) -> None:
        self.send_response(status)
        if length is not None:
            self.send_header("Content-Length", str(len(body) if length < 0 else length))
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        with suppress(OSError):
            self.wfile.write(body)

    def on_picture(self, _: str) -> None:
        self.reply(png())

    def on_video(self, _: str) -> None:
        self.reply(clip(50))

    def on_unsized(self, _: str) -> None:
        self.reply(png(), length=None)

    def on_missing(self, _: str) -> None:
        self.reply(b"no", 404)

    def on_to(self, rest: str) -> None:
        self.reply(b"", 302, Location=rest)

    def on_loop(self, _: str) -> None:
        self.reply(b"", 302, Location="/loop")

    def on_promise(self, rest: str) -> None:
        self.reply(b"x" * 100, length=int(rest))

    def on_endless(self, _: str) -> None:
        self.send_response(200)
        self.end_headers()
        try:
            while True:
                self.wfile.write(bytes(1 << 16))
        except OSError:
            pass

    def on_drip(self, _: str) -> None:
        self.send_response(200)
        self.send_header("Content-Length", "1000")
        self.end_headers()
        try:
            for _ in range(100):
                self.wfile.write(b"x")
                time.sleep(0.1)
        except OSError:
            pass

    def on_silent(self, _: str) -> None:
        time.sleep(3)

    def on_page(self, _: str) -> None:
        self.reply(b"<!DOCTYPE html><html></html>")


@contextmanager
def served() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


@pytest.fixture(autouse=True)
def _no_proxies(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)


@pytest.fixture(scope="module")
def site() -> Iterator[str]:
    with served() as address:
        yield address


def test_a_url_is_fetched_and_redirects_are_followed(site: str) -> None:
    for path in ("/picture", "/unsized", "/picture/名字 a.png?q=1 2", f"/to/{site}/picture", "/to//picture"):
        assert Picture.open(site + path).size == (12, 9)
    assert dict(Handler.seen[-1][1])["User-Agent"].startswith("huoyan/")


def test_a_video_by_url(site: str) -> None:
    video = Video.open(f"{site}/video")
    assert [number_of(p.pixels) for p in video.sample().frames] == [0, 25]


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("/missing", "answered 404"),
        ("/loop", "more than 5 times"),
        ("/to/file:///etc/passwd", "not http"),
        ("/to/data:image/png;base64,AAAA", "not http"),
        ("/promise/1000", "broke off after 100 of 1000"),
        ("/promise/99999999", "larger than the 1 MiB"),
        ("/endless", "larger than the 1 MiB"),
        ("/drip", "took longer than"),
        ("/silent", "no answer in time"),
        ("/page", "it is a web page"),
    ],
)
def test_what_goes_wrong_is_said_in_one_line(site: str, path: str, words: str) -> None:
    policy = FetchPolicy(max_bytes=1 << 20, timeout=0.5, max_seconds=1.0)
    start = time.monotonic()
    with pytest.raises(MediaError, match=words) as caught:
        Picture.open(site + path, policy=policy)
    assert time.monotonic() - start < 3
    assert "\n" not in str(caught.value)
    assert "127.0.0.1" in str(caught.value)


def test_unreachable_hosts() -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
    for url, words in (
        (f"http://127.0.0.1:{port}/a.png", "cannot be fetched"),
        ("http://no-such-host.invalid/a.png", "cannot be fetched"),
        ("http:///a.png", "not a complete URL"),
        ("http://[::1/a.png", "cannot be fetched"),
        ("http://host:99999/", "cannot be fetched"),
        ("http://user:secret@127.0.0.1/a.png", "names and passwords"),
    ):
        with pytest.raises(MediaError, match=words) as caught:
            Picture.open(url)
        assert "secret" not in str(caught.value)


# ---- what a server must refuse


def test_a_server_reads_no_files_and_no_private_addresses(site: str, tmp_path: Path) -> None:
    policy = FetchPolicy.for_server()
    path = tmp_path / "a.png"
    path.write_bytes(png())
    for source in (path, str(path), path.as_uri(), "~/a.png"):
        with pytest.raises(MediaError, match="not allowed here"):
            Picture.open(source, policy=policy)
    before = len(Handler.seen)
    port = site.rsplit(":", 1)[1]
    for host in ("127.0.0.1", "localhost", "0.0.0.0", "2130706433", "127.1", "[::ffff:127.0.0.1]", "0x7f.1"):
        with pytest.raises(MediaError, match=r"not a public address|cannot be fetched"):
            Picture.open(f"http://{host}:{port}/picture", policy=policy)
    assert len(Handler.seen) == before
    assert Picture.open(png(), policy=policy).size == (12, 9)


def test_every_redirect_is_checked_again(site: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # The first host counts as public here; what it redirects to does not.
    real = is_public_address
    with served() as other:
        first, second = site.rsplit(":", 1)[1], other.rsplit(":", 1)[1]
        resolve = socket.getaddrinfo

        def fake(host: str, port: int, *args: Any, **kwargs: Any) -> Any:
            return resolve("127.0.0.1", port, *args, **kwargs)

        asked: list[str] = []

        def public(address: str) -> bool:
            asked.append(address)
            return len(asked) == 1 or real(address)

        monkeypatch.setattr(fetch.socket, "getaddrinfo", fake)
        monkeypatch.setattr(fetch, "is_public_address", public)
        before = len(Handler.seen)
        with pytest.raises(MediaError, match="not a public address"):
            Picture.open(
                f"http://public.example:{first}/to/http://inside.example:{second}/picture",
                policy=FetchPolicy.for_server(),
            )
        assert len(asked) == 2
        assert len(Handler.seen) == before + 1


def test_a_server_ignores_proxies(site: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", site)
    before = len(Handler.seen)
    with pytest.raises(MediaError, match="not a public address"):
        Picture.open("http://127.0.0.1:9/picture", policy=FetchPolicy.for_server())
    assert len(Handler.seen) == before


def test_a_proxy_is_used_where_all_addresses_are_allowed(site: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", site)
    with pytest.raises(MediaError):
        Picture.open("http://example.invalid:81/some/path.png", policy=FetchPolicy(timeout=1))
    assert Handler.seen[-1][0].startswith("http://example.invalid:81/some/path.png")


@pytest.mark.parametrize(
    ("address", "public"),
    [
        ("8.8.8.8", True),
        ("2606:4700::1111", True),
        ("64:ff9b::808:808", True),
        ("127.0.0.1", False),
        ("10.1.2.3", False),
        ("172.16.0.1", False),
        ("192.168.1.1", False),
        ("169.254.169.254", False),
        ("100.64.0.1", False),
        ("0.0.0.0", False),
        ("224.0.0.1", False),
        ("255.255.255.255", False),
        ("::1", False),
        ("::", False),
        ("fe80::1%eth0", False),
        ("fc00::1", False),
        ("ff02::1", False),
        ("::ffff:10.0.0.1", False),
        ("64:ff9b::a9fe:a9fe", False),
        ("2002:7f00:1::", False),
        ("not an address", False),
    ],
)
def test_public_addresses(address: str, public: bool) -> None:
    assert is_public_address(address) is public


def test_host_lists(site: str) -> None:
    def refused(url: str, *hosts: str) -> bool:
        try:
            Picture.open(url, policy=FetchPolicy(allowed_hosts=frozenset(hosts), timeout=1))
        except MediaError as error:
            return "not among those" in str(error)
        return False

    assert not refused(f"{site}/picture", "127.0.0.1")
    assert refused(f"{site}/picture", "example.org")
    assert refused(f"{site}/to/http://other.invalid/x", "127.0.0.1")
    assert not refused("http://a.example.invalid/x", ".example.invalid")
    assert refused("http://badexample.invalid/x", ".example.invalid")
    assert refused("http://a.example.invalid/x", "example.invalid")


def test_switches(site: str, tmp_path: Path) -> None:
    with pytest.raises(MediaError, match="fetching URLs is not allowed"):
        Picture.open(f"{site}/picture", policy=FetchPolicy(allow_http=False))
    inside, outside = tmp_path / "in", tmp_path / "out.png"
    inside.mkdir()
    (inside / "a.png").write_bytes(png())
    outside.write_bytes(png())
    (inside / "link.png").symlink_to(outside)
    policy = FetchPolicy(allowed_folder=str(inside))
    assert Picture.open(inside / "a.png", policy=policy).size == (12, 9)
    for bad in (outside, inside / "link.png", inside / ".." / "out.png", f"{inside}x/a.png"):
        with pytest.raises(MediaError, match="outside the folder"):
            Picture.open(bad, policy=policy)
    with pytest.raises(MediaError, match="outside the folder"):
        sample_frames(outside, policy=policy)


def test_data_urls_count_too() -> None:
    import base64

    url = "data:image/png;base64," + base64.b64encode(bytes(3000)).decode()
    with pytest.raises(MediaError, match="larger than"):
        Picture.open(url, policy=FetchPolicy(max_bytes=2999))


def test_names_are_short_clean_and_keep_secrets() -> None:
    assert source_name("https://u:p@host.org:8443/a/b.png?token=secret#x") == "https://host.org:8443/a/b.png"
    assert source_name("data:image/png;base64,AAAA") == "data URL (image/png)"
    assert source_name("C:\\pictures\\a.png") == "C:\\pictures\\a.png"
    assert "\n" not in source_name("a\nb\x1b[31m")
    assert len(source_name("x" * 5000)) < 200


def test_a_windows_drive_or_a_colon_is_a_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "12:30 photo.png").write_bytes(png())
    (tmp_path / "note:a.png").write_bytes(png())
    assert Picture.open("12:30 photo.png").size == (12, 9)
    assert Picture.open("note:a.png").size == (12, 9)


def test_a_callers_exception_passes_through() -> None:
    def use() -> None:
        with open_source(b"abc") as opened:
            raise KeyError(opened.file.read())

    with pytest.raises(KeyError, match="abc"):
        use()


def test_https_certificates_are_checked(tmp_path: Path) -> None:
    assert fetch.ssl.create_default_context().verify_mode == fetch.ssl.CERT_REQUIRED
    with served() as plain, pytest.raises(MediaError, match="cannot be fetched"):
        Picture.open(plain.replace("http:", "https:") + "/picture", policy=FetchPolicy(timeout=1))


def test_pixels_arrive_unchanged(site: str) -> None:
    np.testing.assert_array_equal(Picture.open(f"{site}/picture").pixels, Picture.open(png()).pixels)
