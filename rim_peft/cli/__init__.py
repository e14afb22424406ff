"""The command line: one file per command, which parses arguments, calls one function and prints."""
