"""What the URL of a page asks for."""

from __future__ import annotations

from typing import TypeVar

import msgspec

from llamalith_app.errors import BadInput
from llamalith_app.web.problems import explained
from llamalith_app.web.request import AppRequest

Fields = TypeVar("Fields", bound=msgspec.Struct)


def query_fields(request: AppRequest, form: type[Fields]) -> Fields:
    """The fields of this form in the URL's query; others are ignored. Raises BadInput."""
    try:
        return msgspec.convert({name: value for name, value in request.query_params.items() if value}, form)
    except msgspec.ValidationError as error:
        raise BadInput(explained(str(error), form)) from None
