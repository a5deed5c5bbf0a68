"""Run every benchmark, or those that are named: python -m benchmarks [NAME...]. Each in a process of its own."""

import subprocess
import sys
from pathlib import Path

TOOLS = {"__init__", "__main__", "harness"}


def main():
    names = sys.argv[1:] or sorted(path.stem for path in Path(__file__).parent.glob("*.py") if path.stem not in TOOLS)
    failed = [name for name in names if subprocess.run([sys.executable, "-m", f"benchmarks.{name}"]).returncode]
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
