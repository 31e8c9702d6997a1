"""SAE-Bench's figures of several SAEs, each pass of the language model made once."""
