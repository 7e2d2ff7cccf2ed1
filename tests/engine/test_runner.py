"""What only the real runner does: grammars, seeds, chat formats, and templates that mean harm."""

from __future__ import annotations

import asyncio
import ctypes
import json
import operator
import re
from pathlib import Path
from typing import Any

import llama_cpp
import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llamalith_app.engine.chat import fit
from llamalith_app.engine.client.protocol import EngineRefused
from llamalith_app.engine.messages import ChatMessage, PromptFormat, Submit
from llamalith_app.engine.reasoning import FAMILIES
from llamalith_app.engine.runner import MAX_RUN_CHARS, LlamaRunner, split_long_runs
from llamalith_app.engine.runner_protocol import CannotLoad, Refusal, Sampled, Work
from llamalith_app.engine.sampler import CANDIDATE, SeededDist
from llamalith_app.engine.template import TemplateFailed
from llamalith_app.settings.formats import CHAT_FORMATS
from tests import tiny_models
from tests.engine.conftest import load, run, sampling, started, submit

pytestmark = pytest.mark.slow

HELLO = [ChatMessage("system", "S"), ChatMessage("user", "Hello")]
SMALL_JSON = r"""
root   ::= "{" ws "\"name\":" ws string "," ws "\"age\":" ws [1-9] [0-9]{0,2} "}"
string ::= "\"" [a-zA-Z ]{1,20} "\""
ws     ::= " "?
"""
DEAD_END = r"""root ::= "a" [^\x00-\U0010FFFF]"""


@pytest.mark.parametrize("temperature", [0.0, 1.5])
async def test_a_grammar_is_enforced(temperature: float) -> None:
    bound = submit("Tell me about Ada.", grammar=SMALL_JSON, max_tokens=200, temperature=temperature, seed=3)
    async with started(None) as engine:
        reply = await run(engine, bound)
    assert reply.finish == "stop"
    assert set(json.loads(reply.text)) == {"name", "age"}


async def test_a_grammar_of_one_sequence_leaves_the_others_alone() -> None:
    async with started(None, n_slots=2) as engine:
        alone = await run(engine, submit("List three fruits."))
    async with started(None, n_slots=2) as engine:
        free, bound = await asyncio.gather(
            run(engine, submit("List three fruits.")),
            run(engine, submit("List three fruits.", grammar="root ::= [0-9]{10}")),
        )
    assert free.text == alone.text
    assert re.fullmatch("[0-9]{10}", bound.text)


async def test_a_grammar_that_llguidance_refuses_is_refused() -> None:
    async with started(None) as engine:
        with pytest.raises(EngineRefused, match="cannot be used") as refused:
            await run(engine, msgspec.structs.replace(submit("Hi"), grammar="no grammar"))
        assert refused.value.kind == "grammar"
        assert not engine.died.is_set()


async def test_a_grammar_that_leads_nowhere_ends_its_own_sequence_only() -> None:
    async with started(None, n_slots=2) as engine:
        other = asyncio.create_task(run(engine, submit("List three fruits.")))
        with pytest.raises(EngineRefused, match="no token to go on") as refused:
            await run(engine, submit("Hi", grammar=DEAD_END))
        assert refused.value.kind == "grammar"
        assert (await other).text


async def test_a_seed_makes_a_reply_repeatable() -> None:
    def warm(seed: int | None) -> Submit:
        return submit("Invent a name.", temperature=1.5, seed=seed, max_tokens=8)

    async with started(None) as engine:
        # The first one leaves the prompt in the slot, so that the rest are cut alike.
        _, one, same = [await run(engine, warm(7)) for _ in range(3)]
        others = [await run(engine, warm(None)) for _ in range(4)]
    assert one.tokens == same.tokens
    assert len({reply.text for reply in others}) > 1


@pytest.mark.parametrize("ends_by", ["length", "stop"])
async def test_a_reply_goes_on_behind_what_was_written_of_it(ends_by: str) -> None:
    asked: dict[str, Any] = {"temperature": 0.8, "seed": 7, "max_tokens": 12, "frequency_penalty": 0.5}
    async with started(None) as engine:
        whole = await run(engine, submit("Invent a name.", **asked))
        if ends_by == "stop":
            asked["stop"] = [whole.text[-3:]]
            whole = await run(engine, submit("Invent a name.", **asked))
        for n_written in range(len(whole.tokens) + 1):
            written = whole.tokens[:n_written]
            again = await run(engine, msgspec.structs.replace(submit("Invent a name.", **asked), written=written))
            first = next(advance for advance in again.advances if advance.tokens or advance.finish)
            assert first.tokens[:n_written] == written
            assert again.advances[-1].prompt_tokens == whole.advances[-1].prompt_tokens
            if ends_by == "length":
                assert (len(again.tokens), again.finish) == (12, "length")
    # All of it was written before.
    assert (again.tokens, again.text, again.finish) == (whole.tokens, whole.text, ends_by)


async def test_a_grammar_holds_what_continues_and_what_it_does_not_allow_is_written_again() -> None:
    async with started(None) as engine:
        bound = submit("Tell me about Ada.", grammar=SMALL_JSON, max_tokens=200)
        whole = await run(engine, bound)
        for n_written in (1, len(whole.tokens) // 2, len(whole.tokens)):
            again = await run(
                engine,
                msgspec.structs.replace(
                    submit("Tell me about Ada.", grammar=SMALL_JSON, max_tokens=200), written=whole.tokens[:n_written]
                ),
            )
            assert json.loads(again.text).keys() == json.loads(whole.text).keys()
            assert again.tokens[:n_written] == whole.tokens[:n_written]
        foreign = await run(
            engine,
            msgspec.structs.replace(
                submit("Tell me about Ada.", grammar=SMALL_JSON, max_tokens=200), written=whole.tokens[:1] * 3
            ),
        )
    assert foreign.text == whole.text


async def test_tokens_that_the_model_does_not_have_are_not_gone_on_behind() -> None:
    async with started(None) as engine:
        whole = await run(engine, submit("Hi", max_tokens=4))
        again = await run(engine, msgspec.structs.replace(submit("Hi", max_tokens=4), written=[10**6, -3]))
    assert again.tokens == whole.tokens


def test_what_a_seed_draws_follows_from_the_place_alone() -> None:
    def draws(n_drawn: int) -> list[int]:
        chain = llama_cpp.llama_sampler_chain_init(llama_cpp.llama_sampler_chain_default_params())
        dist = SeededDist(chain, 7, n_drawn)
        drawn = []
        for _ in range(n_drawn, 20):
            candidates = np.zeros(1000, dtype=CANDIDATE)
            candidates["id"] = np.arange(1000)
            array = llama_cpp.llama_token_data_array(
                data=candidates.ctypes.data_as(llama_cpp.llama_token_data_p), size=1000, selected=-1, sorted=False
            )
            llama_cpp.llama_sampler_apply(chain, ctypes.byref(array))
            drawn.append(int(array.data[array.selected].id))
            dist.next()
        llama_cpp.llama_sampler_free(chain)
        return drawn

    whole = draws(0)
    assert len(set(whole)) > 10
    assert all(draws(n) == whole[n:] for n in range(20))


class FourTokens:
    """A constraint."""

    ids = (100, 200, 300, 400)

    def __init__(self, n_vocab: int) -> None:
        self._n_vocab = n_vocab

    def allows(self, token: int) -> bool:
        return token in self.ids

    def allowed(self) -> Any:
        return np.isin(np.arange(self._n_vocab), self.ids)

    def accept(self, token: int) -> None: ...


def test_of_what_a_grammar_allows_the_chain_draws_as_if_there_were_nothing_else(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    runner = LlamaRunner(load(), lambda _: None)
    n_vocab = runner._n_vocab
    logits = np.full(n_vocab, 7.0, dtype=np.float32)
    logits[list(FourTokens.ids)] = (8.0, 7.9, 7.8, -2.0)
    row = logits.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
    monkeypatch.setattr("llama_cpp.llama_get_logits_ith", lambda *_: row)
    monkeypatch.setattr("llamalith_app.engine.runner.Constraint", lambda *_: FourTokens(n_vocab))
    drawn = set()
    for seed in range(100):
        runner.begin(1, sampling(temperature=1.0, typical_p=0.5, seed=seed), "four", None, [1], ())
        drawn.add(runner._samplers[1].sample(None, 0))
        runner.end(1)
    runner.close()
    # Of three about as likely ones, those nearest to what was to be expected.
    assert drawn == {100, 200}


@pytest.mark.parametrize("temperature", [1e-40, 1e-300])
async def test_a_temperature_next_to_0_is_0(temperature: float) -> None:
    async with started(None) as engine:
        texts = []
        for heat in (0.0, temperature):
            for penalty in (1.0, 1.1):
                sent = submit("List three fruits.", max_tokens=8, temperature=heat, seed=1, repeat_penalty=penalty)
                texts.append((await run(engine, sent)).text)
    assert texts[:2] == texts[2:]
    assert texts[0].strip()


async def test_a_penalty_next_to_0_is_a_small_one() -> None:
    async with started(None) as engine:
        texts = [
            (await run(engine, submit("List three fruits.", max_tokens=8, repeat_penalty=penalty))).text
            for penalty in (0.01, 1e-40)
        ]
    assert texts[0] == texts[1]
    assert texts[0].strip()


RUNS = st.builds(operator.mul, st.sampled_from(["a", "-", " ", "\n", "春", "<|end|>"]), st.integers(1, 9000))


@settings(deadline=None)
@given(st.lists(RUNS, max_size=6))
def test_a_text_is_cut_only_in_runs_that_are_too_long_and_never_in_a_special_token(pieces: list[str]) -> None:
    text = "".join(pieces)
    parts = split_long_runs(text, ["<|end|>"])
    assert "".join(parts) == text
    assert sum(part.count("<|end|>") for part in parts) == text.count("<|end|>")
    runs = [run for part in parts for run in re.findall(r"\S+|\s+", part)]
    assert max(map(len, runs), default=0) <= MAX_RUN_CHARS + len("<|end|>")
    if max(map(len, re.findall(r"\S+|\s+", text)), default=0) < MAX_RUN_CHARS:
        assert parts == [text]


@pytest.mark.parametrize("writes_bos", [True, False], ids=["template writes it", "template does not"])
@pytest.mark.parametrize("adds_bos", [True, False], ids=["vocabulary adds it", "vocabulary does not"])
@pytest.mark.parametrize("adds_eos", [True, False], ids=["and an end", "and no end"])
def test_a_prompt_begins_with_one_first_token_at_most_and_never_ends_with_an_end(
    writes_bos: bool, adds_bos: bool, adds_eos: bool, tmp_path: Path
) -> None:
    template = "{{ bos_token }}" * writes_bos + "{% for m in messages %}{{ m.content }}{% endfor %}"
    path = tiny_models.write(tmp_path / "model.gguf", "llama", template=template, adds_bos=adds_bos, adds_eos=adds_eos)
    runner = LlamaRunner(load(path=str(path)), lambda _: None)
    begin, end = llama_cpp.llama_vocab_bos(runner._vocab), llama_cpp.llama_vocab_eos(runner._vocab)
    for text in ("hello", "a" * 9000 + " end"):
        prompt = fit([ChatMessage("user", text)], runner.render, runner.tokenize, 10_000, 1)
        assert prompt.tokens.count(begin) == (writes_bos or adds_bos)
        assert prompt.tokens[0] == begin or not (writes_bos or adds_bos)
        assert end not in prompt.tokens
        assert b"".join(runner.piece(token) for token in prompt.tokens).decode() == text
    runner.close()


def test_an_end_that_the_template_writes_stays(tmp_path: Path) -> None:
    path = tiny_models.write(tmp_path / "model.gguf", "llama", template="{{ messages[0].content }}{{ eos_token }}")
    runner = LlamaRunner(load(path=str(path)), lambda _: None)
    tokens = runner.tokenize(runner.render([ChatMessage("user", "hello")]))
    assert tokens[-1] == llama_cpp.llama_vocab_eos(runner._vocab)
    runner.close()


@pytest.mark.parametrize(
    ("template", "control", "setting", "family"),
    [
        ("{{ messages[0].content }}", (), "auto", ""),
        ("{{ messages[0].content }}", (), "think", "think"),
        ("{{ messages[0].content.split('</think>')[-1] }}", (), "auto", "think"),
        ("{{ messages[0].content }}<think>\n", (), "none", "think"),
        ("{{ messages[0].content }}", ("<think>", "</think>"), "auto", "think"),
        ("{{ messages[0].content }}<think>", ("[THINK]", "[/THINK]"), "auto", "think"),
        ("{{ messages[0].content }}", ("[THINK]", "[/THINK]"), "auto", "magistral"),
        ("{{ messages[0].content }}<think>", ("[THINK]", "[/THINK]"), "magistral", "magistral"),
    ],
)
def test_how_a_model_thinks_its_template_and_its_vocabulary_say_or_else_its_setting(
    template: str, control: tuple[str, ...], setting: str, family: str, tmp_path: Path
) -> None:
    path = tiny_models.write(tmp_path / "model.gguf", "llama", template=template, control=control)
    runner = LlamaRunner(load(path=str(path), reasoning=setting), lambda _: None)
    assert runner.family == family
    known = FAMILIES[family].markers if family else frozenset()
    assert runner.marker_tokens == known & set(control)
    # Of other control tokens llama.cpp writes nothing.
    text = "<think>hm</think>hello [THINK]"
    tokens = runner.tokenize(text)
    shown = text if known.issuperset(control) else text.replace("[THINK]", "")
    assert b"".join(runner.piece(token) for token in tokens).decode() == shown
    of_text = [marker for marker in ("<think>", "</think>", "[THINK]") if marker in runner.marker_tokens]
    assert [runner.piece(token).decode() for token in tokens if runner.is_marker(token)] == of_text
    runner.close()


def test_the_bundled_model_cannot_think(monkeypatch: pytest.MonkeyPatch) -> None:
    runner = opened(monkeypatch, None)
    assert not runner.family
    runner.close()


async def test_an_engine_reports_that_a_prompt_ends_inside_of_thinking(tmp_path: Path) -> None:
    template = "{{ messages[-1].content }}{% if '/think' in messages[-1].content %}<think>\n{% endif %}"
    path = tiny_models.write(tmp_path / "model.gguf", "llama", template=template)
    async with started(None, path=str(path)) as engine:
        assert engine.limits.family == "think"
        opened = await run(engine, submit("Hi /think", max_tokens=2))
        plain = await run(engine, submit("Hi", max_tokens=2))
        of_people = await run(engine, submit("Hi <think>", max_tokens=2))
    assert {advance.opens_thinking for advance in opened.advances} == {True}
    assert {advance.opens_thinking for advance in [*plain.advances, *of_people.advances]} == {False}


async def test_a_character_that_max_tokens_cuts_is_left_out() -> None:
    async with started(None) as engine:
        for max_tokens in (1, 2, 3, 4, 5):
            reply = await run(engine, submit("Hi", grammar='root ::= "a🦊🦊🦊"', max_tokens=max_tokens))
            assert "\ufffd" not in reply.text
            assert "a🦊🦊🦊".startswith(reply.text)


def test_a_state_is_of_its_context_and_of_its_number_of_slots() -> None:
    fingerprints = set()
    for changed in ({}, {"n_ctx": 512}, {"n_slots": 2}):
        runner = LlamaRunner(load(**changed), lambda _: None)
        fingerprints.add(runner.fingerprint)
        runner.close()
    assert len(fingerprints) == 3


async def test_penalties_keep_a_reply_from_repeating_itself() -> None:
    grammar = 'root ::= ("ha " | "ho "){10}'
    async with started(None) as engine:
        plain = await run(engine, submit("Say: ha ha ha ha", grammar=grammar, max_tokens=40))
        bent = await run(engine, submit("Say: ha ha ha ha", grammar=grammar, max_tokens=40, frequency_penalty=50.0))
    assert bent.text != plain.text


def opened(monkeypatch: pytest.MonkeyPatch, template: bytes | None, **changed: Any) -> LlamaRunner:
    """The bundled model as if its file held this template."""
    monkeypatch.setattr("llama_cpp.llama_model_chat_template", lambda *_: template)
    return LlamaRunner(load(**changed), lambda _: None)


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        (b"{{ raise_exception('Only poems, please') }}", "Only poems, please"),
        (b"{{ ''.__class__.__mro__[1].__subclasses__() }}", "unsafe"),
        (b"{{ cycler.__init__.__globals__.os.system('true') }}", "unsafe"),
        (b"{{ messages.append(1) }}", "safe"),
        (b"{% for message in messages %}", "cannot be compiled: .*endfor"),
        (b"{{ 1 // 0 }}", "division"),
        (b"{{ range(10 ** 9) | list }}", "[Rr]ange"),
    ],
)
def test_a_template_that_fails_or_reaches_out_is_refused(
    monkeypatch: pytest.MonkeyPatch, template: bytes, reason: str
) -> None:
    runner = opened(monkeypatch, template)
    with pytest.raises(Refusal, match=reason) as refusal:
        fit(HELLO, runner.render, runner.tokenize, runner.n_ctx, 10)
    assert refusal.value.kind == "template"
    runner.close()


def test_a_model_without_a_template_gets_the_format_of_its_vocabulary(monkeypatch: pytest.MonkeyPatch) -> None:
    runner = opened(monkeypatch, None)
    assert runner.format == PromptFormat(source="vocabulary", name="chatml", system="own")
    assert runner.render(HELLO).startswith("<|im_start|>system\nS<|im_end|>")
    runner.close()


def test_where_nothing_is_known_the_format_is_a_guess_with_a_stop_string(monkeypatch: pytest.MonkeyPatch) -> None:
    guess = PromptFormat(source="guess", name="chatml")
    monkeypatch.setattr("llamalith_app.engine.fallback.choose", lambda *_: guess)
    runner = opened(monkeypatch, None)
    assert (runner.format.source, list(runner.extra_stop)) == ("guess", ["<|im_end|>"])
    runner.close()


def test_a_named_format_brings_its_own_stop_string(monkeypatch: pytest.MonkeyPatch) -> None:
    runner = opened(monkeypatch, None, chat_format="zephyr")
    assert runner.render(HELLO).startswith("<|system|>\nS</s>")
    assert list(runner.extra_stop) == ["</s>"]
    runner.close()


@pytest.mark.parametrize("name", sorted({*CHAT_FORMATS} - {"open-orca"}))
def test_no_named_format_loses_what_a_message_says(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    runner = opened(monkeypatch, None, chat_format=name)
    prompt = runner.render([ChatMessage("system", "Be brief."), ChatMessage("user", "Hello")])
    assert "Be brief." in prompt
    assert "Hello" in prompt
    runner.close()


def test_a_named_format_that_shows_no_prompt_in_any_form_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    # llama-cpp-python's own mistake: its roles are not the names that messages have.
    runner = opened(monkeypatch, None, chat_format="open-orca")
    with pytest.raises(TemplateFailed, match="leaves out what the user says"):
        runner.render(HELLO)
    runner.close()


@pytest.mark.parametrize("name", ["nonesuch", "functionary"])
def test_an_unknown_format_is_refused_by_its_name(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    with pytest.raises(CannotLoad, match=f"smollm2.*{name}"):
        opened(monkeypatch, None, chat_format=name)


def test_special_tokens_of_the_template_are_one_token_each_and_the_first_stands_once() -> None:
    runner = LlamaRunner(load(), lambda _: None)
    (start,) = runner.tokenize("<|im_start|>")
    tokens = runner.tokenize(runner.render(HELLO))
    assert tokens[0] == start
    assert tokens.count(start) == 3
    text = "naïve 🦊 text"
    assert b"".join(runner.piece(token) for token in runner.tokenize(text)).decode() == text
    runner.close()


@pytest.mark.parametrize(("asked", "given"), [(300, 300), (1_000_000, 8192)])
def test_the_context_is_as_asked_but_no_longer_than_the_model_was_trained_for(asked: int, given: int) -> None:
    runner = LlamaRunner(load(n_ctx=asked), lambda _: None)
    assert runner.n_ctx == given
    runner.close()


async def test_the_likeliest_token_is_the_one_that_a_greedy_chain_draws() -> None:
    plain: dict[str, Any] = {"temperature": 0.0, "repeat_penalty": 1.0, "max_tokens": 24}
    async with started(None) as engine:
        without_chain = await run(engine, submit("List three fruits.", **plain))
        # A penalty that changes nothing, and yet wants the chain.
        with_chain = await run(engine, submit("List three fruits.", **plain, presence_penalty=1e-9))
    assert without_chain.tokens == with_chain.tokens


def test_a_slot_that_only_fills_a_gap_keeps_what_it_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    runner = opened(monkeypatch, None, n_slots=4, n_threads=1)
    texts = ["One fox runs.", "Two dogs sleep in the sun.", "Three birds sing.", "Four fish swim."]
    tokens = [runner.tokenize(text) for text in texts]
    for number in range(4):
        runner.begin(number, sampling(temperature=0.0, repeat_penalty=1.0), "", None, tokens[number], ())

    at = [0] * 4

    def step(*slots: int) -> dict[int, int]:
        """Reads, or goes on, in each of the slots; the sampled token by slot."""
        works = []
        for slot in slots:
            held = runner.keep(slot, at[slot]) if at[slot] else 0
            works.append(Work(slot, slot, tokens[slot][held:], held, wanted=True))
            at[slot] = len(tokens[slot])
        sampled = {one.sequence_id: one.token for one in runner.evaluate(works) if isinstance(one, Sampled)}
        for slot, token in sampled.items():
            tokens[slot].append(token)
        return sampled

    def replies(groups: list[tuple[int, ...]]) -> list[list[int]]:
        tokens[:] = [runner.tokenize(text) for text in texts]
        at[:] = [0] * 4
        for slot in range(4):
            runner.keep(slot, 0)
        for group in groups:
            step(*group)
        return [list(one) for one in tokens]

    filled: list[int] = []
    fillers = runner._fillers

    def noted(slots: set[int]) -> list[Work]:
        filled.extend(work.slot for work in fillers(slots))
        return fillers(slots)

    monkeypatch.setattr(runner, "_fillers", noted)
    alone: list[tuple[int, ...]] = [(slot,) for slot in range(4) for _ in range(4)]
    apart = replies(alone)
    assert not filled
    # In the first of these steps slot 1 is empty and slot 2 too; later each holds something while others go on.
    with_gaps = replies([(0, 3), (0, 3), (1, 3), (0, 2), (0, 2), (1, 3), (1,), (1,), (2,), (2,)])
    assert filled == [1, 2, 1, 2, 2, 1, 1, 2]
    assert with_gaps == apart
    runner.close()


def test_a_full_slot_fills_no_gap(monkeypatch: pytest.MonkeyPatch) -> None:
    runner = opened(monkeypatch, None, n_slots=3, n_ctx=32, n_threads=1)
    full = [runner.tokenize("a")[0]] * 32
    runner.evaluate([Work(1, 1, full, 0, wanted=False)])
    runner.begin(0, sampling(), "", None, full[:1], ())
    runner.begin(2, sampling(), "", None, full[:1], ())
    results = runner.evaluate([Work(2, 2, full[:1], 0, wanted=True), Work(0, 0, full[:1], 0, wanted=True)])
    assert {one.sequence_id for one in results} == {0, 2}
    assert runner.keep(1, 32) == 32
    runner.close()
