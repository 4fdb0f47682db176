"""`python -m attnrewrite` is the command `attnrewrite`."""

from attnrewrite.cli import main

if __name__ == "__main__":
    main()
