"""Runs commands in this process; notes where they connect and listen, delete, rename and open for writing.

    python tests/helpers/audited.py LOG COMMAND...

A COMMAND is a JSON list: train.py or ghibli, and its words. LOG gets a JSON list [event, target] per line.
`ghibli app RUN` serves the page, draws and restyles once with the run, and is stopped.
"""

import io
import json
import os
import runpy
import signal
import socket
import sys
import threading
import time
import urllib.request
from pathlib import Path

from PIL import Image

REPO = Path(__file__).parents[2]
sys.path[:0] = [str(REPO), str(REPO / "tests")]

from helpers.page_requests import NO_STRUCTURE, call, index_of, upload  # noqa: E402

WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
TARGETS = {  # audit event -> positions of a path and of the folder's descriptor that it is relative to
    "os.remove": ((0, 1),), "os.rmdir": ((0, 1),), "shutil.rmtree": ((0, 1),), "os.mkdir": ((0, 2),),
    "os.rename": ((0, 2), (1, 3)), "os.link": ((1, 3),), "os.symlink": ((1, 2),), "os.chmod": ((0, 2),),
    "os.truncate": ((0, None),), "shutil.move": ((0, None), (1, None)),
}  # fmt: skip


def absolute(path: object, folder: int | None) -> str:
    """Return a path that is relative to the folder with this descriptor, or to the current one."""
    is_relative = isinstance(folder, int) and folder >= 0
    return os.path.abspath(os.path.join(os.readlink(f"/proc/self/fd/{folder}") if is_relative else "",
                                        os.fsdecode(path)))  # fmt: skip


def install(log: int) -> None:
    """Write events to the descriptor; a hook can never be removed again."""

    def note(event: str, target: object, folder: int | None = None) -> None:
        if isinstance(target, int):  # a descriptor, whose file was opened before
            return
        text = repr(target) if event.startswith("socket.") else absolute(target, folder)
        os.write(log, (json.dumps([event, text]) + "\n").encode())

    def hook(event: str, arguments: tuple) -> None:
        if event == "open":
            path, mode, flags = arguments
            if (isinstance(flags, int) and flags & WRITES) or (
                isinstance(mode, str) and set(mode) & set("wax+")
            ):
                note(event, path)
        elif event in ("socket.connect", "socket.sendto", "socket.bind"):
            if event != "socket.bind" or isinstance(arguments[1], tuple):  # a path is a Unix socket's
                note(event, arguments[1])
        elif event in ("socket.getaddrinfo", "socket.gethostbyname"):
            note(event, arguments[0])
        elif event in TARGETS:
            for path, folder in TARGETS[event]:
                note(event, arguments[path], None if folder is None else arguments[folder])

    sys.addaudithook(hook)


def visit(address: str, run: str) -> None:
    """Wait for the page, draw and restyle as a visitor would, and stop the process with SIGTERM."""
    try:
        answers(address)
        settings = ["a lake", "", "ddim", 1, 2, 0, 1, False]
        drawn = call(address, index_of(address, "draw"), [[run], *settings, 1])
        photo = io.BytesIO()
        Image.new("RGB", (64, 64), "green").save(photo, "PNG")
        uploaded = {"path": upload(address, photo.getvalue()), "meta": {"_type": "gradio.FileData"}}
        words = [[run], uploaded, *settings, 1, "img2img", *NO_STRUCTURE]
        restyled = call(address, index_of(address, "restyle"), words)
        if not (drawn["success"] and restyled["success"]):
            print(f"the page refused: {drawn} {restyled}", file=sys.stderr)
            os._exit(1)
    finally:
        os.kill(os.getpid(), signal.SIGTERM)


def answers(address: str) -> None:
    """Wait until something listens there."""
    for _ in range(600):
        try:
            urllib.request.urlopen(address).close()
        except OSError:
            time.sleep(0.1)
        else:
            return
    raise TimeoutError(address)


def app_words(run: str) -> list[str]:
    """Return the words that serve the page, and start its visitor."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    threading.Thread(target=visit, args=(f"http://127.0.0.1:{port}/", run)).start()
    return ["app", "model=demo", "data=demo", "--port", str(port)]


def main() -> None:
    log = os.open(sys.argv[1], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    commands = [json.loads(word) for word in sys.argv[2:]]
    install(log)
    for command, *words in commands:
        is_app = words[:1] == ["app"]
        sys.argv = [command, *(app_words(words[1]) if is_app else words)]
        try:
            if command == "ghibli":
                runpy.run_module("ghibli", run_name="__main__")
            else:
                runpy.run_path(str(REPO / command), run_name="__main__")
        except SystemExit as leave:
            if leave.code and not (is_app and leave.code == 128 + signal.SIGTERM):
                raise


if __name__ == "__main__":
    main()
