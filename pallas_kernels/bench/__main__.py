import sys

from pallas_kernels.bench.command import main

sys.exit(main())
