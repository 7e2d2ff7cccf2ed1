"""What HTTP needs and no route owns."""
