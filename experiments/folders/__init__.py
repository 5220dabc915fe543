"""Run folders: whose they are, whether they are finished, and by which code."""
