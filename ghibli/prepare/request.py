"""What `ghibli prepare` is asked for, checked before torch is loaded."""

from ghibli.runtime.errors import UserError
from ghibli.runtime.home import expanded


def require_images(data: str) -> None:
    """Check that images can be what they are named as.

    Args:
        data: a folder or file, `kaggle`, or a hub dataset OWNER/NAME.

    Raises:
        UserError: there is no such folder or file, and it is no such name.
    """
    path = expanded(data)
    is_hub_id = data.count("/") == 1 and not data.startswith((".", "/", "~"))
    if not (data == "kaggle" or path.is_dir() or path.is_file() or is_hub_id):
        raise UserError(
            f"--data {data}: no such folder or file, and not a hub dataset (OWNER/NAME) or kaggle"
        )
