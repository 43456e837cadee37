"""Words around numbers."""


def number_of(count: int, noun: str) -> str:
    """Format a count with its noun: `1 pair`, `2 pairs`."""
    return f"{count} {noun}{'s' * (count != 1)}"
