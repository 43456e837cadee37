"""One process per device: the first one starts the others, writes and prints; they only train along.

The first process writes config.yaml and tells each of the others, through its environment, which run to
join, so `resume=latest`, a dated folder or one trial of a sweep is the same to all. Nobody waits with a
timeout, as the first one may sample images for minutes; each side watches whether the other is alive.

Why not Lightning's own launcher: it starts the same command line again, which would compose the settings
anew (another dated folder, another `latest`) and, in a sweep, run every trial again in every process; and
when one process dies, the others hang in their next collective operation.
"""

import os
import signal
import subprocess
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

from ghibli.runs.folder import RunDir
from ghibli.runtime.commands import resume_command
from ghibli.runtime.console import console
from ghibli.runtime.errors import UserError, disk_trouble
from ghibli.runtime.files import write_text
from ghibli.runtime.provenance import now
from ghibli.runtime.terminal import guard_terminal

JOINS = "GHIBLI_JOINS"  # set for processes that train.py starts: id of the first one, a space, the run folder
RENDEZVOUS = ("MASTER_ADDR", "MASTER_PORT", "NODE_RANK", "LOCAL_RANK", "WORLD_SIZE")  # read by Lightning
FOREVER = timedelta(days=1000)
GRACE = 10  # seconds for a process that has lost its partner to end by itself


def started_outside() -> bool:
    """Return whether srun, torchrun or the like started several processes of this command."""
    tasks = os.environ.get("SLURM_NTASKS", 1) if "SLURM_PROCID" in os.environ else 1
    return JOINS not in os.environ and int(os.environ.get("WORLD_SIZE", tasks)) > 1


def run_to_join() -> RunDir | None:
    """Return the run that this process was started to join; None for a command of the user."""
    if JOINS not in os.environ:
        return None
    return RunDir(Path(os.environ[JOINS].split(" ", 1)[1]))


def last_words(run: RunDir, rank: int) -> Path:
    """Return the file where a further process leaves the reason why it ends."""
    return run.path / f".process_{rank}"


@contextmanager
def together(trainer: Any, run: RunDir, script: Path) -> Iterator[None]:
    """Start the other processes by `python script` around trainer.fit in the first, and end them after it.

    Raises:
        UserError: another process ended before the run did, with the reason it gave.
    """
    if hasattr(trainer.strategy, "_timeout"):
        trainer.strategy._timeout = FOREVER  # private in Lightning 2.6; its constructor is not ours to call
    if trainer.strategy.launcher is None or trainer.strategy.cluster_environment.creates_processes_externally:
        yield
        return
    before = {name: os.environ.get(name) for name in RENDEZVOUS}
    processes = start_others(trainer, run, script)
    done = threading.Event()
    threading.Thread(target=watch, args=(processes, run, done), daemon=True).start()
    try:
        yield
        with suppress(subprocess.TimeoutExpired):
            for process in processes:
                process.wait(GRACE)
    except UserError:
        raise
    except Exception as error:  # a broken connection may be seen before its process has ended
        time.sleep(1)
        if any(process.poll() for process in processes):
            raise UserError(why_ended(processes, run)) from error
        raise
    finally:
        done.set()
        end_others(processes, run)
        leave_group()
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value


def start_others(trainer: Any, run: RunDir, script: Path) -> list[subprocess.Popen]:
    """Start a process for each further device of this machine, with the environment Lightning documents."""
    environment = trainer.strategy.cluster_environment
    os.environ |= {
        "MASTER_ADDR": environment.main_address, "MASTER_PORT": str(environment.main_port),
        "NODE_RANK": str(environment.node_rank()), "LOCAL_RANK": "0", "WORLD_SIZE": str(trainer.world_size),
    }  # fmt: skip
    joins = {JOINS: f"{os.getpid()} {run.path.resolve()}", "TORCH_CPP_LOG_LEVEL": "ERROR"}
    words = [sys.executable, str(script)]
    return [  # in sessions of their own, so that a terminal's Ctrl-C reaches the first process only
        subprocess.Popen(words, env=os.environ | joins | {"LOCAL_RANK": str(rank)}, start_new_session=True)
        for rank in range(1, trainer.num_devices)
    ]


def watch(processes: list[subprocess.Popen], run: RunDir, done: threading.Event) -> None:
    """Thread of the first process: end it when another has failed and it would wait for that one for ever."""
    while not done.wait(1):
        if any(process.poll() for process in processes):
            if done.wait(GRACE):
                return
            reason = why_ended(processes, run)
            run.status.update(state="failed", reason=reason, ended=now())
            print(f"error: {reason}", file=sys.stderr, flush=True)
            end_others(processes, run)
            os._exit(2)


def end_others(processes: list[subprocess.Popen], run: RunDir) -> None:
    """Kill the processes that still run; they write nothing, so any moment is fine."""
    for rank, process in enumerate(processes, start=1):
        process.kill()
        process.wait()
        last_words(run, rank).unlink(missing_ok=True)


def why_ended(processes: list[subprocess.Popen], run: RunDir) -> str:
    """Return the reason that the first process to end gave, or how it ended."""
    ended = ((rank, process.poll()) for rank, process in enumerate(processes, start=1))
    rank, code = next((rank, code) for rank, code in ended if code)
    try:
        return last_words(run, rank).read_text()
    except OSError:
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"
        return (
            f"process {rank + 1} of {len(processes) + 1} {how} without a message, perhaps out of memory; "
            f"what was saved is kept: {resume_command(run.path)}"
        )


def leave_group() -> None:
    """Close the process group, so that the next trial of a sweep can open its own."""
    import torch

    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


@contextmanager
def following(run: RunDir) -> Iterator[None]:
    """Run as a further process: print nothing, ignore signals, and end when the first process does."""
    guard_terminal()
    console.quiet = True  # the first process prints the same
    warnings.simplefilter("ignore")  # the first process has the same libraries, and shows what they say
    for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1"):
        if hasattr(signal, name):  # Windows has two of them
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    first = int(os.environ[JOINS].split(" ", 1)[0]) if JOINS in os.environ else os.getppid()
    threading.Thread(target=leave_with, args=(first,), daemon=True).start()
    try:
        yield
    except UserError as error:
        give_up(run, str(error))
    except Exception as error:
        time.sleep(GRACE / 2)  # meanwhile the first process, if it has failed, ends this one
        trouble = disk_trouble(error)
        if trouble is None:
            traceback.print_exc()
        give_up(run, trouble or f"{type(error).__name__}: {error}")


def leave_with(first: int) -> None:
    """Thread of a further process: end it as soon as the process that started it is gone."""
    while os.getppid() == first:
        time.sleep(0.5)
    os._exit(1)


def give_up(run: RunDir, reason: str) -> None:
    """Leave the reason for the process that started this one and exit at once, whatever the threads do."""
    if JOINS in os.environ:
        write_text(last_words(run, int(os.environ["LOCAL_RANK"])), reason)
    else:
        print(f"error: {reason}", file=sys.stderr, flush=True)
    os._exit(2)
