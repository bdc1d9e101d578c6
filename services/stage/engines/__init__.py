"""What runs models: the protocol of an engine, its conformance suite, and one folder for each engine."""
