"""`ghibli push`: upload an exported folder to a hub repository."""

import glob
from pathlib import Path

import huggingface_hub

from ghibli.models.hub import hub_answers
from ghibli.runtime.commands import command_here
from ghibli.runtime.errors import UserError, first_line

UPLOADED = (".safetensors", ".md", ".png", ".json")
WHOLE_MODEL = "_merged.safetensors"  # gigabytes, and the base's licence: not uploaded


def files_to_push(folder: Path) -> list[tuple[str, int]]:
    """List (name, bytes) of what would be uploaded: adapters, card and grids, without hidden files.

    Raises:
        UserError: nothing was exported there, or something is a link, which may lead to any file.
    """
    found = [
        file
        for file in sorted([*folder.glob("*"), *folder.glob("samples/*.png")])
        if file.suffix in UPLOADED and not file.name.startswith(".") and not file.name.endswith(WHOLE_MODEL)
    ]
    places = (folder, folder / "samples", *found)
    link = next((place for place in places if place.is_symlink()), None)
    if link is not None:
        raise UserError(f"{link} is a link: only files of an export are sent; replace it by a copy")
    if "README.md" not in [file.name for file in found]:
        command = command_here("ghibli", "export", folder.parent)
        raise UserError(f"{folder} holds nothing to send: run `{command}` first")
    return [(str(file.relative_to(folder)), file.stat().st_size) for file in found if file.is_file()]


def push(folder: Path, hub_id: str, *, private: bool) -> str:
    """Upload the files in one commit with the token of `hf auth login`; return their address.

    Raises:
        UserError: no token, no network, or the hub refuses.
    """
    names = [name for name, _ in files_to_push(folder)]
    if huggingface_hub.get_token() is None:
        command = command_here("hf", "auth", "login")
        raise UserError(f"not logged in to the hub: run `{command}` first, or set HF_TOKEN")
    if not hub_answers():
        raise UserError("the hub cannot be reached: try again with a network connection")
    api = huggingface_hub.HfApi()
    try:
        api.create_repo(hub_id, private=private, exist_ok=True)
        api.upload_folder(repo_id=hub_id, folder_path=folder, allow_patterns=[glob.escape(n) for n in names])
    except (OSError, ValueError) as error:
        raise UserError(f"the hub refused {hub_id}: {first_line(error)[:150]}") from error
    return f"{api.endpoint}/{hub_id}"
