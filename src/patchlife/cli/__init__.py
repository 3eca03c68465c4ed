"""The command line: option parsing, and one file for each verb."""
