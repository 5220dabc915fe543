"""The config: composed, checked, explained; the classes that it names."""
