"""The subcommands of `llamalith`, one module each, which exposes `command`. A module is imported when it is called."""
