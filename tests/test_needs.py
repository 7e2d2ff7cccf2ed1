"""What happens to a test whose browser or nginx is not installed."""

from __future__ import annotations

import pytest

from tests.needs import need


def test_a_missing_program_skips_the_test_and_names_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LLAMALITH_REQUIRE_ALL", raising=False)
    with pytest.raises(pytest.skip.Exception, match="nowhere is not here .*apt-get install nothing"):
        need("nowhere", "nothing")


def test_a_missing_program_is_a_failure_where_every_test_must_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLAMALITH_REQUIRE_ALL", "1")
    with pytest.raises(pytest.fail.Exception, match="nowhere is not here"):
        need("nowhere", "nothing")
