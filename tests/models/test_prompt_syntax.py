"""Prompt weights against the examples in A1111's documentation of its parser."""

import math
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ghibli.models.prompt_syntax import escaped, parse_prompt
from ghibli.runtime.errors import UserError


@pytest.mark.parametrize(
    ("prompt", "parts"),
    [
        ("normal text", [("normal text", 1)]),
        ("an (important) word", [("an ", 1), ("important", 1.1), (" word", 1)]),
        (r"\(literal\]", [("(literal]", 1)]),
        ("(unnecessary)(parens)", [("unnecessaryparens", 1.1)]),
        (
            "a (((house:1.3)) [on] a (hill:0.5), sun, (((sky)))).",
            [
                ("a ", 1), ("house", 1.3 * 1.1 * 1.1), (" ", 1.1), ("on", 1), (" a ", 1.1),
                ("hill", 0.55), (", sun, ", 1.1), ("sky", 1.1**4), (".", 1),
            ],
        ),
        ("(x:1.4)", [("x", 1.4)]),
        ("(a cat:-0.5)", [("a cat", -0.5)]),
        ("(a: b)", [("a: b", 1.1)]),
        ("12:30 (12:30:1.2)", [("12:30 ", 1), ("12:30", 1.2)]),
        ("", []),
    ],
)  # fmt: skip
def test_parts_and_weights(prompt: str, parts: list[tuple[str, float]]) -> None:
    found = parse_prompt(prompt)
    assert [text for text, _ in found] == [text for text, _ in parts]
    assert [weight for _, weight in found] == pytest.approx([weight for _, weight in parts])


@pytest.mark.parametrize("prompt", ["(a", "a)", "[a", "a]", "(a]", "[a)", "((a:1.2)", "a (b [c) d]"])
def test_a_bracket_without_its_partner_is_one_line(prompt: str) -> None:
    with pytest.raises(UserError, match=re.escape(f"the prompt `{prompt}` has a ")) as caught:
        parse_prompt(prompt)
    assert "without its partner: weights are written (word:1.3)" in str(caught.value)


@pytest.mark.parametrize("weight", ["nan", "inf", "-inf", "1e999"])
def test_a_weight_is_finite(weight: str) -> None:
    with pytest.raises(UserError, match="the weight in a prompt"):
        parse_prompt(f"(a:{weight})")


@pytest.mark.parametrize("prompt", ["((a:1e300):1e300)", "[((a:1e200):-1e200)]"])
def test_a_product_of_weights_is_finite(prompt: str) -> None:
    with pytest.raises(UserError, match="has weights whose product is not a finite number$"):
        parse_prompt(prompt)


@given(st.text())
def test_an_escaped_text_is_itself(text: str) -> None:
    assert parse_prompt(escaped(text)) == ([(text, 1.0)] if text else [])


@given(st.text(alphabet="ab ()[]\\:1.3"))
def test_every_text_is_parsed_or_refused(text: str) -> None:
    try:
        parts = parse_prompt(text)
    except UserError:
        return
    assert all(math.isfinite(weight) and part for part, weight in parts)
