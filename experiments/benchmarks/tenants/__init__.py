"""What each client of a server gets beside others (`kvarena benchmark fairness`)."""
