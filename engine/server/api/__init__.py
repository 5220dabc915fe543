"""What HTTP means: bodies become requests, and what comes of them becomes answers."""
