"""Planning: which stage is called next, and whether there is capacity for a request."""
