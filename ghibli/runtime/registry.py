"""Named entries that a setting can choose from, and that other code can add to."""

import importlib
from collections.abc import Iterator
from typing import Any, Generic, TypeVar

from ghibli.runtime.errors import UserError, did_you_mean

Entry = TypeVar("Entry")


class Registry(Generic[Entry]):
    """An ordered mapping name -> entry whose lookup explains an unknown name to the user.

    Args:
        key: the setting that names an entry, such as `optimizer.name`.
    """

    def __init__(self, key: str):
        self.key = key
        self._entries: dict[str, Entry] = {}

    def register(self, name: str, entry: Entry) -> None:
        """Add an entry behind those that are there.

        Raises:
            ValueError: the name is taken.
        """
        if name in self._entries:
            raise ValueError(f"{self.key}: {name} is already registered")
        self._entries[name] = entry

    def remove(self, name: str) -> None:
        """Take an entry out again."""
        del self._entries[name]

    def require(self, name: str, key: str | None = None) -> Entry:
        """Return the entry of this name.

        Args:
            key: the setting or option that the user typed, where it is not the registry's own.

        Raises:
            UserError: no such entry.
        """
        if name not in self._entries:
            key = key or self.key
            typed = f"{key} {name}" if key.startswith("--") else f"{key}={name}"
            if not self._entries:
                raise UserError(
                    f"{typed} is unknown: there is none yet; docs/extending.md says how one is added"
                )
            hint = did_you_mean(name, self._entries)
            raise UserError(f"{typed} is unknown: choose one of {', '.join(self._entries)}{hint}")
        return self._entries[name]

    def __getitem__(self, name: str) -> Entry:
        return self.require(name)

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def items(self) -> Iterator[tuple[str, Entry]]:
        """Iterate over (name, entry), in the order of registration."""
        return iter(self._entries.items())


def load_object(path: str) -> Any:
    """Import what `module:attribute` names, such as `torch.optim:AdamW`."""
    module, _, attribute = path.partition(":")
    return getattr(importlib.import_module(module), attribute)
