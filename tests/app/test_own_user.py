"""Only who serves the page is answered: the kernel tells whose a connection is."""

import os
import socket
import subprocess
import sys

import pytest

from ghibli.app import own_user
from ghibli.app.own_user import is_own_user

VISIT = """
import encodings.idna, os, socket, sys  # all of it, as nobody may not be able to read it
host, port, user = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
if user != os.getuid():
    os.setuid(user)
connection = socket.create_connection((host, port))
sys.stdin.read()
"""
NOBODY = 65534

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux tells")


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
@pytest.mark.parametrize("user", [None, NOBODY])
def test_another_user_is_told_apart(host: str, user: int | None) -> None:
    if user is not None and os.getuid() != 0:
        pytest.skip("only root can be somebody else")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.create_server((host, 0), family=family) as server:
        server.settimeout(30)
        words = [sys.executable, "-c", VISIT, host, str(server.getsockname()[1]), str(user or os.getuid())]
        with subprocess.Popen(words, stdin=subprocess.PIPE) as visitor:
            connection, client = server.accept()
            with connection:
                ends = client[:2], connection.getsockname()[:2]
                assert is_own_user(*ends) is (user is None)
                visitor.stdin.close()
                visitor.wait()
                assert not is_own_user(*ends)  # closed on the other side: nobody's


def test_where_nothing_is_told_nobody_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    assert is_own_user(("127.0.0.1", 1), ("127.0.0.1", 2))  # a connection that is not listed
    assert is_own_user(("testclient", 1), ("127.0.0.1", 2))
    monkeypatch.setattr(own_user, "TABLES", {})
    assert is_own_user(("127.0.0.1", 1), ("127.0.0.1", 2))


def test_who_became_root_by_sudo_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SUDO_UID", "1234")
    assert own_user.allowed_users() == {0, os.getuid(), 1234}
