"""The worker's side of an engine: the protocol that every kind of engine speaks, and the kinds there are."""
