"""The command line's entry: also while it is loaded, Ctrl-C is answered in one line."""

from __future__ import annotations

import sys

from autofit.interrupts import INTERRUPTED


def main() -> None:
    try:
        from autofit import cli

        cli.main()
    except KeyboardInterrupt:
        sys.stderr.write("autofit: interrupted\n")
        sys.exit(INTERRUPTED)


if __name__ == "__main__":
    main()
