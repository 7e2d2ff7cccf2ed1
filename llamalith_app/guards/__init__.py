"""Who may come in. Closed unless a route says that it is open; a guard knows credentials and nothing of jobs."""
