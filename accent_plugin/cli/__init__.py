"""The command line: accent-plugin VERB."""
