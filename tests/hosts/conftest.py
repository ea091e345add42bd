"""Lets these tests import what tests of disturbed runs share."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parent.parent / "e2e"))
