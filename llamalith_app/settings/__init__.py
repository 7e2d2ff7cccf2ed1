"""What a person sets: declared once, read from `config.json`, `.env` and the environment, made into one `Config`."""
