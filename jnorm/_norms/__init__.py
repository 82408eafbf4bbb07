"""One file a norm: its state, its map, its function."""
