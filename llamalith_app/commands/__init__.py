"""The commands of `llamalith`, one module each, loaded when asked for; each exposes `command`."""
