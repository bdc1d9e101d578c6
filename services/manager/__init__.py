"""The old name of services.scaler, until 0.2: `python -m services.manager` still starts it."""
