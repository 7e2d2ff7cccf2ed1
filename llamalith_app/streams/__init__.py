"""A job's events and progress over Redis."""
