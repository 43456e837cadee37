"""How often a JPEG file has its whole image gone through: a file of 1 MB can take minutes to decode."""

import mmap
import re
from pathlib import Path

MOST_SCANS = 250  # in a file; encoders write 1 to about 20
MARKER = re.compile(
    rb"\xff[\x01-\xcf\xd8-\xfe]"
)  # what may stand within a scan are FF00, FFFF and FFD0 to FFD7
ALONE, END, SCAN = (b"\xff\x01", b"\xff\xd8"), b"\xff\xd9", b"\xff\xda"


def has_too_many_scans(file: Path) -> bool:
    """Tell whether a JPEG file has more than MOST_SCANS; each is a pass over all pixels, and takes 100 bytes.

    What follows the image, such as the video of a moving photo, does not count, nor does a preview in it.
    """
    with open(file, "rb") as opened, mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as content:
        return has_more_scans(content)


def has_more_scans(content: bytes | mmap.mmap) -> bool:
    """Tell the same of a file's content."""
    scans, at = 0, 2
    while scans <= MOST_SCANS and (marker := MARKER.search(content, at)) and marker[0] != END:
        at = marker.end()
        scans += marker[0] == SCAN
        if marker[0] not in ALONE:  # two bytes of length, which they count
            at += max(int.from_bytes(content[at : at + 2], "big"), 2)
    return scans > MOST_SCANS
