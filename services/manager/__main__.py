"""Runs services.scaler under its old name, for one release."""

from services.scaler.__main__ import main

if __name__ == "__main__":
    main()
