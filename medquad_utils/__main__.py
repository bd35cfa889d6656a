"""The command ``medquad``, also as ``python -m medquad_utils``."""

import sys
from collections.abc import Sequence

from medquad_utils import STOPPED


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; Ctrl-C is one line even while Python still imports."""
    try:
        from medquad_utils import cli

        return cli.main(arguments)
    except KeyboardInterrupt:
        print(f"medquad: {STOPPED}", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
