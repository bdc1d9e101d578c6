"""The stage service: one model, or several under a memory budget, behind gRPC."""
