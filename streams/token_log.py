"""The log of live answers in Valkey Streams: what any reader on any node has seen is in it first.

A stream's key holds entries whose ids are our own offsets: an entry `47-0` ends at offset 47 of the answer's line
(`models/parts.py`). So appending is ordered and idempotent, a reader's cursor is a place in the log, and what begins
before a cursor can be cut. A script appends only where the log ends as the writer believes: a writer learns in the same
round trip that it was fenced, that the log was lost (and then writes it anew from its own memory, under the same ids),
or that an append whose answer it never got had succeeded after all.

The last entry, with the greatest id there is, says that nothing follows: it is written by a producer that has stored
its end, and by whoever takes the answer of a dead one over. Nothing can be appended behind it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from uuid import UUID, uuid4

import orjson
from redis.exceptions import ResponseError

from models.parts import Part, part_from_dict, part_to_dict
from streams.buffer import ContentEvent, Delta, PartAdded, parts_of
from streams.cursor import cursor_prefix
from streams.valkey import PREFIX, Script, make_client, soon

LAST_ID = 2**53 - 1  # what a number in Lua holds exactly
BLOCK_SECONDS = 2.0
END_KEPT_SECONDS = 300
_KEPT_SECONDS = 3_600
_MOST_ENTRIES = 500_000  # far more than an answer of the longest duration has; a bound on a log that nobody ends
_READ_ENTRIES = 1_000
_MERGED_ENTRIES = 4_000
_WAKE_KEPT_SECONDS = 3_600
_LETTERS = {"TEXT": "T", "REASONING": "R"}
_KINDS: dict[str, Any] = {"T": "TEXT", "R": "REASONING"}


# KEYS: logs, those to be appended to first. ARGV: how many those are, milliseconds to keep, most entries; the last id,
# milliseconds to keep of the others, which are ended (once is enough, and twice is no error); then for each log to be
# appended to: where it should end, how many entries follow, and those: id, field, value. Answers where each log ends
# now. One that cannot be ended keeps nobody else's text back: -1 is answered for it.
_APPEND = Script("""
local at, ends, appended, last_id = 6, {}, tonumber(ARGV[1]), ARGV[4] .. '-0'
for place, key in ipairs(KEYS) do
  if place > appended then
    local rows = redis.pcall('XREVRANGE', key, '+', '-', 'COUNT', 1)
    local is_ended = not rows.err and rows[1] and rows[1][1] == last_id
    if not rows.err and not is_ended then
      local added = redis.pcall('XADD', key, last_id, 'E', '')
      is_ended = type(added) == 'string' or not added.err
    end
    ends[place] = is_ended and tonumber(ARGV[4]) or -1
    redis.call('PEXPIRE', key, ARGV[5])
  else
    local last = redis.call('XREVRANGE', key, '+', '-', 'COUNT', 1)[1]
    local expected, count = tonumber(ARGV[at]), tonumber(ARGV[at + 1])
    local ends_at = last and tonumber(string.match(last[1], '^%d+')) or 0
    at = at + 2
    if ends_at == expected then
      for entry = at, at + 3 * (count - 1), 3 do
        redis.call('XADD', key, 'MAXLEN', '~', ARGV[3], ARGV[entry] .. '-0', ARGV[entry + 1], ARGV[entry + 2])
        ends_at = tonumber(ARGV[entry])
      end
    end
    at = at + 3 * count
    redis.call('PEXPIRE', key, ARGV[2])
    ends[place] = ends_at
  end
end
return ends
""")
# KEYS: a log. ARGV: where to begin, most entries. Texts of one part that follow one another are put together here: to
# take them apart by the thousand costs a reader 40 times as much as to be given one. Answers how many entries there
# were, and then id, field and value of each.
_READ = Script("""
local rows = redis.call('XRANGE', KEYS[1], ARGV[1], '+', 'COUNT', ARGV[2])
local found, texts, field = {#rows}, nil, nil
for _, row in ipairs(rows) do
  local name, value = row[2][1], row[2][2]
  if texts and name == field then
    texts[#texts + 1] = value
    found[#found - 2] = row[1]
  else
    if texts then found[#found] = table.concat(texts) end
    local letter = string.sub(name, 1, 1)
    texts, field = (letter == 'T' or letter == 'R') and {value} or nil, name
    found[#found + 1], found[#found + 2], found[#found + 3] = row[1], name, value
  end
end
if texts then found[#found] = table.concat(texts) end
return found
""")
# KEYS: a log of one entry. ARGV: milliseconds to keep.
_WAKE = Script("""
redis.call('XADD', KEYS[1], 'MAXLEN', 1, '*', 'w', '')
redis.call('PEXPIRE', KEYS[1], ARGV[1])
return 1
""")


@dataclass(frozen=True, slots=True)
class LogName:
    """Which log: that of an attempt to write an answer. A further attempt is made only where nothing is left of it."""

    message_id: UUID
    attempt: int = 1

    @property
    def key(self) -> str:
        """Where it is in Valkey."""
        return f"{PREFIX}stream:{self.message_id.hex}:{self.attempt}"


@dataclass(frozen=True, slots=True)
class Growth:
    """What a log is to grow by: the events behind `offset`, where the log is believed to end."""

    name: LogName
    offset: int
    events: Sequence[ContentEvent]


@dataclass(frozen=True, slots=True)
class Entry:
    """One entry of a log. `event` None: nothing follows."""

    offset: int
    event: ContentEvent | None


class TokenLog:
    """The logs of all live answers, as one process uses them. Closed by its maker.

    Every call has a deadline and raises what `streams.valkey.LOST` names where the log is out of reach; nothing is
    tried again in here.
    """

    def __init__(self, url: str) -> None:
        self._client = make_client(url)
        self._reading = make_client(url, waits=BLOCK_SECONDS)
        # A log of this process's own, that every wait waits for too.
        self._wake_key = f"{PREFIX}wake:{uuid4().hex}"
        self._woken: bytes | str = "0"

    async def close(self) -> None:
        """Close the connections."""
        await self._client.aclose()
        await self._reading.aclose()

    async def append(self, growths: Sequence[Growth], ended: Sequence[LogName] = ()) -> list[int]:
        """Append to many logs in one round trip, or, without events, only keep them; and end others.

        Args:
            ended: to these nothing can be appended any more, and readers are told that the database knows the rest, or
                will.

        Returns:
            Where each log ends now: behind the events; at another offset where it did not end as believed (nothing was
            appended then); or at `LAST_ID` where the answer was ended by somebody else. Behind those, of each of
            `ended`: at `LAST_ID`, or -1 where Valkey refuses that.
        """
        arguments: list[Any] = [
            len(growths),
            _KEPT_SECONDS * 1000,
            _MOST_ENTRIES,
            LAST_ID,
            END_KEPT_SECONDS * 1000,
        ]
        for growth in growths:
            arguments += [growth.offset, len(growth.events)]
            offset = growth.offset
            for event in growth.events:
                if isinstance(event, Delta):
                    offset += len(event.text)
                    arguments += [offset, f"{_LETTERS[event.kind]}{event.part_index}", event.text]
                else:
                    offset += 1
                    arguments += [offset, f"P{event.part_index}", orjson.dumps(part_to_dict(event.part))]
        names = [*(growth.name for growth in growths), *ended]
        ends = await _APPEND.run(self._client, [name.key for name in names], arguments)
        return [int(end) for end in ends]

    async def sealed(self, name: LogName) -> list[Part]:
        """All that was ever shown of an answer whose writer is dead; if it is not, it can append no more."""
        if await self.append((), [name]) != [LAST_ID]:
            raise ResponseError("the log cannot be ended")
        return parts_of([entry.event for entry in await self.read(name, 0) if entry.event is not None])

    async def read(self, name: LogName, offset: int) -> list[Entry]:
        """Everything behind an offset, texts that follow one another put together."""
        found: list[Entry] = []
        while True:
            count, *told = await _READ.run(self._client, [name.key], [f"({offset}-0", _MERGED_ENTRIES])
            ids, fields, values = told[::3], told[1::3], told[2::3]
            found += _entries(
                name, [(key, {field: value}) for key, field, value in zip(ids, fields, values, strict=True)]
            )
            if count < _MERGED_ENTRIES:
                return found
            offset = found[-1].offset

    async def wait(self, offsets: Mapping[LogName, int]) -> dict[LogName, list[Entry]]:
        """What follows the offsets of many logs, in one read that waits for a while, or until `wake`."""
        by_key = {name.key: name for name in offsets}
        reading = self._reading.xread(
            {self._wake_key: self._woken} | {key: f"{offsets[name]}-0" for key, name in by_key.items()},
            count=_READ_ENTRIES,
            block=int(BLOCK_SECONDS * 1000),
        )
        rows = await soon(reading, waits=BLOCK_SECONDS)
        found: dict[LogName, list[Entry]] = {}
        for key_bytes, entries in _pairs(rows):
            key = key_bytes.decode()
            if key == self._wake_key:
                self._woken = entries[-1][0]
            else:
                found[by_key[key]] = _entries(by_key[key], entries)
        return found

    async def probe(self) -> None:
        """Whether the log answers, asked of the node that has our keys."""
        await soon(self._client.exists(self._wake_key))

    async def wake(self) -> None:
        """End the wait of this process: the logs to wait for are others now."""
        await _WAKE.run(self._client, [self._wake_key], [_WAKE_KEPT_SECONDS * 1000])


def _pairs(rows: Any) -> Iterable[tuple[bytes, Any]]:
    """The logs of an answer to XREAD, as RESP2 and RESP3 have them."""
    if isinstance(rows, dict):
        return (
            (key, entries[0] if entries and isinstance(entries[0], list) else entries) for key, entries in rows.items()
        )
    return ((key, entries) for key, entries in rows or ())


def _entries(name: LogName, rows: Iterable[tuple[bytes, Mapping[bytes, bytes]]]) -> list[Entry]:
    prefix = cursor_prefix(name.message_id, name.attempt)
    entries: list[Entry] = []
    for entry_id, fields in rows:
        offset = int(entry_id.partition(b"-")[0])
        ((field, value),) = fields.items()
        letter, index = chr(field[0]), field[1:]
        if letter == "E":
            entries.append(Entry(offset, None))
        elif letter == "P":
            part: Part = part_from_dict(orjson.loads(value))
            entries.append(Entry(offset, PartAdded(f"{prefix}{offset}", int(index), part)))
        else:
            text = value.decode()
            entries.append(Entry(offset, Delta(f"{prefix}{offset}", int(index), _KINDS[letter], text)))
    return entries
