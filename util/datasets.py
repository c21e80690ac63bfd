"""The old name of python -m util.data, for one release."""

from util.data.__main__ import main

if __name__ == "__main__":
    raise SystemExit(main())
