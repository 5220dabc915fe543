"""What a server records: noted in the engine's process, kept and written by another one."""
