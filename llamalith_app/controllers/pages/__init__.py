"""The pages under /chat: one module and one controller a page.

Thin: what a page shows is read from the record and from live progress. A prompt from a form goes the way of every
prompt. How HTML is made is not known here, nor what a script does with it.
"""

from __future__ import annotations

from typing import get_args

from llamalith_app.contracts.conversation_list import ConversationStatusWord, SourceWord

SOURCES: tuple[str, ...] = get_args(SourceWord)
CONVERSATION_STATUSES: tuple[str, ...] = get_args(ConversationStatusWord)
EXCERPT_CHARS = 300
"""Of a text in a list."""
