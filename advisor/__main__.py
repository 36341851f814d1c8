"""``python -m advisor`` is ``steelyard``."""

import signal

before = signal.signal(signal.SIGINT, signal.SIG_DFL)  # see steelyard.main

from advisor.cli import main  # noqa: E402

signal.signal(signal.SIGINT, before)
main()
