"""Run the command line as ``python -m latentindigo``."""

from latentindigo.cli import main

if __name__ == "__main__":
    main()
