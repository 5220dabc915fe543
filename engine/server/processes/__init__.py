"""What is started, watched and drained: the supervisor and its fronts."""
