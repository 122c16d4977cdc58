"""Trust by fuzzing: random graphs whose norms and near misses are known by construction. See `tests.fuzz.__main__`."""
