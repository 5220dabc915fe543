"""Pages, tables and figures, and what is drawn from one run's own files."""
