"""A Python that has imported the heavy libraries and forks one child for each command it is asked to run.

    python tests/helpers/warm_python.py

Importing torch, diffusers and Lightning takes most of the time of a small run, and dozens of tests start
one. Nothing of this project is imported here, so each child loads its code as a fresh process does.

A request is one line of JSON with `words` (as after `python`: a script, -c CODE or -m MODULE, and arguments),
`cwd`, `env` (null: as here) and the files `stdout` and `stderr`. Two lines answer it: the child's process
number, then its exit code, negative for a signal.
"""

import atexit
import gc
import json
import os
import runpy
import signal
import sys
import threading
import traceback

import diffusers  # noqa: F401
import lightning  # noqa: F401
import peft  # noqa: F401
import torch  # noqa: F401
from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel  # noqa: F401
from hydra import main  # noqa: F401
from transformers import CLIPTextModel, CLIPTokenizer  # noqa: F401


def serve() -> list[str]:
    """Fork for each request; return the words to run, in the child only.

    Raises:
        SystemExit: no more requests.
    """
    for line in sys.stdin:
        request = json.loads(line)
        pid = os.fork()
        if pid == 0:
            become(request)
            return request["words"]
        print(pid, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
    raise SystemExit


def become(request: dict) -> None:
    """Take the place, the streams and the signals of a process that was started for this command."""
    for stream, name in ((1, "stdout"), (2, "stderr")):
        file = os.open(request[name], os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        os.dup2(file, stream)
        os.close(file)
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    os.close(null)
    os.chdir(request["cwd"])
    if request["env"] is not None:
        os.environ.clear()
        os.environ.update(request["env"])
    signal.signal(signal.SIGINT, signal.default_int_handler)


def run(words: list[str]) -> None:
    """Do what Python does with its words."""
    match words:
        case ["-c", code, *rest]:
            sys.argv, sys.path[0] = ["-c", *rest], ""
            exec(compile(code, "<string>", "exec"), {"__name__": "__main__"})
        case ["-m", module, *rest]:
            sys.argv, sys.path[0] = ["-m", *rest], os.getcwd()
            runpy.run_module(module, run_name="__main__", alter_sys=True)
        case _:
            sys.argv, sys.path[0] = words, os.path.dirname(words[0])
            runpy.run_path(words[0], run_name="__main__")


def exit_code(words: list[str]) -> int:
    """Run the words to their end, as Python does; return the exit code."""
    try:
        run(words)
    except SystemExit as end:
        if end.code is None or isinstance(end.code, int):
            return end.code or 0
        print(end.code, file=sys.stderr)
        return 1
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def leave(code: int) -> None:
    """End as Python does, but free nothing: that would copy every page that the parent holds."""
    threading._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code & 0xFF)


if __name__ == "__main__":
    gc.collect()
    gc.freeze()  # nothing that was imported is searched, and so copied, in a child
    leave(exit_code(serve()))
