"""One script per table; results are kept in benchmarks/results."""
