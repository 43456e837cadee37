"""What the page has drawn, newest first, each with its command; forgotten when the page ends."""

import itertools
import threading
from collections import defaultdict, deque
from dataclasses import dataclass

from PIL import Image

MOST = 40  # images of one visitor


@dataclass(frozen=True)
class Drawn:
    """An image with what made it."""

    number: int  # of all that the page has drawn
    image: Image.Image  # with its settings, as in a PNG file of `ghibli generate`
    label: str
    command: str


class History:
    """The images of each visitor; of one person's page, all of its tabs share them."""

    def __init__(self, shared: bool) -> None:
        """Start empty.

        Args:
            shared: the page is one person's, whose images outlive a reload.
        """
        self._shared = shared
        self._numbers = itertools.count(1)
        self._drawn: defaultdict[str, deque[Drawn]] = defaultdict(lambda: deque(maxlen=MOST))
        self._changing = threading.Lock()

    def add(self, visitor: str, images: list[tuple[Image.Image, str, str]]) -> None:
        """Remember images: (image, label, command)."""
        with self._changing:
            for image, label, command in images:
                self._drawn[self._key(visitor)].appendleft(Drawn(next(self._numbers), image, label, command))

    def of(self, visitor: str) -> list[Drawn]:
        """Return a visitor's images, the newest first."""
        with self._changing:
            return list(self._drawn.get(self._key(visitor), ()))

    def forget(self, visitor: str) -> None:
        """Forget the images of a visitor who left, unless the tabs share them."""
        if not self._shared:
            with self._changing:
                self._drawn.pop(visitor, None)

    def _key(self, visitor: str) -> str:
        return "" if self._shared else visitor
