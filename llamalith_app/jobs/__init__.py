"""From an accepted prompt to a stored reply. Imports nothing here, so that the web loads only `submit`."""
