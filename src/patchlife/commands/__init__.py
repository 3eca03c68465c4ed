"""The verbs of the command line, one file each; what they do can be called from Python too."""
