"""Runs commands in this process and notes what they connect to, delete, rename and open for writing.

    python tests/helpers/audited.py LOG COMMAND...

A COMMAND is a JSON list: train.py or ghibli, and its words. LOG gets a JSON list [event, target] per line.
"""

import json
import os
import runpy
import sys
from pathlib import Path

REPO = Path(__file__).parents[2]
sys.path.insert(0, str(REPO))
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
TARGETS = {  # audit event -> positions of the paths among its arguments
    "os.remove": (0,), "os.rmdir": (0,), "shutil.rmtree": (0,), "os.rename": (0, 1), "os.link": (1,),
    "os.symlink": (1,), "os.truncate": (0,), "os.mkdir": (0,), "os.chmod": (0,), "shutil.move": (0, 1),
}  # fmt: skip


def install(log: int) -> None:
    """Write events to the descriptor; a hook can never be removed again."""

    def note(event: str, target: object) -> None:
        if isinstance(target, int):  # a descriptor, whose file was opened before
            return
        text = repr(target) if event.startswith("socket.") else os.path.abspath(os.fsdecode(target))
        os.write(log, (json.dumps([event, text]) + "\n").encode())

    def hook(event: str, arguments: tuple) -> None:
        if event == "open":
            path, mode, flags = arguments
            if (isinstance(flags, int) and flags & WRITES) or (
                isinstance(mode, str) and set(mode) & set("wax+")
            ):
                note(event, path)
        elif event in ("socket.connect", "socket.sendto"):
            note(event, arguments[1])
        elif event in ("socket.getaddrinfo", "socket.gethostbyname"):
            note(event, arguments[0])
        elif event in TARGETS:
            for position in TARGETS[event]:
                note(event, arguments[position])

    sys.addaudithook(hook)


def main() -> None:
    log = os.open(sys.argv[1], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    commands = [json.loads(word) for word in sys.argv[2:]]
    install(log)
    for command, *words in commands:
        sys.argv = [command, *words]
        try:
            if command == "ghibli":
                runpy.run_module("ghibli", run_name="__main__")
            else:
                runpy.run_path(str(REPO / command), run_name="__main__")
        except SystemExit as leave:
            if leave.code:
                raise


if __name__ == "__main__":
    main()
