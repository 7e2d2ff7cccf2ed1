"""Runs the whole product on one machine (`up`), and holds what its processes need to start and stop."""
