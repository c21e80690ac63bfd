"""Run `python -m evidence`. This old name stays for one release."""

import runpy

if __name__ == "__main__":
    runpy.run_module("evidence", run_name="__main__", alter_sys=True)
