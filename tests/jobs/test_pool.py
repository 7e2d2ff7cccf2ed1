"""Which engines are up within the budget. Engines without a process; time is an argument."""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import msgspec
import pytest
import structlog

from llamalith_app.engine.client.plan import OVERHEAD_BYTES
from llamalith_app.engine.client.protocol import Engine, EngineLoadFailed
from llamalith_app.jobs.worker.memory import MIB
from llamalith_app.jobs.worker.placement import RETRY_PRELOAD_S
from llamalith_app.jobs.worker.pool import ModelTooLarge, Pool, Reservation
from llamalith_app.jobs.worker.speeds import Speeds
from llamalith_app.settings.config import ModelConfig
from llamalith_app.settings.declaration import ModelSettings
from tests.gguf import LLAMA, header, write
from tests.in_process_engine import InProcessEngine, InProcessEngines
from tests.settle import eventually

NEED = 500 * MIB + OVERHEAD_BYTES
"""Of one model, without its 2 MiB of caches."""
Make = Callable[..., Awaitable[Pool]]


@pytest.fixture
async def make(tmp_path: Path) -> AsyncIterator[Make]:
    """A pool of the models a, b, c of equal size; `rules` are the fake engine's."""
    async with AsyncExitStack() as stack:

        async def make(
            *rules: dict[str, Any], n_fit: float = 2.1, idle_unload_s: float = 600, **settings_by_model: dict[str, Any]
        ) -> Pool:
            script = tmp_path / "script.json"
            script.write_bytes(msgspec.json.encode(rules))
            models = {
                name: ModelConfig(
                    name=name,
                    path=write(tmp_path / f"{name}.gguf", file_bytes=500 * MIB),
                    settings=ModelSettings(**settings_by_model.get(name, {})),
                )
                for name in "abc"
            }
            pool = Pool(
                models,
                InProcessEngines(script, default_n_slots=2),
                budget_bytes=int(n_fit * NEED),
                idle_unload_s=idle_unload_s,
            )
            stack.push_async_callback(pool.close)
            await pool.survey()
            return pool

        yield make


def taken(pool: Pool, model: str) -> Reservation:
    place = pool.reserve(model)
    assert place is not None
    return place


async def used(pool: Pool, model: str) -> InProcessEngine:
    """The model's engine after a job that has ended."""
    with taken(pool, model) as place:
        engine = await place.engine()
    assert isinstance(engine, InProcessEngine)
    return engine


async def cooled_down(pool: Pool, model: str) -> None:
    async def look() -> bool:
        return not pool.cooldown_s(model)

    await eventually(look)


def is_there(engine: Engine) -> bool:
    return not engine.died.is_set()


async def test_models_that_fit_are_loaded_side_by_side_each_with_its_slots(make: Make) -> None:
    pool = await make(b={"n_slots": 1})
    engines = [await used(pool, "a"), await used(pool, "b")]
    assert all(map(is_there, engines))
    assert [engine.limits.n_slots for engine in engines] == [2, 1]
    assert [pool.capacity(model).n_free for model in "ab"] == [2, 1]
    with taken(pool, "b"):
        assert pool.reserve("b") is None
        assert pool.capacity("a").n_free == 2
    assert pool.capacity("b").n_free == 1


async def test_the_least_recently_used_idle_model_gives_way_and_is_gone_before_the_next_is_there(make: Make) -> None:
    pool = await make()
    a, b = await used(pool, "a"), await used(pool, "b")
    assert await used(pool, "a") is a
    c = await used(pool, "c")
    assert (is_there(a), is_there(b), is_there(c)) == (True, False, True)
    assert pool.capacity("b").since is None


async def test_a_model_at_work_is_never_stopped_and_is_the_one_to_wait_for(make: Make) -> None:
    pool = await make()
    with taken(pool, "a") as place:
        a = await place.engine()
        b = await used(pool, "b")
        with taken(pool, "b"):
            room = pool.capacity("c")
            assert (room.n_free, len(room.waits_for)) == (0, 1)
            assert pool.reserve("c") is None
        await used(pool, "c")
        assert (is_there(a), is_there(b)) == (True, False)


async def test_idle_models_in_the_way_of_one_that_waits_go_with_those_at_work(make: Make, tmp_path: Path) -> None:
    pool = await make()
    write(tmp_path / "c.gguf", file_bytes=1000 * MIB)
    await pool.survey()
    with taken(pool, "a") as place:
        await place.engine()
        await used(pool, "b")
        assert pool.capacity("c").waits_for == {"a", "b"}


async def test_who_waits_for_a_load_that_fails_shares_the_failure_and_the_model_cools_down_while_others_have_room(
    make: Make, tmp_path: Path
) -> None:
    gate = tmp_path / "gate"
    pool = await make({"model": "a", "load_gate": str(gate), "cannot_load": "It is broken."}, n_fit=1.5)
    with taken(pool, "a") as one, taken(pool, "a") as other:
        waiting = [asyncio.create_task(place.engine()) for place in (one, other)]

        async def begun() -> bool:
            return bool(pool.pooled["a"].starting)

        await eventually(begun)
        gate.touch()
        failed = await asyncio.gather(*waiting, return_exceptions=True)
        assert [str(error) for error in failed] == [str(failed[0])] * 2
        gate.unlink()
        assert pool.pooled["a"].starting is None, "no load of its own"
        assert pool.reserve("a") is None
        assert pool.capacity("a").waits_for == frozenset()
    await used(pool, "b")
    await cooled_down(pool, "a")
    gate.touch()
    with pytest.raises(EngineLoadFailed, match="It is broken."):
        await used(pool, "a")


async def test_a_model_that_cools_down_is_loaded_neither_ahead_nor_for_a_place_that_was_given_before(
    make: Make, tmp_path: Path
) -> None:
    gate = tmp_path / "gate"
    pool = await make({"model": "a", "load_gate": str(gate), "cannot_load": "It is broken."}, a={"preload": True})
    with taken(pool, "a") as one, taken(pool, "a") as other:
        waiting = asyncio.create_task(one.engine())

        async def begun() -> bool:
            return bool(pool.pooled["a"].starting)

        await eventually(begun)
        gate.touch()
        with pytest.raises(EngineLoadFailed):
            await waiting
        pool.failures["a"] = pool.failures["a"]._replace(took_s=1000)
        gate.unlink()
        with pytest.raises(EngineLoadFailed, match="It is broken."):
            await other.engine()
    pool.tend(time.monotonic() + RETRY_PRELOAD_S + 1)
    assert pool.pooled == {}


async def test_loads_of_one_model_are_one_and_those_of_two_do_not_wait_for_each_other(
    make: Make, tmp_path: Path
) -> None:
    gate = tmp_path / "gate"
    pool = await make({"model": "a", "load_gate": str(gate)})
    places = [taken(pool, "a") for _ in range(2)]
    waiting = asyncio.gather(*(place.engine() for place in places))
    await used(pool, "b")
    assert not waiting.done()
    gate.touch()
    first, second = await waiting
    assert first is second


async def test_a_load_whose_place_was_given_back_goes_on_and_is_kept_in_mind(make: Make, tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    pool = await make({"model": "a", "load_gate": str(gate)}, n_fit=1.5)
    for load_begins_first in (False, True):
        with taken(pool, "a") as place:
            loading = asyncio.create_task(place.engine())
            if load_begins_first:

                async def begun() -> bool:
                    return bool(pool.pooled["a"].starting)

                await eventually(begun)
                with taken(pool, "a") as other:
                    waiting = asyncio.create_task(other.engine())
        if load_begins_first:
            assert pool.capacity("b").waits_for == {"a"}
            gate.touch()
            assert await loading is await waiting
            assert pool.pooled["a"].live is await loading
        else:
            gate.touch()
            first = await loading
            assert pool.pooled["a"].live is first
            gate.unlink()
            await used(pool, "b")
            assert not is_there(first)


async def test_what_can_never_fit_says_what_it_needs_and_what_is_allowed(make: Make) -> None:
    pool = await make(n_fit=0.5)
    assert pool.capacity("a").n_free == 1
    with pytest.raises(
        ModelTooLarge, match=r"Model a \(.*a.gguf\) needs about 652 MiB .* with 2 slots of 4096 tokens; 325 MiB are"
    ):
        await used(pool, "a")
    assert pool.pooled == {}


async def test_a_pinned_model_stays_and_what_does_not_fit_beside_it_fails_with_the_reason(make: Make) -> None:
    pool = await make(n_fit=1.5, a={"pinned": True})
    a = await used(pool, "a")
    with pytest.raises(ModelTooLarge, match="beside the 652 MiB of pinned models"):
        await used(pool, "b")
    pool.tend(time.monotonic() + 10_000)
    assert is_there(a)
    assert pool.capacity("a").since is not None


async def test_a_pinned_model_that_is_only_tried_ends_no_other_s_jobs(make: Make, tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    pool = await make(
        {"model": "a", "load_gate": str(gate), "cannot_load": "It is broken."}, n_fit=1.5, a={"pinned": True}
    )
    with taken(pool, "a") as place:
        loading = asyncio.create_task(place.engine())
        assert pool.capacity("b").waits_for == {"a"}
        assert pool.reserve("b") is None
        gate.touch()
        with pytest.raises(EngineLoadFailed, match="It is broken."):
            await loading
    await used(pool, "b")


@pytest.mark.parametrize(("idle_unload_s", "seconds", "stays"), [(600, 599, True), (600, 610, False), (0, 1e9, True)])
async def test_a_model_without_work_is_unloaded_after_its_time(
    make: Make, idle_unload_s: float, seconds: float, stays: bool
) -> None:
    pool = await make(idle_unload_s=idle_unload_s)
    a, b = await used(pool, "a"), await used(pool, "b")
    with taken(pool, "b"):
        # Loading b took its time too, which is none of the test's.
        pool.tend(pool.pooled["a"].used_at + seconds)
        assert (pool.capacity("a").since is not None) is stays
        assert pool.capacity("b").since is not None
    if not stays:
        await a.died.wait()
    assert is_there(b)


async def test_a_model_to_be_there_is_loaded_without_work_and_again_after_its_death_or_another_s_turn(
    make: Make,
) -> None:
    pool = await make(n_fit=1.5, a={"preload": True})

    async def there() -> Engine | None:
        pool.tend(time.monotonic())
        return pool.pooled["a"].live if "a" in pool.pooled else None

    first = await eventually(there)
    assert first is not None
    assert await used(pool, "a") is first
    assert isinstance(first, InProcessEngine)
    first.die("It was killed.")
    second = await eventually(there)
    assert second is not None
    assert second is not first
    with taken(pool, "b") as place:
        await place.engine()
        assert not is_there(second)
        assert await there() is None
    pool.tend(time.monotonic() + 601)
    assert await eventually(there)


async def test_a_preload_that_fails_is_tried_again_later_and_stands_in_nobody_s_way(make: Make, tmp_path: Path) -> None:
    pool = await make({"model": "a", "cannot_load": "It is broken."}, n_fit=1.5, a={"preload": True})
    pool.tend(time.monotonic())

    async def failed() -> bool:
        return "a" in pool.failures

    await eventually(failed)
    assert "It is broken." in str(pool.failures["a"].error)
    (tmp_path / "script.json").write_bytes(b"[]")
    pool.tend(time.monotonic())
    assert pool.pooled == {}
    await used(pool, "b")
    await pool.pooled["b"].engine.stop()  # type: ignore[union-attr]
    await cooled_down(pool, "a")
    pool.tend(time.monotonic() + RETRY_PRELOAD_S + 1)

    async def loaded() -> bool:
        return pool.pooled["a"].live is not None

    await eventually(loaded)
    assert pool.failures == {}


async def test_a_damaged_file_is_refused_before_an_engine_sees_it(make: Make, tmp_path: Path) -> None:
    pool = await make()
    (tmp_path / "a.gguf").write_bytes(b"GGUF damaged")
    await pool.survey()
    with pytest.raises(EngineLoadFailed, match=r"The model file .*a.gguf is a GGUF of version 1835099168"):
        await used(pool, "a")
    assert "a" in pool.failures
    assert pool.pooled == {}


async def test_the_second_part_of_a_split_model_is_reported_with_the_name_of_the_first_at_start_and_by_a_job(
    make: Make, tmp_path: Path
) -> None:
    pool = await make()
    write(tmp_path / "a.gguf", {"split.no": 1, "split.count": 3})
    flaw = f"The model file {tmp_path}/a.gguf is part 2 of a model that is split into 3 files"
    with structlog.testing.capture_logs() as lines:
        await pool.survey()
    assert [(line["event"], line["model"]) for line in lines] == [("model cannot be used", "a")]
    assert lines[0]["reason"].startswith(flaw)
    with pytest.raises(EngineLoadFailed, match=f"{re.escape(flaw)}: give the first, …-00001-of-00003.gguf"):
        await used(pool, "a")


async def test_a_file_whose_load_will_fail_is_warned_of_at_start_and_left_to_llama_cpp(
    make: Make, tmp_path: Path
) -> None:
    pool = await make()
    (tmp_path / "a.gguf").write_bytes(header(LLAMA, n_tensors=0))
    write(tmp_path / "b.gguf", LLAMA | {"split.no": 0, "split.count": 2})
    with structlog.testing.capture_logs() as lines:
        await pool.survey()
    assert [(line["event"], line["model"]) for line in lines] == [("model cannot be used", name) for name in "ab"]
    assert "has no weights" in lines[0]["reason"]
    assert "its name must end with -00001-of-00002.gguf" in lines[1]["reason"]
    await used(pool, "a")


async def test_a_file_that_grew_is_planned_again_when_it_is_loaded(make: Make, tmp_path: Path) -> None:
    pool = await make()
    write(tmp_path / "a.gguf", file_bytes=5000 * MIB)
    with pytest.raises(ModelTooLarge):
        await used(pool, "a")
    write(tmp_path / "b.gguf", file_bytes=900 * MIB)
    with taken(pool, "c") as place:
        await place.engine()
        with pytest.raises(EngineLoadFailed, match="others are at work"):
            await used(pool, "b")
    await cooled_down(pool, "b")
    await used(pool, "b")
    assert set(pool.pooled) == {"b"}


async def test_a_close_while_a_model_loads_ends_the_load_and_fails_whoever_waits_for_it(make: Make) -> None:
    pool = await make({"model": "a", "load_gate": "/nonexistent/never"})
    waiting = asyncio.create_task(used(pool, "a"))

    async def loading() -> bool:
        return bool(pool.pooled and pool.pooled["a"].starting)

    await eventually(loading)
    await pool.close()
    with pytest.raises(EngineLoadFailed, match="This worker is ending"):
        await waiting


async def test_a_model_that_a_person_asks_for_is_loaded_without_a_job_and_others_give_way(make: Make) -> None:
    pool = await make()
    a, b = await used(pool, "a"), await used(pool, "b")
    assert pool.load("c")
    assert pool.load("c"), "asked again, it is on its way"

    async def loaded() -> bool:
        return pool.statuses(Speeds())[2].state == "loaded"

    await eventually(loaded)
    assert (is_there(a), is_there(b)) == (False, True)


async def test_a_model_is_not_loaded_on_request_while_those_at_work_leave_no_room(make: Make) -> None:
    pool = await make(n_fit=1.1)
    with taken(pool, "a") as place:
        engine = await place.engine()
        assert not pool.load("b")
        assert not pool.unload("a"), "it works"
    assert is_there(engine)
    assert pool.load("b")
    await engine.died.wait()


async def test_a_model_that_can_never_be_loaded_says_so_when_a_person_asks(make: Make) -> None:
    pool = await make(n_fit=0.5)
    assert pool.load("a")
    status = pool.statuses(Speeds())[0]
    assert (status.state, "are allowed" in (status.reason or "")) == ("failed", True)


async def test_a_model_that_a_person_unloads_stays_unloaded_until_it_is_asked_for(make: Make) -> None:
    pool = await make(a={"preload": True}, b={"pinned": True})
    a, b = await used(pool, "a"), await used(pool, "b")
    assert not pool.unload("b"), "pinned"
    assert pool.unload("a")
    assert pool.unload("a"), "it is gone"
    await a.died.wait()
    assert is_there(b)
    pool.tend(time.monotonic() + 1000)
    assert "a" not in pool.pooled, "although it is to be preloaded"
    again = await used(pool, "a")
    assert is_there(again)
