"""The fields that the pages' forms send. Unknown fields are ignored."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from llamalith_app.contracts.conversation_list import MAX_TAG, ConversationStatusWord, SourceWord, Title
from llamalith_app.contracts.jobs import MAX_COMPARED, PriorityWord, StatusWord
from llamalith_app.contracts.text import CONTROL_FREE, END, MAX_NAME, NUL_FREE, ConversationId, Name, Text
from llamalith_app.settings import ranges

MAX_ONCE = 64
"""Characters of `JobForm.once`."""
MAX_ID_DIGITS = 18

Once = Annotated[
    str,
    Meta(
        max_length=MAX_ONCE,
        description="Random, new in each form: sent twice, it makes one job. Empty: two submits make two jobs.",
    ),
]
OptionalTurn = Annotated[
    str, Meta(title="the id of a turn, or nothing", max_length=MAX_ID_DIGITS, pattern=rf"^(?:[1-9][0-9]*)?{END}")
]


MAX_NUMBER = 40
"""Characters of a number in a form."""
NumberText = Annotated[str, Meta(max_length=MAX_NUMBER)]
StopTexts = Annotated[str, Meta(max_length=ranges.MAX_STOPS * (ranges.MAX_STOP_CHARACTERS + 1))]


class ParameterFields(msgspec.Struct, kw_only=True):
    """Sampling parameters as people type them. What is empty is as the model's settings say."""

    max_tokens: NumberText = ""
    temperature: NumberText = ""
    top_p: NumberText = ""
    top_k: NumberText = ""
    min_p: NumberText = ""
    typical_p: NumberText = ""
    repeat_penalty: NumberText = ""
    presence_penalty: NumberText = ""
    frequency_penalty: NumberText = ""
    seed: NumberText = ""
    stop: StopTexts = ""
    """One text a line."""


class JobForm(ParameterFields, kw_only=True):
    """A prompt: from the page of a new chat, from a conversation, or stored while its author logs in."""

    content: Text = ""
    model: Name = ""
    system_prompt: Text = ""
    system_prompt_was: Text = ""
    """The system prompt that the form showed. Where `system_prompt` equals it, the one in force stays."""
    conversation_id: ConversationId = ""
    """Empty: a new conversation."""
    once: Once = ""
    seen: OptionalTurn = ""
    """The last turn that the page showed: the prompt continues the branch through it. Empty: the head's."""
    beside: OptionalTurn = ""
    """The turn whose prompt this one edits: it becomes its sibling. Empty: none."""
    compare: str = ""
    """Other models that are sent the same, one a line; those that are not offered are refused. A form has a box for
    each, named COMPARE_BOX and the model; a draft has this field."""


COMPARE_BOX = "compare:"


class RegenerateForm(msgspec.Struct, kw_only=True):
    """Another reply to the prompt of a job."""

    conversation_id: ConversationId = ""
    """The conversation that shows it; empty: the job's own."""
    model: Name = ""
    """Empty: the job's."""
    once: Once = ""


class TurnForm(msgspec.Struct, kw_only=True):
    """What is to happen with a turn of a conversation."""

    conversation_id: ConversationId
    turn_id: Annotated[str, Meta(max_length=MAX_ID_DIGITS, pattern=rf"^[1-9][0-9]*{END}")]


class PromptForm(msgspec.Struct, kw_only=True):
    """The new text of a prompt that waits."""

    content: Text


SHORT_FIELDS = {
    "model": MAX_NAME,
    "conversation_id": MAX_NAME,
    "once": MAX_ONCE,
    **dict.fromkeys(ParameterFields.__struct_fields__, MAX_NUMBER),
    "stop": ranges.MAX_STOPS * (ranges.MAX_STOP_CHARACTERS + 1),
    "seen": MAX_ID_DIGITS,
    "beside": MAX_ID_DIGITS,
    "compare": MAX_COMPARED * (MAX_NAME + 1),
}
"""The short fields of a JobForm, each with its maximum number of characters."""


class FormAccepted(msgspec.Struct, kw_only=True):
    """What a page's script learns of a prompt that was accepted."""

    url: str
    """Of the conversation, at the job."""
    once: str
    """For the next prompt of the same form."""


class ConversationsForm(msgspec.Struct, kw_only=True):
    """What is to become of the conversations whose ids the field `id` has, once for each."""

    action: Literal["rename", "pin", "unpin", "archive", "unarchive", "tag", "untag", "delete", "undo"]
    title: Title = ""
    """Of `rename`. Empty: none."""
    tag: Annotated[str, Meta(max_length=MAX_TAG, pattern=CONTROL_FREE)] = ""
    """Of `tag` and `untag`."""
    deleted: Annotated[str, Meta(pattern="^[0-9]{1,17}$")] = "0"
    """Of `undo`: when they were deleted, in microseconds since 1970."""


class ConversationsFilter(msgspec.Struct, kw_only=True):
    """Which conversations their list shows, as its URL says it. What is empty does not restrict."""

    q: Annotated[str, Meta(title="at most 200 characters without NUL", max_length=200, pattern=NUL_FREE)] = ""
    archived: Literal["", "true", "any"] = ""
    """Empty: those that are not archived."""
    tag: Annotated[str, Meta(max_length=MAX_TAG, pattern=CONTROL_FREE)] = ""
    source: SourceWord | Literal[""] = ""
    status: ConversationStatusWord | Literal[""] = ""


class LoginForm(msgspec.Struct, kw_only=True):
    """A password. The fields of a JobForm may come with it, unvalidated, where a session ended while it was typed."""

    password: str = ""
    next: str = ""
    """The path to go to after the login; ignored where it is none of Llamalith's."""


class LookForm(msgspec.Struct, kw_only=True):
    """How the pages look in this browser. What is absent stays as it is."""

    theme: Literal["light", "dark", "system"] | None = None
    sidebar: Literal["open", "closed"] | None = None


Day = Annotated[str, Meta(title="a day such as 2026-11-30, or nothing", pattern=rf"^(\d{{4}}-\d\d-\d\d)?{END}")]
"""In the viewer's zone."""
Digits = Annotated[str, Meta(title="a whole number", pattern=rf"^\d{{1,18}}{END}")]


class JobsFilter(msgspec.Struct, kw_only=True):
    """Which jobs the jobs page shows, as its URL says it. What is empty does not restrict."""

    status: StatusWord | Literal[""] = ""
    model: Name = ""
    priority: PriorityWord | Literal[""] = ""
    q: Annotated[str, Meta(title="at most 200 characters", max_length=200, pattern=CONTROL_FREE)] = ""
    """Text to look for."""
    age: Literal["", "hour", "day", "week", "month"] = ""
    """Accepted within this time."""
    since: Day = ""
    until: Day = ""
    """Up to the end of this day."""
    source: SourceWord | Literal[""] = ""
    """Where its conversation was made."""


class BulkForm(JobsFilter, kw_only=True):
    """An action on all jobs that match."""

    action: Literal["cancel", "retry", "priority"]
    to: PriorityWord | Literal[""] = ""
    """The class to move to."""
    newest: Digits = "0"
    """The newest job that the page told of."""


class BulkDone(msgspec.Struct, kw_only=True):
    """What an action did, in the URL of the page that says it."""

    did: Literal["", "cancel", "retry", "priority"] = ""
    n: Digits = "0"
    more: Literal["", "1"] = ""


class PriorityForm(msgspec.Struct, kw_only=True):
    priority: PriorityWord


class ModelForm(msgspec.Struct, kw_only=True):
    model: Name


class AgainForm(msgspec.Struct, kw_only=True):
    """A job with changes. What is empty is as the model's settings say."""

    content: Text = ""
    model: Name = ""
    system_prompt: Text = ""
    priority: PriorityWord = "interactive"
    max_tokens: str = ""
    temperature: str = ""
    top_p: str = ""
    top_k: str = ""
    min_p: str = ""
    repeat_penalty: str = ""
    seed: str = ""
    stop: str = ""
    """One text a line."""
    once: Annotated[str, Meta(max_length=MAX_ONCE)] = ""
    """As in JobForm."""
