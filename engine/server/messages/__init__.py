"""What `/v1/messages` means: a translation of its blocks onto a chat, and of a chat's answer onto its events."""
