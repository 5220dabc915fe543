"""The engine's side: the step loop, what it takes in, and grammars."""
