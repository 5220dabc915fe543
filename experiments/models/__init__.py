"""Makes model directories: the embedded demo model, trained, and real shapes without weights."""
