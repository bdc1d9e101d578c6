"""Which stage is asked next, and whether there is room for a request."""
