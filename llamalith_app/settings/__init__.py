"""What a person sets: the environment and `config.json`."""
