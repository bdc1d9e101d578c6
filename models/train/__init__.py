"""How the embedded family was made. Needs torch and a GPU: see `make models`."""
