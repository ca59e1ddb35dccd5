"""For every test: one thread. The nets are tiny, and processes of two threads each fight over two cores."""

from __future__ import annotations

import os

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported, and for what the tests start
