"""The command line: `python -m mhc_lightning <command> --config PATH_OR_NAME [key=value …]`.

Modules here import torch and Lightning inside functions only, so that help and argument errors
come at once.
"""
