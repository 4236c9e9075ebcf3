"""Histories as hypothesis draws them: any parts, in any order, of any role, with what vendors refuse among them."""

from __future__ import annotations

from hypothesis import strategies as st

from providers.base import (
    PromptFile,
    PromptMessage,
    PromptPart,
    PromptReasoning,
    PromptText,
    PromptToolCall,
)

_WORDS = st.sampled_from(["", " ", "a", "b\n", "漢 👩‍💻"])
_VALUES = st.sampled_from([None, "", "x", 5, [1], {"q": "owl"}, {"a": {"b": None}}])
_NAMES = st.sampled_from(["", "search", "sea rch", "näme", "x" * 200, "a.b/c"])
PARTS: st.SearchStrategy[PromptPart] = (
    st.builds(PromptText, _WORDS)
    | st.builds(PromptFile, st.just("a.png"), st.just("image/png"), st.just(b"\x89PNG"))
    | st.builds(PromptFile, st.just("d.pdf"), st.just("application/pdf"), st.just(b"%PDF-"))
    | st.builds(PromptReasoning, _WORDS, st.just("EqQ="))
    | st.builds(PromptToolCall, st.sampled_from(["", "c1", "c1", "toolu_!"]), _NAMES, _VALUES, _VALUES)
)
_ROLES = st.sampled_from(["user", "assistant", "assistant", "system"])
_MESSAGES = st.builds(PromptMessage, _ROLES, st.lists(PARTS, max_size=5).map(tuple))
# As the product makes them: what is asked stands last.
PROMPTS: st.SearchStrategy[tuple[PromptMessage, ...]] = st.builds(
    lambda before, last: (*before, last),
    st.lists(_MESSAGES, max_size=6),
    st.just(PromptMessage.of("user", "And now?")),
)
