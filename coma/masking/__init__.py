"""Which parts of an image a view sees: units, partitions, and nothing about models."""
