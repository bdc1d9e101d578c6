"""The name of services.scaler until 0.2: `python -m services.manager` goes on to start it."""
