"""Chat templates that mean well, and such that loop, fill the memory or reach for Python: no engine is needed here."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager
from typing import Any

import pytest
from llama_cpp.llama_chat_format import Jinja2ChatFormatter

from llamalith_app.engine.chat import fit
from llamalith_app.engine.messages import ChatMessage
from llamalith_app.engine.steps import Refusal
from llamalith_app.engine.template import Template, TemplateFailed
from tests.engine.test_process import wait_until_gone
from tests.tiny_models import LOOPING_TEMPLATE, template_that_loops_on

HELLO = [ChatMessage("system", "S <é>"), ChatMessage("user", "Hello\n"), ChatMessage("assistant", "")]


@contextmanager
def template(source: str) -> Iterator[Template]:
    with closing(Template(source, bos="<s>", eos="</s>")) as made:
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
    told: list[Any] = [{"role": message.role, "content": message.content} for message in HELLO]
    expected = Jinja2ChatFormatter(source, bos_token="<s>", eos_token="</s>")(messages=told).prompt
    with template(source) as made:
        assert made.render(HELLO) == expected


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
    ("source", "told"),
    [
        ("{{ 'a' * 9999999999 }}", "memory"),
        ("{{ '%9999999999d' % 1 }}", "memory|width too big"),
        ("{{ '{:>9999999999}'.format(1) }}", "memory"),
        ("{{ 'a' | center(9999999999) }}", "memory"),
        ("{{ [0] * 99999999999 }}", "memory"),
        (
            "{% set n = namespace(s='aaaaaaaa') %}{% for i in range(99) %}{% set n.s = n.s + n.s %}{% endfor %}",
            "memory",
        ),
        ("{% for a in range(99999) %}{{ 'a' * 5000 }}{% endfor %}", "memory|characters"),
        ("{{ 'a' * 2000000 }}", "2000000 characters; 1000044 are allowed"),
        ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "recursion"),
    ],
)
def test_a_template_that_fills_the_memory_is_refused(source: str, told: str) -> None:
    with template(source) as made, pytest.raises(Refusal, match=told) as refused:
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
    with template(r"{{ '\ud800' }}") as made, pytest.raises(TemplateFailed, match="surrogate"):
        made.render(HELLO)


def test_a_process_that_was_killed_while_idle_is_replaced() -> None:
    with template("{{ messages[0].content }}") as made:
        made.render(HELLO)
        os.kill(made._process.pid, signal.SIGKILL)
        os.waitid(os.P_PID, made._process.pid, os.WEXITED | os.WNOWAIT)
        assert made.render(HELLO) == HELLO[0].content


OWNER = """
import sys
from llamalith_app.engine.messages import ChatMessage
from llamalith_app.engine.template import Template
made = Template(sys.argv[1], bos="", eos="")
print(made._process.pid, flush=True)
made.render([ChatMessage("user", "x")])
print("rendered", flush=True)
sys.stdin.read()
"""


@pytest.mark.parametrize("source", ["x", LOOPING_TEMPLATE])
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
