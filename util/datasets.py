"""Run `python -m util.data`. This old name stays for one release."""

from util.data.__main__ import main

if __name__ == "__main__":
    raise SystemExit(main())
