"""The engine: tokens in, tokens out, in a child process that knows nothing of jobs, HTTP, Redis or SQL."""
