"""Renders Markdown as HTML that is safe to put into a page.

CommonMark with tables, strikethrough, formulas and bare addresses. A line break in the text is one on the page. There
is no raw HTML and no link reference, so a block means the same whatever follows it: `web/markdown_stream.py` renders
one block after another. nh3 cleans what markdown-it makes once more, by a list of what is allowed. A formula keeps its
source; static/formulas.js typesets it. The time is about linear in the length of any text. Knows no page and no stream.
"""

from __future__ import annotations

import io
import re
import time
from collections import OrderedDict
from collections.abc import Sequence
from urllib.parse import urlsplit

import nh3
from markdown_it import MarkdownIt
from markdown_it.common.utils import escapeHtml, unescapeAll
from markdown_it.token import Token
from markupsafe import Markup
from pygments.formatters.html import HtmlFormatter
from pygments.lexers import get_lexer_by_name
from pygments.token import STANDARD_TYPES

from llamalith_app.contracts.parameters import Parameters
from llamalith_app.web.markdown_rules import add_rules

MAX_CHARS = 200_000
"""A longer text is shown as it is."""
MAX_CODE_CHARS = 50_000
"""Longer code has no colours."""
MAX_COLOURING_S = 0.25
"""Of processor time: Pygments is not linear for everything that somebody could call code. After this, no colours."""
MAX_LINE_CHARS, MAX_SPACES, MAX_WORDS = 1_000, 200, 100
"""Of code with colours: in a line, in one gap, and of words with only gaps between. On more than that a single step of
Pygments takes too long."""
MAX_CACHED_CHARS = 8_000_000
"""Of texts and their HTML together."""
MAX_NESTING = 60
"""Of lists and quotes; a list counts twice. What stands deeper is left out, far beyond what people could read."""
LANGUAGES = frozenset(
    (
        *(
            "bash",
            "c",
            "c++",
            "console",
            "cpp",
            "cs",
            "csharp",
            "css",
            "dart",
            "diff",
            "docker",
            "dockerfile",
            "elixir",
        ),
        *("erlang", "go", "graphql", "haskell", "html", "http", "ini", "java", "javascript", "js", "json", "jsx"),
        *("julia", "kotlin", "latex", "less", "lua", "make", "makefile", "matlab", "nasm", "nginx", "ocaml", "perl"),
        *("php", "powershell", "proto", "protobuf", "ps1", "py", "pycon", "python", "python3", "r", "rb", "rs", "ruby"),
        *("rust", "sass", "scala", "scss", "sh", "shell", "sql", "swift", "tex", "toml", "ts", "tsx", "typescript"),
        *("udiff", "vim", "xml", "yaml", "yml", "zig", "zsh"),
    )
)
"""Pygments' names of what gets colours. No other lexer of its many is ever run on what strangers wrote."""
LANGUAGE = re.compile(r"[^\s{}]{1,40}")
LINE_END = "\n"
SCHEMES = frozenset({"http", "https", "mailto"})
BLOCKS = ("p", "h2", "h3", "h4", "h5", "h6", "ul", "ol", "blockquote", "table")
CLEANER = nh3.Cleaner(
    tags={
        *BLOCKS,
        *("li", "hr", "br", "em", "strong", "s", "a", "code", "pre", "figure", "figcaption", "span", "div"),
        *("thead", "tbody", "tr", "th", "td"),
    },
    attributes={"ol": {"start"}, "a": {"href", "title"}, "span": {"data-tex"}, "div": {"data-tex"}},
    tag_attribute_values={
        **{tag: {"dir": {"auto"}} for tag in BLOCKS},
        "pre": {"dir": {"auto", "ltr"}, "tabindex": {"0"}},
        "div": {"tabindex": {"0"}},
    },
    allowed_classes={
        "span": {"math", "display", *filter(None, STANDARD_TYPES.values())},
        "div": {"math", "display", "table"},
        "figure": {"code"},
        "pre": {"plain"},
        "th": {"left", "center", "right"},
        "td": {"left", "center", "right"},
    },
    set_tag_attribute_values={"a": {"target": "_blank"}},
    url_schemes=set(SCHEMES),
    url_relative="deny",
    link_rel="noopener noreferrer nofollow",
)
JSON_BEGINS = "```json\n"
NO_SPACES = re.compile(r"\S+")
SIGNS = re.compile(r"[^\w\s]+")
COLOURS: HtmlFormatter[str] = HtmlFormatter(nowrap=True)


def markdown(text: str) -> Markup:
    """The text as HTML, to be put into an element of the class `markdown`."""
    return CACHE.html(text)


def plain(text: str) -> str:
    """The text as it is, as HTML."""
    return f'<pre class="plain" dir="auto">{escapeHtml(text)}</pre>'


def before_reply(parameters: Parameters | None) -> str:
    """What stands before a reply's Markdown: JSON is shown as code."""
    return JSON_BEGINS if parameters is not None and parameters.wants_json else ""


def parse(text: str) -> list[Token]:
    """The tokens of a text. A block's `map`: its first line, and the line behind its last."""
    try:
        text.encode()
    except UnicodeEncodeError:
        # Half a character, which no page can hold.
        text = text.encode("utf-8", "replace").decode()
    return PARSER.parse(text)


class Outline:
    """Renders blocks in the order of their text: the level of a heading depends on those before it."""

    def __init__(self, level: int = 1) -> None:
        self.level = level
        """Of the last heading. 1 is the page's own: it begins below that, and no heading leaves a level out."""
        self._n_links = 0
        """Links that are open."""

    def html(self, tokens: Sequence[Token]) -> str:
        return CLEANER.clean(self._raw_html(tokens))

    def rows_html(self, rows: Sequence[Token]) -> str:
        """The same for rows of a table, which stand for nothing outside one."""
        begin, end = "<table><tbody>", "</tbody></table>"
        return CLEANER.clean(begin + self._raw_html(rows) + end).removeprefix(begin).removesuffix(end)

    def _raw_html(self, tokens: Sequence[Token]) -> str:
        """Without white space between blocks. That a list is tight is only known at its end, so it is CSS's affair."""
        return "".join(map(self._tag, tokens))

    def _tag(self, token: Token) -> str:
        match token.type:
            case "inline":
                return self._raw_html(token.children or [])
            case "text" | "text_special":
                return escapeHtml(token.content)
            case "softbreak" | "hardbreak":
                return "<br>\n"
            case "code_inline":
                return f"<code>{escapeHtml(token.content)}</code>"
            case "fence" | "code_block":
                return code(token.content, token.info)
            case "math_inline":
                return formula(token.content, "span", is_displayed=token.markup in ("$$", "\\["))
            case "math_block" if token.meta["open"]:
                return f'<p dir="auto">{escapeHtml(token.content).replace(LINE_END, "<br>" + LINE_END)}</p>'
            case "math_block":
                return formula(token.content, "div", is_displayed=True)
            case "image":
                return self._link_to_image(token)
            case "link_open":
                self._n_links += 1
                return f"<a{_attributes(token, 'href', 'title')}>"
            case "link_close":
                self._n_links -= 1
                return "</a>"
            case "heading_open":
                self.level = min(int(token.tag[1]) + 1, self.level + 1, 6)
                return f'<h{self.level} dir="auto">'
            case "heading_close":
                return f"</h{self.level}>"
            case "table_open":
                return '<div class="table" tabindex="0"><table dir="auto">'
            case "table_close":
                return "</tbody></table></div>"
            case "thead_close":
                return "</thead><tbody>"
            case "tbody_open" | "tbody_close":
                return ""
            case "th_open" | "td_open":
                aligned = str(token.attrs.get("style", "")).removeprefix("text-align:")
                return f'<{token.tag} class="{aligned}">' if aligned else f"<{token.tag}>"
            case _ if token.nesting < 0:
                return f"</{token.tag}>"
            case _:
                direction = ' dir="auto"' if token.level == 0 and token.tag in BLOCKS else ""
                return f"<{token.tag}{direction}{_attributes(token, 'start')}>"

    def _link_to_image(self, token: Token) -> str:
        """Nothing is loaded that a text names."""
        text = escapeHtml(text_of(token.children or []).strip() or str(token.attrs["src"]))
        return text if self._n_links else f'<a href="{escapeHtml(str(token.attrs["src"]))}">{text}</a>'


def text_of(tokens: Sequence[Token]) -> str:
    """What the tokens of a line say, without its marks."""
    return "".join(text_of(token.children) if token.children else token.content for token in tokens)


def _attributes(token: Token, *names: str) -> str:
    return "".join(f' {name}="{escapeHtml(str(token.attrs[name]))}"' for name in names if name in token.attrs)


def code(text: str, info: str) -> str:
    """A code block. `info` begins with its language, and may be empty. Long code, and code in a language that is not
    known, has no colours. static/code.js adds a button to the caption. Not cleaned."""
    found = LANGUAGE.match(unescapeAll(info).strip())
    language = found[0] if found else ""
    shown = (_coloured(text, language.lower()) if _can_have_colours(text, language) else None) or escapeHtml(text)
    caption = f"<figcaption>{escapeHtml(language)}</figcaption>"
    return f'<figure class="code">{caption}<pre dir="ltr" tabindex="0"><code>{shown}</code></pre></figure>'


def _can_have_colours(text: str, language: str) -> bool:
    return (
        language.lower() in LANGUAGES
        and len(text) <= MAX_CODE_CHARS
        and max(map(len, text.split("\n"))) <= MAX_LINE_CHARS
        and max(map(len, NO_SPACES.split(text))) <= MAX_SPACES
        and max(len(part.split()) for part in SIGNS.split(text)) <= MAX_WORDS
    )


def _coloured(text: str, language: str) -> str | None:
    """None: it takes too long."""
    deadline = time.thread_time() + MAX_COLOURING_S
    tokens = []
    for token in get_lexer_by_name(language, stripnl=False).get_tokens(text):
        tokens.append(token)
        if time.thread_time() > deadline:
            return None
    out = io.StringIO()
    COLOURS.format(tokens, out)
    return out.getvalue()


def formula(source: str, tag: str, *, is_displayed: bool) -> str:
    classes = "math display" if is_displayed else "math"
    source = escapeHtml(source)
    return f'<{tag} class="{classes}" data-tex="{source}">{source}</{tag}>'


def _is_absolute(address: str) -> bool:
    """Whether it leads out of this site, by an allowed scheme."""
    try:
        return urlsplit(address).scheme.lower() in SCHEMES
    except ValueError:
        return False


def _parser() -> MarkdownIt:
    parser = MarkdownIt("commonmark", {"html": False, "maxNesting": MAX_NESTING})
    parser.enable(["table", "strikethrough"])
    parser.disable(["reference", "html_block", "html_inline"])
    parser.validateLink = _is_absolute  # type: ignore[method-assign, assignment]
    add_rules(parser)
    return parser


PARSER = _parser()


def render(text: str) -> str:
    """The HTML of a whole text."""
    return plain(text) if len(text) > MAX_CHARS else Outline().html(parse(text))


class Cache:
    """The HTML of the texts that were asked for last. A page shows the same replies again and again."""

    def __init__(self, max_chars: int) -> None:
        self._max_chars = max_chars
        self._n_chars = 0
        self._html: OrderedDict[str, Markup] = OrderedDict()

    def html(self, text: str) -> Markup:
        if (found := self._html.get(text)) is not None:
            self._html.move_to_end(text)
            return found
        html = self._html[text] = Markup(render(text))  # noqa: S704 - it is clean
        self._n_chars += len(text) + len(html)
        while self._n_chars > self._max_chars:
            oldest, its_html = self._html.popitem(last=False)
            self._n_chars -= len(oldest) + len(its_html)
        return html


CACHE = Cache(MAX_CACHED_CHARS)
