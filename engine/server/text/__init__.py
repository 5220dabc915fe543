"""Text and tokens: tokenizing, detokenizing, stop strings, tool calls."""
