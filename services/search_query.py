"""What a search is for: the words of a query, what they may have been meant to be, and where a text holds them.

A text is taken apart here as the database takes it apart (`search_words` in models/migrations/0004_search.py, which a
test compares), so that what is marked in a snippet is what was found.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice, pairwise
from uuid import UUID

from services.errors import BadUserInputError, PayloadTooLargeError
from services.input import checked_text

MAX_QUERY_CHARS = 200
MAX_TERMS = 16
MAX_TEXT_CHARS = 100_000
_MAX_WORD_CHARS = 64
# Shorter words match only what they are, but for the last, which is being typed.
_LEAST_PREFIX = 3
_LEAST_MISSPELT = 4
_LEAST_TWO_SLIPS = 6
MAX_SNIPPET_PARTS = 21
_SNIPPET_CHARS = 200
_SNIPPET_LEAD = 60

# The classes of the migration.
_SEPARATORS = (
    r"\u0000-\u002f\u003a-\u0040\u005b-\u0060\u007b-\u00a9\u00ab-\u00b1\u00b4\u00b6-\u00b8\u00bb\u00bf\u00d7\u00f7"
    r"\u2000-\u206f\u20a0-\u20cf"
    r"\u037e\u0387\u055a-\u055f\u0589\u058a\u05be\u05c0\u05c3\u05c6\u05f3\u05f4\u060c\u060d\u061b-\u061f"
    r"\u066a-\u066d\u06d4\u0700-\u070d\u0964\u0965\u0970\u0df4\u0f04-\u0f14\u0f3a-\u0f3d\u10fb\u1360-\u1368"
    r"\u166e\u169b\u169c\u16eb-\u16ed\u1800-\u180e"
    r"\u2500-\u25ff\u2e00-\u2e7f\u3000-\u3004\u3008-\u3020\u3030\u303d\u30a0\u30fb\ua4fe\ua4ff"
    r"\ue000-\uf8ff\ufd3e\ufd3f\ufe00-\ufe1f\ufe30-\ufe6f\ufeff\uff00-\uff0f\uff1a-\uff20\uff3b-\uff40"
    r"\uff5b-\uff65\uffe0-\uffff\U000e0000-\U0010ffff"
)
_SINGLES = (
    r"\u0e01-\u0eff\u1000-\u109f\u1780-\u17ff\u2190-\u24ff\u2600-\u2bff"
    r"\u2e80-\u2fff\u3005-\u3007\u3021-\u302f\u3031-\u303c\u303e\u303f\u3041-\u309f\u30a1-\u30fa\u30fc-\u312f"
    r"\u3190-\u31ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U0001f000-\U0001fbff\U00020000-\U0003ffff"
)
_WORD = re.compile(f"[{_SINGLES}]|[^{_SEPARATORS}{_SINGLES}]+")
_SINGLE = re.compile(f"[{_SINGLES}]")
_LETTER = f"[^{_SEPARATORS}{_SINGLES}]"
_BLANK = re.compile(r"\s+")
_QUOTES = str.maketrans("“”„‟", '""""')
_TERM = re.compile(r'(-?)(?:"([^"]*)("?)|([^\s"]+))')

# Letters that may have been meant, by script, and those that are often typed without their accent.
_ALPHABETS = (
    "abcdefghijklmnopqrstuvwxyzäöüß",
    "абвгдежзийклмнопрстуфхцчшщъыьэюяёіїєґ",
    "αβγδεζηθικλμνξοπρσςτυφχψωάέήίόύώ",
    "אבגדהוזחטיכלמנסעפצקרשתךםןףץ",
    "ابتثجحخدذرزسشصضطظعغفقكلمنهويءآأؤإئىةپچژکگی",
)
_ACCENTED = {
    "a": "áàâãåą", "c": "çćč", "d": "ďđ", "e": "éèêëęě", "i": "íìîïı", "l": "ł", "n": "ñńň", "o": "óòôõøő",
    "r": "ř", "s": "śšşș", "t": "ťțţ", "u": "úùûůű", "y": "ýÿ", "z": "źżž",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Term:
    """Words that must (or, `excluded`, must not) stand in this order; with `prefix` the last one may go on."""

    words: tuple[str, ...]
    prefix: bool = False
    excluded: bool = False

    @property
    def may_be_misspelt(self) -> bool:
        """Whether it is one word, not in quotes, that is long enough to be recognised in another spelling."""
        return self.prefix and len(self.words) == 1 and len(self.words[0]) >= _LEAST_MISSPELT

    @property
    def allowed_slips(self) -> int:
        """How many slips may lie between this word and what was meant."""
        return 2 if len(self.words[0]) >= _LEAST_TWO_SLIPS else 1


def parse_query(query: str) -> list[Term]:
    """The terms of a query: bare words, "phrases", and -excluded ones. Everything in them is data.

    Raises:
        BadUserInputError: it cannot be stored, has too many terms, or none to look for.
        PayloadTooLargeError: it is too long.
    """
    if len(query) > MAX_QUERY_CHARS:
        raise PayloadTooLargeError(f"A search has at most {MAX_QUERY_CHARS} characters.", field="query")
    query = checked_text(query, field="query", max_bytes=4 * MAX_QUERY_CHARS).translate(_QUOTES)
    terms: list[Term] = []
    for match in _TERM.finditer(query):
        minus, phrase, closing, bare = match.groups()
        words = tuple(words_of(bare if phrase is None else phrase))
        if not words:
            continue
        typing = match.end() == len(query) and not closing
        going_on = typing or (phrase is None and len(words[-1]) >= _LEAST_PREFIX)
        prefix = going_on and not minus and _SINGLE.match(words[-1]) is None
        terms.append(Term(words, prefix=prefix, excluded=bool(minus)))
    if len(terms) > MAX_TERMS:
        raise BadUserInputError(f"A search has at most {MAX_TERMS} words and phrases.", field="query")
    if all(term.excluded for term in terms):
        raise BadUserInputError("There is no word to look for.", field="query")
    return terms


def words_of(text: str) -> list[str]:
    """The words of a text, in one spelling, as its document has them."""
    return [word[:_MAX_WORD_CHARS] for word in _WORD.findall(_folded(text[:MAX_TEXT_CHARS]))]


def _folded(text: str) -> str:
    # Character by character, as PostgreSQL does: "İ" is one letter, and a final sigma is a sigma.
    return "".join(letter.lower()[0] for letter in unicodedata.normalize("NFKC", text))


def document_query(owner_id: UUID, terms: Sequence[Term], corrections: dict[Term, list[str]]) -> str:
    """The terms as a `tsquery` on the documents of one owner."""
    return " & ".join(_term_query(owner_id, term, corrections.get(term, ())) for term in terms)


def _term_query(owner_id: UUID, term: Term, others: Sequence[str]) -> str:
    phrase = " <-> ".join(lexeme(owner_id, word) for word in term.words) + (":*" if term.prefix else "")
    either = " | ".join([f"({phrase})", *(lexeme(owner_id, word) for word in others)])
    return f"!({either})" if term.excluded else f"({either})"


def lexeme(owner_id: UUID, word: str) -> str:
    """A word as the documents of this owner have it, for a `tsquery`.

    Words hold no character that has a meaning there (see `_SEPARATORS`): quotes are enough.
    """
    return f"'{owner_id.hex[-6:]}{word}'"


def one_slip_away(word: str) -> list[str]:
    """All words that one slip makes this one: a letter left out, added, replaced, or swapped with the next."""
    letters = dict.fromkeys(next((letters for letters in _ALPHABETS if word[0] in letters), "") + word)
    found: dict[str, None] = {}
    for at in range(len(word) + 1):
        before, behind = word[:at], word[at:]
        if behind:
            found[before + behind[1:]] = None
            accented = _ACCENTED.get(behind[0], "")
            found |= dict.fromkeys(before + letter + behind[1:] for letter in (*letters, *accented))
        if len(behind) > 1:
            found[before + behind[1] + behind[0] + behind[2:]] = None
        found |= dict.fromkeys(before + letter + behind for letter in letters)
    found.pop(word, None)
    return list(found)


def slips(one: str, other: str) -> int:
    """How many slips lie between two words (Damerau-Levenshtein distance, optimal string alignment)."""
    twice: list[int] = []
    row = list(range(len(other) + 1))
    for i, letter in enumerate(one, 1):
        before, row = row, [i]
        for j, against in enumerate(other, 1):
            cost = min(before[j] + 1, row[j - 1] + 1, before[j - 1] + (letter != against))
            if i > 1 and j > 1 and letter == other[j - 2] and one[i - 2] == against:
                cost = min(cost, twice[j - 2] + 1)
            row.append(cost)
        twice = before
    return row[-1]


@dataclass(frozen=True, slots=True)
class SnippetPart:
    """A stretch of a snippet; `matched` where it is what was looked for."""

    text: str
    matched: bool


def snippet(text: str, terms: Sequence[Term], corrections: dict[Term, list[str]]) -> list[SnippetPart]:
    """About 200 characters around the first match, white space folded, what matched apart."""
    text = text[:MAX_TEXT_CHARS]
    marks = _marks(terms, corrections)
    folded = _same_length_folded(text)
    first = marks.search(folded)
    if first is None and not unicodedata.is_normalized("NFKC", text):
        # It may stand there in another spelling: then the snippet is in the one that was found.
        text = unicodedata.normalize("NFKC", text)
        folded = _same_length_folded(text)
        first = marks.search(folded)
    start, end = _window(text, first)
    parts = [SnippetPart("…", matched=False)] if start > 0 else []
    done = start
    for match in islice(marks.finditer(folded, start, end), MAX_SNIPPET_PARTS // 2):
        _add(parts, text[done : match.start()], matched=False)
        _add(parts, text[match.start() : match.end()], matched=True)
        done = match.end()
    _add(parts, text[done:end] + ("…" if end < len(text) else ""), matched=False)
    return parts


def _same_length_folded(text: str) -> str:
    lower = text.lower()
    # Of all letters only "İ" gets longer, and only "Σ" looks at its neighbours.
    if len(lower) == len(text) and "Σ" not in text:
        return lower
    return "".join(letter.lower()[0] for letter in text)


def _marks(terms: Sequence[Term], corrections: dict[Term, list[str]]) -> re.Pattern[str]:
    """What the terms match; of two that begin at one place the longer term."""
    patterns: list[str] = []
    for term in sorted(terms, key=lambda term: -len(term.words)):
        if not term.excluded:
            patterns.append(_mark(term.words, prefix=term.prefix))
            patterns += [_mark((word,), prefix=False) for word in corrections.get(term, ())]
    return re.compile("|".join(patterns))


def _mark(words: Sequence[str], *, prefix: bool) -> str:
    """The words in order, with separators between them, not within other words."""
    # Looking back behind the first letter, not before it: the search for a letter is the fast part.
    first = re.escape(words[0][0])
    pattern = first if _SINGLE.match(first) else f"{first}(?<!{_LETTER}{first})"
    pattern += re.escape(words[0][1:])
    for before, word in pairwise(words):
        alone = _SINGLE.match(before) or _SINGLE.match(word)
        pattern += f"[{_SEPARATORS}]{'*' if alone else '+'}{re.escape(word)}"
    if prefix or len(words[-1]) == _MAX_WORD_CHARS:
        return pattern + f"{_LETTER}*"
    return pattern if _SINGLE.match(words[-1]) else pattern + f"(?!{_LETTER})"


def _window(text: str, first: re.Match[str] | None) -> tuple[int, int]:
    """A stretch of the text around a match, not cut within words where there is white space to cut at."""
    begin, stop = first.span() if first else (0, 0)
    start = max(0, begin - _SNIPPET_LEAD)
    if start > 0 and (blank := _BLANK.search(text, start, begin)):
        start = blank.end()
    end = min(len(text), max(start + _SNIPPET_CHARS, min(stop, start + 2 * _SNIPPET_CHARS)))
    if end < len(text) and (cut := max(text.rfind(" ", stop, end), text.rfind("\n", stop, end))) > stop:
        end = cut
    return start, end


def _add(parts: list[SnippetPart], text: str, *, matched: bool) -> None:
    folded = _BLANK.sub(" ", text)
    if not folded:
        return
    if parts and not matched and not parts[-1].matched:
        folded = parts.pop().text + folded
    parts.append(SnippetPart(folded, matched))
