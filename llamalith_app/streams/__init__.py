"""A job's events and progress over Redis: the worker publishes, the web subscribes."""
