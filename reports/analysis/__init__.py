"""What one run's numbers say."""
