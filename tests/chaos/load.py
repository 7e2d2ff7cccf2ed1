"""The clients: they submit, cancel, read, follow and retry at both webs, and record the answers in the history.

They follow the product's documentation: an Idempotency-Key for each new job, the same request again if no answer came,
`Retry-After`, and `Last-Event-ID`.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import random
from collections.abc import AsyncIterator, Sequence
from datetime import UTC, datetime
from typing import Any

import httpx

from tests.chaos.history import Heard, History, Lane, Operation, Sighting
from tests.chaos.record import TERMINAL
from tests.streams import sse

N_CLIENTS = 8
N_CONVERSATIONS = 60
"""In use at a time. A conversation with N_TURNS turns is replaced by a new one."""
N_TURNS = 12
"""So few that a conversation fits the context of its model, and no message is omitted."""
MOST_OPEN = 80
"""No more jobs are submitted while so many have not ended, as far as the clients know."""
MOST_STREAMS = 16
REST_S = (0.02, 0.25)
"""Between two operations of a client."""
TIMEOUT_S = 4.0
"""For an answer; some freezes are longer."""
STREAM_TIMEOUT_S = 20.0
"""For the next byte of a stream; longer than the keep-alive interval."""
AGAIN_S = 0.2
STREAM_AGAIN_S = 0.2
LANE_SHARE = 0.25
"""Of the streams, those of a whole conversation."""
LANE_S = (3.0, 20.0)
"""How long a conversation's stream is read."""
OLD_SHARE = 0.4
"""Of the cancels, those of the oldest open job, which most likely runs."""
BUSY_SHARE = 0.2
"""Of the submits, those to the first N_BUSY conversations, so that several prompts wait in one."""
N_BUSY = 4
REAL_TOKENS = 6
N_NUMBERS_A_REAL = 60
"""Prompts, of which those to the real model share a conversation. It stays short: digests have many tokens."""

SHARES = {"submit": 62, "cancel": 3, "read": 18, "follow": 12, "retry": 5}


class Load:
    """All clients together. `real_share`: the share of submits that go to `real_model`."""

    def __init__(
        self,
        history: History,
        ports: Sequence[int],
        token: str,
        *,
        seed: int,
        fake_models: Sequence[str],
        real_model: str | None,
        real_share: float,
    ) -> None:
        self.history = history
        self._chance = random.Random(seed)
        self._fake_models = fake_models
        self._real_model, self._real_share = real_model, real_share
        self._webs = [
            httpx.AsyncClient(
                base_url=f"http://127.0.0.1:{port}",
                headers={"Authorization": f"Bearer {token}"},
                timeout=TIMEOUT_S,
                trust_env=False,
            )
            for port in ports
        ]
        self._numbers = itertools.count(1)
        self._conversations = [self._new_conversation() for _ in range(N_CONVERSATIONS)]
        self._turns: dict[str, int] = {}
        """Turns sent to each conversation."""
        self._there: list[str] = []
        """Conversations that an answer named, so that they exist."""
        self._bodies: dict[str, dict[str, Any]] = {}
        """The body of each submit, by its key."""
        self._known: list[int] = []
        """Jobs that an answer named."""
        self._open: set[int] = set()
        """Those of them whose end no client has seen."""
        self._lost: list[int] = []
        """Those of them that ended without a reply and were not retried."""
        self._over = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []
        self._streams: set[asyncio.Task[None]] = set()

    def start(self) -> None:
        self._tasks = [asyncio.create_task(self._act_on()) for _ in range(N_CLIENTS)]
        self._tasks.append(asyncio.create_task(self._poll_jobs()))

    async def stop(self, within_s: float) -> None:
        """Begins no new operation; waits for the answers of the open ones."""
        self._over.set()
        await _settled(self._tasks, within_s)

    async def end(self, within_s: float) -> None:
        """Waits for the streams to end, after all jobs have."""
        await _settled(self._streams, within_s)
        for web in self._webs:
            await web.aclose()

    async def ask_again(self, most: int) -> None:
        """Sends at most so many of the earlier submits once more under their keys."""
        made = [one for one in self.history.operations if one.key in self._bodies and one.outcome == "ok"]
        for operation in self._chance.sample(made, min(most, len(made))):
            answer = await self._ask(
                "POST",
                "/api/jobs",
                json=self._bodies[operation.key or ""],
                headers={"Idempotency-Key": operation.key or ""},
            )
            if answer is None or answer.status_code != 200:
                operation.refusal = f"asked again: {answer and answer.text[:500]}"
                operation.outcome = "fail"
            else:
                operation.job_ids.append(answer.json()["job_id"])

    async def _act_on(self) -> None:
        while not self._over.is_set():
            (kind,) = self._chance.choices(list(SHARES), list(SHARES.values()))
            await getattr(self, f"_{kind}")()
            await asyncio.sleep(self._chance.uniform(*REST_S))

    # Requests

    async def _submit(self) -> None:
        if len(self._open) >= MOST_OPEN:
            return
        n = next(self._numbers)
        is_real = self._real_model is not None and self._chance.random() < self._real_share
        conversation_id = f"real-{n // N_NUMBERS_A_REAL}" if is_real else self._conversation()
        pace = self._chance.choice(("slow", "quick", "", "", ""))
        body: dict[str, Any] = {
            "content": f"{pace} prompt {n} of {conversation_id}".strip(),
            "conversation_id": conversation_id,
            "model": self._real_model if is_real else self._chance.choice(self._fake_models),
            "max_attempts": 100,
            "priority": self._chance.choice(("interactive", "normal", "normal", "batch")),
        }
        if is_real:
            body |= {"max_tokens": REAL_TOKENS, "temperature": 0}
        if self._chance.random() < 0.1:
            body["system_prompt"] = f"System {n}."
        if self._chance.random() < 0.1:
            body["assistant_context"] = f"Context {n}."
        operation = self.history.invoke(
            "submit",
            conversation_id=conversation_id,
            content=body["content"],
            model=body["model"],
            key=None if self._chance.random() < 0.05 else f"submit-{n}",
        )
        if operation.key:
            self._bodies[operation.key] = body
        await self._make(operation, "/api/jobs", body)

    async def _retry(self) -> None:
        if self._lost:
            job_id = self._lost.pop(self._chance.randrange(len(self._lost)))
            operation = self.history.invoke("retry", subject=job_id, key=f"retry-{job_id}-{next(self._numbers)}")
            await self._make(operation, f"/api/jobs/{job_id}/retry", None)

    async def _make(self, operation: Operation, path: str, body: dict[str, Any] | None) -> None:
        """Sends the request until it is answered. Without a key, and at random, gives up after the first timeout."""
        gives_up = operation.key is None or self._chance.random() < 0.1
        twice = operation.key is not None and self._chance.random() < 0.05
        headers = {"Idempotency-Key": operation.key} if operation.key else {}
        while True:
            asked = [self._ask("POST", path, json=body, headers=headers) for _ in range(1 + twice)]
            answers = [answer for answer in await asyncio.gather(*asked) if answer is not None]
            for answer in answers:
                if answer.status_code == 200:
                    self._made(operation, answer.json())
                elif answer.status_code in (429, 503):
                    operation.n_busy += 1
                else:
                    operation.refusal = f"{answer.status_code} {answer.text[:500]}"
            if operation.refusal is not None:
                operation.end("fail")
                return
            if operation.job_ids:
                operation.end("ok")
                return
            operation.n_unanswered += len(asked) - len(answers)
            if gives_up and not answers:
                operation.end("unknown")
                return
            await asyncio.sleep(AGAIN_S)

    def _made(self, operation: Operation, accepted: dict[str, Any]) -> None:
        operation.job_ids.append(accepted["job_id"])
        if len(operation.job_ids) == 1:
            self._known.append(accepted["job_id"])
            self._open.add(accepted["job_id"])
            if accepted["conversation_id"] not in self._there:
                self._there.append(accepted["conversation_id"])

    async def _cancel(self) -> None:
        """Sends a cancel once; its outcome is unknown if no answer comes."""
        if not self._open:
            return
        job_id = min(self._open) if self._chance.random() < OLD_SHARE else self._chance.choice(list(self._open))
        operation = self.history.invoke("cancel", subject=job_id)
        answer = await self._ask("POST", f"/api/jobs/{job_id}/cancel")
        if answer is None:
            operation.n_unanswered += 1
            operation.end("unknown")
        elif answer.status_code == 200:
            operation.word = answer.json()["status"]
            self._see(answer.json(), "cancel")
            operation.end("ok")
        else:
            self._refused(operation, answer)

    async def _read(self) -> None:
        if not self._known:
            return
        job_id = self._chance.choice(self._known[-200:])
        path = self._chance.choice(
            (
                f"/api/jobs/{job_id}",
                f"/api/jobs/{job_id}/attempts",
                "/api/jobs?limit=50",
                f"/api/conversations/{self._chance.choice(self._conversations)}/latest",
            )
        )
        await self._get(path)

    async def _get(self, path: str) -> Any:
        operation = self.history.invoke("read", content=path)
        answer = await self._ask("GET", path)
        if answer is None:
            operation.n_unanswered += 1
            operation.end("unknown")
            return None
        if answer.status_code != 200:
            self._refused(operation, answer)
            return None
        operation.end("ok")
        shown = answer.json()
        for job in [shown] if "status" in shown else [*shown.get("jobs", []), shown.get("last_job")]:
            if job:
                self._see(job, path)
        return shown

    def _refused(self, operation: Operation, answer: httpx.Response) -> None:
        if answer.status_code in (429, 503):
            operation.n_busy += 1
            operation.end("unknown")
        else:
            operation.refusal = f"{answer.status_code} {answer.text[:500]}"
            operation.end("fail")

    async def _ask(self, method: str, path: str, **request: Any) -> httpx.Response | None:
        """The answer; None if there is none. If one web refuses the connection, the other one is asked."""
        webs = self._chance.sample(self._webs, len(self._webs))
        for web in webs:
            try:
                return await web.request(method, path, **request)
            except httpx.ConnectError:
                continue
            except httpx.HTTPError:
                return None
        return None

    # Ends of jobs

    async def _poll_jobs(self) -> None:
        """Finds out which jobs have ended."""
        while not self._over.is_set():
            await self._get("/api/jobs?limit=200")
            if self._open:
                await self._get(f"/api/jobs/{min(self._open)}")
            await asyncio.sleep(0.5)

    def _see(self, job: dict[str, Any], by: str) -> None:
        if job["status"] not in TERMINAL:
            return
        self.history.see(Sighting(job["id"], job["status"], job["result"], by))
        if job["id"] in self._open:
            self._open.discard(job["id"])
            if job["status"] != "done":
                self._lost.append(job["id"])

    # Streams

    async def _follow(self) -> None:
        if len(self._streams) >= MOST_STREAMS or not self._open:
            return
        if self._chance.random() < LANE_SHARE:
            work = self._hear_lane(self._chance.choice(self._there[-N_CONVERSATIONS:]), self._chance.uniform(*LANE_S))
        else:
            heard = Heard(job_id=self._chance.choice(list(self._open)))
            self.history.heard.append(heard)
            work = self._hear_job(heard)
        task = asyncio.create_task(work)
        self._streams.add(task)
        task.add_done_callback(self._streams.discard)

    async def _hear_job(self, heard: Heard) -> None:
        """Reads a job's stream to its last event, over as many connections as needed."""
        got = sse.Heard()
        while heard.final is None:
            heard.n_connections += 1
            with contextlib.suppress(httpx.HTTPError):
                async for event in self._events(f"/api/jobs/{heard.job_id}/events", got.last_id):
                    if not self._take(heard, got, event):
                        return
            await asyncio.sleep(STREAM_AGAIN_S)

    async def _hear_lane(self, conversation_id: str, for_s: float) -> None:
        """Reads a conversation's stream for so many seconds."""
        since = ""
        lane: dict[int, tuple[Heard, sse.Heard]] = {}
        last_id, n_connections = "", 0
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(for_s):
                while True:
                    n_connections += 1
                    with contextlib.suppress(httpx.HTTPError):
                        async for event in self._events(f"/api/conversations/{conversation_id}/events", last_id):
                            last_id = event.id or last_id
                            since = since or str(datetime.now(UTC).replace(tzinfo=None))
                            if event.kind == "progress":
                                continue
                            job_id = event.data["id" if event.kind in TERMINAL else "job_id"]
                            heard, got = lane.setdefault(job_id, (Heard(job_id=job_id), sse.Heard()))
                            if not self._take(heard, got, event):
                                raise TimeoutError
                    await asyncio.sleep(STREAM_AGAIN_S)
        ended = [heard for heard, _ in lane.values() if heard.final or heard.broken]
        if ended:
            ended[0].n_connections = n_connections
            self.history.heard += ended
            self.history.lanes.append(Lane(since, [heard.job_id for heard in ended]))

    def _take(self, heard: Heard, got: sse.Heard, event: sse.Event) -> bool:
        """Applies an event; False if it breaks a rule of streams."""
        if event.kind == "progress":
            return True
        try:
            got.take(event)
        except AssertionError as error:
            heard.broken = f"{event} after {got.text!r} and {got.kinds[-5:]}: {error}"
            return False
        heard.text, heard.n_restarts = got.text, got.kinds.count("restart")
        if got.final is not None:
            heard.final = event.kind
            self._see(got.final, "stream")
        return True

    async def _events(self, path: str, last_id: str) -> AsyncIterator[sse.Event]:
        """The events of one connection."""
        async with self._chance.choice(self._webs).stream(
            "GET",
            path,
            headers={"Last-Event-ID": last_id} if last_id else {},
            timeout=httpx.Timeout(TIMEOUT_S, read=STREAM_TIMEOUT_S),
        ) as answer:
            if answer.status_code == 200:
                async for event in sse.Reader(answer).events():
                    yield event
            elif answer.status_code != 503:
                operation = self.history.invoke("read", content=path)
                await answer.aread()
                self._refused(operation, answer)

    # Conversations

    def _conversation(self) -> str:
        place = self._chance.randrange(N_BUSY if self._chance.random() < BUSY_SHARE else N_CONVERSATIONS)
        chosen = self._conversations[place]
        self._turns[chosen] = self._turns.get(chosen, 0) + 1
        if self._turns[chosen] >= N_TURNS:
            self._conversations[place] = self._new_conversation()
        return chosen

    def _new_conversation(self) -> str:
        return f"talk-{next(self._numbers)}"


async def _settled(tasks: Any, within_s: float) -> None:
    """Waits so many seconds for the tasks, then cancels the others. Raises what a task raised."""
    if not tasks:
        return
    done, late = await asyncio.wait(list(tasks), timeout=within_s)
    for task in late:
        task.cancel()
    await asyncio.gather(*late, return_exceptions=True)
    for task in done:
        task.result()
