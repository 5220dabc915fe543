"""What several runs' numbers say beside each other."""
