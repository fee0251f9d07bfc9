import sys

from train.reports.report import main

sys.exit(main())
