"""The slow and readable definitions, in numpy float32: specification, fallback and judge of every fast kernel."""
