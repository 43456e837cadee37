"""The page's doors: addresses, who may ask, how much, and what is left when it ends."""

import asyncio
import os
import signal
import socket
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from helpers.commands import REPO
from PIL import Image
from typer.testing import CliRunner

from ghibli.app.address import (
    find_address,
    in_url,
    is_loopback,
    is_wildcard,
    without_proxies,
)
from ghibli.cli.main import app as command_line
from ghibli.runtime.errors import UserError

pytest.importorskip("gradio")
from ghibli.app import guard, images
from ghibli.app.answers import without_places
from ghibli.app.guard import Guard
from ghibli.app.page import serve
from ghibli.app.session import AppSession
from ghibli.app.settings import Settings
from ghibli.images.read import Unusable

SETTINGS = ([], "a lake", "", "ddim", 7.5, 30, 0, 1.0, False)
DEAD_PROXY = "http://127.0.0.1:9"  # the port that discards


# Addresses


@pytest.mark.parametrize(
    ("host", "port", "words"),
    [
        ("127.0.0.1", 0, r"^--port 0: must be from 1 to 65535$"),
        ("127.0.0.1", 65536, r"^--port 65536: must be from 1 to 65535$"),
        ("no.such.host.invalid", None, r"^--host no.such.host.invalid: unknown host; use 127.0.0.1"),
        ("192.0.2.1", None, r"^--host 192.0.2.1: not an address of this machine$"),
        ("a..b", None, r"^--host a..b: unknown host"),
    ],
)
def test_an_address_that_cannot_be_used(host: str, port: int | None, words: str) -> None:
    with pytest.raises(UserError, match=words):
        find_address(host, port)
    result = CliRunner().invoke(
        command_line,
        ["app", "model=demo", "--host", host, *(["--port", str(port)] if port is not None else [])],
    )
    assert isinstance(result.exception, UserError)


def test_a_port_in_use_is_passed_over_or_named() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=f"^--port {port} on 127.0.0.1 cannot be used: it is in use"):
            find_address("127.0.0.1", port)
    assert find_address("[::1]", port) == ("::1", port)


def test_hosts() -> None:
    assert [in_url(host) for host in ("127.0.0.1", "::1", "a.b")] == ["127.0.0.1", "[::1]", "a.b"]
    assert all(map(is_loopback, ("127.0.0.1", "127.3.0.1", "::1", "[::1]", "localhost")))
    assert not any(map(is_loopback, ("0.0.0.0", "::", "192.168.0.7", "localhost.example")))
    assert is_wildcard("0.0.0.0") and is_wildcard("::") and not is_wildcard("127.0.0.1")
    typed = {
        "0": "0.0.0.0",
        "127.1": "127.0.0.1",
        "0x7f.1": "127.0.0.1",
        "LocalHost": "localhost",
        "[::1]": "::1",
    }
    assert {host: find_address(host, None)[0] for host in typed} == typed


def test_proxies_are_hidden_and_come_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTPS_PROXY", DEAD_PROXY)
    monkeypatch.setenv("no_proxy", "intranet")
    monkeypatch.delenv("NO_PROXY", raising=False)
    with without_proxies("192.168.0.7"):
        assert "HTTPS_PROXY" not in os.environ
    assert os.environ["HTTPS_PROXY"] == DEAD_PROXY
    assert os.environ["no_proxy"] == "intranet,localhost,127.0.0.1,::1,192.168.0.7"


def test_words_that_are_no_settings() -> None:
    for word, reason in (
        ("nope=1", "unknown key nope"),
        ("lora.rank=8", "lora.rank=8 changes nothing here: only model.*, data=NAME and data.style do"),
        ("outputs/train/run", "`outputs/train/run` is no setting"),
        ("model.path=no/such/base/here", "model.path=no/such/base/here: no such folder or file"),
    ):
        result = CliRunner().invoke(command_line, ["app", word])
        assert isinstance(result.exception, UserError)
        assert str(result.exception).startswith(reason)


# The guard, without gradio behind it


def ask(
    host: str = "127.0.0.1", folder: Path = Path("/nonexistent"), is_private: bool = False, **request: Any
) -> tuple[int, int]:
    """Send a request through a Guard; return the status, and how many bytes reached the application."""
    reached = 0

    async def app(scope: Any, receive: Any, send: Any) -> None:
        nonlocal reached
        more = True
        while more:
            message = await receive()
            reached += len(message.get("body", b""))
            more = message.get("more_body", False)
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    async def main() -> int:
        transport = httpx.ASGITransport(app=Guard(app, host, folder, is_private))
        headers = request.pop("headers", {})
        async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1:7860") as client:
            method, path = request.pop("method", "GET"), request.pop("path", "/")
            return (await client.request(method, path, headers=headers, **request)).status_code

    return asyncio.run(main()), reached


@pytest.mark.parametrize(
    ("opened_on", "host", "accepted"),
    [
        ("127.0.0.1", "127.0.0.1:7860", True),
        ("127.0.0.1", "localhost:8000", True),  # forwarded by ssh
        ("127.0.0.1", "[::1]:7860", True),
        ("127.0.0.1", "LOCALHOST", True),
        ("127.0.0.1", "evil.example", False),
        ("127.0.0.1", "127.0.0.1.evil.example:7860", False),
        ("127.0.0.1", "192.168.0.7:7860", False),
        ("127.0.0.1", "", False),
        ("127.0.0.1", "[::1", False),
        ("0.0.0.0", "192.168.0.7:7860", True),
        ("0.0.0.0", "[fe80::1]:7860", True),
        ("0.0.0.0", "evil.example:7860", False),
        ("gpu.lab", "GPU.lab:7860", True),
        ("gpu.lab", "cpu.lab:7860", False),
    ],
)
def test_only_the_hosts_it_was_opened_on(opened_on: str, host: str, accepted: bool) -> None:
    """A name that resolves to this machine by DNS rebinding is another host."""
    assert ask(opened_on, headers={"host": host})[0] == (200 if accepted else 403)


@pytest.mark.parametrize(
    ("origin", "accepted"),
    [
        ("http://127.0.0.1:7860", True),
        ("https://127.0.0.1:7860", True),  # behind a proxy that speaks TLS
        ("http://127.0.0.1:8000", False),
        ("http://localhost:7860", False),
        ("http://evil.example", False),
        ("null", False),
    ],
)
def test_only_its_own_origin(origin: str, accepted: bool) -> None:
    for method, path in (("GET", "/config"), ("POST", "/gradio_api/upload")):
        status, _ = ask(method=method, path=path, headers={"origin": origin})
        assert status == (200 if accepted else 403)


@pytest.mark.parametrize("is_own", [True, False])
def test_a_private_page_answers_its_own_user_alone(is_own: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever can start a training can run code as its user."""
    seen: list[tuple[Any, Any]] = []
    monkeypatch.setattr(guard, "is_own_user", lambda *ends: seen.append(ends) or is_own)
    assert ask()[0] == 200 and not seen  # a page that others may reach
    for method, path in (("GET", "/"), ("POST", "/gradio_api/run/predict"), ("POST", "/gradio_api/upload")):
        status, _ = ask(method=method, path=path, is_private=True)
        assert status == (200 if is_own else 403)
    assert seen == [(("127.0.0.1", 123), ("127.0.0.1", 7860))] * 3


def test_other_pages_may_only_link_here() -> None:
    link = {"sec-fetch-site": "cross-site", "sec-fetch-mode": "navigate", "sec-fetch-dest": "document"}
    assert ask(headers=link)[0] == 200
    for change in ({"sec-fetch-dest": "iframe"}, {"sec-fetch-mode": "no-cors", "sec-fetch-dest": "image"}):
        assert ask(headers=link | change)[0] == 403
    assert ask(headers=link | {"sec-fetch-site": "same-origin", "sec-fetch-mode": "cors"})[0] == 200
    for path in ("/gradio_api/file=a.png", "/config", "/gradio_api/logout"):  # a link opens the page, no more
        assert ask(headers=link, path=path)[0] == 403
        assert ask(headers=link | {"sec-fetch-site": "none"}, path=path)[0] == 200


@pytest.mark.parametrize(
    ("host", "origin", "accepted"),
    [
        ("127.0.0.1:7860", "http://127.0.0.1:7860", True),
        ("127.0.0.1:7860", "http://evil.example", False),
        ("evil.example:7860", "http://evil.example:7860", False),
    ],
)
def test_a_websocket_passes_the_same_door(host: str, origin: str, accepted: bool) -> None:
    """A browser sends one from any page, without asking first."""
    sent, reached = [], []

    async def application(scope: Any, receive: Any, send: Any) -> None:
        reached.append(scope["path"])

    async def send(message: Any) -> None:
        sent.append(message["type"])

    headers = [(b"host", host.encode()), (b"origin", origin.encode())]
    scope = {"type": "websocket", "path": "/", "headers": headers}
    asyncio.run(Guard(application, "127.0.0.1", Path("/nonexistent"))(scope, None, send))
    assert (reached, sent) == ((["/"], []) if accepted else ([], ["websocket.close"]))


@pytest.mark.parametrize(
    "headers",
    [
        [("host", "127.0.0.1:7860"), ("host", "evil.example")],
        [("host", "127.0.0.1:7860"), ("origin", "http://127.0.0.1:7860"), ("origin", "http://evil.example")],
    ],
)
def test_a_header_that_is_given_twice_is_refused(headers: list[tuple[str, str]]) -> None:
    """Whoever reads the other one would be somebody else's page."""
    assert ask(headers=headers)[0] == 403


def test_routes_that_the_page_does_not_use_are_closed() -> None:
    for method, path in (
        ("POST", "/gradio_api/process_recording"),
        ("POST", "/gradio_api/call/draw"),
        ("GET", "/gradio_api/proxy=https://example.com"),
        ("GET", "/gradio_api/deep_link"),
        ("GET", "/monitoring/"),
        ("DELETE", "/"),
    ):
        assert ask(method=method, path=path)[0] == 403, path
    for path in ("/gradio_api/queue/join", "/gradio_api/run/predict"):
        assert ask(method="POST", path=path, json={})[0] == 200


def test_bodies_are_bounded(tmp_path: Path) -> None:
    """With a Content-Length nothing gets through, without one no more than the limit."""
    join = {"method": "POST", "path": "/gradio_api/queue/join"}
    large = b"x" * (guard.LARGEST_REQUEST + 1)
    assert ask(**join, content=large) == (413, 0)

    async def chunks() -> Any:
        for _ in range(40):
            yield large[: 2**14]

    status, reached = ask(**join, content=chunks())
    assert status == 413 and reached <= guard.LARGEST_REQUEST
    assert ask(**join, content=large[:-1]) == (200, guard.LARGEST_REQUEST)
    upload = {"method": "POST", "path": "/gradio_api/upload", "folder": tmp_path}
    assert ask(**upload, content=b"x" * 2**20) == (200, 2**20)
    with open(tmp_path / "earlier", "wb") as sparse:
        sparse.truncate(guard.ALL_FILES - 2**20 + 1)
    assert ask(**upload, content=b"x" * 2**20) == (413, 0)


# What other programs than a browser may send


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"prompt": "x" * 4001}, "a prompt of 4001 characters: at most 4000"),
        ({"negative": "x" * 8_000_000}, "a prompt of 8000000 characters: at most 4000"),
        ({"prompt": None}, "a prompt must be text"),
        ({"steps": float("nan")}, "steps must be a number"),
        ({"seed": float("inf")}, "seed must be a number"),
        ({"guidance": "7"}, "guidance must be a number"),
        ({"scale": [1]}, "scale must be a number"),
    ],
)
def test_settings_are_checked_here(change: dict[str, Any], words: str) -> None:
    names = ("runs", "prompt", "negative", "sampler", "guidance", "steps", "seed", "scale", "safe")
    with pytest.raises(UserError, match=f"^{words}"):
        Settings(**dict(zip(names, SETTINGS, strict=True)) | change)
    Settings(*SETTINGS)


def test_a_bomb_is_refused_by_its_header(tmp_path: Path) -> None:
    """A PNG of 177 megapixels takes 0.2 MB on disk and half a gigabyte as RGB; it is never decoded."""
    bomb = tmp_path / "bomb.png"
    Image.new("P", (13_300, 13_300)).save(bomb)
    assert bomb.stat().st_size < 10**6
    with pytest.raises(Unusable, match="13300x13300 px, more than this page decodes"):
        images.read_small(bomb)
    Image.new("RGBA", (10, 10)).save(bomb)
    assert images.read_small(bomb).size == (10, 10)


def test_one_photo_is_decoded_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each takes up to a gigabyte, and every thread that decoded one keeps the freed memory for itself."""
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    inside, most, threads, decode = [], [], set(), images.read_image

    def counted(*words: Any, **options: Any) -> Any:
        inside.append(1)
        most.append(len(inside))
        threads.add(threading.get_ident())
        time.sleep(0.02)
        inside.pop()
        return decode(*words, **options)

    monkeypatch.setattr(images, "read_image", counted)
    with ThreadPoolExecutor(8) as pool:
        assert len(list(pool.map(images.read_small, [tmp_path / "a.png"] * 8))) == 8
    assert most == [1] * 8 and len(threads) == 1


def test_messages_name_no_folder_of_this_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/somebody")
    told = without_places(f"{tmp_path}/outputs/a and {tmp_path} and /home/somebody/base")
    assert told == "outputs/a and . and ~/base"


def test_a_run_from_elsewhere_does_not_keep_the_page_shut(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its status may lack a gain; a link out of it is refused when it is chosen, as its grids are shown."""
    run = tmp_path / "outputs" / "theirs"
    (run / "adapter").mkdir(parents=True)
    (run / "status.json").write_text('{"state": "finished", "gain": null}')
    (run / "samples").symlink_to(tmp_path)
    monkeypatch.chdir(tmp_path)
    app_session = AppSession([])
    assert app_session.run_choices() == [("theirs", "outputs/theirs")]
    with pytest.raises(UserError, match="samples is a link to"):
        app_session.model_of(["outputs/theirs"])


# The whole


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder to serve the page in, with a proxy that answers nothing in the environment."""
    monkeypatch.chdir(tmp_path)
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, DEAD_PROXY)
    for name in ("no_proxy", "NO_PROXY", "GRADIO_TEMP_DIR"):
        monkeypatch.setenv(name, "")
    return tmp_path


def test_behind_a_proxy_on_ipv6(folder: Path) -> None:
    page, address = serve(["model=demo", "data=demo"], "::1", None)
    try:
        assert address.startswith("http://[::1]:")
        with httpx.Client(trust_env=False) as client:
            assert client.get(address).status_code == 200
            refused = client.get(address, headers={"host": "evil.example"})
            assert refused.status_code == 403
            files = {"files": ("a.png", b"x")}
            url = f"{address}gradio_api/upload"
            assert client.post(url, files=files, headers={"origin": "http://evil.example"}).status_code == 403
            (stored,) = client.post(url, files=files).json()
        private = Path(os.environ["GRADIO_TEMP_DIR"])
        assert Path(stored).is_relative_to(private)
        assert stat.S_IMODE(private.stat().st_mode) == 0o700
    finally:
        page.close()


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_its_folder_is_gone_after_a_signal(folder: Path, number: signal.Signals) -> None:
    environment = os.environ | {"TMPDIR": str(folder), "PYTHONPATH": str(REPO), "HTTP_PROXY": ""}
    words = [sys.executable, "-u", "-m", "ghibli", "app", "model=demo", "data=demo"]
    options = {"stdout": subprocess.PIPE, "text": True, "preexec_fn": heed_ctrl_c}
    with subprocess.Popen(words, env=environment, **options) as page, ended(page):
        assert page.stdout is not None
        line = next(line for line in page.stdout if line.startswith("page "))
        address = line.split()[1]
        with httpx.Client(trust_env=False) as client:
            client.post(f"{address}gradio_api/upload", files={"files": ("a.png", b"x")})
        (private,) = folder.glob("ghibli-page-*")
        assert any(file.is_file() for file in private.rglob("*"))
        page.send_signal(number)
        assert page.wait(20) in (128 + number, 0, 130)
    assert not list(folder.glob("ghibli-page-*"))


def heed_ctrl_c() -> None:
    """Undo that a shell starts background jobs, such as these tests perhaps, with SIGINT ignored."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@contextmanager
def ended(process: subprocess.Popen) -> Iterator[None]:
    """Kill the process at the end, if a failed test has left it running."""
    try:
        yield
    finally:
        process.kill()


def test_folders_of_killed_pages_are_removed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from ghibli.app import private_folder

    monkeypatch.setattr(private_folder.tempfile, "tempdir", str(folder))
    (folder / "ghibli-page-999999999-x").mkdir()
    (folder / f"ghibli-page-{os.getpid()}-y").mkdir()
    (folder / "ghibli-page-notes").mkdir()
    made = private_folder.make_private_folder()
    left = sorted(path.name for path in folder.iterdir())
    assert left == sorted([f"ghibli-page-{os.getpid()}-y", "ghibli-page-notes", made.name])
