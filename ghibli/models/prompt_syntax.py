"""Prompt weights as A1111 and ComfyUI write them: `(word:1.3)`, `(word)`, `[word]`; imports no torch."""

import re
from math import isfinite

from ghibli.config.checks import require_finite
from ghibli.runtime.errors import UserError

STRONGER = 1.1  # factor of `(word)`; `[word]` divides by it
TOKEN = re.compile(r"\\[\\()\[\]]|[()\[\]]|[^\\()\[\]]+|\\")
WEIGHT_AT_END = re.compile(r"\A(.*):\s*([^:\s]+)\s*\Z", re.DOTALL)
NUMBER = re.compile(r"[+-]?([0-9]+[.]?[0-9]*|[.][0-9]+)(e[+-]?[0-9]+)?", re.IGNORECASE)
CLOSED_BY = {"(": ")", "[": "]"}

Weighted = list[tuple[str, float]]  # parts of a prompt in their order, each with its weight


def parse_prompt(prompt: str) -> Weighted:
    r"""Split a prompt into parts with weights, as A1111's parse_prompt_attention does.

    Brackets nest, and their factors multiply. `\(`, `\)`, `\[`, `\]` and `\\` stand for the letters. Where
    A1111 guesses, brackets without a partner are refused.

    Raises:
        UserError: a bracket without its partner, or a weight or a product of weights that is not finite.
    """
    stack: list[tuple[str, Weighted]] = [("", [])]  # (the open bracket, what stands in it so far)
    for token in TOKEN.findall(prompt):
        if token in CLOSED_BY:
            stack.append((token, []))
        elif token in (")", "]"):
            opened, inside = stack.pop()
            if CLOSED_BY.get(opened) != token:
                raise unbalanced(prompt, token if not stack else f"{opened} and {token}")
            stack[-1][1].extend(weighted(opened, inside))
        else:
            stack[-1][1].append((token[1] if len(token) == 2 and token[0] == "\\" else token, 1.0))
    if len(stack) > 1:
        raise unbalanced(prompt, stack[-1][0])
    found = joined(stack[0][1])
    if not all(isfinite(weight) for _, weight in found):
        raise UserError(f"the prompt `{prompt[:60]}` has weights whose product is not a finite number")
    return found


def weighted(bracket: str, inside: Weighted) -> Weighted:
    """Multiply the weights of what stood in a bracket: by the number after its colon, or by STRONGER."""
    if bracket == "[":
        return [(text, weight / STRONGER) for text, weight in inside]
    factor = STRONGER
    found = WEIGHT_AT_END.match(inside[-1][0]) if inside and inside[-1][1] == 1 else None
    if found and re.fullmatch(r"[+-]?(nan|inf|infinity)", found[2], re.IGNORECASE):
        require_finite("the weight in a prompt", float(found[2]))
    if found and NUMBER.fullmatch(found[2]):
        factor = float(found[2])
        require_finite("the weight in a prompt", factor)
        inside = [*inside[:-1], (found[1], 1.0)]
    return [(text, weight * factor) for text, weight in inside]


def joined(parts: Weighted) -> Weighted:
    """Join neighbours of equal weight, and leave out what is empty."""
    found: Weighted = []
    for text, weight in parts:
        if found and found[-1][1] == weight:
            found[-1] = (found[-1][0] + text, weight)
        elif text:
            found.append((text, weight))
    return found


def unbalanced(prompt: str, bracket: str) -> UserError:
    """Return the error about a bracket without its partner."""
    return UserError(
        rf"the prompt `{prompt[:60]}` has a {bracket} without its partner: weights are written (word:1.3); "
        r"put \ before a bracket that is meant as a letter"
    )


def escaped(text: str) -> str:
    r"""Return a text as a prompt in which brackets are letters: `\(`, `\)`, `\[`, `\]`, `\\`."""
    return re.sub(r"([\\()\[\]])", r"\\\1", text)
