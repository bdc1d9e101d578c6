"""What holds for all tests."""

import os

from services.common.privacy import report_nothing

# Before a test's module imports a library that would report the test to its makers.
report_nothing()
# Threads of scikit-learn that wait for each other spin: where other programs have the cores, fitting a tree
# took minutes in place of seconds. With one thread it takes no longer on an idle machine.
os.environ.setdefault("OMP_NUM_THREADS", "1")
