"""The benchmark: how far every norm is from the memory's limit, and from every peer."""
