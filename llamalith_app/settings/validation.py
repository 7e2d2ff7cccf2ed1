"""Validates values against the declared types: every problem, each named by its place.

Knows nothing of files and of the environment: a value of `config.json` and the text of a variable are checked alike.
"""

from __future__ import annotations

import re
from typing import Any, get_args, get_origin

import msgspec
from msgspec import UNSET

from llamalith_app.settings.declaration import SECRET_KEYS, TYPES
from llamalith_app.settings.messages import plain, shown, suggestion
from llamalith_app.settings.ranges import in_words, is_struct, takes_lone_text, title, without_limits, without_none

WHOLE_NUMBER = re.compile(r"\s*[+-]?\d{1,18}\s*", re.ASCII)
NUMBER = re.compile(r"\s*[+-]?\d{1,18}(?:\.\d{1,18})?\s*", re.ASCII)
# What the original read and nothing here needs. Its own sampling of end tokens is the model's business now.
MEANINGLESS_KEY = re.compile(
    r"(?:^|[_-])(?:bias|end_?tokens?|eos_?tokens?|stop_?tokens?)(?:[_-]|$)"
    r"|^(?:story_settings|max_continues|poll_\w+|n_batch)$"
)
VARIABLES_OF_SECRETS = SECRET_KEYS | {variable.lower(): variable for variable in SECRET_KEYS.values()}
"""By a key under which somebody might write the secret."""


def parse_variable(key: str, text: str, name: str) -> tuple[Any, list[str]]:
    """The value that a variable's text means for a setting, or UNSET; and the problems, which call it `name`."""
    found: Any = text
    bare = without_limits(TYPES[key])
    if get_origin(bare) is tuple:
        found = split(text)
    elif bare is int and WHOLE_NUMBER.fullmatch(text):
        found = int(text)
    elif bare is float and NUMBER.fullmatch(text):
        found = float(text)
    problems: list[str] = []
    value = ConfigValidator("", problems, []).value(found, TYPES[key], name)
    return value, problems


def split(text: str) -> list[str]:
    """The parts of a comma-separated list, trimmed, without empty ones."""
    return [part for part in map(str.strip, text.split(",")) if part]


class ConfigValidator:
    """Walks a value and its type together and collects what does not fit."""

    def __init__(self, prefix: str, problems: list[str], ignored: list[str]) -> None:
        self._prefix = prefix
        self._problems = problems
        self._ignored = ignored

    def value(self, found: Any, wanted: Any, place: str) -> Any:
        """The value as the type wants it, or UNSET after adding the problem. A struct becomes a dict."""
        wanted = without_none(wanted)
        bare = without_limits(wanted)
        if is_struct(bare):
            return self._fields(found, bare, place)
        if get_origin(bare) is dict:
            return self._entries(found, bare, place)
        if get_origin(bare) is tuple:
            return self._items(found, wanted, bare, place)
        try:
            return msgspec.convert(found, wanted)
        except msgspec.ValidationError:
            return self._refuse(place, in_words(wanted, found), found)

    def _fields(self, found: Any, wanted: type[msgspec.Struct], place: str) -> Any:
        if not isinstance(found, dict):
            return self._refuse(place, "an object", found)
        types = {field.encode_name: field.type for field in msgspec.structs.fields(wanted)}
        values = {}
        for key, value in found.items():
            at = _joined(place, key)
            if key in types:
                if value is not None:
                    values[key] = self.value(value, types[key], at)
            elif MEANINGLESS_KEY.search(key):
                self._ignored.append(at)
            elif key.lower() in VARIABLES_OF_SECRETS:
                variable = VARIABLES_OF_SECRETS[key.lower()]
                self._problems.append(
                    f"{self._prefix}{at}: a secret; it belongs in .env or the environment, as {variable}"
                )
            else:
                self._problems.append(f"{self._prefix}{at}: unknown key{suggestion(key, types)}")
        return {key: value for key, value in values.items() if value is not UNSET}

    def _entries(self, found: Any, wanted: Any, place: str) -> Any:
        if not isinstance(found, dict):
            return self._refuse(place, "an object", found)
        key_type, value_type = get_args(wanted)
        values = {
            self.value(key, key_type, place): self.value(value, value_type, _joined(place, key))
            for key, value in found.items()
            if value is not None
        }
        return {key: value for key, value in values.items() if key is not UNSET and value is not UNSET}

    def _items(self, found: Any, wanted: Any, bare: Any, place: str) -> Any:
        item_type = get_args(bare)[0]
        if isinstance(found, str) and takes_lone_text(wanted):
            found = [found]
        if not isinstance(found, list):
            return self._refuse(place, title(wanted) or "a list", found)
        items = [self.value(item, item_type, f"{place}[{index}]") for index, item in enumerate(found)]
        if UNSET in items:
            return UNSET
        try:
            return msgspec.convert(items, wanted)
        except msgspec.ValidationError:
            return self._refuse(place, title(wanted), items)

    def _refuse(self, place: str, allowed: str, found: Any) -> Any:
        at = f"{self._prefix}{place}: " if place else self._prefix
        self._problems.append(f"{at}expected {allowed}, got {shown(found)}")
        return UNSET


def _joined(place: str, key: str) -> str:
    return f"{place}.{plain(key)}" if place else plain(key)
