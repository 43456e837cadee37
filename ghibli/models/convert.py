"""Pickled weights -> safetensors. The one place that reads a pickle, and only tensors come out of it."""

import warnings
from pathlib import Path

import torch
from safetensors.torch import save

from ghibli.config.paths import PICKLES
from ghibli.runtime.errors import UserError, first_line
from ghibli.runtime.files import write_atomically

RENAMED = {"pytorch_model": "model"}  # transformers' names of the same weights, pickled and not


def to_safetensors(file: Path) -> Path:
    """Writes the file's tensors beside it as .safetensors and returns that file; the old one stays.

    Raises:
        UserError: no such file, a file that holds more than tensors, or nothing but other things.
    """
    target = file.with_name(RENAMED.get(file.stem, file.stem) + ".safetensors")
    if file.suffix not in PICKLES:
        raise UserError(f"{file}: only {', '.join(PICKLES)} files are converted")
    if not file.is_file():
        raise UserError(f"{file}: no such file")
    if target.exists():
        raise UserError(f"{target} is there already: move it away first")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about how it was pickled
            content = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many types for what is no pickle of tensors
        raise UserError(
            f"{file} cannot be read without running code hidden in it, or is damaged: get the .safetensors "
            f"of the same model ({first_line(error)[:100]})"
        ) from error
    if isinstance(content, dict):
        content = content.get("state_dict", content)
    named = content.items() if isinstance(content, dict) else ()
    tensors = {name: value for name, value in named if isinstance(value, torch.Tensor)}
    if not tensors:
        raise UserError(f"{file} holds no weights by name")
    try:  # safetensors refuses shared memory
        content = save(
            {name: t.detach().contiguous().clone() for name, t in tensors.items()}, {"format": "pt"}
        )
    except (RuntimeError, TypeError, ValueError, KeyError) as error:
        raise UserError(
            f"{file} holds what no .safetensors file can, which is for dense tensors by name: get the "
            f".safetensors of the same model ({first_line(error)[:100]})"
        ) from error
    write_atomically(target, lambda opened: opened.write(content))
    return target
