"""What `/v1/responses` means: a translation of its items onto a chat, and of a chat's answer onto its events."""
