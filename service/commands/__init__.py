"""The commands of `loraplex`, one concept per file; service/cli.py lists them. A module is imported when its command is
used, and imports what is slow (the client, rich) when it runs."""
