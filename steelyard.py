"""``python -m steelyard`` is the command ``steelyard``. The library is in ``traces``, ``loadgen`` and ``advisor``."""

from advisor.cli import main

if __name__ == "__main__":
    main()
