"""Many replicas and many cards: what routers find, how models scale, and how far off their step times are."""
