"""What a grammar does not hold: thinking before the reply, and how a budget ends it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from contextlib import aclosing
from pathlib import Path
from typing import Any, cast

import msgspec
import pytest

from llamalith_app.engine.client.protocol import EngineRefused
from llamalith_app.engine.constraint import Constraint, GrammarFailed
from llamalith_app.engine.messages import Submit
from llamalith_app.engine.reasoning import FAMILIES
from llamalith_app.engine.reply import Reply
from llamalith_app.engine.sampler import follow
from llamalith_app.engine.thinking import Thinking
from tests import tiny_models
from tests.engine.conftest import run, started, submit
from tests.fake_engine import END, MARKER_OF, TOKEN_OF, FakeRunner, piece

SAID = "{1}"
every_family = pytest.mark.parametrize("name", FAMILIES)
as_tokens_or_text = pytest.mark.parametrize("has_tokens", [True, False], ids=["tokens", "texts"])


class Grammar:
    """Allows SAID and nothing else."""

    def __init__(self) -> None:
        self.written = ""

    def next(self) -> int:
        rest = SAID[len(self.written) :]
        return rest.encode()[0] if rest else END

    def allows(self, token: int) -> bool:
        return token == self.next()

    def accept(self, token: int) -> None:
        assert self.allows(token)
        if token != END:
            self.written += chr(token)


class Writer:
    """Draws as the sampler does; the test says what the model would like to write."""

    def __init__(
        self, name: str, *, has_tokens: bool = True, budget: int | None = None, is_opened: bool = False
    ) -> None:
        self.family = FAMILIES[name]
        self.tokens = self.family.markers if has_tokens else frozenset[str]()
        self.is_opened = is_opened
        self.grammar = Grammar()
        self.thinking = Thinking(
            self.family,
            FakeRunner(list),
            self.tokenize,
            marker_tokens=self.tokens,
            is_opened=is_opened,
            budget=budget,
        )
        self.drawn: list[int] = []

    def tokenize(self, text: str) -> list[int]:
        """Any marker that is a token, at its place."""
        tokens: list[int] = []
        while text:
            marker = next((marker for marker in self.tokens if text.startswith(marker)), None)
            tokens += [TOKEN_OF[marker]] if marker else list(text[0].encode())
            text = text[len(marker or text[0]) :]
        return tokens

    def write(self, *wanted: int) -> None:
        for want in wanted:
            # What is forced comes first.
            while (forced := self.thinking.forced) is not None:
                self.follow(forced)
            if self.drawn[-1:] != [END]:
                self.draw(want)

    def draw(self, want: int) -> None:
        if self.thinking.is_free:
            self.follow(self.thinking.instead_of(want))
        elif want in self.thinking.openings or self.grammar.allows(want):
            self.follow(want)
        else:
            self.follow(self.grammar.next())

    def say(self) -> None:
        """To the end, which is all that it would like to write."""
        while self.drawn[-1:] != [END]:
            assert len(self.drawn) < 500
            self.write(END)

    def follow(self, token: int) -> None:
        follow(token, cast(Constraint, self.grammar), self.thinking)
        self.drawn.append(token)

    def parted(self) -> tuple[str, str]:
        """Thinking and reply, as the worker reads them."""
        reply, at = Reply(self.family, tokens=self.tokens, is_opened=self.is_opened), 0
        for token in self.drawn[:-1]:
            text = piece(token).decode()
            reply.feed(text, [at] if token in MARKER_OF else [])
            at += len(text)
        reply.end()
        return reply.thinking, str(reply)


@every_family
@as_tokens_or_text
def test_a_grammar_waits_for_the_end_of_the_thinking(name: str, has_tokens: bool) -> None:
    writer = Writer(name, has_tokens=has_tokens)
    family = FAMILIES[name]
    begins = writer.tokenize(f"{family.opens}{family.thinks_in}{family.header_closes}")
    writer.write(begins[0])
    rest = begins[1:]
    # The rest of a marker that is a text is forced.
    writer.write(*(rest if has_tokens else rest[len(family.opens) - 1 :]), *b"hm {2}", *writer.tokenize(family.closing))
    writer.say()
    assert writer.parted() == ("hm {2}", SAID)


@every_family
@as_tokens_or_text
def test_who_ends_within_its_thinking_must_still_write_the_reply(name: str, has_tokens: bool) -> None:
    writer = Writer(name, has_tokens=has_tokens, is_opened=True)
    writer.write(*b"hm")
    writer.say()
    assert writer.parted() == ("hm", SAID)


@every_family
@as_tokens_or_text
def test_who_does_not_think_writes_the_reply_at_once(name: str, has_tokens: bool) -> None:
    writer = Writer(name, has_tokens=has_tokens, budget=0)
    writer.write(*b"no grammar allows this")
    writer.say()
    assert writer.parted() == ("", SAID)


@every_family
@as_tokens_or_text
@pytest.mark.parametrize("budget", [0, 1, 5])
def test_thinking_that_took_its_tokens_is_closed(name: str, has_tokens: bool, budget: int) -> None:
    writer = Writer(name, has_tokens=has_tokens, budget=budget, is_opened=True)
    writer.write(*b"x" * 20)
    writer.say()
    assert writer.parted() == ("x" * budget, SAID)


@every_family
@as_tokens_or_text
def test_thinking_is_closed_when_somebody_asks(name: str, has_tokens: bool) -> None:
    writer = Writer(name, has_tokens=has_tokens, is_opened=True)
    writer.write(*b"xx")
    writer.thinking.close()
    writer.write(*b"yy")
    writer.say()
    assert writer.parted() == ("xx", SAID)


def test_a_budget_does_not_cut_a_character() -> None:
    writer = Writer("think", budget=2, is_opened=True)
    for byte in "a🐉b".encode():
        writer.write(byte)
    writer.say()
    assert b"".join(map(piece, writer.drawn[:-1])).decode() == f"a🐉</think>{SAID}"


def test_a_token_that_would_close_the_thinking_and_begin_the_reply_is_not_drawn() -> None:
    class Joined(FakeRunner):
        def piece(self, token: int) -> bytes:
            return {300: b">{", 301: b"k></think>no", 302: b">\n", 303: b".</think>no"}.get(token) or super().piece(
                token
            )

    for written, token, closed in (
        (b"hm</think", 300, b">"),
        (b"hm</thin", 301, b"k>"),
        (b"hm", 303, b"</think>"),
        (b"hm</think", 302, b">\n"),
    ):
        model = Joined(list)
        thinking = Thinking(FAMILIES["think"], model, str.encode, marker_tokens=(), is_opened=True, budget=None)
        for byte in written:
            thinking.accept(byte)
        drawn = thinking.instead_of(token)
        thinking.accept(drawn)
        shown = model.piece(drawn)
        while (forced := thinking.forced) is not None:
            thinking.accept(forced)
            shown += model.piece(forced)
        assert shown == closed
        assert not thinking.is_free


def test_a_header_without_an_end_gets_one() -> None:
    writer = Writer("harmony")
    writer.write(TOKEN_OF["<|channel|>"], *b"analysis ", *b"x" * 150, *b"hm")
    writer.say()
    thinking, reply = writer.parted()
    assert thinking.endswith("xxhm")
    assert reply == SAID


def test_a_reply_that_begins_in_front_of_its_grammar_is_a_failure_and_no_wrong_reply() -> None:
    class Joined(FakeRunner):
        def piece(self, token: int) -> bytes:
            return b"\nno" if token == 300 else super().piece(token)

    writer = Writer("gemma4")
    writer.thinking._model = Joined(list)
    writer.write(TOKEN_OF["<|channel>"], *b"other")
    with pytest.raises(GrammarFailed):
        writer.follow(300)


def test_a_later_attempt_is_where_the_first_one_was() -> None:
    writer = Writer("harmony", budget=3, is_opened=True)
    writer.write(*b"x" * 9)
    writer.say()
    drawn = writer.drawn
    for n in range(len(drawn)):
        again = Writer("harmony", budget=3, is_opened=True)
        for token in drawn[:n]:
            assert again.thinking.forced in (None, token)
            again.follow(token)
        assert again.thinking.forced in (None, drawn[n])
        again.write(*b"x" * max(0, 9 - n))
        again.say()
        assert again.drawn == drawn


# The real engine, with a model that never closes what was opened


def thinks(prompt: str, budget: int | None, **changed: Any) -> Submit:
    grammar = changed.pop("grammar", 'root ::= "{" [0-9]{3} "}"')
    submitted = submit(prompt, grammar=grammar, **{"max_tokens": 60, **changed})
    return Submit(
        sequence_id=submitted.sequence_id,
        messages=submitted.messages,
        sampling=submitted.sampling,
        stop=[],
        grammar=submitted.grammar,
        thinks=True,
        thinking_budget=budget,
    )


@pytest.mark.slow
@pytest.mark.parametrize("control", [("<think>", "</think>"), ()], ids=["tokens", "texts"])
async def test_the_engine_closes_thinking_and_holds_the_reply_to_its_grammar(
    control: Sequence[str], tmp_path: Path
) -> None:
    template = "{{ messages[-1].content }}{% if 'open' in messages[-1].content %}<think>\n{% endif %}"
    path = tiny_models.write(tmp_path / "model.gguf", "llama", template=template, control=control)
    async with started(None, path=str(path)) as engine:
        for temperature in (0.0, 1.2):
            opened = await run(engine, thinks("open", 7, temperature=temperature, seed=1))
            inside, _, behind = opened.text.partition("</think>")
            assert inside
            assert re.fullmatch(r"\{\d{3}\}", behind)
            assert opened.finish == "stop"
            again = thinks("open", 7, temperature=temperature, seed=1)
            for n in (3, 9, len(opened.tokens) - 2):
                resumed = Submit(
                    sequence_id=again.sequence_id + 1000 + n + 100 * int(temperature),
                    messages=again.messages,
                    sampling=again.sampling,
                    stop=[],
                    grammar=again.grammar,
                    thinks=True,
                    thinking_budget=7,
                    written=opened.tokens[:n],
                )
                assert (await run(engine, resumed)).tokens == opened.tokens
            plain = await run(engine, thinks("Hi", 7, temperature=temperature, seed=1))
            assert re.fullmatch(r"\{\d{3}\}", plain.text)
        without_grammar = await run(engine, thinks("open", 7, grammar=""))
        assert without_grammar.text.count("</think>") == 1
        assert without_grammar.finish == "length"


@pytest.mark.slow
@pytest.mark.parametrize("grammar", ["", 'root ::= "{" [0-9]{3} "}"'], ids=["free", "grammar"])
async def test_the_engine_closes_thinking_when_it_is_asked_to(grammar: str, tmp_path: Path) -> None:
    template = "{{ messages[-1].content }}{% if 'open' in messages[-1].content %}<think>\n{% endif %}"
    path = tiny_models.write(tmp_path / "model.gguf", "llama", template=template, control=("<think>", "</think>"))
    async with started(None, path=str(path)) as engine:
        for temperature in (0.0, 1.2):
            # More than it writes before it hears of it.
            request = thinks("open", None, grammar=grammar, temperature=temperature, seed=1, max_tokens=1500)
            # Of one that it does not know, and of one that does not think.
            engine.answer_now(request.sequence_id + 10_000)
            text, n_tokens, n_asked = "", 0, 0
            async with aclosing(engine.run(request)) as steps:
                async for step in steps:
                    text, n_tokens = text + step.text, n_tokens + len(step.tokens)
                    if n_tokens >= 5 and not n_asked:
                        engine.answer_now(request.sequence_id)
                        n_asked = n_tokens
            inside, closing, behind = text.partition("</think>")
            assert closing
            assert inside
            assert not grammar or re.fullmatch(r"\{\d{3}\}", behind)
        plain = await run(engine, thinks("Hi", None, grammar=""))
        assert plain.text


@pytest.mark.slow
async def test_a_template_gets_the_jobs_arguments_and_does_without_an_effort_that_it_refuses(tmp_path: Path) -> None:
    template = (
        "{% if reasoning_effort is defined and reasoning_effort != 'high' %}{{ raise_exception('no') }}{% endif %}"
        "{{ messages[-1].content }}{{ style }}{{ ' Think.' if reasoning_effort is defined }}"
    )
    path = tiny_models.write(tmp_path / "model.gguf", "llama", template=template)

    async with started(None, path=str(path)) as engine:

        async def n_tokens(effort: dict[str, Any], arguments: dict[str, Any]) -> int:
            asked = submit("Hi.", max_tokens=1)
            asked = msgspec.structs.replace(asked, effort_arguments=effort, template_arguments=arguments)
            return (await run(engine, asked)).advances[-1].prompt_tokens

        plain = await n_tokens({}, {})
        assert await n_tokens({}, {"style": " In a few words."}) > plain
        assert await n_tokens({"reasoning_effort": "high"}, {}) > plain
        assert await n_tokens({"reasoning_effort": "low"}, {}) == plain
        assert await n_tokens({"reasoning_effort": "low"}, {"reasoning_effort": "high"}) > plain
        with pytest.raises(EngineRefused, match="no"):
            await n_tokens({}, {"reasoning_effort": "low"})
        with pytest.raises(EngineRefused, match=r"control token <\|im_start\|>"):
            await n_tokens({}, {"style": "x<|im_start|>system"})
