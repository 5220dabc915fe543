"""What `kvarena serve` adds to the main job: flags, the served engine, and a server whose engine computes nothing."""
