"""When requests arrive, and who hands them over when they are due: to an engine in this process, or over HTTP."""
