"""Command-line tools: the demonstration, videos from text, and training of the small model."""
