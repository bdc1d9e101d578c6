"""What the GPU engines take, on models of the true shapes: `python -m benchmarks.gpu`."""
