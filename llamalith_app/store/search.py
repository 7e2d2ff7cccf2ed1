"""Finds conversations by words in their titles and in the messages that people and models wrote.

On SQLite the table `texts` is an index of words (FTS5) without the texts themselves. A message stands in it under
`turn_id << 20 | position`, a title under the negative id of its conversation. `catch_up` adds the messages that are
not in it yet, many in one transaction, which costs far less than one by one: the worker's sweep calls it, and each
search before it reads. What is missing need not be stored: it is all messages after the newest one that is indexed, in
the order in which they were inserted (`rowid`). Triggers of the migrations 0012 and 0014 do the rest in the transaction
that changes a title, or deletes or changes a message that is indexed. A migration that makes one of these tables anew
keeps the order of the messages, and makes their triggers anew, too. Elsewhere, and for scripts that put no blanks
between words, the newest messages are looked through one by one.

Knows no list and no page: `store/conversation_list.py` puts what is found in order.
"""

from __future__ import annotations

import contextlib
import re
import unicodedata
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from sqlalchemy import Connection, bindparam, func, literal_column, select, text

from llamalith_app.errors import StorageUnavailable
from llamalith_app.store.database import Database
from llamalith_app.store.tables import ConversationRow, MessageRow, TurnRow

MAX_QUERY = 200
"""Characters of a query."""
MAX_TERMS = 16
"""Words and phrases of a query that count."""
MAX_HITS = 2000
"""Messages, the newest that match, among which conversations are found; and as many titles."""
MIN_PREFIX = 3
"""Letters from which on a word also finds longer ones."""
MAX_SCANNED = 2000
"""Turns, the newest, whose messages are looked through where no index helps."""
INDEXED_CHARS = 100_000
"""Characters at the beginning of each message that are searched."""
MAX_INDEXED, MAX_INDEXED_CHARS = 500, 500_000
"""Messages, and their characters, that one transaction adds to the index: 20 ms, while no other can write.
"""
MAX_TRANSACTIONS = 20
"""That one `catch_up` makes."""
SNIPPET_CHARS = 160
CHARS_BEFORE = 40
"""Of a snippet, before the first word that was found."""

_SHIFT = 20
_POSITIONS = (1 << _SHIFT) - 1
_TERM = re.compile(r'"([^"]*)"?|(\w+)')
_WITHOUT_BLANKS = re.compile(
    "[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u2e80-\u31ff\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]"
)
"""Letters of scripts whose words are not divided by blanks; an index of words has whole sentences of them."""
_BLANKS = re.compile(r"\s+")


class Term(NamedTuple):
    text: str
    is_phrase: bool
    """It stood in quotation marks: found only as it is. Else longer words that begin with it are found, too."""


class Hit(NamedTuple):
    """The newest message of a conversation in which something was found."""

    turn_id: int
    position: int


class Snippet(NamedTuple):
    """The part of a message around what was found, on one line."""

    text: str
    marks: list[tuple[int, int]]
    """Where in `text` something was found: from, and the end after it; in characters (code points), ascending."""

    @property
    def parts(self) -> list[tuple[str, bool]]:
        """The text in parts; True: this one was found."""
        parts, end = [], 0
        for start, after in self.marks:
            parts += [(self.text[end:start], False), (self.text[start:after], True)]
            end = after
        return [part for part in [*parts, (self.text[end:], False)] if part[0]]


def terms(query: str) -> list[Term]:
    """The words and quoted phrases of a query. Signs alone are none."""
    found = []
    for match in _TERM.finditer(query[:MAX_QUERY]):
        phrase, word = match.groups()
        given = word if phrase is None else _BLANKS.sub(" ", phrase).strip()
        if any(char.isalnum() for char in given):
            found.append(Term(given, phrase is not None))
    return found[:MAX_TERMS]


_NEWEST_INDEXED = (
    "SELECT m.rowid FROM messages m CROSS JOIN texts_docsize d ON d.id = (m.turn_id << 20) | m.position"
    " ORDER BY m.rowid DESC LIMIT 1"
)
# In this order SQLite reads the messages backwards, and none before the newest that is indexed.
_MISSING = f"m.rowid > coalesce(({_NEWEST_INDEXED}), 0) AND m.role IN ('user', 'assistant')"
_IS_BEHIND = text(f"SELECT EXISTS (SELECT 1 FROM messages m WHERE {_MISSING})")  # noqa: S608 - fixed texts
_FIRST_MISSING = text(
    f"SELECT m.rowid, min(length(m.content), {INDEXED_CHARS}) FROM messages m"  # noqa: S608
    f" WHERE {_MISSING} ORDER BY m.rowid LIMIT {MAX_INDEXED}"
)
_INDEX = text(
    "INSERT INTO texts (rowid, text)"  # noqa: S608
    f" SELECT (turn_id << 20) | position, substr(content, 1, {INDEXED_CHARS}) FROM messages"
    " WHERE rowid BETWEEN :first AND :last AND role IN ('user', 'assistant') ORDER BY rowid"
)


def is_behind(connection: Connection) -> bool:
    """Whether there are messages that `index_messages` would add."""
    return connection.dialect.name == "sqlite" and bool(connection.execute(_IS_BEHIND).scalar_one())


def index_messages(connection: Connection) -> bool:
    """Adds the oldest messages that are missing, as many as one transaction may. Returns whether some are still missing
    then."""
    if connection.dialect.name != "sqlite":
        return False
    missing = connection.execute(_FIRST_MISSING).all()
    if not missing:
        return False
    n_taken = n_chars = 0
    for _, length in missing:
        n_chars += length
        if n_taken and n_chars > MAX_INDEXED_CHARS:
            break
        n_taken += 1
    connection.execute(_INDEX, {"first": missing[0].rowid, "last": missing[n_taken - 1].rowid})
    return n_taken == MAX_INDEXED or n_taken < len(missing)


async def catch_up(database: Database) -> None:
    """Adds the messages that are missing, the oldest first: at most MAX_TRANSACTIONS times as many as one transaction
    may. None where the database takes no writes now: a search then finds the others. Raises StorageUnavailable where it
    cannot be read either."""
    if await database.read(is_behind):
        with contextlib.suppress(StorageUnavailable):
            for _ in range(MAX_TRANSACTIONS):
                if not await database.write_lightly(index_messages):
                    break


def conversations(connection: Connection, owner_id: int, query: str) -> dict[int, Hit | None]:
    """The ids of the owner's conversations that match, deleted ones left out. All terms of a query stand in one message
    or in the title. None: only the title matches. Empty: nothing matches."""
    wanted = terms(query)
    if connection.dialect.name != "sqlite" or not wanted or _WITHOUT_BLANKS.search(query):
        return _scanned(connection, owner_id, [term.text for term in wanted] or query[:MAX_QUERY].split())
    found, n_hits = _indexed(connection, owner_id, wanted, with_longer=False)
    # For longer words FTS5 reads all places where any of them stands, a tenth of a second for some 100,000 messages. A
    # word that is that frequent fills the list by itself.
    if n_hits < MAX_HITS:
        longer, _ = _indexed(connection, owner_id, wanted, with_longer=True)
        found = found | longer
    return found


def _indexed(
    connection: Connection, owner_id: int, wanted: Iterable[Term], *, with_longer: bool
) -> tuple[dict[int, Hit | None], int]:
    """What the index finds, and in how many messages."""
    of = {"match": _fts_expression(wanted, with_longer), "of_owner": owner_id, "most": MAX_HITS}
    found: dict[int, Hit | None] = {}
    n_hits = 0
    for conversation_id, place, n_messages in connection.execute(_MATCHING_MESSAGES, of):
        found[conversation_id] = Hit(place >> _SHIFT, place & _POSITIONS)
        n_hits += n_messages
    # That would read all those places again.
    if not with_longer or n_hits < MAX_HITS:
        for conversation_id in connection.execute(_MATCHING_TITLES, of).scalars():
            found.setdefault(conversation_id, None)
    return found, n_hits


_MATCHING_MESSAGES = text(
    """
    SELECT t.conversation_id, max(found.rowid), count(*) FROM (
        SELECT rowid FROM texts WHERE texts MATCH :match AND rowid > 0 ORDER BY rowid DESC LIMIT :most
    ) AS found CROSS JOIN turns t ON t.id = found.rowid >> 20 CROSS JOIN conversations c ON c.id = t.conversation_id
    WHERE c.owner_id = :of_owner AND c.deleted_at IS NULL GROUP BY t.conversation_id
    """
)
_MATCHING_TITLES = text(
    """
    SELECT c.id FROM (
        SELECT -rowid AS id FROM texts WHERE texts MATCH :match AND rowid < 0 ORDER BY rowid LIMIT :most
    ) AS found CROSS JOIN conversations c ON c.id = found.id
    WHERE c.owner_id = :of_owner AND c.deleted_at IS NULL
    """
)


def _fts_expression(wanted: Iterable[Term], with_longer: bool) -> str:
    # In quotation marks nothing has a meaning for FTS5; there are none in a term.
    return " ".join(
        f'"{term.text}"' + ("*" if with_longer and not term.is_phrase and len(term.text) >= MIN_PREFIX else "")
        for term in wanted
    )


def _scanned(connection: Connection, owner_id: int, words: list[str]) -> dict[int, Hit | None]:
    """The same without an index: those in whose newest MAX_SCANNED turns, or title, all words stand."""
    if not words:
        return {}
    mine = (ConversationRow.owner_id == owner_id, ConversationRow.deleted_at.is_(None))
    in_title = (ConversationRow.title.icontains(word, autoescape=True) for word in words)
    titled = select(ConversationRow.id).where(*mine, ConversationRow.title.is_not(None), *in_title).limit(MAX_HITS)
    found: dict[int, Hit | None] = dict.fromkeys(connection.execute(titled).scalars())
    newest = (
        select(TurnRow.id, TurnRow.conversation_id)
        .join(ConversationRow, ConversationRow.id == TurnRow.conversation_id)
        .where(*mine)
        .order_by(TurnRow.id.desc())
        .limit(MAX_SCANNED)
        .subquery()
    )
    beginning = func.substr(MessageRow.content, 1, INDEXED_CHARS)
    rows = connection.execute(
        select(newest.c.conversation_id, MessageRow.turn_id, MessageRow.position)
        .join_from(newest, MessageRow, MessageRow.turn_id == newest.c.id)
        .where(
            MessageRow.role.in_([literal_column("'user'"), literal_column("'assistant'")]),
            *(beginning.icontains(word, autoescape=True) for word in words),
        )
        .order_by(MessageRow.turn_id, MessageRow.position)
    )
    for conversation_id, turn_id, position in rows:
        found[conversation_id] = Hit(turn_id, position)
    return found


def snippets(connection: Connection, query: str, hits: Mapping[int, Hit | None]) -> dict[int, Snippet]:
    """The snippets of these messages, by conversation. `hits`: at most some hundred, of `conversations`."""
    wanted = {hit: conversation_id for conversation_id, hit in hits.items() if hit is not None}
    if not wanted:
        return {}
    searched = _pattern(terms(query) or [Term(word, True) for word in query[:MAX_QUERY].split()])
    of = {"turns": [hit.turn_id for hit in wanted], "positions": list({hit.position for hit in wanted})}
    return {
        wanted[hit]: _snippet(row.beginning, searched)
        for row in connection.execute(_TEXTS, of)
        if (hit := Hit(row.turn_id, row.position)) in wanted
    }


_TEXTS = select(
    MessageRow.turn_id, MessageRow.position, func.substr(MessageRow.content, 1, INDEXED_CHARS).label("beginning")
).where(
    # Not pairs: SQLite would compare each message with them.
    MessageRow.turn_id.in_(bindparam("turns", expanding=True)),
    MessageRow.position.in_(bindparam("positions", expanding=True)),
)


def _snippet(content: str, searched: re.Pattern[str]) -> Snippet:
    first = searched.search(content)
    # The index folds more than the pattern knows; then the message is shown from its beginning.
    start = 0 if first is None else max(0, first.start() - CHARS_BEFORE)
    if first is not None and start and (blank := _BLANKS.search(content, start, first.start())):
        start = blank.end()
    end = min(len(content), start + SNIPPET_CHARS)
    shown = _BLANKS.sub(" ", content[start:end]).strip()
    shown = ("…" if start else "") + shown + ("…" if end < len(content) else "")
    return Snippet(shown, [match.span() for match in searched.finditer(shown)])


def _pattern(wanted: Iterable[Term]) -> re.Pattern[str]:
    """Finds the words and phrases as the index does: whatever their case and diacritics, at the beginning of a word."""
    alternatives = [
        r"\W+".join("".join(map(_variants, word)) for word in re.findall(r"\w+", term.text)) or re.escape(term.text)
        for term in sorted(wanted, key=lambda term: -len(term.text))
    ]
    at_word = "" if any(_WITHOUT_BLANKS.search(term.text) for term in wanted) else r"(?<!\w)"
    return re.compile(f"{at_word}(?:{'|'.join(alternatives)})", re.IGNORECASE)


def _base(char: str) -> str:
    return unicodedata.normalize("NFD", char)[0]


_WITH_DIACRITICS: dict[str, str] = {}
for _code in (*range(0xC0, 0x250), *range(0x1E00, 0x1F00)):
    if (_letter := _base(chr(_code)).lower()) != chr(_code).lower():
        _WITH_DIACRITICS[_letter] = _WITH_DIACRITICS.get(_letter, "") + chr(_code)


def _variants(char: str) -> str:
    """A pattern of this letter with any diacritic."""
    base = _base(char).lower()
    return f"[{base}{_WITH_DIACRITICS[base]}]" if base in _WITH_DIACRITICS else re.escape(char)
