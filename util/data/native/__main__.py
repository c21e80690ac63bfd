"""Build the native library, or say whether it is there.

python -m util.data.native build
python -m util.data.native status
"""

import argparse
import sys

from util.data.native import bindings, compiler


def main(argv: list[str] | None = None) -> int:
    """Run a command; return 0 if the library can be used afterwards, and 1 otherwise."""
    description = __doc__.partition("\n")[0]
    parser = argparse.ArgumentParser(prog="python -m util.data.native", description=description)
    parser.add_argument("command", choices=("build", "status"))
    command = parser.parse_args(argv).command
    if command == "build":
        try:
            compiler.build()
        except ValueError as error:
            parser.exit(2, f"{error}\n")
    # The process may have looked for the library before it was built.
    bindings.forget()
    # Also after a build: the file may not load on this machine.
    if bindings.library() is None:
        print(bindings.describe())
        return 1
    print(f"{bindings.LIBRARY}: {bindings.describe()}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
