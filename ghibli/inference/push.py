"""`ghibli push`: an exported folder to a hub repository, after a look at what would go."""

import glob
from pathlib import Path

from ghibli.models.hub import hub_answers
from ghibli.runtime.errors import UserError, first_line

SENT = (".safetensors", ".md", ".png")


def files_of(folder: Path) -> list[tuple[str, int]]:
    """(name, bytes) of what would be sent: adapters, card and grids; no merged pipeline, no hidden file.

    Raises:
        UserError: nothing was exported there.
    """
    found = [(file.name, file.stat().st_size) for file in sorted(folder.glob("*")) if file.suffix in SENT]
    if "README.md" not in dict(found):
        raise UserError(f"{folder} holds nothing to send: ghibli export RUN fills it")
    return [(name, size) for name, size in found if not name.startswith(".")]


def push(folder: Path, hub_id: str, *, private: bool) -> str:
    """Uploads the files in one commit and returns their address. The token is the one of `hf auth login`.

    Raises:
        UserError: no token, no network, or the hub refuses.
    """
    from huggingface_hub import HfApi, get_token

    names = [name for name, _ in files_of(folder)]
    if get_token() is None:
        raise UserError("the hub does not know you: run `hf auth login` first, or set HF_TOKEN")
    if not hub_answers():
        raise UserError("the hub cannot be reached: try again when there is a network")
    api = HfApi()
    try:
        api.create_repo(hub_id, private=private, exist_ok=True)
        api.upload_folder(repo_id=hub_id, folder_path=folder, allow_patterns=[glob.escape(n) for n in names])
    except (OSError, ValueError) as error:
        raise UserError(f"the hub refused {hub_id}: {first_line(error)[:150]}") from error
    return f"{api.endpoint}/{hub_id}"
