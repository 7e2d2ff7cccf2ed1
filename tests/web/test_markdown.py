"""Markdown as HTML: what it looks like, that nothing hostile comes through, and that nothing takes long."""

from __future__ import annotations

import time
from html.parser import HTMLParser
from itertools import cycle

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pygments.token import STANDARD_TYPES

from llamalith_app.web import markdown
from llamalith_app.web.html import ASSETS, MEDIA_TYPES
from llamalith_app.web.markdown import Cache, render
from tests.browser.payloads import TEXTS

LINK = 'target="_blank" rel="noopener noreferrer nofollow"'


def coloured(code: str, language: str = "") -> str:
    caption = f"<figcaption>{language}</figcaption>"
    return f'<figure class="code">{caption}<pre dir="ltr" tabindex="0"><code>{code}</code></pre></figure>'


@pytest.mark.parametrize(
    ("text", "html"),
    [
        ("", ""),
        ("two\nlines", '<p dir="auto">two<br>\nlines</p>'),
        ("*a* **b** ~~c~~ `d`", '<p dir="auto"><em>a</em> <strong>b</strong> <s>c</s> <code>d</code></p>'),
        # A heading is below the page's own, and leaves out no level.
        ("# a\n### b\n# c", '<h2 dir="auto">a</h2><h3 dir="auto">b</h3><h2 dir="auto">c</h2>'),
        ("###### a", '<h2 dir="auto">a</h2>'),
        # Loose or tight: a list is written while nobody knows.
        ("- a\n- b", '<ul dir="auto"><li><p>a</p></li><li><p>b</p></li></ul>'),
        ("- a\n\n- b", '<ul dir="auto"><li><p>a</p></li><li><p>b</p></li></ul>'),
        ("3. a", '<ol dir="auto" start="3"><li><p>a</p></li></ol>'),
        ("> a", '<blockquote dir="auto"><p>a</p></blockquote>'),
        ("***", "<hr>"),
        (
            "|a|b|\n|:-|-:|\n|1|2|",
            '<div class="table" tabindex="0"><table dir="auto"><thead><tr><th class="left">a</th>'
            '<th class="right">b</th></tr></thead><tbody><tr><td class="left">1</td>'
            '<td class="right">2</td></tr></tbody></table></div>',
        ),
        ("```\n<b>\n```", coloured("&lt;b&gt;\n")),
        ("```unknown-language\nx\n```", coloured("x\n", "unknown-language")),
        (
            "```Python title\nx = 1\n```",
            coloured('<span class="n">x</span> <span class="o">=</span> <span class="mi">1</span>\n', "Python"),
        ),
        ("    x", coloured("x\n")),
        ("[a](https://b.example 'c')", f'<p dir="auto"><a href="https://b.example" title="c" {LINK}>a</a></p>'),
        (
            "https://a.example/(b).",
            f'<p dir="auto"><a href="https://a.example/(b)" {LINK}>https://a.example/(b)</a>.</p>',
        ),
        (
            "**http://a.example**",
            f'<p dir="auto"><strong><a href="http://a.example" {LINK}>http://a.example</a></strong></p>',
        ),
        ("<mailto:a@b.example>", f'<p dir="auto"><a href="mailto:a@b.example" {LINK}>mailto:a@b.example</a></p>'),
        # An image becomes a link, and within a link its text.
        ("![alt](https://a.example/b.png)", f'<p dir="auto"><a href="https://a.example/b.png" {LINK}>alt</a></p>'),
        (
            "[![alt](https://a.example)](https://b.example)",
            f'<p dir="auto"><a href="https://b.example" {LINK}>alt</a></p>',
        ),
        # No raw HTML, no reference, no address of this site.
        ("<b>a</b>", '<p dir="auto">&lt;b&gt;a&lt;/b&gt;</p>'),
        ("[a]: x\n\n[a]", '<p dir="auto">[a]: x</p><p dir="auto">[a]</p>'),
        ("[a](/chat/logout)", '<p dir="auto">[a](/chat/logout)</p>'),
        ("[a](//b.example)", '<p dir="auto">[a](//b.example)</p>'),
        ("$a_b$", '<p dir="auto"><span class="math" data-tex="a_b">a_b</span></p>'),
        ("\\(a<b\\)", '<p dir="auto"><span class="math" data-tex="a&lt;b">a&lt;b</span></p>'),
        ("a $$b$$", '<p dir="auto">a <span class="math display" data-tex="b">b</span></p>'),
        ("\\[\na\n- b\n\\]", '<div class="math display" data-tex="a\n- b">a\n- b</div>'),
        (
            "text\n$$\na\n$$\ntext",
            '<p dir="auto">text</p><div class="math display" data-tex="a">a</div><p dir="auto">text</p>',
        ),
        ("$$\na\n\nb\n$$", '<p dir="auto">$$<br>\na</p><p dir="auto">b</p><p dir="auto">$$</p>'),
        ("`$a$`", '<p dir="auto"><code>$a$</code></p>'),
        (
            "$5 and $10, $5-$10, US$5, $x$",
            '<p dir="auto">$5 and $10, $5-$10, US$5, <span class="math" data-tex="x">x</span></p>',
        ),
        ("\u202eabc\0", '<p dir="auto">\u202eabc\ufffd</p>'),
        ("half \ud800", '<p dir="auto">half ?</p>'),
    ],
)
def test_a_text_becomes_this_html(text: str, html: str) -> None:
    assert render(text) == html


def test_a_text_that_is_longer_than_any_reply_is_shown_as_it_is() -> None:
    assert (
        render("*a*" + " " * markdown.MAX_CHARS) == f'<pre class="plain" dir="auto">*a*{" " * markdown.MAX_CHARS}</pre>'
    )


@pytest.mark.parametrize(
    "code",
    ["x = 1\n" * 10_000, "x" * 1_001, "a\n" * 200, " " * 201 + "\n", "a b\n" * 101],
    ids=lambda code: repr(code[:3]),
)
def test_code_that_could_take_long_has_no_colours(code: str) -> None:
    assert render(f"```csharp\n{code}\n```").count("<span") == 0
    assert render("```csharp\nint x = 1;\n```").count("<span") > 3


# Nothing hostile


class Allowed(HTMLParser):
    """Asserts what stands in HTML."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        assert tag in TAGS, tag
        for name, value in attrs:
            assert name in {"class", "dir", "href", "title", "rel", "target", "start", "data-tex", "tabindex"}, name
            if name == "href":
                assert (value or "").lower().startswith(("http://", "https://", "mailto:")), value
            if name == "class":
                assert not set((value or "").split()) - CLASSES, value

    def handle_comment(self, data: str) -> None:
        raise AssertionError(data)

    def handle_decl(self, decl: str) -> None:
        raise AssertionError(decl)

    def handle_pi(self, data: str) -> None:
        raise AssertionError(data)


TAGS = {
    *("p", "h2", "h3", "h4", "h5", "h6", "ul", "ol", "li", "blockquote", "hr", "br", "em", "strong", "s", "a", "code"),
    *("pre", "figure", "figcaption", "span", "div", "table", "thead", "tbody", "tr", "th", "td"),
}
CLASSES = {"code", "plain", "math", "display", "table", "left", "right", "center", *STANDARD_TYPES.values()}
AROUND = (
    "{}", "*{}*", "- {}", "> {}", "# {}", "`{}`", "``` {}\n{}\n```", "```html\n{}\n```", "```js\n{}\n```", "[{}](https://a.b)",
    "[x]({})", "[x](<{}>)", "[x](https://a.b '{}')", '[x](https://a.b "{}")', "![{}](https://a.b)", "![x]({})", "<{}>",
    "|a|\n|-|\n|{}|", "${}$", "$$\n{}\n$$", "\\[{}\\]", "https://a.b/{}", "<https://a.b/{}>", "[x][{}]\n\n[{}]: {}",
)  # fmt: skip


def hostile() -> list[str]:
    around = cycle(AROUND)
    return [*TEXTS, *(next(around).replace("{}", text) for text in TEXTS)]


def test_nothing_but_what_is_allowed_comes_out_of_a_thousand_hostile_texts() -> None:
    for text in hostile():
        Allowed().feed(render(text))


@given(st.text(alphabet="<>&\"'`*_~[]()!#|-$\\ \n\t:/=abjsx;&\0\u202e", max_size=200))
def test_nothing_but_what_is_allowed_comes_out_of_any_text(text: str) -> None:
    Allowed().feed(render(text))


def test_each_address_of_another_scheme_stays_text() -> None:
    for scheme in (
        "javascript",
        "JaVaScRiPt",
        "data",
        "vbscript",
        "file",
        "ftp",
        "blob",
        "&#106;avascript",
        "java\tscript",
    ):
        parser = Allowed()
        parser.feed(render(f"[x]({scheme}:alert(1)) <{scheme}:alert> ![x]({scheme}:x)"))
        assert "a" not in parser.tags, scheme


# Nothing slow


REPEATED = [
    *(
        "[",
        "![",
        "[a](",
        "*",
        "*a ",
        "**a ",
        "_",
        "~~a ",
        "`",
        "`a ",
        "<",
        "<a:",
        "&",
        "\\",
        "]",
        "[]",
        "$",
        "$a ",
        "$$a ",
    ),
    *(
        "\\(",
        "\\[\n",
        "$$a\n",
        "http://a",
        "http://a)",
        "\t",
        "> a\n",
        ">" * 70 + "a\n",
        "- a\n",
        "- ",
        "1. a\n",
        "|a|b|\n",
    ),
    *("|", "```py\nx\n```\n", "# a\n", "a\n=\n", "---\n", "a\n", "[a]: b\n", "*_~~`[a", "    a\n"),
    "".join(f"{'  ' * n}- a\n" for n in range(40)),
]


@pytest.mark.slow
@pytest.mark.parametrize("part", REPEATED)
def test_the_time_for_a_large_hostile_text_is_like_that_for_an_eighth_of_it(part: str) -> None:
    """Eight times as long would be linear, 64 times quadratic."""
    text = part * (32_000 // len(part))
    # Loads what colours code, too.
    render(part)
    for _ in range(4):
        eighth, whole = _cpu_seconds(text[: len(text) // 8]), _cpu_seconds(text)
        if whole < max(12.0 * eighth, 0.03):
            return
    raise AssertionError(f"{eighth:.3f} s for an eighth, {whole:.3f} s for all")


def _cpu_seconds(text: str) -> float:
    began = time.thread_time()
    render(text)
    return time.thread_time() - began


# What is kept


def test_a_text_is_rendered_once_and_the_oldest_are_forgotten() -> None:
    cache = Cache(200)
    first = cache.html("*a*")
    assert cache.html("*a*") is first
    for number in range(20):
        cache.html(f"text {number}")
    assert cache.html("*a*") is not first
    assert cache.html("x" * 1000) == f'<p dir="auto">{"x" * 1000}</p>'


def test_katex_lies_among_the_static_files_with_its_licence_and_its_fonts() -> None:
    names = {name for name in ASSETS if name.startswith("katex/")}
    assert {"katex/katex.min.js", "katex/katex.min.css", "katex/LICENSE.txt"} < names
    assert sum(name.endswith(".woff2") for name in names) == 20
    assert all(name.rpartition(".")[2] in MEDIA_TYPES for name in ASSETS)
