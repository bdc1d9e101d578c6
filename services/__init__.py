"""The services of asd: router, stage, client and what they share."""
