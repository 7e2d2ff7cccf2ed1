"""Chat templates that mean well, and such that loop, fill the memory or reach for Python: no engine is needed here."""

from __future__ import annotations

import contextlib
import errno
import os
import queue
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest
from llama_cpp.llama_chat_format import Jinja2ChatFormatter

from llamalith_app.engine.chat import fit
from llamalith_app.engine.messages import ChatMessage
from llamalith_app.engine.runner_protocol import Refusal
from llamalith_app.engine.template import ProcessLost, Template, TemplateFailed, TemplateProcess, Timings
from llamalith_app.engine.template_program import TemplateSource, compile_template
from tests.engine.test_process import wait_until_gone
from tests.tiny_models import LOOPING_TEMPLATE, template_that_loops_on

pytestmark = pytest.mark.slow

HELLO = [ChatMessage("system", "S <é>"), ChatMessage("user", "Hello\n"), ChatMessage("assistant", "")]


@contextmanager
def template(source: str, timings: Timings | None = None) -> Iterator[Template]:
    with closing(Template(source, bos="<s>", eos="</s>", timings=timings or Timings())) as made:
        yield made


@pytest.mark.parametrize(
    "source",
    [
        "{% for message in messages %}\n  {{ message.role + ': ' + message['content'] | trim }}\n{% endfor %}\n",
        "{{ bos_token }}{{ messages | tojson }}{{ messages[0] | tojson(indent=2) }}{{ eos_token }}",
        "{%- for m in messages if m.role != 'system' -%}{% if loop.last %}{% break %}{% endif %}{{ m }}{%- endfor -%}",
        "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}",
        "{% macro say(m) %}[{{ m.role.upper() }}]{% endmacro %}{% for m in messages %}{{ say(m) }}{% endfor %}",
        "{% generation %}{{ messages[-1].content }}{% endgeneration %}{{ add_generation_prompt }}",
        "{{ tools is none }} {{ tools is defined }} {{ documents is defined }} {{ strftime_now('%Y') }} {{ missing }}",
        "{{ '<b>' }}{{ messages[0].content[::-1] }}{{ messages | map(attribute='role') | list }}",
    ],
)
def test_a_template_renders_as_in_llama_cpp_python(source: str) -> None:
    messages: list[Any] = [{"role": message.role, "content": message.content} for message in HELLO]
    expected = Jinja2ChatFormatter(source, bos_token="<s>", eos_token="</s>")(messages=messages).prompt
    assert compile_template(TemplateSource(source, "<s>", "</s>"))(messages) == expected


@pytest.mark.parametrize(
    "source",
    [
        LOOPING_TEMPLATE,
        # One operation of the interpreter, in which no thread and no handler of a signal gets its turn.
        "{% set n = 7 %}{{ (n ** 9999999) ** 99 }}",
        # The same, worked out while the template is compiled.
        "{{ (7 ** 9999999) ** 99 }}",
    ],
)
def test_a_template_that_computes_for_ever_is_refused(source: str) -> None:
    with template(source) as made:
        for _ in range(2):
            with pytest.raises(Refusal, match="computes for more than 1 s") as refused:
                fit(HELLO, made.render, lambda _: [1], 100, 1)
            assert refused.value.kind == "template"


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("{{ 'a' * 9999999999 }}", "memory"),
        ("{{ '%9999999999d' % 1 }}", "memory|cannot be what it says"),
        ("{{ '{:>9999999999}'.format(1) }}", "memory"),
        ("{{ 'a' | center(9999999999) }}", "memory"),
        ("{{ [0] * 99999999999 }}", "memory"),
        (
            "{% set n = namespace(s='aaaaaaaa') %}{% for i in range(99) %}{% set n.s = n.s + n.s %}{% endfor %}",
            "memory",
        ),
        ("{% for a in range(99999) %}{{ 'a' * 5000 }}{% endfor %}", "memory|characters"),
        ("{{ messages[-1].content }}{{ 'a' * 2000000 }}", "2000000 characters; 1000044 are allowed"),
        ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "recursion"),
    ],
)
def test_a_template_that_fills_the_memory_is_refused(source: str, reason: str) -> None:
    with template(source) as made, pytest.raises(Refusal, match=reason) as refused:
        fit(HELLO, made.render, lambda _: [1], 100, 1)
    assert refused.value.kind == "template"


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ (''|attr('__class__')|attr('__mro__'))[1] }}",
        "{{ ''['__cla' ~ 'ss__']['__base__'] }}",
        "{{ '{0.__class__.__init__.__globals__}'.format(raise_exception) }}",
        "{{ '{x.__class__.__base__}'.format_map({'x': 1}) }}",
        "{{ ['{0.__globals__}'] | map('format', raise_exception) | list }}",
        "{{ raise_exception.__globals__ }}",
        "{{ strftime_now.__globals__['os'].system('true') }}",
        "{{ raise_exception.__code__.co_consts }}",
        "{{ cycler.__init__.__globals__.os }}",
        "{{ lipsum.__globals__['os'].popen('id').read() }}",
        "{{ joiner.__init__.__globals__ }}",
        "{{ namespace.__init__.__globals__ }}",
        "{{ self.__init__.__globals__ }}",
        "{{ self._TemplateReference__context.environment.__class__ }}",
        "{{ range.__self__ }}{{ (messages|map(attribute='__class__')|list)[0].__base__ }}",
        "{{ (messages | map(attribute='__class__') | first).mro() }}",
        "{{ messages.append(1) }}",
        "{{ messages[0].update(role='x') }}",
        "{{ messages.__setitem__(0, 1) }}",
        "{% include '/etc/passwd' %}",
        "{% import 'os' as os %}{{ os }}",
        "{% extends '/etc/passwd' %}",
    ],
)
def test_a_template_that_reaches_for_python_gets_nothing(source: str) -> None:
    with template(source) as made:
        try:
            written = made.render(HELLO)
        except TemplateFailed:
            return
    # What the sandbox lets pass unsaid is undefined, which writes nothing.
    assert written.strip() in ("", "[]", "{0.__globals__}"), written


def test_a_conversation_after_a_refused_one_is_rendered() -> None:
    with template(template_that_loops_on("loop")) as made:
        assert made.render([ChatMessage("user", "one")]) == "one"
        with pytest.raises(Refusal):
            made.render([ChatMessage("user", "loop")])
        assert made.render([ChatMessage("user", "two")]) == "two"


def test_other_threads_go_on_while_a_template_computes() -> None:
    refused = threading.Event()

    def render() -> None:
        with pytest.raises(Refusal):
            made.render(HELLO)
        refused.set()

    with template("{% set n = 7 %}{{ (n ** 9999999) ** 99 }}") as made:
        thread = threading.Thread(target=render)
        thread.start()
        turns = 0
        while not refused.wait(0.01):
            turns += 1
        thread.join()
    assert turns > 10


def test_a_long_conversation_is_rendered_whole() -> None:
    turns = [ChatMessage("user" if number % 2 == 0 else "assistant", "word 🦊 " * 500) for number in range(1000)]
    with template("{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% endfor %}") as made:
        assert made.render(turns) == "".join(f"<|{turn.role}|>{turn.content}" for turn in turns)


def test_what_is_no_text_is_refused() -> None:
    with (
        template(r"{{ messages[-1].content }}{{ '\ud800' }}") as made,
        pytest.raises(TemplateFailed, match="surrogate"),
    ):
        made.render(HELLO)


def test_a_process_that_was_killed_while_idle_is_replaced() -> None:
    with template("{{ messages[0].content }}") as made:
        made.render(HELLO)
        (pid,) = processes(made)
        kill(pid)
        assert made.render(HELLO) == HELLO[0].content


def processes(made: Template) -> list[int]:
    """Those that nobody uses just now."""
    return [process.pid for process in made._idle.queue]


def kill(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)
    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)


@contextmanager
def rendering(made: Template, *messages: ChatMessage) -> Iterator[queue.SimpleQueue[str | Exception]]:
    """In a thread; what comes of it is put into the queue."""
    outcome: queue.SimpleQueue[str | Exception] = queue.SimpleQueue()

    def render() -> None:
        try:
            outcome.put(made.render(messages))
        except Exception as error:  # noqa: BLE001 - the test looks at it
            outcome.put(error)

    thread = threading.Thread(target=render)
    thread.start()
    yield outcome
    thread.join(30)
    assert not thread.is_alive()


SLOW = template_that_loops_on("slow").replace("99999", "1500")
"""Some tenths of a second."""


def user(text: str) -> ChatMessage:
    return ChatMessage("user", text)


def until_at_work(made: Template) -> None:
    while made._idle.qsize():
        time.sleep(0.001)


def test_a_process_that_is_killed_while_it_renders_is_replaced_and_the_conversation_rendered_once_more() -> None:
    with template(SLOW) as made:
        made.render([user("ready")])
        (pid,) = processes(made)
        with rendering(made, user("slow")) as outcome:
            until_at_work(made)
            os.kill(pid, signal.SIGKILL)
            assert outcome.get(timeout=30) == "slow"
        assert processes(made) != [pid]


def test_where_each_process_is_killed_the_refusal_is_one_that_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    real = TemplateProcess.ask

    def ask(process: TemplateProcess, conversation: bytes) -> Any:
        os.kill(process.pid, signal.SIGKILL)
        return real(process, conversation)

    monkeypatch.setattr(TemplateProcess, "ask", ask)
    with template("{{ messages[0].content }}") as made, pytest.raises(Refusal, match="ended by SIGKILL") as refused:
        made.render(HELLO)
    assert refused.value.kind == "engine_died"


def test_a_process_that_cannot_be_started_is_tried_again_too(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OSError(errno.EAGAIN, "no more processes")

    with template("{{ messages[0].content }}") as made:
        made.render(HELLO)
        kill(processes(made)[0])
        monkeypatch.setattr(subprocess, "Popen", fail)
        with pytest.raises(Refusal, match="no more processes") as refused:
            made.render(HELLO)
    assert refused.value.kind == "engine_died"


def test_a_process_that_hangs_is_replaced_and_holds_up_nobody_else() -> None:
    with template("{{ messages[0].content }}") as made:
        made.render(HELLO)
        (pid,) = processes(made)
        os.kill(pid, signal.SIGSTOP)
        with rendering(made, user("first")) as first:
            until_at_work(made)
            with rendering(made, user("second")) as second:
                assert second.get(timeout=30) == "second"
            assert first.empty()
            assert first.get(timeout=30) == "first"
        wait_until_gone(pid)
        assert len(processes(made)) == 1


# Python itself waits for such a process later on.
@pytest.mark.filterwarnings("ignore:subprocess .* is still running:ResourceWarning")
def test_a_hanging_process_that_outlives_its_kill_is_replaced_too(monkeypatch: pytest.MonkeyPatch) -> None:
    with template("{{ messages[0].content }}", Timings(kill_wait_s=0)) as made:
        made.render(HELLO)
        (pid,) = processes(made)
        os.kill(pid, signal.SIGSTOP)
        # As while it is inside the kernel.
        monkeypatch.setattr(subprocess.Popen, "kill", lambda _: None)
        assert [made.render(HELLO) for _ in range(2)] == [HELLO[0].content] * 2
        monkeypatch.undo()
        os.kill(pid, signal.SIGKILL)
        with contextlib.suppress(ChildProcessError):
            os.waitpid(pid, 0)


def test_a_hanging_process_that_does_not_even_read_is_replaced() -> None:
    with template("{{ messages[0].content }}") as made:
        made.render(HELLO)
        os.kill(processes(made)[0], signal.SIGSTOP)
        assert made.render([user("x" * 5_000_000)]) == "x" * 5_000_000


def test_a_process_that_hangs_as_it_starts_is_replaced() -> None:
    with template("{{ messages[0].content }}") as made:
        os.kill(processes(made)[0], signal.SIGSTOP)
        assert made.render(HELLO) == HELLO[0].content


@pytest.mark.parametrize(
    ("seen", "outcome"),
    [
        ([("R", "1")] * 50, "is waited for"),
        ([("S", str(number)) for number in range(50)], "is waited for"),
        ([("S", "1")] * 50, "hangs"),
        ([("T", "1")] * 50, "hangs"),
        ([("D", "1")] * 50, "hangs"),
    ],
)
def test_a_process_that_waits_for_a_core_on_a_busy_machine_does_not_hang(
    seen: list[tuple[str, str]], outcome: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    left = iter(seen)
    with template("{{ messages[0].content }}") as made:
        made.render(HELLO)
        (process,) = made._idle.queue
        monkeypatch.setattr("llamalith_app.engine.template._activity", lambda _: next(left))
        process._n_silent_looks = 0
        hangs = pytest.raises(ProcessLost, match="hangs") if outcome == "hangs" else nullcontext()
        with hangs:
            look_often(process, len(seen))


def look_often(process: TemplateProcess, n_looks: int) -> None:
    for _ in range(n_looks):
        process._look()


TEMPLATES = Path(__file__).parent / "templates"
ASKED = [ChatMessage("system", "Be brief."), user("Hi"), ChatMessage("assistant", "Hello."), user("Bye")]


@pytest.mark.parametrize(
    ("name", "prompt"),
    [
        ("ignores_system", "<s>[ASK]Be brief.\n\nHi[/ASK]Hello.</s>[ASK]Bye[/ASK]"),
        (
            "typed_content",
            "<s><system>Be brief.</system><user>Hi</user><assistant>Hello.</assistant><user>Bye</user><assistant>",
        ),
        (
            "needs_tools",
            "<s><system>You may call:</system><system>Be brief.</system><user>Hi</user>"
            "<assistant>Hello.</assistant><user>Bye</user><assistant>",
        ),
    ],
)
def test_what_messages_say_is_in_the_prompt(name: str, prompt: str) -> None:
    with template((TEMPLATES / f"{name}.jinja").read_text()) as made:
        assert made.render(ASKED) == prompt


@pytest.mark.parametrize(
    ("source", "prompt"),
    [
        # Parts of the user's messages only.
        (
            "{% for m in messages %}{% if m.role == 'user' %}{% for part in m.content %}{{ part.text }};{% endfor %}"
            "{% else %}{{ m.content | trim }};{% endif %}{% endfor %}",
            "Be brief.;Hi;Hello.;Bye;",
        ),
        # Both kinds: a text stays one.
        (
            "{% for m in messages %}{% if m.content is string %}{{ m.content }};{% else %}"
            "{% for part in m.content %}[{{ part.text }}]{% endfor %}{% endif %}{% endfor %}",
            "Be brief.;Hi;Hello.;Bye;",
        ),
        # It looks at the newest message only, where the first user message is lost too.
        ("{{ messages[-1].content }}", "Be brief.\n\nBye"),
        # The system message comes late, but it comes.
        ("{{ messages[-1].content }} ({{ messages[0].content }})", "Bye (Be brief.)"),
        # `tools` is a list where it is asked for, and None where that is looked at.
        ("{{ tools is none }}{% for m in messages %}{{ m.content }};{% endfor %}", "TrueBe brief.;Hi;Hello.;Bye;"),
        ("{{ tools | length }}{% for m in messages %}{{ m.content }};{% endfor %}", "0Be brief.;Hi;Hello.;Bye;"),
    ],
)
def test_a_template_gets_messages_in_the_form_that_it_shows(source: str, prompt: str) -> None:
    with template(source) as made:
        assert made.render(ASKED) == prompt


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        (
            "{% for m in messages if m.role == 'assistant' %}{{ m.content }}{% endfor %}",
            "leaves out what the user says",
        ),
        ("A prompt.", "leaves out what the user says"),
        ("{% for m in messages %}{{ m.content[-8:] }}{% endfor %}", None),
        ("{{ messages[-1].content.split('\n\n')[-1] }}", "leaves out the system message"),
    ],
)
def test_what_a_template_shows_in_no_form_is_not_lost_without_a_word(source: str, reason: str | None) -> None:
    with template(source) as made:
        if reason is None:
            assert made.render(ASKED)
            return
        with pytest.raises(TemplateFailed, match=reason):
            made.render(ASKED)


def test_without_a_system_message_one_that_has_no_place_for_it_is_fine() -> None:
    with template("{{ messages[-1].content.split('\n\n')[-1] }}") as made:
        assert made.render(ASKED[1:]) == "Bye"
        assert made.render([ChatMessage("system", "  "), *ASKED[1:]]) == "Bye"


@pytest.mark.parametrize(
    "expression",
    [
        "messages + 1",
        "none.x.y",
        "messages[9].content.x",
        "[][0].x",
        "{}['a']['b']",
        "messages | map('nope') | list",
        "1 // 0",
        "'a' * 9999999999",
        "range(10 ** 9)",
        "messages.append(1)",
        "''.__class__.__mro__",
        "'%d' % 'x'",
        "'{:d}'.format('x')",
        "messages | tojson(indent=messages)",
        "messages()",
        "nothing()",
        "strftime_now(1)",
        "raise_exception(messages, 1)",
        "namespace(1, 2)",
        "'x'.encode('no-such')",
        "'%c' % -1",
        "none | list",
    ],
)
def test_no_error_speaks_python(expression: str) -> None:
    source = (
        f"{{{{ messages[-1].content }}}}\n{{% if messages[-1].content == 'now' %}}{{{{ {expression} }}}}{{% endif %}}"
    )
    with template(source) as made:
        assert made.render([user("before")])
        with pytest.raises(TemplateFailed) as failed:
            made.render([user("now")])
    reason = str(failed.value)
    python = r"object|NoneType|built-in|function|argument|attribute|__|Error|0x|\bint\b|\bstr\b|'list'|'dict'"
    assert not re.search(python, reason), reason
    assert "line 2" in reason or "memory" in reason


def test_what_a_template_raises_itself_is_shown_in_its_own_words() -> None:
    with (
        template("{{ messages[-1].content }}{{ raise_exception(\"'NoneType' object is not welcome\") }}") as made,
        pytest.raises(TemplateFailed, match="^'NoneType' object is not welcome$"),
    ):
        made.render(HELLO)


OWNER = """
import sys
from llamalith_app.engine.messages import ChatMessage
from llamalith_app.engine.template import Template
made = Template(sys.argv[1], bos="", eos="")
print(made._idle.queue[0].pid, flush=True)
made.render([ChatMessage("user", "x")])
print("rendered", flush=True)
sys.stdin.read()
"""


@pytest.mark.parametrize("source", ["{{ messages[0].content }}", LOOPING_TEMPLATE])
def test_the_process_ends_with_its_owner_that_is_killed(source: str) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", OWNER, source], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as owner:
        assert owner.stdout is not None
        pid = int(owner.stdout.readline())
        if source != LOOPING_TEMPLATE:
            owner.stdout.readline()
        owner.kill()
    wait_until_gone(pid)
