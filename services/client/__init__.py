"""The typed client of a cascade (`services.client.client`), and `asd` (`services.client.commands`).

Nothing is imported here, so that `asd --help` stays fast.
"""
