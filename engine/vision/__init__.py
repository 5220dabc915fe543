"""Images: cut into tiles, encoded by a vision tower, and put where the prompt has placeholders."""
