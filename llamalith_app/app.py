"""The composition root of the web process: `create_app` builds the application, `create_server` its HTTP server.

Builds the services that handlers use (`Parts`), opens and closes them. Never imports the engine or the worker; the web
learns about them from the database and from Redis.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from datetime import timedelta
from typing import Any

import msgspec
import uvicorn
from litestar import Litestar, Router
from litestar.config.cors import CORSConfig
from litestar.connection import ASGIConnection
from litestar.exceptions import HTTPException
from litestar.handlers import BaseRouteHandler
from litestar.openapi import OpenAPIConfig
from litestar.openapi.spec import Components, SecurityScheme

from llamalith_app import __version__
from llamalith_app.attachments.reader import AttachmentReader
from llamalith_app.controllers.branches import BranchesOfConversation, BranchesOfJob
from llamalith_app.controllers.conversation_list import ConversationList, NamedImport
from llamalith_app.controllers.conversations import Conversations
from llamalith_app.controllers.events import Events
from llamalith_app.controllers.health import Probes
from llamalith_app.controllers.jobs import Jobs
from llamalith_app.controllers.legacy import Legacy
from llamalith_app.controllers.models import Models
from llamalith_app.controllers.pages.attachments import AttachmentsPage
from llamalith_app.controllers.pages.branches import BranchForms
from llamalith_app.controllers.pages.conversation import ConversationPage
from llamalith_app.controllers.pages.conversations import ConversationsPage
from llamalith_app.controllers.pages.docs import DocsPage
from llamalith_app.controllers.pages.draft import DraftPage, answer_session_unreadable, answer_stale_form
from llamalith_app.controllers.pages.job import JobPage
from llamalith_app.controllers.pages.jobs import JobsPage
from llamalith_app.controllers.pages.login import LoginPage, answer_login_needed
from llamalith_app.controllers.pages.logout import LogoutPage
from llamalith_app.controllers.pages.look import LookPage
from llamalith_app.controllers.pages.monitor import MonitorPage
from llamalith_app.controllers.pages.new_chat import NewChatPage, front_door
from llamalith_app.controllers.pages.offline import OfflinePage
from llamalith_app.controllers.pages.status import StatusPage
from llamalith_app.controllers.pages.stream import StreamPage
from llamalith_app.controllers.v1.chat import ChatCompletions
from llamalith_app.controllers.v1.models import OpenAIModels
from llamalith_app.controllers.v1.responses import Responses
from llamalith_app.errors import LlamalithError, LoginNeeded, SessionUnreadable, StaleForm
from llamalith_app.grammars import grammar
from llamalith_app.guards import sessions
from llamalith_app.guards.hosts import Hosts
from llamalith_app.guards.passwords import Passwords
from llamalith_app.guards.principal import PrincipalGuard
from llamalith_app.guards.sessions import COOKIE, Sessions
from llamalith_app.jobs import order, queue, schemas
from llamalith_app.jobs.branches import Branches
from llamalith_app.jobs.bulk import BulkActions
from llamalith_app.jobs.calls import Calls
from llamalith_app.jobs.cancel import Cancellations
from llamalith_app.jobs.forecast import Forecasts
from llamalith_app.jobs.monitor import Monitor
from llamalith_app.jobs.queue import Hints, redis_without_retries
from llamalith_app.jobs.submit import Submissions
from llamalith_app.settings.config import Config
from llamalith_app.store.database import LOCK_DEADLINE_S, Database
from llamalith_app.store.record import record_id
from llamalith_app.streams.progress import ProgressReader
from llamalith_app.web import follow, html, problems, sidebar
from llamalith_app.web.envelope import Envelope
from llamalith_app.web.follow import Followers
from llamalith_app.web.live import Live
from llamalith_app.web.openapi import ExactDocument
from llamalith_app.web.paths import MarkedSlashes, restore_slashes
from llamalith_app.web.readiness import ReadinessCheck
from llamalith_app.web.request import MAX_BODY_BYTES, AppRequest, Parts
from llamalith_app.web.request_log import RequestLog
from llamalith_app.web.server import IDLE_S, Protocol, Server


class WebApp(MarkedSlashes):
    """The ASGI application with its outer middleware."""

    def __init__(self, app: Litestar, parts: Parts, *, hsts: str) -> None:
        super().__init__(RequestLog(Envelope(app, parts.hosts), hsts=hsts))
        self.end_streams = parts.followers.end
        """Called by the server at a stop, before it waits for open connections: streams never end by themselves."""


class Timings(msgspec.Struct, frozen=True, kw_only=True):
    """How long the web process waits, in seconds. No setting: only tests pass other values."""

    redis_timeout_s: float = queue.TIMEOUT_S
    """How long a command to Redis may take."""
    session_poll_s: float = sessions.POLL_S
    """How long a stream may outlive a session that another process has ended."""
    session_touch_s: float = sessions.TOUCH_S
    """How old the stored time of a session's last use may be."""
    lock_deadline_s: float = LOCK_DEADLINE_S
    """How long a write waits for another process's transaction."""
    schema_s: float = schemas.TIMEOUT_S
    """How long the validation of a schema may take, the wait for a free process included."""


TIMINGS = Timings()


def create_app(
    config: Config, timings: Timings = TIMINGS, *, follow_timings: follow.Timings = follow.TIMINGS
) -> WebApp:
    """The web application. It opens its database when its lifespan starts.

    Raises ConfigError for a grammar that cannot be read. The schema must be current (`store/migrate.py`).
    """
    models = tuple(model.name for model in config.models)
    database = Database(config.database_path, timings.lock_deadline_s)
    record = record_id(config.database_path)
    redis = redis_without_retries(config.redis_url, timings.redis_timeout_s)
    hints = Hints(config.redis_url, models, timeout_s=timings.redis_timeout_s)
    max_wait = order.max_wait_by_priority(config.max_wait_s)
    forecasts = Forecasts(database, models, max_wait)
    submissions = Submissions(
        database,
        hints,
        models=models,
        grammars=grammar.load(config.grammar_dir),
        limits=config,
        forecasts=forecasts,
        schema_s=timings.schema_s,
    )
    live = Live(database, ProgressReader(redis, record), forecasts)
    followers = Followers(database, live, redis, record, follow_timings)
    cancellations = Cancellations(database, hints, models, followers.publish_ended)
    hosts = Hosts(config.allowed_hosts)
    parts = Parts(
        database=database,
        submissions=submissions,
        branches=Branches(database),
        cancellations=cancellations,
        bulk=BulkActions(database, cancellations, submissions, models),
        calls=Calls(database, cancellations, grace_s=config.v1_grace_s, cancels=config.v1_client_gone == "cancel"),
        attachments=AttachmentReader(),
        live=live,
        followers=followers,
        readiness=ReadinessCheck(database, redis),
        sessions=Sessions(
            database,
            secret_key=config.secret_key,
            password_hash=config.admin_password_hash,
            poll_s=timings.session_poll_s,
            touch_s=timings.session_touch_s,
        ),
        passwords=Passwords(database, config.admin_password_hash, hosts),
        monitor=Monitor(config.redis_url, models, timeout_s=timings.redis_timeout_s),
        models=models,
        model_configs=config.models,
        redis=redis,
        record=record,
        forecasts=forecasts,
        max_wait=max_wait,
        hosts=hosts,
        restorable=timedelta(days=config.restore_days),
    )

    @asynccontextmanager
    async def opened() -> AsyncIterator[None]:
        database.open()
        parts.calls.start()
        try:
            yield
        finally:
            await parts.followers.close()
            await parts.calls.close()
            parts.passwords.close()
            await hints.close()
            await parts.monitor.close()
            await database.close()
            await redis.aclose()

    app = routes(config.cors_origins)
    guard = PrincipalGuard(config.api_token, parts.sessions)
    app.state.update({"parts": parts, "guard": guard, "opened": opened})
    return WebApp(app, parts, hsts=config.hsts)


def routes(cors_origins: Sequence[str]) -> Litestar:
    """All routes. `create_app` puts into the application's state what they work with: `parts`, `guard` and `opened`, a
    context in which the parts are open."""
    api = [
        Jobs,
        ConversationList,
        NamedImport,
        Conversations,
        BranchesOfConversation,
        BranchesOfJob,
        Events,
        Models,
        Legacy,
    ]
    v1 = [ChatCompletions, Responses, OpenAIModels]
    pages = [
        *(NewChatPage, JobsPage, JobPage, DraftPage, ConversationsPage, ConversationPage, BranchForms),
        *(AttachmentsPage, StatusPage, StreamPage, LoginPage, LogoutPage, LookPage, OfflinePage, DocsPage, MonitorPage),
    ]
    return Litestar(
        route_handlers=[
            Router("/api", route_handlers=api, security=[{"bearer": []}, {"token": []}, {"session": []}]),
            Router("/chat/api", route_handlers=api, include_in_schema=False),
            Router("/v1", route_handlers=v1, security=[{"bearer": []}, {"token": []}, {"session": []}]),
            Router("/chat/v1", route_handlers=v1, include_in_schema=False),
            Probes,
            front_door,
            Router(
                "/chat", route_handlers=[*pages, html.asset], include_in_schema=False, before_request=sidebar.read_chats
            ),
        ],
        guards=[_authenticate],
        template_config=html.template_config(),
        request_class=AppRequest,
        middleware=[restore_slashes],
        request_max_body_size=MAX_BODY_BYTES,
        exception_handlers={
            LoginNeeded: answer_login_needed,
            StaleForm: answer_stale_form,
            SessionUnreadable: answer_session_unreadable,
            LlamalithError: html.answer_own_error,
            HTTPException: html.answer_litestar_error,
            Exception: html.answer_unexpected_error,
        },
        cors_config=CORSConfig(
            allow_origins=list(cors_origins),
            allow_methods=["GET", "POST", "PATCH", "DELETE"],
            allow_headers=[
                "Authorization",
                "Content-Type",
                "X-API-Token",
                "X-Request-ID",
                "Last-Event-ID",
                "Idempotency-Key",
            ],
            expose_headers=["X-Request-ID", "Retry-After"],
        )
        if cors_origins
        else None,
        openapi_config=OpenAPIConfig(
            title="Llamalith",
            version=__version__,
            description="A durable queue for local language models. The same API stands under /api and /chat/api.",
            path="/api/openapi.json",
            render_plugins=[ExactDocument(path="/")],
            components=Components(
                security_schemes={
                    "bearer": SecurityScheme(type="http", scheme="bearer"),
                    "token": SecurityScheme(type="apiKey", name="X-API-Token", security_scheme_in="header"),
                    "session": SecurityScheme(
                        type="apiKey",
                        name=COOKIE,
                        security_scheme_in="cookie",
                        description=f"Over https __Host-{COOKIE}.",
                    ),
                }
            ),
        ),
        plugins=[problems.InDocument()],
        lifespan=[_opened],
        logging_config=None,
        debug=False,
    )


async def _authenticate(connection: ASGIConnection[Any, Any, Any, Any], handler: BaseRouteHandler) -> None:
    await connection.app.state.guard(connection, handler)


@asynccontextmanager
async def _opened(app: Litestar) -> AsyncIterator[None]:
    async with app.state.opened():
        yield


def create_server(
    config: Config,
    *,
    host: str = "127.0.0.1",
    port: int = 0,
    timings: Timings = TIMINGS,
    follow_timings: follow.Timings = follow.TIMINGS,
) -> Server:
    """An HTTP server for the application. `port` 0 takes any free one. Raises what `create_app` raises."""
    app = create_app(config, timings, follow_timings=follow_timings)
    settings = uvicorn.Config(
        app,
        http=Protocol,
        ws="none",
        host=host,
        port=port,
        proxy_headers=bool(config.trusted_proxies),
        forwarded_allow_ips=list(config.trusted_proxies),
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_keep_alive=IDLE_S,
        # Otherwise an open connection would keep the process alive for ever.
        timeout_graceful_shutdown=5,
    )
    return Server(settings, app.end_streams)
