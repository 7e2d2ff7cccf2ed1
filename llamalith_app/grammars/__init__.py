"""Grammars that hold a reply to a form: GBNF, and JSON Schema with the validation of what a grammar cannot enforce."""
