"""The `asd` command: its commands are in services.cli.commands.

Nothing is imported here, so that `asd --help` stays fast.
"""
