"""`python -m causalprune` is the command `causalprune`."""

from causalprune.cli import main

if __name__ == "__main__":
    main()
