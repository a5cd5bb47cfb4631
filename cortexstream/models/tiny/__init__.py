"""The embedded model: a small Llama checkpoint and its tokenizer, in the files that Hugging Face uses."""
