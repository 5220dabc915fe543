"""Papers' figures and claims, found again."""
