"""Run `python -m util.data.native`. This old name stays for one release."""

from util.data.native.__main__ import main

if __name__ == "__main__":
    raise SystemExit(main())
