"""Runs services.scaler under its old name, for one release."""

from services.common.privacy import report_nothing
from services.scaler.__main__ import main as run_scaler


def main() -> None:
    """Read the settings and serve."""
    report_nothing()
    run_scaler()


if __name__ == "__main__":
    main()
