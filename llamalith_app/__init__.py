"""Llamalith: a durable queue for local language models.

The map:

    app.py           the web's composition root: create_app(config)
    cli.py           the `llamalith` command; commands/ has a module for each subcommand
    commands/        up, web, worker, migrate, init, check, backup, restore, healthcheck, config, hash-password
    config.py        every setting; the only reader of the environment
    config_file.py   judges a config.json
    contracts/       the shapes of everything that crosses a wire
    controllers/     thin HTTP: API, events (follow, transcript), probes; pages/ has a controller for each page;
                     problems, envelope and the request log
    engine/          the child process that holds a model: plan -> evaluate -> apply; states on disk, and what a
                     GGUF's header tells
    errors.py        one error tree, with what HTTP says of each
    files.py         reads regular files only, and no more of them than is allowed
    gbnf.py          GBNF, written anew for llguidance
    grammar.py       what a reply may be held to: named grammars, found at start, and JSON Schemas; with which bounds
    grammars/        those that are shipped
    guards/          who may come in: token or session, where a browser comes from, under which Host, passwords
    jobs/            from an accepted prompt to a stored reply: submit, schemas, cancel, queue, generate, shape, reply,
                     pool, memory, order, forecast, speeds, sweep, worker; and what SAQ's monitor shows
    keywords.py      keywords of JSON Schema: which are notes, and which cannot be enforced while a reply is written
    logs.py          structured logs, and what a command says
    parent.py        a child ends with its parent, and holds nothing of its parent's
    pidfile.py       a pid that proves itself by a lock
    progress.py      live progress beside the record
    ranges.py        what sampling may be set to, and how people are told
    signals.py       which signals ask a process to end
    schema.py        judges a JSON Schema, as a program of its own
    server.py        uvicorn, with bounds on what a connection may take
    store/           the record: tables, the writer thread, transitions (jobs) and what people read of them (job_reads),
                     invariants, migrations; what it is called beside others (record), answers that are given again
                     (keys), whole copies (backup), what is not kept (retention)
    strength.py      how many guesses a secret withstands
    streams.py       a job's events by Redis: written, told, kept for a while
    up.py            the whole product on one machine
    validation.py    validates a whole reply against its schema, as a program of its own
    valkey.py        the embedded Valkey

Beside the package: templates/ and static/, the pages as HTML, one stylesheet, and JavaScript modules that app.js
starts, one concern each.

Four routes to keep short:

- A prompt: guards -> controllers -> jobs/submit -> store/jobs.submit -> commit -> hint (jobs/queue), and from there
  jobs/generate -> jobs/pool -> store/jobs.claim -> engine -> store/jobs.finish.
- A token: engine/runner -> engine/scheduler.apply -> engine/text -> a frame -> engine/process -> jobs/generate
  -> streams.Writer -> streams.Teller -> Redis -> streams.Hearing -> controllers/follow -> controllers/events
  -> the reader.
- A page: guards (session) -> controllers/pages -> store, controllers/live -> templates; static/live-list.js polls its
  lists, and static/list-renderer.js renders what changed.
- A setting: config.load() -> create_app, Worker or a command -> the constructor that needs it.

Direction: controllers -> submit -> store <- generate -> engine; contracts, errors and config are leaves.
"""

__version__ = "0.1.0"
