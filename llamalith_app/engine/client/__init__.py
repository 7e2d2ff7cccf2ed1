"""What the worker holds of an engine."""
