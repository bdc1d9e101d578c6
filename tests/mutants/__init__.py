"""What the tests catch of the router's loop: mutants made by chance, and faults described in words.

    make mutants                                          # 200 random mutants of HEAD
    .venv/bin/python -m tests.mutants --commit bdf92a5    # the same of another revision
    .venv/bin/python -m tests.mutants.faults              # thirty faults; --commit as above

Each runs in a temporary clone of the revision, with that revision's tests and this environment: the checkout
is never changed. The files of the router's unit and integration rooms run, the quickest first. The first test
that fails ends a run; so does a time of several times what the unchanged code takes. Verdicts are kept under
build/mutants as they come, and the next run goes on from there. Figures are written to benchmarks/results:
mutants.json and faults.json, by revision.

cosmic-ray lists the mutations, of which a sample is drawn by seed: a place first, then one of its mutations.
mutmut was looked at: since version 3 it changes nothing outside functions, and it forks a process that has
loaded code and tests, which gRPC supports with restrictions only.
"""
