"""smollm2: a real language model from a package; see README.md."""
