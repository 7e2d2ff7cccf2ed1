"""The record: what was accepted and what became of it. SQL alone; knows nothing of Redis, HTTP or engines."""
