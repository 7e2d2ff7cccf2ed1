"""Jobs and attempts in the record."""
