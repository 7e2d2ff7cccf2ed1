"""The whole product on one machine, and what every process of it needs to start and end."""
