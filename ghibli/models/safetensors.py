"""safetensors files: integrity checks, and metadata in a reproducible order."""

import json
from math import prod
from pathlib import Path

from safetensors import SafetensorError, safe_open

from ghibli.config.paths import NO_PICKLE, convert_command
from ghibli.runtime.errors import UserError, first_line
from ghibli.runtime.files import require_plain

FLOATS = {"F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2"}
PICKLE_STARTS = (b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")  # zipped, or bare


def check_whole(file: Path, what: str) -> None:
    """Raise a UserError for a .safetensors file that is cut off, damaged, a pickle or a git-lfs pointer.

    Args:
        what: the setting that names it, for messages, such as model.path=DIR.
    """
    try:
        require_plain(file)
    except OSError as error:
        raise UserError(f"{what}: {file} cannot be read: {error.strerror}") from error
    with open(file, "rb") as opened:
        start = opened.read(19)
    if start == b"version https://git":
        raise UserError(f"{what}: {file} is a git-lfs pointer, not the weights: run git lfs pull")
    try:
        with safe_open(file, framework="pt"):
            pass
    except SafetensorError as error:
        if start.startswith(PICKLE_STARTS):  # asked only now: the length of a whole header can look the same
            renamed = file.with_suffix(".bin")
            raise UserError(
                f"{what}: {file} is a pickle under another name; {NO_PICKLE}; rename it to {renamed.name}, "
                f"then {convert_command([renamed])}"
            ) from error
        raise UserError(
            f"{what}: {file} is cut off or damaged; download it again ({first_line(error)})"
        ) from error


def check_float(file: Path, what: str) -> None:
    """Raise a UserError for a network's weights that are whole numbers, as in a quantized model.

    Args:
        what: as for check_whole.
    """
    with safe_open(file, framework="pt") as opened:
        for name in opened.keys():  # noqa: SIM118  not a dictionary
            stored = opened.get_slice(name)
            if name.endswith((".weight", ".bias")) and stored.get_dtype() not in FLOATS:
                raise UserError(
                    f"{what}: {file} stores {name} as {stored.get_dtype()}: a quantized model cannot be used"
                )


def count_weights(file: Path) -> int:
    """Count the numbers in a file, as its header tells."""
    with safe_open(file, framework="pt") as opened:
        return sum(prod(opened.get_slice(name).get_shape()) for name in opened.keys())  # noqa: SIM118


def with_sorted_metadata(content: bytes) -> bytes:
    """Return a safetensors file with its metadata sorted by key; the library writes them in random order."""
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    header["__metadata__"] = dict(sorted(header.get("__metadata__", {}).items()))
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # tensors start at a multiple of 8 bytes
    return len(text).to_bytes(8, "little") + text + content[8 + length :]
