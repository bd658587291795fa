"""Command-line flags: the types of their values."""

import argparse


def named(text: str) -> tuple[str, str]:
    """The type of flags that give a name to something: `NAME=VALUE`."""
    name, _, value = text.partition("=")
    if not (name and value):
        raise argparse.ArgumentTypeError(f"must be NAME=VALUE, but is {text!r}")
    return name, value
