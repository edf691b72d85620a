"""``python -m metal_marlin``: the command line."""

from metal_marlin.cli import main

if __name__ == "__main__":
    main()
