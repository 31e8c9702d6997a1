"""The built-in language model: corpus, labelled tasks, training script and weights."""
