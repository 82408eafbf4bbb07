"""Opaque ops over x: each a primitive with its XLA form and its rules for AD, batching and partitioning."""
