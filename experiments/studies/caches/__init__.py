"""Which eviction policies find what."""
