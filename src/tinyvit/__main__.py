"""``python -m tinyvit`` is the same as ``tinyvit``."""

from tinyvit.cli.main import main

if __name__ == "__main__":
    main()
