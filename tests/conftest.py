"""What holds for all tests."""

import os

from services.common.privacy import report_nothing

# One thread for each test process and what it starts, set before numpy is imported. The pools' threads spin
# while they wait for one another: where tests share the cores, small matrices take fifty times as long.
os.environ |= {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}

# Before a test's module imports a library that would report the test to its makers.
report_nothing()
