"""What of a conversation is sent when it does not fit, and in which form for which template."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence

import pytest
from jinja2 import Environment

from llamalith_app.engine import forms
from llamalith_app.engine.chat import MAX_CHARS_A_TOKEN, fit, fit_raw
from llamalith_app.engine.messages import ChatMessage
from llamalith_app.engine.runner_protocol import Refusal


def system(content: str) -> ChatMessage:
    return ChatMessage("system", content)


def user(content: str) -> ChatMessage:
    return ChatMessage("user", content)


def assistant(content: str) -> ChatMessage:
    return ChatMessage("assistant", content)


def plain(messages: Sequence[ChatMessage]) -> str:
    return "".join(f"{message.role[0]}:{message.content};" for message in messages)


def tokenize(text: str) -> list[int]:
    return list(text.encode())


def kept(
    messages: Sequence[ChatMessage],
    n_ctx: int = 1000,
    max_tokens: int = 1,
    render: Callable[[Sequence[ChatMessage]], str] = plain,
) -> tuple[str, int]:
    prompt = fit(messages, render, tokenize, n_ctx, max_tokens)
    return bytes(prompt.tokens).decode(), prompt.omitted_messages


HISTORY = [system("S"), user("1"), assistant("r1"), user("2"), assistant("r2"), user("3")]


def test_what_fits_is_sent_as_it_is() -> None:
    assert kept(HISTORY) == (plain(HISTORY), 0)


@pytest.mark.parametrize(
    ("n_room", "expected"),
    [
        (len("s:S;u:1;a:r1;u:2;a:r2;u:3;"), ("s:S;u:1;a:r1;u:2;a:r2;u:3;", 0)),
        (len("s:S;u:1;a:r1;u:2;a:r2;u:3;") - 1, ("s:S;u:2;a:r2;u:3;", 2)),
        (len("s:S;u:2;a:r2;u:3;"), ("s:S;u:2;a:r2;u:3;", 2)),
        (len("s:S;u:2;a:r2;u:3;") - 1, ("s:S;u:3;", 4)),
        (len("s:S;u:3;"), ("s:S;u:3;", 4)),
    ],
)
def test_whole_turns_are_left_out_oldest_first(n_room: int, expected: tuple[str, int]) -> None:
    assert kept(HISTORY, n_ctx=n_room + 1) == expected


@pytest.mark.parametrize("n_more", [1, 500, MAX_CHARS_A_TOKEN * 1000])
def test_a_conversation_that_is_not_to_be_shortened_is_refused_where_it_does_not_fit(n_more: int) -> None:
    n_ctx = len(plain(HISTORY)) + 1
    assert fit(HISTORY, plain, tokenize, n_ctx, 1, may_omit=False).omitted_messages == 0
    longer = [HISTORY[0], user("x" * n_more), *HISTORY[1:]]
    with pytest.raises(Refusal, match=f"{n_ctx - 1} fit .* none of it may be left out") as caught:
        fit(longer, plain, tokenize, n_ctx, 1, may_omit=False)
    assert caught.value.kind == "context_overflow"
    assert fit(longer, plain, tokenize, n_ctx, 1).omitted_messages > 0


def test_a_raw_prompt_is_sent_as_it_is_or_refused() -> None:
    assert fit_raw("Once", tokenize, 5, 1) == (list(b"Once"), 0, False)
    with pytest.raises(Refusal, match="5 tokens; 4 fit"):
        fit_raw("Once.", tokenize, 5, 1)


def test_room_for_the_reply_is_a_quarter_of_the_context_at_most() -> None:
    assert kept([user("x" * 72)], n_ctx=100, max_tokens=1000)[1] == 0
    with pytest.raises(Refusal):
        kept([user("x" * 73)], n_ctx=100, max_tokens=1000)


def test_a_prompt_that_does_not_fit_alone_is_refused_with_both_numbers() -> None:
    with pytest.raises(Refusal) as refusal:
        kept([system("S"), user("1"), user("x" * 100)], n_ctx=100, max_tokens=10)
    assert refusal.value.kind == "context_overflow"
    assert str(refusal.value) == (
        "The prompt has 107 tokens together with its system message; 90 fit"
        " (context of 100 tokens, 10 kept for the reply)."
    )


def test_a_long_history_is_rendered_a_few_times_and_its_far_past_never() -> None:
    rendered: list[int] = []

    def render(messages: Sequence[ChatMessage]) -> str:
        rendered.append(sum(len(message.content) for message in messages))
        return plain(messages)

    history = [one for _ in range(10_000) for one in (user("q" * 50), assistant("r" * 50))]
    text, omitted = kept([*history, user("now")], n_ctx=2000, render=render)
    assert text.endswith("u:now;")
    assert omitted == len(history) + 1 - text.count(";")
    assert len(text) > 1700
    assert len(rendered) < 15
    assert max(rendered) <= 2000 * MAX_CHARS_A_TOKEN


def test_messages_without_text_have_their_length_too() -> None:
    rendered: list[int] = []

    def render(messages: Sequence[ChatMessage]) -> str:
        rendered.append(len(messages))
        return plain(messages)

    history = [one for _ in range(100_000) for one in (user(""), assistant(""))]
    text, omitted = kept([*history, user("now")], n_ctx=2000, render=render)
    assert omitted == len(history) + 1 - text.count(";")
    assert max(rendered) <= 2000


def test_a_prompt_without_history_is_tokenized_once() -> None:
    counted: list[str] = []

    def count(text: str) -> list[int]:
        counted.append(text)
        return tokenize(text)

    with pytest.raises(Refusal):
        fit([user("x" * 10_000)], plain, count, 100, 10)
    assert len(counted) == 1


def newest_alone(messages: Sequence[ChatMessage]) -> str:
    return f"{messages[-1].content};"


def test_messages_that_a_template_does_not_show_count_as_left_out() -> None:
    asked = [user("one"), assistant("r"), user("two"), assistant("r"), user("three")]
    prompt = fit(asked, newest_alone, tokenize, 1000, 1)
    assert (bytes(prompt.tokens), prompt.omitted_messages) == (b"three;", 2)
    with pytest.raises(Refusal, match="leaves out earlier messages") as caught:
        fit(asked, newest_alone, tokenize, 1000, 1, may_omit=False)
    assert caught.value.kind == "template"


@pytest.mark.parametrize("n_ctx", range(40, 260, 3))
def test_of_a_shortened_conversation_each_message_that_is_not_in_the_prompt_counts(n_ctx: int) -> None:
    def without_hidden(messages: Sequence[ChatMessage]) -> str:
        return "".join(f"{message.content};" for message in messages if not message.content.startswith("hidden"))

    turns = [
        (user(f"hidden secret{n}"), assistant(f"r{n}"), user(f"shown {n} {'x' * 20}"), assistant(f"s{n}"))
        for n in range(6)
    ]
    asked = [*(message for turn in turns for message in turn), user("last")]
    prompt = fit(asked, without_hidden, tokenize, n_ctx, 1)
    shown = bytes(prompt.tokens).decode().split(";")
    assert prompt.omitted_messages == sum(message.content not in shown for message in asked)


@pytest.mark.parametrize(
    ("shown", "why"),
    [
        (lambda messages: messages[0].content, "leaves out what the user says"),
        (lambda messages: messages[-1].content.replace("Rhyme.", ""), "leaves out the system message"),
    ],
)
def test_without_the_newest_prompt_or_the_system_message_there_is_no_prompt(
    shown: Callable[[Sequence[ChatMessage]], str], why: str
) -> None:
    with pytest.raises(Refusal, match=why):
        fit([system("Rhyme."), user("one"), assistant("r"), user("two")], shown, tokenize, 1000, 1)


@pytest.mark.parametrize(
    "write", [str.upper, json.dumps, lambda text: " ".join(text.split()), lambda text: text.strip()]
)
def test_a_text_may_be_written_otherwise(write: Callable[[str], str]) -> None:
    text = ' He said: "Grüße,\n\nfrom 12 dragons" \t'
    assert forms.missing(write(text), [user(text)]) == []
    assert forms.missing("something else", [user(text)]) == [user(text)]
    assert forms.missing("What is 2+2?", [user("What is 2+2? /no_think")]) == []
    assert forms.missing("", [user(" … "), assistant("gone")]) == []


def alternating(messages: Sequence[ChatMessage]) -> str:
    """As the templates of several families are: the user's turn first, then by turns."""
    rest = messages[1:] if messages[0].role == "system" else messages
    for at, message in enumerate(rest):
        if message.role != ("user", "assistant")[at % 2]:
            raise ValueError("Conversation roles must alternate")
    return plain(messages)


def without_system(messages: Sequence[ChatMessage]) -> str:
    if any(message.role == "system" for message in messages):
        raise ValueError("System role not supported")
    return alternating(messages)


def test_neighbours_of_one_role_are_joined_for_a_template_that_insists() -> None:
    messages = [system("S"), user("1"), user("2"), assistant("r"), assistant("c"), user("3")]
    assert kept(messages, render=alternating)[0] == "s:S;u:1\n\n2;a:r\n\nc;u:3;"
    assert kept(messages)[0] == plain(messages)


def test_what_stands_before_the_first_prompt_is_folded_into_it_where_it_has_no_place() -> None:
    assert kept([system("S"), assistant("c"), user("1")], render=alternating)[0] == "u:S\n\nc\n\n1;"
    turns = [system("S"), user("1"), assistant("r"), user("2")]
    assert kept(turns, render=without_system)[0] == "u:S\n\n1;a:r;u:2;"


def test_a_template_that_always_raises_is_refused_in_its_own_words() -> None:
    def raising(messages: Sequence[ChatMessage]) -> str:
        raise ValueError("This model only listens")

    with pytest.raises(Refusal, match="This model only listens") as refusal:
        kept(HISTORY, render=raising)
    assert refusal.value.kind == "template"


def test_a_template_that_writes_nothing_is_refused() -> None:
    with pytest.raises(Refusal) as refusal:
        kept(HISTORY, render=lambda _: "")
    assert refusal.value.kind == "template"


@pytest.mark.parametrize(
    ("behind", "newest", "opens"),
    [
        ("<|assistant|>", "Hi", False),
        ("<|assistant|><think>", "Hi", True),
        ("<|assistant|><think>\n", "Hi", True),
        ("<|assistant|><think>\n\n</think>\n\n", "Hi", False),
        ("<|assistant|><think>\n", "What is <think>", True),
        ("<|assistant|><think>\n", ">", True),
        ("", "What is <think>\n", False),
        ("\n", "What is <think>", False),
    ],
)
def test_the_prompt_says_whether_it_ends_inside_of_thinking(behind: str, newest: str, opens: bool) -> None:
    def render(messages: Sequence[ChatMessage]) -> str:
        return plain(messages)[:-1] + behind

    turns, short = [user("1"), assistant("<think>"), user(newest)], [user("1" * 100), user(newest)]
    assert fit(turns, render, tokenize, 1000, 1, "<think>").opens_thinking is opens
    assert fit(short, render, tokenize, 80, 1, "<think>").opens_thinking is opens
    assert not fit(turns, render, tokenize, 1000, 1).opens_thinking, "it cannot think"


def jinja(source: str) -> Callable[[list[forms.Message]], str]:
    return lambda messages: Environment().from_string(source).render(messages=messages)


@pytest.mark.parametrize("shown", ["upper", "title", "capitalize"])
def test_a_template_that_changes_the_case_shows_what_it_is_given(shown: str) -> None:
    source = "{% for m in messages %}{{ m.role }}: {{ m.content | FILTER }} {% endfor %}".replace("FILTER", shown)
    assert forms.detect(jinja(source)) == forms.Form()


@pytest.mark.parametrize("shown", ["m.content", "m.content | tojson"])
def test_a_part_that_is_written_as_a_program_writes_it_is_not_shown(shown: str) -> None:
    source = "{% for m in messages %}{% if m.content is not string %}{{ SHOWN }}{% endif %}{% endfor %}"
    form = forms.detect(jinja(source.replace("SHOWN", shown)))
    assert form.parts == frozenset()
    assert not form.shows_prompt
