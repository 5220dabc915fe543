"""What every process of a server knows: settings, errors, messages, metrics."""
