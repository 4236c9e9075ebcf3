"""What tokens cost, and how many an answer may have."""

from __future__ import annotations

from decimal import ROUND_HALF_UP, Decimal
from typing import Any
from uuid import uuid4

import pytest
from hypothesis import given
from hypothesis import strategies as st

from models.parts import DeltaKind, FilePart, Part, ReasoningPart, TextPart, ToolPart
from models.prices import MAX_PRICE, ModelPrices
from models.records import MessageTokens
from providers.scripted import Script, ScriptError, parse_script
from streams.tokens import TOKENS_PER_IMAGE, Allowance, estimate

prices = st.builds(ModelPrices, *[st.integers(0, MAX_PRICE)] * 3)
counts = st.integers(0, 2**31 - 1)


@given(prices, counts, counts, counts)
def test_a_cost_is_the_sum_of_its_tokens_prices_rounded_half_up(
    price: ModelPrices, prompt: int, completion: int, cached: int
) -> None:
    cached = min(cached, prompt)
    exact = Decimal((prompt - cached) * price.prompt + cached * price.cached + completion * price.completion)
    expected = (exact / 1_000_000).quantize(Decimal(1), ROUND_HALF_UP)
    assert price.cost_micros(MessageTokens(prompt, completion, 0, cached, estimated=False)) == int(expected)


@pytest.mark.parametrize(
    ("tokens", "cost"),
    [
        (MessageTokens(1_000_000, 0, 0, 0, estimated=False), 250_000),
        (MessageTokens(1_000_000, 0, 0, 1_000_000, estimated=False), 25_000),
        (MessageTokens(0, 1_000_000, 1_000_000, 0, estimated=False), 2_000_000),
        (MessageTokens(2, 0, 0, 0, estimated=False), 1),  # 0.5 is rounded up
        (MessageTokens(1, 0, 0, 0, estimated=False), 0),
        (MessageTokens(10, 0, 0, 99, estimated=False), 0),  # more cached than there was: all of it was
        (MessageTokens(0, 0, 0, 0, estimated=False), 0),
    ],
)
def test_costs_of_a_model_at_a_quarter_and_two(tokens: MessageTokens, cost: int) -> None:
    assert ModelPrices(250_000, 25_000, 2_000_000).cost_micros(tokens) == cost


deltas = st.lists(
    st.one_of(
        st.tuples(st.sampled_from(["TEXT", "REASONING"]), st.text(st.characters(codec="utf-8"), max_size=12)),
        st.tuples(st.just("TOOL"), st.just("")),
    ),
    max_size=20,
)


@given(deltas, st.integers(1, 40))
def test_what_an_allowance_lets_through_is_never_estimated_to_be_more(
    said: list[tuple[DeltaKind, str]], tokens: int
) -> None:
    allowance, parts, cut = Allowance(tokens), list[Part](), False
    for kind, text in said:
        if kind not in ("TEXT", "REASONING"):
            part = ToolPart("c", "f", {})
            if not allowance.take_part(part):
                cut = True
                break
            parts.append(part)
            continue
        allowed = allowance.take(kind, text)
        assert text.startswith(allowed)
        make = TextPart if kind == "TEXT" else ReasoningPart
        last = parts[-1] if parts else None
        if allowed and isinstance(last, make):
            parts[-1] = make(last.text + allowed)
        elif allowed:
            parts.append(make(allowed))
        if allowed != text:
            cut = True
            break
    assert estimate(0, parts).completion <= tokens
    if not cut:
        assert "".join(text for kind, text in said if kind in ("TEXT", "REASONING")) == "".join(
            part.text for part in parts if isinstance(part, TextPart | ReasoningPart)
        )


def test_an_image_is_allowed_whole_or_not_at_all() -> None:
    image = FilePart(uuid4(), "image-1.png", "image/png", 5)
    assert estimate(0, [TextPart("abc"), image]).completion == 1 + TOKENS_PER_IMAGE
    allowance = Allowance(2 * TOKENS_PER_IMAGE + 1)
    assert allowance.take("TEXT", "abc") == "abc"
    assert [allowance.take_image() for _ in range(3)] == [True, True, False]


def test_an_allowance_is_used_to_the_last_byte() -> None:
    allowance = Allowance(2)
    assert allowance.take("TEXT", "abcd") == "abcd"
    assert allowance.take("TEXT", "éé") == "éé"
    assert allowance.take("TEXT", "") == ""
    assert allowance.take("TEXT", "x") == ""
    assert Allowance(1).take("TEXT", "ab🦉") == "ab", "no half of a character"
    assert Allowance(1).take("TEXT", "x" * 1_000_000) == "xxxx"


def test_a_script_can_have_prices() -> None:
    script = parse_script("m", {"steps": [], "prices": {"prompt": 1, "cached": 0, "completion": MAX_PRICE}})
    assert script == Script((), 0.0, ModelPrices(1, 0, MAX_PRICE))
    assert parse_script("m", {"steps": []}).prices is None


@pytest.mark.parametrize(
    "given_prices",
    [
        *(5, [], "1", {}, {"prompt": 1}, {"prompt": 1, "cached": 1}, {"prompt": 1, "cached": 1, "completion": -1}),
        *({"prompt": 1, "cached": 1, "completion": 1.5}, {"prompt": 1, "cached": 1, "completion": True}),
        *({"prompt": 1, "cached": 1, "completion": MAX_PRICE + 1}, {"prompt": 1, "cached": "1", "completion": 1}),
        {"prompt": 1, "cached": 1, "completion": 1, "other": 1},
    ],
)
def test_prices_that_are_none_are_refused_with_the_model_named(given_prices: Any) -> None:
    with pytest.raises(ScriptError, match="'m': prices"):
        parse_script("m", {"steps": [], "prices": given_prices})
