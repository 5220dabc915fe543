"""Reports: a pure function of the files that a run left. Imports nothing else of this project."""
