"""How it is carried: connections, pages, and the way to the engine's process."""
