"""`python -m dpe_cli` is `dpe`."""

from dpe_cli.commands.entry import run

if __name__ == "__main__":
    run()
