"""Install a lock file into an environment and say how far it is: `python locks/install.py PYTHON LOCK`.

With uv if it is there, which shows its own progress, else with that environment's pip. Needs no package.
"""

import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

LOCKED = ("--no-build-isolation", "--require-hashes", "-r")  # what builds packages is in build.txt
WHOLE = {"dev.txt": 3.3, "extras.txt": 4.0}  # GB to download on Linux
SIZE = re.compile(
    r"\s*(?:Downloading|Using cached) (?P<name>\S+?)-\d\S* \((?P<size>[\d.]+) (?P<unit>[kMG]?B)\)"
)
LOCAL = re.compile(r"Processing (?P<path>\S+\.whl)")
FEW = 2e8  # bytes that tell no pace yet
BYTES = {"B": 1, "kB": 1e3, "MB": 1e6, "GB": 1e9}


def main(python: str, lock: str) -> int:
    """Install the packages of a lock file; return the exit status of uv or pip."""
    uv = shutil.which("uv")
    if uv is not None:
        return subprocess.call([uv, "pip", "install", "--python", python, *LOCKED, lock])
    words = [python, "-m", "pip", "install", "--disable-pip-version-check", "--progress-bar", "off"]
    pip = subprocess.Popen(
        [*words, *LOCKED, lock], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert pip.stdout is not None
    began, done, said = time.monotonic(), 0.0, []
    for line in pip.stdout:
        said.append(line)
        found = package_of(line)
        if found is not None:
            name, size = found
            show(progress(name, size, done, WHOLE.get(Path(lock).name, 0) * 1e9, time.monotonic() - began))
            done += size
        elif line.startswith("Installing collected packages"):
            show(f"unpacking {line.count(',') + 1} packages, a minute or two")
    show("")
    if pip.wait() != 0:
        sys.stderr.writelines(said[-20:])
    return pip.returncode


def package_of(line: str) -> tuple[str, float] | None:
    """Return name and bytes of the package that a line of pip's output begins to fetch; None for others."""
    remote, local = SIZE.match(line), LOCAL.match(line)
    if remote is not None:
        return remote["name"], float(remote["size"]) * BYTES[remote["unit"]]
    if local is not None and Path(local["path"]).is_file():
        return Path(local["path"]).name.split("-")[0], Path(local["path"]).stat().st_size
    return None


def progress(name: str, size: float, done: float, whole: float, seconds: float) -> str:
    """Say what is fetched, how much is done and, from the pace so far, how long the rest takes.

    Args:
        size: bytes of the package.
        done, whole: bytes fetched, and bytes in all.
    """
    text = f"fetching {name} ({size / 1e6:.0f} MB), {done / 1e9:.1f} of {whole / 1e9:.1f} GB done"
    if not FEW < done < whole:
        return text
    left = seconds * (whole - done) / done
    return f"{text}, about {left / 60:.0f} min left" if left >= 60 else f"{text}, less than a minute left"


def show(text: str) -> None:
    """Replace the last line on a terminal; elsewhere print only what takes long."""
    if sys.stdout.isatty():
        width = shutil.get_terminal_size().columns - 1
        print(f"\r\x1b[2K{text[:width]}", end="", flush=True)
    elif re.search(r"\(\d{3,} MB\)|unpacking", text):
        print(text, flush=True)


if __name__ == "__main__":
    raise SystemExit(main(*sys.argv[1:]))
