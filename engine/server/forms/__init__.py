"""How models write thoughts and tool calls, and the parsers that follow an answer in each form."""
