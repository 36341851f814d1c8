"""``python -m advisor`` is ``steelyard``."""

from advisor.cli import main

main()
