"""The address that the page is opened on: checked before anything is loaded, reached without a proxy."""

import errno
import ipaddress
import os
import re
import socket
from collections.abc import Iterator
from contextlib import contextmanager

from ghibli.runtime.errors import UserError

PORTS = range(7860, 7960)  # tried in this order when none is named
PROXIES = ("http_proxy", "https_proxy", "all_proxy")
NUMBER = re.compile(r"[0-9][0-9a-fx.]*|\*")  # an IPv4 address, perhaps short or in hex; * is 0.0.0.0
LOOPBACK = ("localhost", "127.0.0.1", "::1")


def find_address(host: str, port: int | None) -> tuple[str, int]:
    """Return (host without brackets, port) to listen on; the port is the first free one if none is named.

    A number is written out: `0` is 0.0.0.0, and `127.1` is 127.0.0.1.

    Raises:
        UserError: an unknown host, one of another machine, or a port that cannot be used.
    """
    host = host.removeprefix("[").removesuffix("]").lower()
    if port is not None and not 1 <= port <= 65535:
        raise UserError(f"--port {port}: must be from 1 to 65535")
    try:
        found = socket.getaddrinfo(host, port or PORTS[0], type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (socket.gaierror, UnicodeError) as error:
        raise UserError(
            f"--host {host}: unknown host; use 127.0.0.1 for this machine only, 0.0.0.0 for all networks"
        ) from error
    family, where = found[0][0], found[0][4]
    if NUMBER.fullmatch(host):
        host = str(where[0])
    for candidate in PORTS if port is None else (port,):
        reason = trouble(family, (where[0], candidate, *where[2:]))
        if reason is None:
            return host, candidate
        if reason == errno.EADDRNOTAVAIL:
            raise UserError(f"--host {host}: not an address of this machine")
        if port is not None:
            why = "it is in use" if reason == errno.EADDRINUSE else os.strerror(reason)
            raise UserError(
                f"--port {port} on {host} cannot be used: {why}; without --port a free one is found"
            )
    raise UserError(f"the ports {PORTS[0]} to {PORTS[-1]} on {host} cannot be used: name one with --port")


def trouble(family: int, where: tuple[object, ...]) -> int | None:
    """Return why one cannot listen there, as an errno; None if one can.

    Where IPv6 is asked for, the port must be free on 127.0.0.1 too: gradio looks there.
    """
    places = [(family, where)]
    if family == socket.AF_INET6:
        places.append((socket.AF_INET, ("127.0.0.1", where[1])))
    for kind, place in places:
        try:
            with socket.socket(kind, socket.SOCK_STREAM) as opened:
                opened.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                opened.bind(place)
        except OSError as error:
            return error.errno
    return None


def in_url(host: str) -> str:
    """Return a host as it stands in a URL: an IPv6 address in brackets."""
    return f"[{host}]" if ":" in host else host


def is_wildcard(host: str) -> bool:
    """Tell whether a host means all addresses of this machine: 0.0.0.0 or ::."""
    address = as_ip(host)
    return address is not None and address.is_unspecified


def is_loopback(host: str) -> bool:
    """Tell whether a host can be reached from this machine only."""
    address = as_ip(host.removeprefix("[").removesuffix("]"))
    return host == "localhost" or (address is not None and address.is_loopback)


def as_ip(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    """Parse an IP address; None for a name."""
    try:
        return ipaddress.ip_address(host)
    except ValueError:
        return None


@contextmanager
def without_proxies(host: str) -> Iterator[None]:
    """Hide the proxies of the environment from gradio, which asks its own server whether it has started.

    Afterwards they are back, for a base from a hub, but never used for this machine.
    """
    names = [name for proxy in PROXIES for name in (proxy, proxy.upper())]
    kept = {name: os.environ.pop(name) for name in names if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(kept)
        for name in ("no_proxy", "NO_PROXY"):
            before = [word for word in os.environ.get(name, "").split(",") if word]
            os.environ[name] = ",".join(dict.fromkeys([*before, *LOOPBACK, host]))
