"""The network of a sandbox that has none: what the broker connects for it, as its policy names."""
