"""What the page lets in: requests for the addresses it was opened on, of a bounded size, to few routes."""

from contextlib import suppress
from pathlib import Path
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ghibli.app.address import LOOPBACK, as_ip, is_wildcard
from ghibli.app.own_user import is_own_user

LARGEST_UPLOAD = 31 * 2**20  # bytes of a request that uploads a photo, a little above parts.UPLOAD_LIMIT
LARGEST_REQUEST = 2**18  # bytes of any other request
ALL_FILES = 500 * 2**20  # bytes of uploads and images that the page keeps
DROPPED = 2**28  # bytes of a refused request that are read all the same
UPLOAD = "/gradio_api/upload"
POSTS = (  # what the page sends; run/predict is for what is not queued: Cancel, and training
    UPLOAD, "/gradio_api/queue/join", "/gradio_api/run/predict", "/gradio_api/cancel", "/gradio_api/reset",
)  # fmt: skip
CLOSED = (
    "/gradio_api/deep_link", "/gradio_api/proxy=", "/gradio_api/run-history", "/gradio_api/dev",
    "/monitoring",
)  # fmt: skip


class TooLarge(Exception):
    """A request body beyond its limit."""


class Guard:
    """ASGI middleware in front of gradio: answers 403 or 413 to what has no business here.

    A page elsewhere can make a visitor's browser send requests here. It cannot choose their Host (but by DNS
    rebinding, where that is a name of its own) nor their Origin.

    Args:
        app: the application behind it.
        host: that the page was opened on; 0.0.0.0 and :: stand for every IP address, but for no name.
        folder: where gradio keeps uploads and images.
        is_private: answer nobody but the user of this process, as far as the system tells.
    """

    def __init__(self, app: ASGIApp, host: str, folder: Path, is_private: bool = False):
        self.app, self.folder, self.is_private = app, folder, is_private
        self.hosts = {host.lower(), *LOOPBACK}
        self.any_ip = is_wildcard(host)
        self.arriving = 0  # bytes, at most, of the uploads that are being received

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket"):  # the server's start and end
            await self.app(scope, receive, send)
            return
        reason = self.refusal(scope, Headers(scope=scope))
        if reason is not None:
            await refuse(scope, receive, send, 403, reason)
        else:
            await self.bounded(scope, receive, send)

    def refusal(self, scope: Scope, headers: Headers) -> str | None:
        """Return why a request is refused; None if it is not."""
        client, server = scope.get("client"), scope.get("server")
        if self.is_private and client and server and not is_own_user(client, server):
            return "the page belongs to another user of this machine"
        host, origin = headers.get("host", ""), headers.get("origin")
        if any(len(headers.getlist(name)) > 1 for name in ("host", "origin")):
            return "a header that is given twice"
        name = hostname(host)
        if name not in self.hosts and not (self.any_ip and as_ip(name) is not None):
            return "the page was not opened on this host"
        if origin is not None and urlsplit_or_none(origin) != host.lower():
            return "a request from another page"
        path = scope["path"].rstrip("/")
        is_link = headers.get("sec-fetch-mode") == "navigate" and headers.get("sec-fetch-dest") == "document"
        if headers.get("sec-fetch-site") in ("cross-site", "same-site") and not (is_link and path == ""):
            return "a request from another page"
        reads = scope.get("method", "GET") in ("GET", "HEAD")
        if path.startswith(CLOSED) or not (reads or path in POSTS):
            return "not used by the page"
        return None

    async def bounded(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve a request whose body is counted as it arrives."""
        uploads = scope["path"].rstrip("/") == UPLOAD
        most = LARGEST_UPLOAD if uploads else LARGEST_REQUEST
        length = Headers(scope=scope).get("content-length", "")
        expected = int(length) if length.isascii() and length.isdigit() else most
        if length and expected > most:
            await refuse(scope, receive, send, 413, f"more than {most} bytes: over the maximum allowed size")
            return
        reserved = expected if uploads else 0
        if uploads and self.stored() + self.arriving + reserved > ALL_FILES:
            await refuse(scope, receive, send, 413, "there are too many uploads: try again in an hour")
            return
        self.arriving += reserved
        try:
            await self.counted(scope, receive, send, most)
        finally:
            self.arriving -= reserved

    async def counted(self, scope: Scope, receive: Receive, send: Send, most: int) -> None:
        """Pass a request on; answer 413 once its body is longer than `most` bytes."""
        seen, started = 0, False

        async def receive_counted() -> Message:
            nonlocal seen
            message = await receive()
            seen += len(message.get("body", b""))
            if seen > most:
                raise TooLarge
            return message

        async def send_noted(message: Message) -> None:
            nonlocal started
            started = True
            await send(message)

        try:
            await self.app(scope, receive_counted, send_noted)
        except TooLarge:
            if not started:
                await refuse(scope, receive, send, 413, f"more than {most} bytes")

    def stored(self) -> int:
        """Return the bytes in the page's folder."""
        total = 0
        for file in self.folder.rglob("*"):
            with suppress(OSError):  # gradio may have removed it by now
                total += file.lstat().st_size
        return total


async def refuse(scope: Scope, receive: Receive, send: Send, status: int, reason: str) -> None:
    """Answer a request with an error. Its body is read and dropped first, up to DROPPED bytes.

    A client that is still sending would see a broken connection instead of the answer.
    """
    if scope["type"] == "websocket":
        await send({"type": "websocket.close", "code": 1008, "reason": reason})
        return
    dropped, more = 0, True
    while more and dropped < DROPPED:
        message = await receive()
        dropped += len(message.get("body", b""))
        more = message.get("more_body", False)
    await PlainTextResponse(reason, status, headers={"connection": "close"})(scope, receive, send)


def hostname(host: str) -> str:
    """Return the name or IP address in a Host header, in lower case; empty if there is none."""
    try:
        return urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return ""


def urlsplit_or_none(origin: str) -> str | None:
    """Return host and port of an Origin header, in lower case; None for `null` and what is no URL."""
    try:
        return urlsplit(origin).netloc.lower() or None
    except ValueError:
        return None
