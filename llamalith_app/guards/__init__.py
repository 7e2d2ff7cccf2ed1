"""Authentication. Every route is closed unless it is marked open. Guards know credentials and nothing about jobs."""
