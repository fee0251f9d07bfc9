import sys

from dsa_jax.demo.command import main

sys.exit(main())
