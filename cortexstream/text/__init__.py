"""Strings to token ids and back: tokenizer, chat templates, incremental detokenisation, stop strings."""
