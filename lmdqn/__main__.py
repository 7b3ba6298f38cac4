"""`python -m lmdqn`."""

from lmdqn.cli import main

if __name__ == "__main__":
    main()
