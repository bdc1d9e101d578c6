"""The typed client of a cascade (`services.client.client`) and the `asd` command (`services.client.cli`).

Nothing is imported here, so that `asd --help` stays fast.
"""
