"""A model directory as files: what can be told of it before torch is loaded, and its tokenizer.

Nothing here imports torch at module level: a server's supervisor checks a directory in milliseconds.
"""
