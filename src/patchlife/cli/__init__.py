"""The command line ``patchlife VERB ...``: `main.py` has the table of verbs; each verb is a module with its name."""
