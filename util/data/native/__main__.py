"""Build the native library, or say whether it is there.

python -m util.data.native build
python -m util.data.native status
"""

import argparse
import sys

from util.data import native


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m util.data.native", description=__doc__.partition("\n")[0]
    )
    parser.add_argument("command", choices=("build", "status"))
    command = parser.parse_args(argv).command
    try:
        if command == "build":
            native.build()
    except ValueError as error:
        parser.exit(2, f"{error}\n")
    native.forget()
    print(f"{native.LIBRARY}: {native.describe()}" if native.library() else native.describe())
    return int(native.library() is None)


if __name__ == "__main__":
    sys.exit(main())
