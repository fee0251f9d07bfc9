import sys

from dsa_jax.demo.demo import main

sys.exit(main())
