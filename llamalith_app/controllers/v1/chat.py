"""Chat completions and completions, as OpenAI clients call them."""

from __future__ import annotations

from typing import Any

from litestar import Controller, Response, post
from litestar.openapi.datastructures import ResponseSpec
from litestar.params import JSONBody

from llamalith_app.contracts.openai import ChatCompletion, ChatCompletionCreate, Completion, CompletionCreate
from llamalith_app.controllers.v1 import calls
from llamalith_app.web.openai import asked
from llamalith_app.web.openai.told import ChatTelling, CompletionTelling
from llamalith_app.web.problems import NAMES_MODEL
from llamalith_app.web.request import AppRequest, IdempotencyKey

CHAT = ResponseSpec(
    ChatCompletion,
    generate_examples=False,
    description="The whole answer. With `stream`, Server-Sent Events: chunks of it, then `data: [DONE]`.",
)
TEXT = ResponseSpec(Completion, generate_examples=False, description=CHAT.description)


class ChatCompletions(Controller):
    path = ""
    tags = ("OpenAI",)

    @post("/chat/completions", status_code=200, summary="Answer a conversation", responses={200: CHAT}, opt=NAMES_MODEL)
    async def chat(
        self,
        request: AppRequest,
        data: JSONBody[ChatCompletionCreate],
        idempotency_key: IdempotencyKey = None,
    ) -> Response[Any]:
        """A job like every other: it is on disk before it runs. Where the client leaves, it is cancelled after a
        while (15 s), within which the same call gets its answer; with an Idempotency-Key it goes on. A busy queue makes
        the call wait. A job that ends without a reply is a 400."""
        job = await calls.submit(
            request, asked.chat(data), is_stored=data.store is not False, idempotency_key=idempotency_key
        )
        includes_usage = data.stream_options is not None and bool(data.stream_options.include_usage)
        telling = ChatTelling(job, includes_usage=includes_usage)
        return calls.answer(request, job, telling, streams=bool(data.stream))

    @post("/completions", status_code=200, summary="Continue a text", responses={200: TEXT}, opt=NAMES_MODEL)
    async def complete(
        self, request: AppRequest, data: JSONBody[CompletionCreate], idempotency_key: IdempotencyKey = None
    ) -> Response[Any]:
        """The model reads the prompt as it is, without a chat template. The rest is as for chat completions."""
        wanted = asked.completion(data)
        job = await calls.submit(request, wanted, is_stored=data.store is not False, idempotency_key=idempotency_key)
        includes_usage = data.stream_options is not None and bool(data.stream_options.include_usage)
        echo = wanted.history[0].content if data.echo else ""
        telling = CompletionTelling(job, includes_usage=includes_usage, echo=echo)
        return calls.answer(request, job, telling, streams=bool(data.stream))
