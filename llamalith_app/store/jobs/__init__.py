"""Jobs and their attempts in the record."""
