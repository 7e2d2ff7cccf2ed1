"""Alembic's folder: `env.py` runs them, `versions/` holds one file a change of the schema."""
