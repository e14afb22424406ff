"""``python -m tests.engines ADAPTER``: how many answers of each engine are the adapter's own."""

import sys

from tests.engines.answering import main

sys.exit(main())
