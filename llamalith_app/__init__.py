"""Llamalith: a durable queue for local language models.

The map:

    app.py           the web's composition root: create_app(config), and create_server(config)
    cli.py           the `llamalith` command; commands/ has a module for each subcommand
    commands/        up, web, worker, migrate, init, check, backup, restore, healthcheck, config, hash-password
    errors.py        one error tree, with what HTTP says of each
    files.py         reads regular files only, and no more of them than is allowed
    logs.py          structured logs, and what a command says
    settings/        declaration: every setting, once; load: config_file and environment, merged by sources, become one
                     config; ranges, formats, validation, messages: limits and their words; paths, models,
                     secret_checks, strength
    contracts/       the shapes of everything that crosses a wire
    web/             what HTTP needs and no route owns: server (uvicorn with bounds), envelope, request, request_log,
                     problems, paths, openapi, readiness; html, sidebar, zone, visible, charts and curl for pages;
                     follow (a job's events), transcript (pure) and sse (their format) for streams, lane for a
                     conversation's, merge for several as one; live for progress; markdown with markdown_rules (text to
                     clean HTML), markdown_stream (block by block, pure) and reply_blocks (a job's events as a page
                     reads them); download, a conversation as a file; openai/ and openai_errors: what OpenAI clients
                     ask (asked) and get (told, answers; responses has both)
    controllers/     thin HTTP and nothing else: API, events, probes; v1/ for OpenAI clients; pages/ has a controller
                     for each page
    guards/          who may come in: token or session, where a browser comes from, under which Host, passwords
    jobs/            the queue: submit, schemas, cancel, calls (whose clients wait), branches, bulk (all that match),
                     order (pure), forecast, queue (sole speaker of SAQ), monitor, wishes (load or unload a model);
                     timeline and statistics (pure)
    jobs/worker/     the worker's side: run (from its start to the signal that ends it), process (its composition root),
                     dispatch (who gets a place), pool and placement (which models are loaded: done and decided),
                     attempt, running and settle (one attempt: run, its state, what came of it), shape (what the engine
                     is asked), sweep, task_mirror, memory, speeds, tasks
    engine/          the process that holds a model: child (its threads), loop (plan -> evaluate -> apply), scheduler,
                     sequence, prefill_budget, runner with loader and sampler behind runner_protocol; chat (a
                     conversation as prompt tokens), typed (what people type is text), template with template_program
                     and forms, fallback (formats of files without one), reasoning (markers around thinking), reply
                     (taken apart by them), thinking (token by token), constraint (a grammar); frames; states of slots
                     on disk; gguf reads a file's header
    engine/client/   the worker's side of an engine: protocol (all that the worker knows of one), local (the child
                     process), factory and plan (which engine a model gets, and what it needs)
    streams/         a job's events over Redis, kept for a while: wire (names and shapes), publisher, resume (where a
                     later attempt continues), subscriber; progress, live beside the record
    grammars/        what a reply may be held to: grammar (named ones, and JSON Schema as a grammar), gbnf; schema and
                     validation (programs of their own), subschemas, keywords (what cannot be enforced); the shipped
                     files
    attachments/     the text of files that people attach to a message: reader, and pdf (a program of its own)
    store/           the record: tables, the writer thread (database), turns and their digests, their tree (branches),
                     conversations as a whole (conversations reads one; conversation_list, conversation_changes, search,
                     transfer: export and import; titles), invariants (check), migrations/; its id (record), users,
                     idempotency keys (keys), workers, sessions, rate limits of logins, backup, retention
    store/jobs/      a job in the record: submission makes it, transitions change it, leases and waiting say who runs it
                     and what may start, reads is what clients see, details all of one, listing and statistics what
                     pages show of many; statements that several of them use
    supervise/       up: the whole product on one machine; valkey: the embedded one; pidfile: a pid that proves itself
                     by a lock; parent: a child ends with its parent; signals: which ones ask a process to end; tasks:
                     how those of an event loop are ended;
                     program runs programs of ours on malicious input, limits is how they limit themselves

Beside the package: templates/ and static/, the pages as HTML, stylesheets, and JavaScript modules that app.js starts,
one concern each. static/katex/ is KaTeX as published, and is loaded when a page has a formula.

Four routes to keep short:

- A prompt: guards -> controllers -> jobs/submit -> store/jobs/submission -> store/turns -> commit -> hint (jobs/queue),
  and from there jobs/worker/dispatch -> jobs/worker/pool -> store/jobs/transitions.claim -> jobs/worker/attempt ->
  store/turns -> engine/client/local -> engine/child -> engine/loop -> engine/scheduler -> engine/runner. Its reply goes
  back to jobs/worker/attempt -> jobs/worker/settle -> store/jobs/transitions.finish -> store/turns.
- A token: engine/runner -> engine/scheduler.apply -> engine/text -> a frame -> engine/client/local
  -> jobs/worker/attempt -> streams/publisher, which encodes it -> Redis -> streams/subscriber -> web/follow and
  transcript -> web/sse -> the reader.
- A page: guards (session) -> controllers/pages -> store, web/live -> templates; static/live-list.js polls its
  lists, and static/list-renderer.js renders what changed. What is written meanwhile comes by one stream for all windows
  of a browser: controllers/pages/stream -> static/shared-worker.js with hub.js -> stream.js of each window.
- A setting: settings/declaration -> load() -> create_app, the worker or a command -> the constructor that needs it.

Direction: controllers -> submit -> store <- worker -> engine; pyproject.toml has the layers, contracts, settings and
errors at the bottom.
"""

__version__ = "0.1.0"
