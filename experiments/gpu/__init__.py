"""What runs on a machine that has a GPU and little else: shapes, engines, device timing, and cells measured there."""
