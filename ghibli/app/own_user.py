"""Whether a request on this machine comes from whoever serves the page: other users can reach it as well."""

import os
import socket
import struct
from pathlib import Path

TABLES = {socket.AF_INET: Path("/proc/net/tcp"), socket.AF_INET6: Path("/proc/net/tcp6")}  # of Linux
ESTABLISHED = "01"
ROOT_USER = 0  # who may do everything anyway; WSL's relay of the Windows browser is one
Address = tuple[str, int]  # IP address, port


def is_own_user(client: Address, server: Address) -> bool:
    """Return whether the other end of a connection is this user's, or root's; True where nobody can tell.

    Args:
        client, server: both ends, on this machine.
    """
    family = socket.AF_INET6 if ":" in client[0] else socket.AF_INET
    try:
        lines = TABLES[family].read_text().splitlines()[1:]
        ours, theirs = (in_table(family, address) for address in (server, client))
    except (OSError, KeyError):
        return True
    rows = {(row[1], row[2]): row for row in map(str.split, lines)}
    if (ours, theirs) not in rows:  # not even this end is listed
        return True
    row = rows.get((theirs, ours))
    return row is not None and row[3] == ESTABLISHED and int(row[7]) in allowed_users()


def allowed_users() -> set[int]:
    """Return the ids of root, of this process's user, and of who became that one by sudo."""
    before = os.environ.get("SUDO_UID", "")
    return {ROOT_USER, os.getuid(), *([int(before)] if before.isdecimal() else [])}


def in_table(family: socket.AddressFamily, address: Address) -> str:
    """Write an address as the kernel does: words of 32 bits in this machine's order as hex, and the port.

    Raises:
        OSError: not an IP address.
    """
    packed = socket.inet_pton(family, address[0].partition("%")[0])
    words = struct.unpack(f"={len(packed) // 4}I", packed)
    return f"{''.join(f'{word:08X}' for word in words)}:{address[1]:04X}"
