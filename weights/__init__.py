"""Weights that travel with the package as dpe_cli.pretrained; an editable install finds the folder by this file."""
