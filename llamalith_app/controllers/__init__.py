"""Thin HTTP: each handler turns a contract into a call and the result into a contract."""
