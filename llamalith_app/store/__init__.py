"""The record: accepted jobs, their conversations and their results, in SQL. Knows nothing of Redis, HTTP or engines."""
