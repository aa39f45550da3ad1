"""`python -m organseg` and the command `organseg`: one line for each error, and its exit code."""

import sys


def main() -> int:
    """Run the command line; returns the exit code."""
    from organseg.cli import run

    return run(sys.argv[1:])


if __name__ == "__main__":
    sys.exit(main())
