"""The `asd` command (`services.client.commands`), and what runs a cascade on one machine.

Nothing is imported here, so that `asd --help` stays fast.
"""
