"""``python -m tokensel``."""

from tokensel.cli import main

if __name__ == "__main__":
    main()
