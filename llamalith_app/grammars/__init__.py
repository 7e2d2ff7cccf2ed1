"""What a reply may be held to: GBNF and JSON Schema."""
