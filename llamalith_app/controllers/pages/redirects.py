"""Where a browser goes after a form: addresses of our own pages, and the 303 that leads there.

Whatever a browser sends as an address is reduced to a page under /chat. Which page shows what is not known here.
"""

from __future__ import annotations

import re
from typing import Any
from urllib.parse import quote, unquote, urlsplit

from litestar import Request
from litestar.datastructures import Cookie
from litestar.response import Redirect

HOME = "/chat/"
LOGIN = "/chat/login"
MAX_PATH_CHARS = 2000
"""It goes through a cookie and a header, of which proxies take some thousand bytes."""
OWN_PATH = re.compile(r"/chat(?:/(?!/)[^\\\x00-\x20\x7f]*)?(?:\?[^\\\x00-\x20\x7f]*)?")
"""A path below /chat: nothing that a browser could read as another host."""


def see_other(path: str, *cookies: Cookie) -> Redirect:
    return Redirect(path, status_code=303, cookies=list(cookies))


def referring_page(request: Request[Any, Any, Any]) -> str:
    """The page of ours whose form was sent, as far as its browser says; else that of a new chat. A path alone, whatever
    host it names."""
    try:
        referer = urlsplit(request.headers.get("referer", ""))
    except ValueError:
        return HOME
    return own_page(referer.path + (f"?{referer.query}" if referer.query else ""))


def own_page(path: str) -> str:
    """`path` where it is a page of ours, as it may stand in a header; else that of a new chat."""
    # What a cookie cannot hold is quoted; what was quoted stays as it is.
    quoted = quote(path, safe="/?&=%+:@!$'()*~-._")
    parts = unquote(quoted.partition("?")[0]).split("/")
    is_own = OWN_PATH.fullmatch(path) is not None and not {".", ".."} & set(parts)
    is_page = parts[2:3] not in (["api"], ["login"], ["logout"])
    return quoted if is_own and is_page and len(quoted) <= MAX_PATH_CHARS else HOME
