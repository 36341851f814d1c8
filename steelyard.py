"""``python -m steelyard`` is the command ``steelyard``. The library is in ``traces``, ``loadgen`` and ``advisor``."""

import signal


def main() -> None:
    """Run the command. Until it has been loaded there is nothing to save: Ctrl-C ends it without a traceback."""
    before = signal.signal(signal.SIGINT, signal.SIG_DFL)
    from advisor.cli import main as run

    signal.signal(signal.SIGINT, before)
    run()


if __name__ == "__main__":
    main()
