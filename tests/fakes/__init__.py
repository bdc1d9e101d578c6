"""Stand-ins for the GPU libraries: their signatures and behaviours, over the embedded models on the CPU."""
