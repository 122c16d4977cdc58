"""`python -m normfuse` is the command `normfuse`."""

import sys


def main() -> int:
    """Run the command line; also Ctrl-C while it is still being read, which takes a moment, gives no traceback."""
    try:
        from normfuse import cli

        return cli.main()
    except KeyboardInterrupt:
        print("normfuse: interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
