"""A Python that has imported the heavy libraries and forks one child for each command it is asked to run.

    python tests/helpers/warm_python.py

Importing torch, diffusers and Lightning takes most of the time of a small run, and dozens of tests start
one. Nothing of this project is imported here, so each child loads its code as a fresh process does.

A request is one line of JSON with `words` (a script and its arguments), `cwd` and the files `stdout` and
`stderr`. Two lines answer it: the child's process number, then its exit code, negative for a signal.
"""

import json
import os
import runpy
import signal
import sys

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
    signal.signal(signal.SIGINT, signal.default_int_handler)


if __name__ == "__main__":
    sys.argv = serve()
    sys.path[0] = os.path.dirname(sys.argv[0])
    runpy.run_path(sys.argv[0], run_name="__main__")
