"""What holds for all tests."""

from services.common.privacy import report_nothing

# Before a test's module imports a library that would report the test to its makers.
report_nothing()
