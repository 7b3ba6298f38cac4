"""The command line: `lmdqn COMMAND --help` says what each command takes. A file a family of commands."""

from lmdqn.cli.app import main

__all__ = ["main"]
