"""The old name of services.scaler: `python -m services.manager` still starts it in 0.2."""
