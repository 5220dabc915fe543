"""Images of chats: where they come from, what is taken, and what the engine gets of them."""
