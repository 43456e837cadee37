"""Lines for a terminal: broken between words, commands and numbers with their unit in one piece."""

import re
import textwrap

GLUE = "\0"  # stands for a space at which no line is broken
COMMAND = (  # as `command_here` writes it, to its end, with the label or quote before it
    r"(?:^\S* {2,}|`)?(?:\S*/bin/)?(?:python[\d.]* (?:\S+\.py|-m)|ghibli [a-z]+|wandb [a-z]+|hf auth)"
    r"(?: (?! )[^ `;]+)*"
)
NUMBER = r"\d %(?: \+- [\d.]+ %)?"
WHOLE = re.compile(f"{COMMAND}|{NUMBER}")


def fold(line: str, width: int) -> str:
    """Break a line between words, so that it takes at most `width` columns as far as that is possible.

    A command stays in one piece, so that it can be pasted. Lines after the first are indented as far as the
    text behind a label, such as `gain     `.
    """
    if len(line) <= width:
        return line
    glued = WHOLE.sub(lambda found: found[0].replace(" ", GLUE), line)
    label = re.match(r"\S* {2,}", line)
    folded = textwrap.fill(
        glued, width, subsequent_indent=" " * len(label[0]) if label else "",
        break_long_words=False, break_on_hyphens=False, replace_whitespace=False, expand_tabs=False,
    )  # fmt: skip
    return folded.replace(GLUE, " ")
