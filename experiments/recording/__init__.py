"""What a run leaves in its folder: requests, steps, the KV map, where it comes from, whether it is finished."""
