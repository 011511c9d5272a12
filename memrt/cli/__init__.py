"""The command line: one module a command, found by `memrt.cli.main`."""
