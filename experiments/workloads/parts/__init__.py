"""What workloads are made of: requests, lengths, seeds, readers of traces."""
