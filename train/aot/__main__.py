import sys

from train.aot.command import main

if __name__ == "__main__":
    sys.exit(main())
