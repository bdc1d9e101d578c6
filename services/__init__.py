"""The services of asd, their common code, the `asd` command and the launcher of local cascades."""
