"""The command line `accent-plugin`."""
