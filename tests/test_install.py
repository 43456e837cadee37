"""locks/install.py: what it says while pip fetches packages, from lines that pip prints."""

import importlib.util
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.commands import REPO

spec = importlib.util.spec_from_file_location("install", REPO / "locks" / "install.py")
assert spec is not None and spec.loader is not None
install = importlib.util.module_from_spec(spec)
spec.loader.exec_module(install)


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("  Downloading torch-2.14.1-cp311-cp311-manylinux_2_28_x86_64.whl (554.9 MB)", ("torch", 554.9e6)),
        ("Using cached nvidia_nccl_cu13-2.30.7-py3-none-linux.whl (215 kB)", ("nvidia_nccl_cu13", 215e3)),
        ("Collecting torch==2.14.1", None),
        ("Requirement already satisfied: pip in ./lib (24.0)", None),
        ("Processing ./no/such/file-1.0-py3-none-any.whl", None),
    ],
)
def test_a_line_of_pip_names_a_package(line: str, found: tuple[str, float] | None) -> None:
    assert install.package_of(line) == found


def test_a_wheel_on_this_disk_counts_with_its_size(tmp_path: Path) -> None:
    (tmp_path / "some_name-1.0-py3-none-any.whl").write_bytes(bytes(1234))
    line = f"Processing {tmp_path}/some_name-1.0-py3-none-any.whl"
    assert install.package_of(line) == ("some_name", 1234)


def test_the_time_left_follows_from_the_pace() -> None:
    """1.1 GB in 60 s leave 2.2 GB for 2 minutes; a few files tell no pace."""
    said = install.progress("torch", 555e6, 1.1e9, 3.3e9, 60)
    assert said == "fetching torch (555 MB), 1.1 of 3.3 GB done, about 2 min left"
    assert install.progress("a", 1e6, 1e7, 3.3e9, 60).endswith("0.0 of 3.3 GB done")
    assert install.progress("a", 1e6, 3.2e9, 3.3e9, 60).endswith("less than a minute left")
    assert install.progress("a", 1e6, 3.4e9, 3.3e9, 60).endswith("3.4 of 3.3 GB done")


def fake(folder: Path, name: str, script: str) -> Path:
    """A program that runs a line of Python."""
    file = folder / name
    file.write_text(f"#!{sys.executable}\nimport sys\n{script}\n")
    file.chmod(file.stat().st_mode | stat.S_IXUSR)
    return file


def installed(python: str, path: Path) -> subprocess.CompletedProcess[str]:
    words = [sys.executable, str(REPO / "locks" / "install.py"), python, "locks/dev.txt"]
    return subprocess.run(words, capture_output=True, text=True, env={"PATH": str(path)})


def test_a_failure_of_pip_is_shown_and_its_status_kept(tmp_path: Path) -> None:
    python = fake(tmp_path, "python", "print('ERROR: no match for torch'); sys.exit(7)")
    done = installed(str(python), tmp_path)
    assert (done.returncode, done.stderr) == (7, "ERROR: no match for torch\n")


def test_uv_is_used_where_it_is(tmp_path: Path) -> None:
    fake(tmp_path, "uv", "print(sys.argv[1:])")
    asked = [
        "pip", "install", "--python", ".venv/bin/python", "--no-build-isolation", "--require-hashes", "-r",
        "locks/dev.txt",
    ]  # fmt: skip
    assert installed(".venv/bin/python", tmp_path).stdout == f"{asked}\n"
