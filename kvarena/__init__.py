"""kvarena: compare KV-cache strategies for LLM inference on one engine, and serve the winner."""
