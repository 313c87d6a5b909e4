"""Messages, tool calls and phrases: what a conversation says, before any tokenizer has seen it."""
