"""What a prefix cache was asked for, and what the best one would have found."""
