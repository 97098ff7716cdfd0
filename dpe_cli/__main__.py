"""`python -m dpe_cli` is `dpe`."""

from dpe_cli.main import cli

if __name__ == "__main__":
    cli(prog_name="dpe")
